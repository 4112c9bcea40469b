"""Figures of the text stages in TensorBoard and W&B."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from recbole.utils.wandblogger import WandbLogger

from recbole_gacllm.run import track_stages

MANIFESTS: dict[str, dict[str, Any]] = {
    "sft": {
        "stage": "sft",
        "key": {"seed": 2020},
        "perplexity_before": 29.0,
        "perplexity_after": 18.5,
        "n_tokens": 100,
        "train_losses": [3.5, 3.0],
        "seconds": 9.0,
    },
    "descriptions": {
        "backend": "vllm",
        "layers": [{"n_failed": 2, "failures": {"empty": 2}, "n_output_tokens": 50}],
        "seconds": 30.0,
    },
    "embeddings": {"layers": [{"n_texts": 7}, {"n_texts": 8}]},
}
FIGURES = {
    "sft/perplexity_before": 29.0,
    "sft/perplexity_after": 18.5,
    "sft/n_tokens": 100,
    "sft/seconds": 9.0,
    "descriptions/layer_1/n_failed": 2,
    "descriptions/layer_1/failures/empty": 2,
    "descriptions/layer_1/n_output_tokens": 50,
    "descriptions/seconds": 30.0,
    "embeddings/layer_0/n_texts": 7,
    "embeddings/layer_1/n_texts": 8,
}


class FakeWandb:
    """What RecBole's logger calls of W&B."""

    def __init__(self) -> None:
        self.run = SimpleNamespace(summary={})
        self.logged: list[dict[str, float]] = []
        self.steps: dict[str, str] = {}

    def define_metric(self, name: str, step_metric: str) -> None:
        self.steps[name] = step_metric

    def log(self, metrics: dict[str, float], commit: bool) -> None:
        self.logged.append(metrics)


@pytest.fixture
def trainer(monkeypatch):
    import sys

    scalars: list[tuple[str, float, int]] = []
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())

    def make(log_wandb):
        return SimpleNamespace(
            tensorboard=SimpleNamespace(add_scalar=lambda *values: scalars.append(values)),
            wandblogger=WandbLogger(SimpleNamespace(log_wandb=log_wandb, wandb_project="p")),
            scalars=scalars,
        )

    return make


def test_tensorboard_gets_every_number_of_a_stage_and_the_curve_of_the_loss(trainer):
    found = trainer(log_wandb=False)
    track_stages(found, MANIFESTS)
    curve = [values for values in found.scalars if values[0] == "sft/loss"]
    assert curve == [("sft/loss", 3.5, 0), ("sft/loss", 3.0, 1)]
    rest = [values for values in found.scalars if values not in curve]
    assert {name: value for name, value, _ in rest} == FIGURES


def test_wandb_gets_the_same_under_recboles_switch(trainer):
    found = trainer(log_wandb=True)
    track_stages(found, MANIFESTS)
    wandb = found.wandblogger._wandb
    assert wandb.run.summary == {f"stages/{name}": value for name, value in FIGURES.items()}
    assert wandb.logged == [{"sft/loss": 3.5, "sft_step": 0}, {"sft/loss": 3.0, "sft_step": 1}]
    assert wandb.steps["sft/*"] == "sft_step"


def test_without_the_switch_wandb_gets_nothing(trainer):
    import sys

    track_stages(trainer(log_wandb=False), MANIFESTS)
    assert sys.modules["wandb"].logged == []
