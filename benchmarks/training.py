"""Training and evaluation against RecBole 1.2.1's LightGCN as installed, as ratios.

    python benchmarks/training.py --dataset=ml-100k --json=ratios.json

One process, one thread, both sides by turns, medians. LightGCN is RecBole's own with RecBole's
loaders, sampler, trainer and evaluator; nothing but the repairs of ``compat.py`` touches them. Both
sides have the same embedding size, number of layers, batch size, optimiser and seed. The texts of
the ``best`` preset are random constants of the shape and precision that the encoder writes: what
they say does not change what a step costs, and no LLM is needed. ``--time_to_best`` also trains
both, each with its own learning rate, until early stopping, and takes the seconds of building and
training up to the best validation score. Where LightGCN takes hours, ``--time_limit`` trains it for
so many seconds with the fast paths, which give the same scores, and counts for each epoch up to its
best the seconds that an epoch and an evaluation take as installed. If its best score is then its
last, its time to the best is longer, and the ratio a bound from above.

RecBole's graph models are timed with and without the key ``fast_paths``, 10 batches each (on ml-1m
LightGCN alone). So are SASRec and GRU4Rec with RecBole's widths, leave one out by time and batches
of 256: reading data and making sequences, loading batches alone, an epoch, an evaluation.
``--only=sequential`` times nothing else.

The floor beside a figure is what must be computed and moved at the rates that one thread of this
machine reaches in its first cache; beside peak memory it is what must be held: the process with its
libraries, parameters with gradients and moments, the graph, the texts, a batch of scores.

``--dataset=synthetic`` draws a graph of 200,000 users, 100,000 items and ``--n_edges`` edges, and
evaluates its first 20,000 users. Nothing is trained to its best there: edges drawn at random have
nothing to learn but popularity. Where an epoch has more than ``--steps`` batches, so many are timed
and the epoch is that, scaled.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported
GOALS = {
    "epoch_id_only": 0.25,
    "epoch_best": 0.5,
    "build": 0.05,
    "evaluation": 0.3,
    "time_to_best": 0.3,
    "memory": 1.2,
}
TEXT_WIDTH = 384  # all-MiniLM-L6-v2
BASELINES = ("NGCF", "SGL", "NCL", "DGCF")  # besides LightGCN; a batch of DGCF takes seconds
BASELINE_STEPS = 10
SEQUENTIAL = ("SASRec", "GRU4Rec")
BY_TIME = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "train_neg_sample_args": None,
    "train_batch_size": 256,
}


def settings(side: str, arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Model and keys of a side: ``LightGCN``, ``GaCLLM`` (no text, BPR), ``GaCLLM_best``."""
    keys: dict[str, Any] = {
        "show_progress": False,
        "use_gpu": False,
        "state": "ERROR",
        "checkpoint_dir": arguments.scratch,
        "embedding_size": 64,
        "n_layers": 2,
        "train_batch_size": 2048,
        "valid_metric": "NDCG@10",
        "load_col": {"inter": ["user_id", "item_id"]},
    }
    if arguments.data_path:
        keys["data_path"] = arguments.data_path
    if side == "GaCLLM":
        keys |= {"use_text": False, "loss_type": "BPR"}
    elif side == "GaCLLM_best":
        keys |= {"preset": "best"}
        if arguments.dataset == "synthetic":
            keys["linear_weight"] = 0.0  # its matrix takes minutes; the epoch is the same
    return side.split("_")[0], keys


