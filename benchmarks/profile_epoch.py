"""Where an epoch's time goes, and that no Python function is called once a user, item or edge.

    python benchmarks/profile_epoch.py --dataset=ml-100k --preset=best --text_source=raw

Profiles one epoch of training and one validation of GaCLLM with cProfile, after an epoch that is
not counted, and prints the functions that took most time with their calls a batch. Any key of a run
is a flag. ``text_source=raw`` needs no LLM; what the texts say does not change what a step costs.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import recbole_gacllm  # noqa: F401, I001
import torch
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed
from recbole_gacllm.run_config import build_config

N_FUNCTIONS = 15


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dataset = next((a.split("=")[1] for a in sys.argv if a.startswith("--dataset=")), "ml-100k")
    with tempfile.TemporaryDirectory() as scratch:
        keys = {"epochs": 2, "show_progress": False, "state": "ERROR", "checkpoint_dir": scratch}
        config = build_config("GaCLLM", dataset, config_dict=keys)
        init_seed(config["seed"], True)
        train, valid, _ = data_preparation(config, create_dataset(config))
        model = get_model("GaCLLM")(config, train._dataset).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], "GaCLLM")(config, model)

        def epoch(number: int) -> None:
            trainer._train_epoch(train, number)
            trainer._valid_epoch(valid)

        epoch(0)
        start = time.perf_counter()
        epoch(1)
        seconds = time.perf_counter() - start
        profile = cProfile.Profile()
        profile.runcall(epoch, 2)
    n_batches = len(train) + len(valid)
    print(
        f"{dataset}: {model.n_users - 1} users, {model.n_items - 1} items, "
        f"{len(train._dataset)} training edges; {len(train)} batches of training, {len(valid)} of "
        f"validation; {seconds:.2f} s without the profiler"
    )
    table = pstats.Stats(profile, stream=io.StringIO()).stats  # type: ignore[attr-defined]
    rows = [
        (own, n_calls, f"{Path(file).name}:{line}({name})" if line else name)
        for (file, line, name), (_, n_calls, own, _, _) in table.items()
    ]
    print(f"\n{'own s':>7} {'calls':>8} {'a batch':>8}  function")
    for own, n_calls, name in sorted(rows, reverse=True)[:N_FUNCTIONS]:
        print(f"{own:7.3f} {n_calls:8d} {n_calls / n_batches:8.1f}  {name}")
    python = [row for row in rows if ":" in row[2]]
    _, n_calls, name = max(python, key=lambda row: row[1])
    print(
        f"\nThe Python function called most: {name}, {n_calls} times, "
        f"{n_calls / n_batches:.1f} a batch."
    )


if __name__ == "__main__":
    main()
