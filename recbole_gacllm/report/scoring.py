"""A finished run's model, loaded again: every user's metrics and recommendations.

The counterpart of RecBole's ``load_data_and_model``, which would unpickle the checkpoint, run
GaCLLM's text stages and write log folders where the report is made. A run may be somebody else's:
its configuration comes from ``run.json``, its weights are read as tensors, its text embeddings come
from its artefacts, no pickle is read, and nothing is written or downloaded.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.utils import (
    EvaluatorType,
    InputType,
    ModelType,
    get_model,
    get_trainer,
    init_seed,
)
from torch import Tensor

import recbole_gacllm.model
import recbole_gacllm.text_knn
from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.artifacts.checkpoint import no_pickles, read_weights
from recbole_gacllm.compare.degrees import count_degrees
from recbole_gacllm.compare.job import Recorder, histories, targets
from recbole_gacllm.config import GaCLLMConfig, model_defaults
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inputs import TrainingData
from recbole_gacllm.plugin.registration import MODELS

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


def score(
    record: dict[str, Any], checkpoint: Path, folders: Mapping[str, Path], data_path: Path
) -> Scored:
    """Load a run's data and best weights, and rank all items for its test users.

    Args:
        record: The run's ``run.json``.
        checkpoint: Its checkpoint.
        folders: Stage -> folder of its artefacts.
        data_path: Folder of its data set.

    Raises:
        GaCLLMError: If data or weights are gone, or the model no longer gives the run's metrics.
    """
    if not data_path.is_dir():
        raise GaCLLMError(f"the data is gone: there is no {data_path}")
    with tempfile.TemporaryDirectory() as empty, no_pickles():
        config = _config_of(record, data_path, Path(empty))
        return _score(config, record, checkpoint, folders)


def _config_of(record: dict[str, Any], data_path: Path, empty: Path) -> Config:
    """The run's configuration as RecBole's class, which does not read it again.

    Its constructor would read the command line and other files, and might join a process group.

    Args:
        record: The run's ``run.json``.
        data_path: Folder of its data set.
        empty: Where RecBole looks for saved data sets and writes.
    """
    config = Config.__new__(Config)
    config._init_parameters_category()
    config.yaml_loader = config._build_yaml_loader()
    keys = dict(record["config"])
    if keys["model"] in MODELS:  # keys that are newer than the run
        keys = {**model_defaults(), **keys}
    kinds = {"MODEL_TYPE": ModelType, "MODEL_INPUT_TYPE": InputType, "eval_type": EvaluatorType}
    for key, kind in kinds.items():  # run.json has their text, such as ModelType.GENERAL
        if keys.get(key) is not None:
            keys[key] = kind[str(keys[key]).rpartition(".")[2]]
    keys |= {"show_progress": False, "log_wandb": False, "single_spec": True, "local_rank": 0}
    keys |= dict.fromkeys(("save_dataset", "save_dataloaders"), False)
    keys |= dict.fromkeys(("dataset_save_path", "dataloaders_save_path"))
    keys |= {"data_path": str(data_path), "checkpoint_dir": str(empty)}
    keys["device"] = torch.device("cuda" if _was_on_gpu(record) else "cpu")
    config.final_config_dict = keys
    config.model, config.dataset = keys["model"], keys["dataset"]
    return config


def _was_on_gpu(record: dict[str, Any]) -> bool:
    return str(record.get("device", "")).startswith("cuda") and torch.cuda.is_available()


def _score(
    config: Config, record: dict[str, Any], checkpoint: Path, folders: Mapping[str, Path]
) -> Scored:
    state, others = read_weights(checkpoint)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    with _texts_of(folders):
        model = get_model(config["model"])(config, train._dataset).to(config["device"])
    model.load_state_dict(state)
    model.load_other_parameter(_on(config["device"], others))
    with contextlib.chdir(config["checkpoint_dir"]):
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
def _texts_of(folders: Mapping[str, Path]) -> Iterator[None]:
    """Give GaCLLM's constructor the run's own embeddings; no stage is ever started."""

    def load(options: GaCLLMConfig, data: TrainingData) -> TextLayers:
        n_layers = len(list(folders["embeddings"].glob("layer_*.npy")))
        source = options.text_source
        return TextLayers.load(dict(folders), n_layers, source, data.graph, data.seed)

    with contextlib.ExitStack() as patches:
        for module in (recbole_gacllm.model, recbole_gacllm.text_knn):
            patches.enter_context(mock.patch.object(module, "prepare", load))
        yield


def _on(device: torch.device, value: Any) -> Any:
    """Another parameter on the model's device."""
    if isinstance(value, dict):
        return {key: _on(device, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on(device, item) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


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