class Side:
    """A model with its data and trainer, built as RecBole builds them."""

    def __init__(self, side: str, arguments: argparse.Namespace, **overrides: Any) -> None:
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import get_model, init_seed

        from recbole_gacllm.run_config import build_config

        model, keys = settings(side, arguments)
        self.config = build_config(model, arguments.dataset, config_dict=keys | overrides)
        init_seed(self.config["seed"], True)
        begin = time.perf_counter()
        dataset = create_dataset(self.config)
        self.train, self.valid, _ = data_preparation(self.config, dataset)
        self.data_seconds = time.perf_counter() - begin
        if arguments.dataset == "synthetic":
            self.valid = _first_users(self.config, self.valid)
        self.model_class = get_model(model)
        begin = time.perf_counter()
        self.model = self.build()
        self.build_seconds = time.perf_counter() - begin
        self.trainer = self.make_trainer(self.model)
        self.trainer.eval_collector.data_collect(self.train)
        self.steps = min(arguments.steps, len(self.train))

    def build(self) -> Any:
        """The constructor: parameters, adjacency."""
        from recbole.utils import init_seed

        init_seed(self.config["seed"], True)
        return self.model_class(self.config, self.train._dataset)

    def make_trainer(self, model: Any) -> Any:
        """RecBole's trainer of a model."""
        from recbole.utils import get_trainer

        return get_trainer(self.config["MODEL_TYPE"], self.config["model"])(self.config, model)

    def time_to_best(self, limit: float = float("inf")) -> dict[str, Any]:
        """Seconds from the start of building to the best validation score, and that score.

        Training that takes longer than ``limit`` seconds is stopped: ``finished`` is False.
        """
        begin = time.perf_counter()
        trainer = self.make_trainer(self.build())
        best: dict[str, Any] = {"score": -1.0, "seconds": 0.0, "epochs": 0, "finished": True}

        class OutOfTimeError(Exception):
            pass

        def validated(epoch: int, score: float) -> None:
            seconds = time.perf_counter() - begin
            if score > best["score"]:
                best.update(score=score, seconds=seconds, epochs=epoch + 1)
            if seconds > limit:
                raise OutOfTimeError

        try:
            trainer.fit(self.train, self.valid, saved=False, callback_fn=validated)
        except OutOfTimeError:
            best["finished"] = False
        return best

    def epoch(self) -> float:
        """Seconds of an epoch, or of its first steps, scaled."""
        begin = time.perf_counter()
        self.trainer._train_epoch(_First(self.train, self.steps), 0)
        return (time.perf_counter() - begin) * len(self.train) / self.steps

    def evaluate(self, data: Any = None) -> tuple[float, dict[str, float]]:
        """Seconds and metrics of one full-sort evaluation."""
        self.model.train()
        for name in ("restored", "restore_user_e", "restore_item_e"):  # as after an epoch
            if hasattr(self.model, name):
                setattr(self.model, name, None)
        begin = time.perf_counter()
        result = self.trainer.evaluate(data or self.valid, load_best_model=False)
        return time.perf_counter() - begin, dict(result)


def _first_users(config: Any, loader: Any, n_users: int = 20_000) -> Any:
    """A full-sort loader of its first users only: as installed, RecBole scores one at a time."""
    from recbole.data.utils import get_dataloader

    inter = loader._dataset.inter_feat
    few = loader._dataset.copy(inter[inter["user_id"] <= n_users])
    return get_dataloader(config, "evaluation")(config, few, loader._sampler, shuffle=False)


class _First:
    """The first batches of a loader."""

    def __init__(self, loader: Any, steps: int) -> None:
        self.loader, self.steps = loader, steps

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.loader), self.steps)


def random_texts(options: Any, data: Any) -> Any:
    """In place of the stages: tables of the encoder's shape, float16, unit rows."""
    import torch

    from recbole_gacllm.alignment.embeddings import TextLayers

    n_users, n_items = len(data.graph.user_tokens), len(data.graph.item_tokens)
    generator = torch.Generator().manual_seed(1)
    tables = []
    for _ in range(options.llm_n_layers + 1):
        table = torch.randn(n_users + n_items, TEXT_WIDTH, generator=generator)
        tables.append(torch.nn.functional.normalize(table, dim=1).half())
    rows = [-1, *range(n_users), -1, *range(n_users, n_users + n_items)]
    return TextLayers(tables, torch.tensor(rows), {})


def paired(
    ours: Callable[[], float], theirs: Callable[[], float], repeats: int
) -> dict[str, float]:
    """Median seconds of both, taken by turns after one round to warm up, and their ratio."""
    ours(), theirs()
    rounds = [(ours(), theirs()) for _ in range(repeats)]
    return {
        "ours_seconds": statistics.median(one for one, _ in rounds),
        "recbole_seconds": statistics.median(other for _, other in rounds),
        "ratio": statistics.median(one / other for one, other in rounds),
    }


