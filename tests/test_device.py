"""The recommender on a device of its own (``fake_device.py``): the CPU's losses and metrics."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import ROOT, fresh_process, tiny_settings, write_dataset

RAW = {"text_source": "raw"}
BY_TIME = {"eval_args": {"order": "TO", "split": {"LS": "valid_and_test"}, "mode": "full"}}
SAMPLED = {"eval_args": {"mode": {"valid": "uni10", "test": "uni10"}}}
LINEAR = {"linear_weight": 0.5, "linear_text_weight": 1.0, "linear_reg_weight": 3.0}
COLD = {"cold_item_share": 0.3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ids, BPR": ("GaCLLM", {"use_text": False, "loss_type": "BPR"}),
    "ids, SSM": ("GaCLLM", {"use_text": False, "ssm_n_negatives": 10}),
    "raw texts": ("GaCLLM", RAW),
    "raw texts, BPR, few aligned": ("GaCLLM", {**RAW, "loss_type": "BPR", "align_n_nodes": 5}),
    "two layers, only aligned": ("GaCLLM", {"text_weight": 0.0, "text_hidden_size": 0}),
    "two layers, fused": ("GaCLLM", {"loss_type": "BPR", "require_pow": True}),
    "means of items": ("GaCLLM", {"text_source": "item_mean"}),
    "seldom propagated": ("GaCLLM", {"propagate_every": 3}),
    "seldom propagated, ids": ("GaCLLM", {"propagate_every": 3, "use_text": False}),
    "mixed precision": ("GaCLLM", {"enable_amp": True}),
    "linear, dense": ("GaCLLM", {**LINEAR, "linear_recency": 1.0, **BY_TIME}),
    "linear, sparse": ("GaCLLM", {**LINEAR, "linear_recency": 1.0, **BY_TIME}),
    "linear, large catalogue": ("GaCLLM", {**COLD, **LINEAR}),
    "linear, its weight chosen": ("GaCLLM", {**LINEAR, "linear_reg_weight": None}),
    "unseen items": ("GaCLLM", {**COLD, **LINEAR}),
    "unseen items, BPR": ("GaCLLM", {**COLD, **RAW, "loss_type": "BPR"}),
    "sampled candidates": ("GaCLLM", {**SAMPLED, **LINEAR}),
    "RecBole's own paths": ("GaCLLM", {"fast_paths": False}),
    "many evaluated at once": ("GaCLLM", {**RAW, "eval_batch_size": 1}),
    "TextKNN": ("TextKNN", {}),
    "LightGCN": ("LightGCN", {"fast_paths": True}),
    "NGCF": ("NGCF", {"fast_paths": True, "node_dropout": 0.0}),
    "SGL": ("SGL", {"fast_paths": True}),
    "SGL, mixed precision": ("SGL", {"fast_paths": True, "enable_amp": True}),
    "DGCF": ("DGCF", {"fast_paths": True, "n_factors": 2, "train_batch_size": 64}),
    "NeuMF": ("NeuMF", {"fast_paths": True}),
}
#: Constants of some modules in some of them, with which these go other ways.
CONSTANTS = {
    "linear, sparse": ("linear", {"SPARSE": 1.0}),
    "linear, large catalogue": ("linear", {"MAX_ITEMS": 20}),
    "many evaluated at once": ("fast", {"MIN_SCORES": 1, "MIN_USERS": 5}),
}


def compare(log: Path, *arguments: Any) -> None:
    """In a process of its own, as the fake device is named for the whole process."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    from . import device_process

    device_process.main(*arguments)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each case what the CPU and the device gave."""
    root = tmp_path_factory.mktemp("device")
    settings = tiny_settings(write_dataset(root / "data"), root)
    with contextlib.chdir(root):
        process = fresh_process(compare, root / "log", settings, CASES, CONSTANTS)
    process.join()
    assert process.exitcode == 0, (root / "log").read_text()
    return dict(json.loads((root / "results.json").read_text()))


@pytest.mark.parametrize("case", CASES)
def test_the_device_gives_the_losses_and_metrics_of_the_cpu(
    results: dict[str, Any], case: str
) -> None:
    cpu, device = results[case]
    assert "error" not in cpu, cpu["error"]
    assert "error" not in device, device["error"][:600]
    assert (cpu["on"], device["on"]) == (["cpu"], ["fakegpu:0"])
    if "mixed precision" in case:  # the device's autocast rounds less
        assert device["losses"] == pytest.approx(cpu["losses"], rel=0.01)
        return
    assert device["losses"] == pytest.approx(cpu["losses"], rel=1e-5)
    assert device["metrics"] == pytest.approx(cpu["metrics"], abs=1e-4)
    assert max(cpu["metrics"]) > 0


def test_tensors_of_host_and_device_mix_where_cuda_lets_them(results: dict[str, Any]) -> None:
    for name, (taken_by_cuda, taken_here) in results["mixtures"].items():
        assert taken_here == taken_by_cuda, name


def test_a_batch_of_users_is_larger_on_a_device(results: dict[str, Any]) -> None:
    cpu, device = results["many evaluated at once"]
    assert cpu["step"] == 5
    assert device["step"] == 2**25 // 31
    cpu, device = results["RecBole's own paths"]
    assert cpu["step"] == device["step"]


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_on_a_cpu_and_records_what_fails(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu_check.py"
    command = [sys.executable, str(script), "--small", f"--json={tmp_path / 'gpu.json'}"]
    fine = subprocess.run([*command, "--device=cpu", "--sections", "graph", "functions"])
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert fine.returncode == 0, found
    assert all(found["functions"]["checks"].values())
    assert len(found["functions"]["checks"]) >= 30
    if torch.cuda.is_available():
        return
    failed = subprocess.run([*command, "--device=cuda", "--sections", "graph", "versions"])
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert failed.returncode == 1
    assert set(found) == {"graph", "versions"}  # beside each other on many cores
    assert not any(section["ok"] for section in found.values())
    assert "CUDA" in found["graph"]["error"] + found["graph"]["output"]
