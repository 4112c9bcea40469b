"""What ``propagate_every`` costs in accuracy and what it saves in time.

    python benchmarks/propagation.py --dataset=ml-1m --data_path=DIR --json=figures.json
    python benchmarks/propagation.py --dataset=synthetic --json=figures.json

For each value of the key and each seed, the ``best`` preset without text and linear model (SSM,
two layers, width 64, batches of 2,048) trains for ``--epochs`` epochs; the best NDCG@10 on
**validation** and the processor seconds of an epoch (one thread, validation not counted) are
written. The test split is never looked at. The file is written after every epoch, and a second
call with the same file goes on with the runs that it lacks.

``--dataset=synthetic`` draws the graph of ``training.py`` (200,000 users, 100,000 items,
10,000,000 edges). Each value has a process of its own, which loads the data, builds the model,
trains ``--steps`` batches, and evaluates 4,000 users: training edges per second (positive pairs
that have passed through a step, from the first batch to the last optimiser step; the shuffle of the
epoch before it is told apart), by the wall clock and, for a machine that does something else too,
by the processor's; seconds, and peak memory of the process.
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
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.training import Side, machine, peak_of_this_process, write_synthetic

NO_TEXT = {"use_text": False, "linear_weight": 0.0, "linear_text_weight": 0.0}


def accuracy(
    arguments: argparse.Namespace, every: int, seed: int, save: Any, figures: dict[str, Any]
) -> None:
    """Train once; ``figures`` are filled and saved after every epoch."""
    keys = {"seed": seed, "epochs": arguments.epochs, "stopping_step": arguments.epochs}
    side = Side("GaCLLM_best", arguments, **NO_TEXT, **keys, propagate_every=every)
    trainer, train_epoch, seconds = side.trainer, side.trainer._train_epoch, []

    def timed_epoch(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        result = train_epoch(*args, **kwargs)
        seconds.append(time.process_time() - begin)
        return result

    trainer._train_epoch = timed_epoch
    scores: list[float] = []

    def validated(epoch: int, score: float) -> None:
        scores.append(score)
        figures.update(
            ndcg_at_10=max(scores),
            best_epoch=1 + scores.index(max(scores)),
            batches_per_epoch=len(side.train),
            cpu_seconds_per_epoch=round(statistics.median(seconds), 3),
            validation=scores,
        )
        save()

    trainer.fit(side.train, side.valid, saved=False, callback_fn=validated)
    figures["finished"] = True
    save()


class _FirstBatches:
    """The first batches of a loader, and when they began."""

    def __init__(self, loader: Any, steps: int) -> None:
        self.loader, self.steps = loader, steps

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        begin = time.perf_counter()
        first = next(batches)  # after the shuffle of all edges
        self.began, self.began_cpu = time.perf_counter(), time.process_time()
        self.shuffle_seconds = self.began - begin
        return chain([first], islice(batches, self.steps - 1))


def scale(arguments: argparse.Namespace, every: int) -> dict[str, Any]:
    """Rate and memory of this process on the synthetic graph."""
    begin = time.perf_counter()
    side = Side("GaCLLM_best", arguments, **NO_TEXT, propagate_every=every)
    load_seconds = time.perf_counter() - begin
    batches = _FirstBatches(side.train, side.steps)
    side.trainer._train_epoch(batches, 0)
    seconds = time.perf_counter() - batches.began
    cpu_seconds = time.process_time() - batches.began_cpu
    loaded_peak = peak_of_this_process()
    evaluation_seconds, metrics = side.evaluate()
    return {
        "propagate_every": every,
        "n_training_edges": len(side.train._dataset.inter_feat),
        "n_steps": side.steps,
        "edges_per_second": side.steps * side.config["train_batch_size"] / seconds,
        "edges_per_cpu_second": side.steps * side.config["train_batch_size"] / cpu_seconds,
        "seconds_per_step": seconds / side.steps,
        "shuffle_seconds": batches.shuffle_seconds,
        "load_and_build_seconds": load_seconds,
        "evaluation_seconds": evaluation_seconds,
        "validation": metrics,
        "peak_mib": {"loaded_and_trained": loaded_peak, "evaluated": peak_of_this_process()},
    }


def alone(arguments: argparse.Namespace, every: int) -> dict[str, Any]:
    """:func:`scale` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), f"--child={every}"]
    command += [f"--data_path={arguments.data_path}", f"--steps={arguments.steps}"]
    command += ["--dataset=synthetic"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs that the file lacks; returns those of the file."""
    content: dict[str, Any] = {
        "dataset": arguments.dataset,
        "epochs": arguments.epochs,
        "machine": machine({}),
        "runs": [],
    }
    path = Path(arguments.json) if arguments.json else None
    if path is not None and path.exists():
        content = json.loads(path.read_text())
    runs = content["runs"] = [run for run in content["runs"] if run["finished"]]

    def save() -> None:
        if path is not None:
            path.write_text(json.dumps(content, indent=2) + "\n")

    for seed in arguments.seeds if arguments.dataset != "synthetic" else [None]:
        for every in arguments.every:
            figures: dict[str, Any] = {"propagate_every": every, "seed": seed, "finished": False}
            if any(run["propagate_every"] == every and run["seed"] == seed for run in runs):
                continue
            runs.append(figures)
            if seed is None:
                figures.update(alone(arguments, every), finished=True)
                save()
            else:
                accuracy(arguments, every, seed, save, figures)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="ml-100k", choices=["ml-100k", "ml-1m", "synthetic"])
    parser.add_argument("--data_path", help="folder that holds the data set's folder")
    parser.add_argument("--json", metavar="FILE", help="write all figures, run by run")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 4, 16, 64], help="values")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2020])
    parser.add_argument("--epochs", type=int, default=40, help="of a run; none stops early")
    parser.add_argument("--steps", type=int, default=256, help="batches timed of the synthetic set")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        for name in ("data_path", "json"):
            if getattr(arguments, name):
                setattr(arguments, name, str(Path(getattr(arguments, name)).resolve()))
        if arguments.dataset == "synthetic" and not arguments.data_path:
            arguments.data_path = write_synthetic(Path(scratch) / "data", 10_000_000)
        arguments.scratch = scratch
        sys.argv = sys.argv[:1]  # RecBole reads the command line too
        os.chdir(scratch)  # and writes logs into the working folder
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        import torch

        torch.set_num_threads(1)
        if arguments.child:
            print(json.dumps(scale(arguments, arguments.child)))
            return
        runs = measure(arguments)
    for run in runs:
        shown = {
            name: value for name, value in run.items() if name not in ("validation", "finished")
        }
        print(json.dumps(shown))


if __name__ == "__main__":
    main()