def timed(work: Callable[[], Any]) -> float:
    gc.collect()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def machine_rates() -> dict[str, float]:
    """What one thread does here: GEMM FLOP/s, bytes/s of gathered rows and of streaming."""
    import torch

    a, table = torch.randn(1024, 256), torch.randn(64, 64)  # the table lies in the first cache
    index, starts = torch.randint(0, 64, (2**20,)), torch.arange(0, 2**20, 64)
    weights = torch.rand(2**20)
    stream = torch.randn(2**25)
    target = torch.empty_like(stream)

    def best(work: Callable[[], Any]) -> float:
        return min(timed(work) for _ in range(7))

    return {
        "gemm_flops": 2 * 1024 * 1024 * 256 / best(lambda: a @ a.T),
        # The kernel of the product where every row is in the cache: no graph can be faster.
        "gather_bytes": 2**20
        * 64
        * 4
        / best(
            lambda: torch.nn.functional.embedding_bag(
                index, table, starts, mode="sum", per_sample_weights=weights
            )
        ),
        "stream_bytes": 2 * stream.nbytes / best(lambda: target.copy_(stream)),
    }


def epoch_floor(side: Side, rates: dict[str, float]) -> float:
    """Least seconds of our epoch at the machine's rates: bytes gathered and streamed, FLOPs.

    A step gathers a row an edge and direction for each of 2 x layers products, streams the
    parameters, gradient and both moments of Adam (7 passes), and multiplies: SSM and alignment
    three GEMMs each (scores, two gradients), the text MLP three a layer of it, two where its input
    is constant. GEMMs are counted at float32's rate.
    """
    model, options = side.model, side.model.options
    width, n_layers = options.embedding_size, options.n_layers
    gathered = 2 * n_layers * model.adjacency.matrix.values().numel() * width * 4
    streamed = 7 * sum(p.numel() for p in model.parameters()) * 4
    flops = 0.0
    if model.texts is not None:
        batch = next(iter(side.train))
        negatives = min(options.ssm_n_negatives, model.n_items - 1)
        n_users = len(batch["user_id"].unique())
        n_items = min(model.n_items, len(batch["item_id"].unique()) + negatives)
        aligned = [min(n, options.align_n_nodes or n) for n in (n_users, n_items)]
        flops = 6.0 * n_users * negatives * width
        flops += 6 * len(model.texts) * width * sum(n**2 for n in aligned)
        hidden = options.text_hidden_size
        n_projected = n_users + n_items if options.text_weight > 0 else sum(aligned)
        flops += len(model.texts) * n_projected * hidden * (4 * TEXT_WIDTH + 6 * width)
    step = (
        gathered / rates["gather_bytes"]
        + streamed / rates["stream_bytes"]
        + flops / rates["gemm_flops"]
    )
    return step * len(side.train)


def build_floor(side: Side, rates: dict[str, float]) -> float:
    """Least seconds of building: the matrix's values, columns and rows written thrice."""
    return 3 * 12 * int(side.model.adjacency.matrix.values().numel()) / rates["stream_bytes"]


def evaluation_floor(side: Side, rates: dict[str, float]) -> float:
    """Least seconds of an evaluation: scores are multiplied, written, masked and read by top-k."""
    n_scores = len(side.valid.uid_list) * side.model.n_items
    width = side.model.options.embedding_size
    return float(
        2 * width * n_scores / rates["gemm_flops"] + 3 * 4 * n_scores / rates["stream_bytes"]
    )


def memory_floor(side: Side) -> float:
    """MiB that must be held besides the libraries: see the module's docstring.

    Parameters four times (gradient, two moments), all interactions (two columns of 8 bytes, in the
    data set and in its parts), the matrix, the text tables, the scores of one batch of users.
    """
    from recbole_gacllm.plugin.fast import MIN_SCORES

    model = side.model
    held = 4 * 4 * sum(p.numel() for p in model.parameters())
    n_edges = len(side.train._dataset.inter_feat)
    held += 2 * 16 * n_edges + 12 * int(model.adjacency.matrix.values().numel())
    held += sum(table.nbytes for table in model.texts.tables) if model.texts is not None else 0
    return float(held + 4 * MIN_SCORES) / 2**20


