"""Figures of the text stages in TensorBoard and W&B."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from recbole.utils.wandblogger import WandbLogger

from recbole_gacllm.run import track_stages

MANIFESTS: dict[str, dict[str, Any]] = {
    "sft": {
        "stage": "sft",
        "key": {"seed": 2020},
        "perplexity_before": 29.0,
        "train_losses": [3.5, 3.0],
        "seconds": 9.0,
    },
    "descriptions": {
        "backend": "vllm",
        "layers": [{"n_failed": 2, "failures": {"empty": 2}, "n_output_tokens": 50}],
    },
    "embeddings": {"layers": [{"n_texts": 7}, {"n_texts": 8}]},
}
FIGURES = {
    "sft/perplexity_before": 29.0,
    "sft/seconds": 9.0,
    "descriptions/layer_1/n_failed": 2,
    "descriptions/layer_1/failures/empty": 2,
    "descriptions/layer_1/n_output_tokens": 50,
    "embeddings/layer_0/n_texts": 7,
    "embeddings/layer_1/n_texts": 8,
}


@pytest.fixture
def track(monkeypatch):
    """Hands the manifests to a trainer of RecBole: its TensorBoard, and W&B under the switch."""
    wandb = Mock(run=SimpleNamespace(summary={}))
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def track(log_wandb):
        logger = WandbLogger(SimpleNamespace(log_wandb=log_wandb, wandb_project="p"))
        tensorboard = Mock()
        track_stages(SimpleNamespace(tensorboard=tensorboard, wandblogger=logger), MANIFESTS)
        return [call.args for call in tensorboard.add_scalar.call_args_list], wandb

    return track


def test_tensorboard_gets_every_number_of_a_stage_and_the_curve_of_the_loss(track):
    scalars, wandb = track(log_wandb=False)
    curve = [values for values in scalars if values[0] == "sft/loss"]
    assert curve == [("sft/loss", 3.5, 0), ("sft/loss", 3.0, 1)]
    rest = [values for values in scalars if values not in curve]
    assert {name: value for name, value, _ in rest} == FIGURES
    assert wandb.mock_calls == []  # without the switch


def test_wandb_gets_the_same_under_recboles_switch(track):
    _, wandb = track(log_wandb=True)
    assert wandb.run.summary == {f"stages/{name}": value for name, value in FIGURES.items()}
    logged = [call.args[0] for call in wandb.log.call_args_list]
    assert logged == [{"sft/loss": 3.5, "sft_step": 0}, {"sft/loss": 3.0, "sft_step": 1}]
    wandb.define_metric.assert_any_call("sft/*", step_metric="sft_step")
