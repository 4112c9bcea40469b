"""Data, model and trainer as RecBole makes them."""

from __future__ import annotations

import functools
from typing import Any

from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from recbole_gacllm.run_config import build_config


class Recommender:
    """A model with its configuration and data, from settings and keys."""

    def __init__(
        self, name: str, settings: dict, dataset: str = "tiny", device: Any = None, **keys: Any
    ) -> None:
        self.config = build_config(name, dataset, config_dict={**settings, **keys})
        self.config["device"] = device or self.config["device"]
        self.seed()
        self.dataset = create_dataset(self.config)
        self.train, self.valid, self.test = data_preparation(self.config, self.dataset)
        self.seed()
        model = get_model(name)(self.config, self.train._dataset)
        self.model = model.to(self.config["device"])
        self.called: list[tuple[int, float]] = []  # epoch and score of each validation

    @functools.cached_property
    def trainer(self) -> Any:
        kind = get_trainer(self.config["MODEL_TYPE"], self.config["model"])
        return kind(self.config, self.model)

    def seed(self) -> None:
        init_seed(self.config["seed"], True)

    def fit(self, **keys: Any) -> dict[str, float]:
        """Train; the best validation result."""
        note = {"callback_fn": lambda *at: self.called.append(at), "verbose": False}
        return dict(self.trainer.fit(self.train, self.valid, **{**note, **keys})[1] or {})

    @property
    def losses(self) -> list[float]:
        """Of each epoch."""
        return list(self.trainer.train_loss_dict.values())

    @property
    def batch(self) -> Any:
        """The first of training."""
        return next(iter(self.train))


def without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}