def peak_of_this_process() -> float:
    """MiB; ``ru_maxrss`` would hold the parent's size from before the child's ``exec``."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def alone(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of a side in a process of its own: data, model, an epoch, an evaluation, the peak."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", side]
    command += [f"--dataset={arguments.dataset}", f"--steps={arguments.steps}"]
    if arguments.data_path:
        command.append(f"--data_path={arguments.data_path}")
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def child(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What :func:`alone` asks for. An evaluation by RecBole's way comes last."""
    libraries = peak_of_this_process()
    side = Side(name, arguments)
    epoch = min(side.epoch(), side.epoch())  # the first one warms up
    figures: dict[str, Any] = {"build": side.build_seconds, "epoch": epoch}
    figures["evaluation"], figures["metrics"] = side.evaluate()
    figures["peak_mib"] = peak_of_this_process()
    if name != "LightGCN":
        figures["memory_floor"] = libraries + memory_floor(side)
    if arguments.dataset == "synthetic" and name != "LightGCN":
        rates = machine_rates()
        figures["epoch_floor"] = epoch_floor(side, rates)
        figures["build_floor"] = build_floor(side, rates)
        figures["evaluation_floor"] = evaluation_floor(side, rates)
        figures["machine"] = machine(rates)
        if name == "GaCLLM":
            figures["evaluation"] = evaluations(side)
    return figures


def evaluations(side: Side) -> dict[str, float]:
    """Seconds of an evaluation of a model with and without the fast paths, by turns."""
    loaders = {}
    for fast in (True, False):
        side.config["fast_paths"] = fast
        loaders[fast] = _first_users(side.config, side.valid)

    def evaluate(fast: bool) -> float:
        side.config["fast_paths"] = fast
        seconds, metrics[fast] = side.evaluate(loaders[fast])
        return seconds

    metrics: dict[bool, dict[str, float]] = {}
    figures = paired(lambda: evaluate(True), lambda: evaluate(False), 3)
    if metrics[True] != metrics[False]:
        raise SystemExit(f"evaluation: {metrics[True]} fast, {metrics[False]} RecBole's way")
    return figures


def measure_apart(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a large graph: each side once, in a process of its own, one after the other.

    RecBole's constructor alone takes minutes and gigabytes there; two sides do not fit.
    """
    theirs, ours, best = (alone(side, arguments) for side in ("LightGCN", "GaCLLM", "GaCLLM_best"))

    def pair(one: float, other: float, **more: Any) -> dict[str, Any]:
        return {"ours_seconds": one, "recbole_seconds": other, "ratio": one / other, **more}

    def floor(figures: dict[str, Any], name: str) -> dict[str, float]:
        return {"floor_seconds": figures[f"{name}_floor"]}

    return {
        "epoch_id_only": pair(ours["epoch"], theirs["epoch"], **floor(ours, "epoch")),
        "build": pair(ours["build"], theirs["build"], **floor(ours, "build")),
        "evaluation": ours["evaluation"] | {"metrics": ours["metrics"]} | floor(ours, "evaluation"),
        "epoch_best": pair(best["epoch"], theirs["epoch"], **floor(best, "epoch")),
        "memory": memory({"LightGCN": theirs, "GaCLLM": ours, "GaCLLM_best": best}),
        "machine": ours["machine"],
    }


def memory(sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Peaks of the sides' processes, the ratio of the larger of ours, and the floors of ours."""
    peaks = {side: figures["peak_mib"] for side, figures in sides.items()}
    ratio = max(peaks["GaCLLM"], peaks["GaCLLM_best"]) / peaks["LightGCN"]
    floors = {side: sides[side]["memory_floor"] for side in ("GaCLLM", "GaCLLM_best")}
    return {"ratio": ratio, "peak_mib": peaks, "floor_mib": floors}


def machine(rates: dict[str, float]) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "threads": 1,
        "processor": platform.processor() or platform.machine(),
        **rates,
    }


def write_synthetic(folder: Path, n_edges: int, n_users: int = 200_000, n_items: int = 100_000):
    """Write a graph with popular items, in RecBole's format; returns the ``data_path``."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(5)
    popularity = 1 / (np.arange(n_items) + 100.0)
    pairs = np.empty(0, dtype=np.int64)
    while len(pairs) < n_edges:
        drawn = rng.integers(0, n_users, n_edges) * n_items
        drawn += rng.choice(n_items, n_edges, p=popularity / popularity.sum())
        pairs = np.unique(np.concatenate([pairs, drawn]))
    pairs = rng.permutation(pairs)[:n_edges]
    (folder / "synthetic").mkdir(parents=True)
    frame = pd.DataFrame({"user_id:token": pairs // n_items, "item_id:token": pairs % n_items})
    frame.to_csv(folder / "synthetic" / "synthetic.inter", sep="\t", index=False)
    return str(folder)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one data set."""
    if arguments.only == "sequential":
        return sequential(arguments)
    rates = machine_rates()
    result = {**without_text(arguments, rates), **with_text(arguments, rates)}
    if not arguments.no_memory:
        sides = ("LightGCN", "GaCLLM", "GaCLLM_best")
        result["memory"] = memory({side: alone(side, arguments) for side in sides})
    result |= with_fast_paths(arguments) | sequential(arguments)
    result["machine"] = machine(rates)
    return result


