"""A finished run's model, loaded again: every user's metrics and recommendations.

The counterpart of RecBole's ``load_data_and_model``, which would run GaCLLM's text stages and write
log folders where the report is made. Here the text embeddings come from the run's artefacts.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.utils import get_model, get_trainer, init_seed
from torch import Tensor

import recbole_gacllm.model
import recbole_gacllm.text_knn
from recbole_gacllm.benchmark.degrees import count_degrees
from recbole_gacllm.benchmark.job import Recorder, histories, targets
from recbole_gacllm.config import GaCLLMConfig, model_defaults
from recbole_gacllm.data import TextLayers, TrainingData
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.registration import MODELS

N_RECOMMENDED = 10
# Other machines and PyTorch versions move a rank here and there, no more.
_TOLERANCE = 0.005

Scores = dict[str, "pd.Series[float]"]  # metric -> value of each user, by raw token


@dataclass(frozen=True)
class Scored:
    """What a run's model does for every user.

    Attributes:
        valid, test: Metric -> every user's value, by raw token.
        top: User -> recommended items, best first; without those of the training and validation
            split, as RecBole ranks them. Empty if the run ranked a sample of items only.
        heldout: User -> items of the test split.
        degrees: Training interactions by side and raw token.
    """

    valid: Scores
    test: Scores
    top: dict[str, list[str]]
    heldout: dict[str, list[str]]
    degrees: dict[str, dict[str, int]]


def score(record: dict[str, Any], checkpoint: Path) -> Scored:
    """Load a run's data and best weights, and rank all items for its test users.

    Args:
        record: The run's ``run.json``.
        checkpoint: Its checkpoint. RecBole's checkpoints are pickles: only load what you trust.

    Raises:
        GaCLLMError: If the model no longer gives the metrics of the run.
    """
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=False)
    config = loaded["config"]
    config["show_progress"], config["log_wandb"] = False, False
    config["single_spec"], config["local_rank"] = True, 0
    if config["model"] in MODELS:  # keys that are newer than the run
        for key, value in model_defaults().items():
            config.final_config_dict.setdefault(key, value)
    if not torch.cuda.is_available():
        config["device"] = torch.device("cpu")
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    with _texts_of(record):
        model = get_model(config["model"])(config, train._dataset).to(config["device"])
    model.load_state_dict(loaded["state_dict"])
    model.load_other_parameter(loaded.get("other_parameter"))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        # RecBole's trainer makes folders for logs and checkpoints.
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        trainer.tensorboard.close()
    trainer.eval_collector.data_collect(train)  # what some metrics count; RecBole does so in fit
    valid_scores, _ = _evaluate(trainer, train, valid, valid)
    collected = _collect_top(trainer)
    test_scores, result = _evaluate(trainer, train, valid, test)
    _require_same(record["test"], result)
    tokens = test._dataset.field2id_token[test._dataset.iid_field]
    top = {}
    if isinstance(test, FullSortEvalDataLoader):
        rows = torch.cat(collected).numpy()
        users = _users(train, valid, test)
        top = {user: tokens[row].tolist() for user, row in zip(users, rows, strict=True)}
    heldout: dict[str, list[str]] = {}
    for user, item in sorted(targets(test._dataset)):
        heldout.setdefault(user, []).append(item)
    return Scored(
        valid_scores,
        test_scores,
        top,
        heldout,
        count_degrees(targets(train._dataset) | histories(train._dataset)),
    )


@contextlib.contextmanager
def _texts_of(record: dict[str, Any]) -> Iterator[None]:
    """Give GaCLLM's constructor the run's own embeddings; no stage is ever started."""

    def load(options: GaCLLMConfig, data: TrainingData) -> TextLayers:
        folders = {stage: Path(folder) for stage, folder in record["artifacts"].items()}
        n_layers = len(list(folders["embeddings"].glob("layer_*.npy")))
        return TextLayers.load(folders, n_layers, options, data)

    with contextlib.ExitStack() as patches:
        for module in (recbole_gacllm.model, recbole_gacllm.text_knn):
            patches.enter_context(mock.patch.object(module, "prepare", load))
        yield


def _evaluate(trainer: Any, train: Any, valid: Any, part: Any) -> tuple[Scores, dict[str, float]]:
    recorder = Recorder()
    recorder.on_split(train, valid, part)
    recorder.on_trainer(trainer)
    result = trainer.evaluate(part, load_best_model=False, show_progress=False)
    users = recorder.users()
    scores = {
        # A user may have several rows, of sequential models.
        name: pd.Series(values, index=users).groupby(level=0, sort=True).mean()
        for name, values in recorder.values.items()
    }
    return scores, dict(result)


def _users(train: Any, valid: Any, test: Any) -> list[str]:
    recorder = Recorder()
    recorder.on_split(train, valid, test)
    return recorder.users()


def _collect_top(trainer: Any) -> list[Tensor]:
    """The best items of each evaluated row, filled while the trainer evaluates."""
    collected: list[Tensor] = []
    collect = trainer.eval_collector.eval_batch_collect

    def collecting(scores: Tensor, *others: Any) -> None:
        collected.append(scores.topk(min(N_RECOMMENDED, scores.shape[1] - 1)).indices.cpu())
        collect(scores, *others)

    trainer.eval_collector.eval_batch_collect = collecting
    return collected


def _require_same(expected: dict[str, float], found: dict[str, float]) -> None:
    for name, value in expected.items():
        if abs(found[name] - value) > _TOLERANCE:
            raise GaCLLMError(
                f"the checkpoint gives {name} {found[name]}, the run had {value}: data, code or "
                "packages have changed since"
            )
