"""Sections of ``gpu_check.py`` about the recommender: functions, training, a large graph.

Each takes the device, whether sizes are toys, and a folder of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import recbole_gacllm  # noqa: F401  (before RecBole and transformers)
from recbole_gacllm import model as model_module
from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.alignment.propagation import (
    Adjacency,
    PeriodicPropagation,
    fuse,
    propagate,
    propagate_mean,
    text_projection,
)
from recbole_gacllm.objective import linear, losses
from recbole_gacllm.objective.linear import ItemItemModel, TextNeighbors
from recbole_gacllm.objective.unseen import Unseen
from recbole_gacllm.plugin.fast_graph import infonce_sum
from recbole_gacllm.run_config import build_config

WIDTH, TEXT_WIDTH = 64, 384
#: Largest differences, as shares of the largest value, by number type of autocast.
TOLERANCES = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.06}
#: Functions of an evaluation, which RecBole makes without autocast.
SCORES = ("linear, sparse", "linear, dense", "unseen items", "text neighbors")
LOSS_TOLERANCE, METRIC_TOLERANCE = 1e-3, 0.01
HALF_LOSS_TOLERANCE = 0.02
EPOCHS = 3

Function = Callable[..., Tensor]


# Functions


def functions(device: str, small: bool, folder: Path) -> dict[str, Any]:
    """Values and gradients of each function on the device against the CPU's, each twice."""
    n_users, n_items, n_edges = (60, 40, 400) if small else (3000, 2000, 100_000)
    figures: dict[str, Any] = {}
    checks: dict[str, bool] = {}
    for name, (build, inputs) in _functions(n_users, n_items, n_edges).items():
        expected = _values(build("cpu"), inputs, "cpu", None)
        figures[name] = {}
        for number_type, tolerance in TOLERANCES.items():
            if name in SCORES and number_type != "float32":
                continue
            dtype = None if number_type == "float32" else getattr(torch, number_type)
            first, second = (_values(build(device), inputs, device, dtype) for _ in range(2))
            difference = _largest(first, expected)
            figures[name][number_type] = {
                "difference": difference,
                "repeatable": all(map(torch.equal, first, second)),
            }
            checks[f"{name}, {number_type}"] = difference <= tolerance
    return {"functions": figures, "checks": checks}


