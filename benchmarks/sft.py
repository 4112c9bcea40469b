"""Held-out perplexity before and after fine-tuning, over seeds.

    python benchmarks/sft.py --dataset=ml-100k --seeds 2020 2021 2022 --json=sft.json

Runs RecBole's split and the stage `sft` of a run, with each seed: the split, the pairs and the
adapter are drawn with it. Perplexity is that of the completions of pairs of held-out training
edges, none of which is trained on. Keys of a run (`--preset=paper`,
`--llm_model=…`) may follow; what is finished in `artifact_dir` is not done again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from recbole_gacllm import pipeline
from recbole_gacllm.artifacts import manifests
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.inputs import TrainingData
from recbole_gacllm.run_config import build_config

LIBRARIES = ("torch", "transformers", "peft")
SHOWN = (
    "perplexity_before",
    "perplexity_after",
    "n_pairs",
    "n_heldout",
    "n_dropped",
    "n_steps",
    "n_tokens",
)


def tuned(dataset: str, keys: dict[str, Any]) -> tuple[dict[str, Any], GaCLLMConfig]:
    """The manifest of the stage `sft` of a run, and the run's keys."""
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import init_seed

    config = build_config("GaCLLM", dataset, config_dict=keys)
    init_seed(config["seed"], config["reproducibility"])
    train_data, _, _ = data_preparation(config, create_dataset(config))
    options = GaCLLMConfig.from_mapping(config.final_config_dict)
    data = TrainingData.from_recbole(config, train_data._dataset)
    manifest = manifests.read_manifest(pipeline._Hook(options, data).folders["sft"])
    assert manifest is not None
    return manifest, options


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2020, 2021, 2022])
    parser.add_argument("--json", type=Path, help="file for the figures")
    known, keys_of_run = parser.parse_known_args()
    command = " ".join(["python", "benchmarks/sft.py", *sys.argv[1:]])
    keys = dict(flag.removeprefix("--").split("=") for flag in keys_of_run)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    runs = []
    for seed in known.seeds:
        manifest, options = tuned(known.dataset, {"seed": seed, **keys})
        figures = {name: manifest[name] for name in SHOWN}
        ratio = manifest["perplexity_after"] / manifest["perplexity_before"]
        runs.append({"seed": seed, **figures, "ratio": ratio})
        print(json.dumps(runs[-1]))
    figures = {
        "command": command,
        "dataset": known.dataset,
        "keys": {
            name: getattr(options, name)
            for name in GaCLLMConfig.__dataclass_fields__
            if name.startswith("sft") or name in ("preset", "llm_model")
        },
        "dtype": manifest["key"]["dtype"],
        "runs": runs,
        **{
            name: {
                "mean": statistics.mean(run[name] for run in runs),
                "lowest": min(run[name] for run in runs),
                "highest": max(run[name] for run in runs),
            }
            for name in ("perplexity_before", "perplexity_after", "ratio")
        },
        "machine": {
            "processor": processor(),
            "n_threads": os.environ.get("OMP_NUM_THREADS"),
            "versions": {
                name: metadata.version(name) for name in ("torch", "transformers", "peft")
            },
        },
    }
    print(json.dumps(figures, indent=2))
    if known.json:
        known.json.parent.mkdir(parents=True, exist_ok=True)
        known.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