def without_text(arguments: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """GaCLLM without text and with BPR, embedding size 64."""
    theirs, ours = Side("LightGCN", arguments), Side("GaCLLM", arguments)
    # The same model under RecBole's loader, collector and trainer as installed.
    plain = Side("GaCLLM", arguments, fast_paths=False)
    repeats = arguments.repeats
    builds = max(1, repeats // 2)
    result: dict[str, Any] = {
        "epoch_id_only": paired(ours.epoch, theirs.epoch, repeats),
        "build": paired(lambda: timed(ours.build), lambda: timed(theirs.build), builds),
    }
    plain.model.load_state_dict(ours.model.state_dict())
    metrics, expected = ours.evaluate()[1], plain.evaluate()[1]
    if metrics != expected:
        raise SystemExit(f"evaluation: {metrics} with fast paths, {expected} without")
    result["evaluation"] = paired(lambda: ours.evaluate()[0], lambda: plain.evaluate()[0], repeats)
    result["evaluation"]["metrics"] = metrics
    floors = {
        "epoch_id_only": epoch_floor(ours, rates),
        "build": build_floor(ours, rates),
        "evaluation": evaluation_floor(ours, rates),
    }
    for name, floor in floors.items():
        result[name]["floor_seconds"] = floor
    return result


def with_fast_paths(arguments: argparse.Namespace) -> dict[str, Any]:
    """RecBole's graph models with ``fast_paths`` ("ours") and as installed, the same batches."""
    few = argparse.Namespace(**vars(arguments) | {"steps": min(BASELINE_STEPS, arguments.steps)})
    result = {}
    for model in ("LightGCN", *BASELINES) if arguments.dataset == "ml-100k" else ("LightGCN",):
        keys = {"num_clusters": 100} if model == "NCL" else {}  # RecBole's 1000 need more users
        fast, plain = Side(model, few, fast_paths=True, **keys), Side(model, few, **keys)
        for side in (fast, plain):
            if model == "NCL":
                side.model.e_step()  # clusters, as its trainer makes before the first epoch
        result[f"epoch_{model}_with_fast_paths"] = paired(fast.epoch, plain.epoch, 2)
    return result


def sequential(arguments: argparse.Namespace) -> dict[str, Any]:
    """RecBole's sequential models with ``fast_paths`` ("ours") and as installed, alike batches."""
    few = argparse.Namespace(**vars(arguments) | {"steps": min(BASELINE_STEPS, arguments.steps)})
    result = {}
    for model in SEQUENTIAL:
        fast, plain = sides = [Side(model, few, fast_paths=on, **BY_TIME) for on in (True, False)]
        metrics, expected = (side.evaluate()[1] for side in sides)
        if metrics != expected:
            raise SystemExit(f"{model}: {metrics} with fast paths, {expected} without")
        if model == SEQUENTIAL[0]:  # the same for every model
            ours, theirs = (partial(_data_seconds, few, on) for on in (True, False))
            result["sequences_with_fast_paths"] = paired(ours, theirs, 1)
            ours, theirs = (partial(timed, partial(_load, side)) for side in sides)
            result["batches_with_fast_paths"] = paired(ours, theirs, arguments.repeats)
        result[f"epoch_{model}_with_fast_paths"] = paired(fast.epoch, plain.epoch, 2)
        ours, theirs = (partial(_evaluation_seconds, side) for side in sides)
        result[f"evaluation_{model}_with_fast_paths"] = paired(ours, theirs, 2)
    return result


def _data_seconds(arguments: argparse.Namespace, fast: bool) -> float:
    return Side(SEQUENTIAL[0], arguments, fast_paths=fast, **BY_TIME).data_seconds


def _load(side: Side) -> None:
    for _ in _First(side.train, side.steps):
        pass


def _evaluation_seconds(side: Side) -> float:
    return side.evaluate()[0]


def with_text(arguments: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """The ``best`` preset and LightGCN."""
    theirs, ours = Side("LightGCN", arguments), Side("GaCLLM_best", arguments)
    epoch = paired(ours.epoch, theirs.epoch, arguments.repeats)
    epoch["floor_seconds"] = epoch_floor(ours, rates)
    result: dict[str, Any] = {"epoch_best": epoch}
    if arguments.time_to_best:
        one = ours.time_to_best()
        if arguments.time_limit == float("inf"):
            other = theirs.time_to_best()
        else:
            twin = Side("LightGCN", arguments, fast_paths=True)
            other = twin.time_to_best(arguments.time_limit)
            of_an_epoch = epoch["recbole_seconds"] + theirs.evaluate()[0]
            other["seconds"] = theirs.build_seconds + other["epochs"] * of_an_epoch
        result["time_to_best"] = {
            "ours_seconds": one["seconds"],
            "recbole_seconds": other["seconds"],
            "ratio": one["seconds"] / other["seconds"],
            "floor_seconds": one["epochs"]
            * (epoch["floor_seconds"] + evaluation_floor(ours, rates)),
            "ours": one,
            "recbole": other,
        }
    return result


def _without_paths(command: list[str]) -> list[str]:
    """A command line without the folders and files of this machine."""
    rest, skip = [], False
    for word in command:
        if not skip and not word.startswith(("--json=", "--data_path=")):
            skip = word in ("--json", "--data_path")
            rest += [] if skip else [word]
        else:
            skip = False
    return rest


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{'':34}{'ours':>10}{'RecBole':>10}{'ratio':>8}{'goal':>7}{'floor':>10}"]
    for name, figures in result.items():
        if "ratio" not in figures:
            continue
        if name == "memory":
            peaks = figures["peak_mib"]
            ours, theirs = f"{peaks['GaCLLM_best']:.0f}M", f"{peaks['LightGCN']:.0f}M"
            floor = f"{figures['floor_mib']['GaCLLM_best']:.0f}M"
        else:
            ours = f"{figures['ours_seconds'] * 1e3:.1f}ms"
            theirs = f"{figures['recbole_seconds'] * 1e3:.1f}ms"
            floor = figures.get("floor_seconds")
            floor = "" if floor is None else f"{floor * 1e3:.1f}ms"
        goal = GOALS.get(name, "")
        lines.append(f"{name:34}{ours:>10}{theirs:>10}{figures['ratio']:>8.3f}{goal:>7}{floor:>10}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="ml-100k", choices=["ml-100k", "ml-1m", "synthetic"])
    parser.add_argument("--data_path", help="folder that holds the data set's folder")
    parser.add_argument("--json", metavar="FILE", help="write the ratios and all figures")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="at most so many batches are timed")
    parser.add_argument("--n_edges", type=int, default=10_000_000, help="of the synthetic graph")
    parser.add_argument("--time_to_best", action="store_true", help="train both until they stop")
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="of LightGCN, s")
    parser.add_argument("--only", choices=["sequential"], help="leave out all but these models")
    parser.add_argument("--no_memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        if arguments.data_path:
            arguments.data_path = str(Path(arguments.data_path).resolve())
        if arguments.json:
            arguments.json = str(Path(arguments.json).resolve())
        if arguments.dataset == "synthetic" and not arguments.data_path:
            arguments.data_path = write_synthetic(Path(scratch) / "data", arguments.n_edges)
        arguments.scratch = scratch
        given, sys.argv = sys.argv, sys.argv[:1]  # RecBole reads the command line too
        os.chdir(scratch)  # and writes logs into the working folder
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        import torch

        from recbole_gacllm import model

        torch.set_num_threads(1)
        model.prepare = random_texts
        if arguments.child:
            print(json.dumps(child(arguments.child, arguments)))
            return
        apart = arguments.dataset == "synthetic"
        result = measure_apart(arguments) if apart else measure(arguments)
    print(f"{arguments.dataset}: GaCLLM against RecBole's LightGCN, 1 thread\n")
    print(table(result))
    if arguments.json:
        ratios = {name: round(result[name]["ratio"], 4) for name in GOALS if name in result}
        content = {
            "dataset": arguments.dataset,
            "command": _without_paths(given),
            **ratios,
            "figures": result,
        }
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