def _functions(
    n_users: int, n_items: int, n_edges: int
) -> dict[str, tuple[Callable[[str], Function], list[Tensor]]]:
    """Name -> what builds the function on a device, and its inputs."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    users, items = rng.integers(0, n_users, n_edges), rng.integers(0, n_items - 5, n_edges)
    x = torch.randn(n_users + n_items, WIDTH)
    texts = functional.normalize(torch.randn(n_items, TEXT_WIDTH), dim=1)
    nodes, batch = torch.arange(0, n_users + n_items, 2), torch.arange(0, n_users, 3)
    ids, other = torch.randn(len(batch), WIDTH), torch.randn(len(batch), WIDTH)
    rows = torch.arange(len(batch)).flip(0)
    drawn = torch.zeros(len(batch), dtype=torch.bool)
    projection = text_projection(TEXT_WIDTH, 128, WIDTH, 0.0)

    def graph(device: str) -> Adjacency:
        return Adjacency.from_edges(users, items, n_users, n_items, device)

    def periodic(device: str) -> Function:
        cycle, there = PeriodicPropagation(graph(device), 2, 1), nodes.to(device)
        return lambda x: torch.cat(cycle(x[:n_users], x[n_users:], there))

    def item_item(device: str, share: float) -> Function:
        model = ItemItemModel(users, items, n_users, n_items, 100.0, texts, 0.5, device)

        def scores() -> Tensor:
            linear.SPARSE, usual = share, linear.SPARSE
            try:
                return model.standardized(batch.to(device), slice(None))[0]
            finally:
                linear.SPARSE = usual

        return scores

    def unseen(device: str) -> Function:
        table = texts.to(device)
        some = Unseen.find(items, n_items, lambda ids: table[ids], 512, 10.0, device)
        assert some is not None
        return some.complete

    def tables(device: str) -> Function:
        layers = TextLayers([texts.half()], torch.arange(-1, n_items - 1), {}).to(device)
        there = torch.arange(n_items, device=device)
        made = text_projection(TEXT_WIDTH, 128, WIDTH, 0.0)
        made.load_state_dict(projection.state_dict())
        made.to(device)
        return lambda: layers.projected((0,), there, made)

    def neighbors(device: str) -> Function:
        model = TextNeighbors(users, items, n_users, texts.to(device))
        return lambda: model.scores(batch.to(device))

    return {
        "all hops": (lambda d: lambda x: torch.cat(propagate(graph(d), x, 2)), [x]),
        "hops of some": (
            lambda d: lambda x: torch.cat(propagate(graph(d), x, 2, nodes.to(d))),
            [x],
        ),
        "periodic hops": (periodic, [x]),
        "mean of hops": (lambda d: lambda x: propagate_mean(graph(d), x, 2), [x]),
        "fusion": (lambda d: lambda x, y: fuse([x, y], [y], 0.5), [ids, other]),
        "BPR": (lambda d: lambda x, y: losses.bpr(x.sum(1), y.sum(1)), [ids, other]),
        "sampled softmax": (
            lambda d: lambda x, y: losses.sampled_softmax(x, rows.to(d), y, y, drawn.to(d), 0.2),
            [ids, other],
        ),
        "alignment": (lambda d: lambda x, y: losses.alignment(x, y, 0.2), [ids, other]),
        "L2": (lambda d: lambda x: losses.embedding_l2(x.square().sum(1), squared=False), [ids]),
        "InfoNCE": (lambda d: lambda x, y: infonce_sum(x, y, rows.to(d), 0.2), [ids, other]),
        "text tables": (tables, []),
        "linear, sparse": (lambda d: item_item(d, 2.0), []),
        "linear, dense": (lambda d: item_item(d, 0.0), []),
        "unseen items": (unseen, [torch.randn(n_items, WIDTH)]),
        "text neighbors": (neighbors, []),
    }


def _values(
    function: Function, inputs: list[Tensor], device: str, dtype: torch.dtype | None
) -> list[Tensor]:
    """The function's value and its gradients, on the CPU in float32."""
    there = [tensor.detach().to(device).requires_grad_() for tensor in inputs]
    with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        value = function(*there)
    found = [value.detach()]
    if there:
        value.float().square().mean().backward()
        found += [tensor.grad for tensor in there]
    return [tensor.float().cpu() for tensor in found]


