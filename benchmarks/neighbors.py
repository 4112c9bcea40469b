"""Which neighbours a prompt shows, and how many: tokens against validation NDCG@10.

    python benchmarks/neighbors.py --dataset=ml-100k --json=neighbors.json

Each variant is a whole run of ``KEYS`` (text in the embeddings) with one or two keys changed: the
number of neighbours (4, 8, 16) by rule (random, recent, rare_first), and the length limit of an
answer. The LLM is fine-tuned once. Every variant trains the recommender ``--n-seeds`` times, with
other initial weights and draws on the same split and the same texts, as RecBole alone cannot: its
seed is that of the split, too. The test split is not looked at. ``raw`` is the same recommender on
the raw texts alone, ``no_text`` without any.

A variant takes some minutes of one core. Texts are kept in ``--artifact-dir``, and ``--json`` is
written after each variant: started again, the script goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported

import pandas as pd

KEYS = {
    **{"preset": "paper", "loss_type": "SSM", "llm_n_layers": 1, "llm_max_new_tokens": 48},
    **{"sft_n_pairs": 128, "sft_n_heldout": 32},
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{rule}-{n}": {"neighbor_rule": rule, "n_neighbors": n}
    for rule in ("random", "recent", "rare_first")
    for n in (4, 8, 16)
}
VARIANTS |= {f"limit-{n}": {"llm_max_new_tokens": n} for n in (24, 96)}
VARIANTS |= {"raw": {"text_source": "raw"}, "no_text": {"use_text": False}}


class Recommender:
    """A variant's data, split by the default seed, and its model.

    Building the model makes the texts.
    """

    def __init__(self, variant: str, dataset: str, artifact_dir: Path, scratch: str) -> None:
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import get_model, init_seed

        from recbole_gacllm.run_config import build_config

        keys = {
            **KEYS,
            "artifact_dir": str(artifact_dir),
            "checkpoint_dir": scratch,
            "show_progress": False,
            "state": "WARNING",
            "valid_metric": "NDCG@10",
            **VARIANTS[variant],
        }
        self.config = build_config("GaCLLM", dataset, config_dict=keys)
        init_seed(self.config["seed"], True)
        self.train, self.valid, _ = data_preparation(self.config, create_dataset(self.config))
        self._model_class = get_model("GaCLLM")
        self.texts = self._model_class(self.config, self.train._dataset).texts

    def fit(self, seed: int) -> float:
        """Validation NDCG@10 of a training with a seed of its own, best epoch."""
        from recbole.utils import get_trainer, init_seed

        init_seed(seed, True)
        for generator in (self.train.generator, self.valid.generator):
            generator.manual_seed(seed)
        model = self._model_class(self.config, self.train._dataset).to(self.config["device"])
        trainer = get_trainer(self.config["MODEL_TYPE"], "GaCLLM")(self.config, model)
        best, _ = trainer.fit(self.train, self.valid, saved=False, show_progress=False)
        return float(best)

    def tokens(self) -> dict[str, Any]:
        """What the texts took and what became of them."""
        if self.texts is None or "descriptions" not in self.texts.run_files:
            return {}
        folder = self.texts.run_files["descriptions"]
        layer = pd.read_parquet(folder / "layer_1.parquet")
        made = json.loads((folder / "manifest.json").read_text("utf-8"))["layers"][0]
        asked = layer[layer.n_prompt_tokens > 0]
        tokens = asked.groupby("side")[["n_prompt_tokens", "n_output_tokens"]].mean().round(1)
        return {
            "prompt_tokens_per_description": round(asked.n_prompt_tokens.mean(), 1),
            "output_tokens_per_description": round(asked.n_output_tokens.mean(), 1),
            "tokens_per_description_by_side": tokens.to_dict("index"),
            "share_truncated": round(made["n_truncated"] / made["n_nodes"], 4),
            "share_failed": round(made["n_failed"] / made["n_nodes"], 4),
            "n_different_texts": int(layer.text.nunique()),
            "share_of_prompt_tokens_cached": round(
                made["n_cached_tokens"] / max(made["n_prompt_tokens"], 1), 4
            ),
        }


def measure(variant: str, known: argparse.Namespace) -> dict[str, Any]:
    """Everything about one variant."""
    with tempfile.TemporaryDirectory() as scratch:
        recommender = Recommender(variant, known.dataset, known.artifact_dir, scratch)
        started = time.perf_counter()
        seeds = range(recommender.config["seed"], recommender.config["seed"] + known.n_seeds)
        scores = [recommender.fit(seed) for seed in seeds]
    spread = statistics.stdev(scores) if len(scores) > 1 else math.nan
    return {
        **VARIANTS[variant],
        **recommender.tokens(),
        "ndcg@10_valid": round(statistics.mean(scores), 4),
        "standard_error": round(spread / math.sqrt(len(scores)), 4),
        "ndcg@10_valid_by_seed": scores,
        "training_seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--n-seeds", type=int, default=5, help="trainings of each variant")
    parser.add_argument(
        "--variants", default=",".join(VARIANTS), help=f"some of {', '.join(VARIANTS)}"
    )
    parser.add_argument("--artifact-dir", type=Path, default=Path("saved/gacllm"))
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    known = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole would read the rest
    chosen = known.variants.split(",")
    if unknown := set(chosen) - set(VARIANTS):
        parser.error(f"--variants: {', '.join(unknown)}; allowed are {', '.join(VARIANTS)}")

    figures: dict[str, Any] = {"dataset": known.dataset, "variants": {}}
    if known.json.is_file():
        figures = json.loads(known.json.read_text("utf-8"))
    for variant in chosen:
        done = figures["variants"].get(variant, {})
        if len(done.get("ndcg@10_valid_by_seed", [])) < known.n_seeds:
            figures["variants"][variant] = measure(variant, known)
            known.json.parent.mkdir(parents=True, exist_ok=True)
            known.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(variant, json.dumps(figures["variants"][variant]), flush=True)


if __name__ == "__main__":
    main()
