"""The runs that test_device.py compares: each once on the CPU and once on the fake device.

A process of its own, since the fake device is named for the whole process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional

from recbole_gacllm import model as model_module
from recbole_gacllm import text_knn
from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.alignment.propagation import Adjacency
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.inputs import TrainingData, raw_descriptions
from recbole_gacllm.objective import linear
from recbole_gacllm.plugin import fast
from tests import fake_device
from tests.recommender import Recommender

MODULES = {"fast": fast, "linear": linear}


def texts(options: GaCLLMConfig, data: TrainingData) -> TextLayers:
    """Artefacts as the stages leave them, with random vectors; loaded as they are."""
    folders = {stage: Path.cwd() / stage for stage in ("inputs", "embeddings")}
    raw, _ = raw_descriptions(options, data)
    n_layers = 2 if options.is_described else 1
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    raw.write(folders["inputs"] / "layer_0.parquet")
    rng = np.random.default_rng(3)
    for layer in range(n_layers):
        vectors = rng.standard_normal((sum(map(len, raw.texts.values())), 12))
        np.save(folders["embeddings"] / f"layer_{layer}.npy", vectors.astype(np.float16))
    return TextLayers.load(folders, n_layers, options.text_source, data.graph, data.seed)


def result_of(model: str, keys: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Losses of two epochs, metrics of validation and test."""
    one = Recommender(model, keys, device=device)
    best = one.fit(saved=False)
    tested = one.trainer.evaluate(one.test, load_best_model=False)
    return {
        "losses": one.losses,
        "metrics": [*best.values(), *tested.values()],
        "step": getattr(one.valid, "step", None),
        "on": sorted({str(parameter.device) for parameter in one.model.parameters()}),
    }


def attempt(model: str, keys: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same, or what was raised."""
    try:
        return result_of(model, keys, device)
    except (RuntimeError, TypeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def mixtures() -> dict[str, tuple[bool, Callable[[], Any]]]:
    """Operations on tensors of both places: whether CUDA takes each, and the operation."""
    host, place = torch.arange(6.0).view(2, 3), torch.tensor([0, 1])
    device, place_there = host.to(fake_device.DEVICE), place.to(fake_device.DEVICE)
    adjacency = Adjacency.from_edges(np.array([0, 1]), np.array([0, 0]), 2, 1, fake_device.DEVICE)
    return {
        "copies": (True, lambda: torch.zeros(2, 3).copy_(device) + device.cpu()),
        "a number": (True, lambda: device * torch.tensor(2.0)),
        "indices of the host": (True, lambda: device[place]),
        "sum": (False, lambda: device + host),
        "product": (False, lambda: host @ device.T),
        "graph product": (False, lambda: adjacency.matrix @ host.T),
        "concatenation": (False, lambda: torch.cat([host, device])),
        "in place": (False, lambda: host.add_(device)),
        "indices of the device": (False, lambda: host[place_there]),
        "values of the host": (False, lambda: device.index_put_((place,), host)),
        "index_select": (False, lambda: device.index_select(0, place)),
        "embedding": (False, lambda: functional.embedding(place, device)),
        "embedding_bag": (False, lambda: functional.embedding_bag(place, device, place_there)),
    }


def raises(operation: Callable[[], Any]) -> bool:
    try:
        operation()
    except RuntimeError as error:
        return "to be on the same device" in str(error)
    return False


def main(settings: dict[str, Any], cases: dict[str, Any], constants: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    model_module.prepare = text_knn.prepare = texts
    results: dict[str, Any] = {}
    for name, (model, keys) in cases.items():
        keys = settings | keys
        module, values = constants.get(name, ("linear", {}))
        with patch.dict(vars(MODULES[module]), values):
            on_cpu = attempt(model, keys, torch.device("cpu"))
            with fake_device.FakeDevice():
                on_device = attempt(model, keys, fake_device.DEVICE)
        results[name] = [on_cpu, on_device]
    with fake_device.FakeDevice():
        results["mixtures"] = {
            name: [taken, not raises(operation)] for name, (taken, operation) in mixtures().items()
        }
    Path("results.json").write_text(json.dumps(results))