def _largest(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of any of some tensors, as a share of its largest value."""
    return max(
        float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))
        for one, other in zip(found, expected, strict=True)
    )


# Training

LINEAR = {"linear_weight": 0.5, "linear_text_weight": 0.5, "linear_reg_weight": 400.0}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ids, BPR": ("GaCLLM", {"use_text": False, "loss_type": "BPR"}),
    "ids, SSM": ("GaCLLM", {"use_text": False}),
    "texts": ("GaCLLM", {}),
    "texts, BPR": ("GaCLLM", {"loss_type": "BPR"}),
    "texts only aligned": ("GaCLLM", {"text_weight": 0.0, "align_n_nodes": 512}),
    "seldom propagated": ("GaCLLM", {"propagate_every": 4}),
    "linear": ("GaCLLM", LINEAR),
    "unseen items": ("GaCLLM", {**LINEAR, "cold_item_share": 0.2}),
    "mixed precision": ("GaCLLM", {"enable_amp": True}),
    "LightGCN": ("LightGCN", {"fast_paths": True}),
}


class DrawsOfTheCpu(TorchFunctionMode):
    """What is drawn on a device is drawn on the CPU and copied: both draw the same."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function in (torch.randperm, torch.randint) and device is not None:
            return function(*args, **{**kwargs, "device": "cpu"}).to(device)
        if function is Tensor.random_:
            target, *bounds = args
            return target.copy_(torch.empty_like(target, device="cpu").random_(*bounds, **kwargs))
        return function(*args, **kwargs)


def training(device: str, small: bool, folder: Path) -> dict[str, Any]:
    """ml-100k in ten configurations: losses of each epoch and metrics against the CPU's."""
    keys: dict[str, Any] = {
        "epochs": EPOCHS,
        "show_progress": False,
        "state": "ERROR",
        "checkpoint_dir": str(folder),
        "artifact_dir": str(folder),
    }
    if small:
        keys["user_inter_num_interval"] = "[400,inf)"
    processes = min(len(CONFIGURATIONS), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        compared = pool.map(partial(_compared, keys, device), CONFIGURATIONS)
        figures = dict(zip(CONFIGURATIONS, compared, strict=True))
    checks = {
        name: of_one["metric"] <= METRIC_TOLERANCE
        and of_one["loss"] <= (HALF_LOSS_TOLERANCE if name == "mixed precision" else LOSS_TOLERANCE)
        for name, of_one in figures.items()
    }
    return {"configurations": figures, "checks": checks}


def _compared(keys: dict[str, Any], device: str, name: str) -> dict[str, Any]:
    """A configuration on the CPU and on the device, in a process of its own."""
    sys.argv[1:] = []  # RecBole reads it
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # more are slower on matrices as small
    model_module.prepare = _random_texts
    model, more = CONFIGURATIONS[name]
    cpu, found = (_trained(model, keys | more, where) for where in ("cpu", device))
    return {
        "cpu": cpu,
        "device": found,
        "loss": max(abs(a / b - 1) for a, b in zip(found["losses"], cpu["losses"], strict=True)),
        "metric": max(abs(a - b) for a, b in zip(found["metrics"], cpu["metrics"], strict=True)),
    }


def _random_texts(options: Any, data: Any) -> TextLayers:
    """In place of the stages: tables of the encoder's shape, float16, unit rows."""
    n_users, n_items = len(data.graph.user_tokens), len(data.graph.item_tokens)
    generator = torch.Generator().manual_seed(1)
    shape = (n_users + n_items, TEXT_WIDTH)
    tables = [
        functional.normalize(torch.randn(shape, generator=generator), dim=1).half()
        for _ in range(2)
    ]
    rows = [-1, *range(n_users), -1, *range(n_users, n_users + n_items)]
    return TextLayers(tables, torch.tensor(rows), {})


def _trained(model: str, keys: dict[str, Any], device: str) -> dict[str, Any]:
    config = build_config(model, "ml-100k", config_dict=keys)
    config["device"] = torch.device(device)
    init_seed(config["seed"], True)
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], True)
    with DrawsOfTheCpu():
        made = get_model(model)(config, train._dataset).to(device)
        trainer = get_trainer(config["MODEL_TYPE"], model)(config, made)
        started = time.perf_counter()
        _, best = trainer.fit(train, valid, saved=False, show_progress=False, verbose=False)
        seconds = time.perf_counter() - started
        tested = trainer.evaluate(test, load_best_model=False, show_progress=False)
    return {
        "losses": list(trainer.train_loss_dict.values()),
        "metrics": [float(value) for value in (*best.values(), *tested.values())],
        "epoch_seconds": seconds / EPOCHS,
    }


# A large graph


def graph(device: str, small: bool, folder: Path) -> dict[str, Any]:
    """Ten million edges: two hops forward and back, against the CPU's; seconds and memory."""
    n_users, n_items, n_edges = (2000, 1000, 20_000) if small else (200_000, 100_000, 10_000_000)
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, n_users, n_edges), rng.integers(0, n_items, n_edges)
    x = torch.randn(n_users + n_items, WIDTH, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    on_cpu = Adjacency.from_edges(users, items, n_users, n_items)
    figures: dict[str, Any] = {"build_seconds": time.perf_counter() - started}
    adjacency = Adjacency(on_cpu.matrix.to(device))

    def both_ways(where: str, adjacency: Adjacency) -> list[Tensor]:
        started = time.perf_counter()
        found = _values(lambda x: propagate_mean(adjacency, x, 2), [x], where, None)
        figures.setdefault(f"{where}_seconds", []).append(time.perf_counter() - started)
        return found

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first, second = (both_ways(device, adjacency) for _ in range(2))
    if device == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    difference = _largest(first, both_ways("cpu", on_cpu))
    figures |= {"difference": difference, "repeatable": all(map(torch.equal, first, second))}
    return figures | {"checks": {"as on the CPU": difference <= TOLERANCES["float32"]}}
