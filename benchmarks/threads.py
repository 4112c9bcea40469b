"""Threads of training and evaluation: a number against one, alone and beside a busy process.

    python benchmarks/threads.py --json=threads.json
    python benchmarks/threads.py --dataset=ml-1m --data_path=DIR --steps=10 --json=threads.json

Each way of waiting in a process of its own: ``spinning`` (libgomp's default) and ``sleeping``
(``OMP_WAIT_POLICY=PASSIVE``, what the commands of this package set). In it one thread and
``--threads`` take turns; the ratio is seconds of many over those of one, so that below 1 many are
faster. ``others`` is how many cores were taken by all else meanwhile: "alone" is quiet only where
it is near 0, and beside one busy process at most 1 is ours. ``chosen`` is what a run would take.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import training  # type: ignore[import-not-found]

POLICIES = {"spinning": {}, "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"}}
BUSY = "while True: pass"


def busy_seconds() -> float:
    """Processor seconds that all processes of the machine have taken."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def measure(side: Any, n_threads: int) -> dict[str, float]:
    """An epoch, or its first steps, and an evaluation."""
    import torch

    torch.set_num_threads(n_threads)
    before, own, begin = busy_seconds(), time.process_time(), time.perf_counter()
    seconds = {"epoch": side.epoch(), "evaluation": side.evaluate()[0]}
    wall = time.perf_counter() - begin
    others = busy_seconds() - before - (time.process_time() - own)
    return {**seconds, "others": max(0.0, others) / wall}


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alone and beside a busy process, one thread and many by turns."""
    import torch

    from recbole_gacllm import model
    from recbole_gacllm.plugin import threads

    model.prepare = training.random_texts
    torch.set_num_threads(1)
    side = training.Side(arguments.child, arguments)
    seconds = threads.batch_seconds(side.config, side.model, side.train._dataset.inter_num)
    figures: dict[str, Any] = {"chosen": 1 if seconds < threads.SHORT else arguments.threads}
    for place in ("alone", "beside"):
        command = [sys.executable, "-c", BUSY]
        busy = subprocess.Popen(command) if place == "beside" else None
        try:
            measure(side, 1)
            rounds = [
                (measure(side, 1), measure(side, arguments.threads))
                for _ in range(arguments.repeats)
            ]
        finally:
            if busy is not None:
                busy.kill()
        figures[place] = {
            "epoch_ratio": _median(many["epoch"] / one["epoch"] for one, many in rounds),
            "evaluation_ratio": _median(
                many["evaluation"] / one["evaluation"] for one, many in rounds
            ),
            "epoch_seconds_of_one": _median(one["epoch"] for one, _ in rounds),
            "others": _median(each["others"] for both in rounds for each in both),
        }
    return figures


def _median(values: Any) -> float:
    return round(statistics.median(values), 3)


def main() -> None:
    """Measure and say."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default="ml-100k", choices=["ml-100k", "ml-1m"])
    parser.add_argument("--data_path", help="folder that holds the data set's folder")
    parser.add_argument("--sides", nargs="+", default=["GaCLLM_best", "LightGCN"])
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--steps", type=int, default=20, help="batches that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before PyTorch is imported
        sys.argv = sys.argv[:1]  # RecBole reads it
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        with tempfile.TemporaryDirectory() as arguments.scratch:
            os.chdir(arguments.scratch)
            print(json.dumps(child(arguments)))
        return
    given = [f"--dataset={arguments.dataset}", f"--threads={arguments.threads}"]
    given += [f"--steps={arguments.steps}", f"--repeats={arguments.repeats}"]
    if arguments.data_path:
        given.append(f"--data_path={Path(arguments.data_path).resolve()}")
    figures: dict[str, Any] = {}
    for side in arguments.sides:
        for name, policy in POLICIES.items():
            command = [sys.executable, str(Path(__file__).resolve()), f"--child={side}", *given]
            environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | policy
            run = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            figures[f"{side} {name}"] = json.loads(run.stdout.splitlines()[-1])
            print(f"{side} {name}:", json.dumps(figures[f"{side} {name}"]), flush=True)
    if arguments.json:
        shown = {key: getattr(arguments, key) for key in ("dataset", "threads", "steps", "repeats")}
        content = {**shown, "cores": os.cpu_count(), "figures": figures}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
