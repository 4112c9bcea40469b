"""A finished run's data and model, loaded again: for the report, and for whoever asks the model.

The counterpart of RecBole's ``load_data_and_model``, which would unpickle the checkpoint, run
GaCLLM's text stages and write log folders where it is called. A run may be somebody else's: its
configuration comes from ``run.json``, its weights are read as tensors, its text embeddings come
from its artefacts, no pickle is read, and nothing is written or downloaded.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import EvaluatorType, InputType, ModelType, get_model, get_trainer, init_seed
from torch import Tensor

from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.artifacts.checkpoint import no_pickles, read_weights
from recbole_gacllm.artifacts.locate import RunFiles
from recbole_gacllm.config import MODELS, GaCLLMConfig, model_defaults, text_defaults
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inputs import TrainingData


@dataclass(frozen=True)
class OpenRun:
    """A run as it stood after its best epoch."""

    files: RunFiles
    config: Config  # RecBole's; ``checkpoint_dir`` is a folder that is no longer there
    train: Any  # RecBole's data loaders, on the run's own split
    valid: Any
    test: Any
    model: Any  # with the best weights, on ``config["device"]``


def open_run(files: RunFiles) -> OpenRun:
    """Load a run's data and best weights; nothing of its folder is executed.

    Raises:
        ValueError: If its record is not whole.
        GaCLLMError: If data or weights are gone, or something asks for a pickle.
    """
    files.require_whole()
    checkpoint, data_path = files.checkpoint(), files.data_path()
    if not data_path.is_dir():
        raise GaCLLMError(f"the data is gone: there is no {data_path}")
    state, others = read_weights(checkpoint)
    folders = files.artifacts()

    def stored_texts(options: GaCLLMConfig, data: TrainingData) -> TextLayers:
        n_layers = len(list(folders["embeddings"].glob("layer_*.npy")))
        return TextLayers.load(
            *(folders, n_layers, options.text_source, data.graph, data.seed), options.text_users
        )

    # RecBole looks for saved data sets in the folder of the checkpoints.
    with tempfile.TemporaryDirectory() as empty, no_pickles():
        config = _config_of(files.record, str(data_path), empty)
        init_seed(config["seed"], config["reproducibility"])
        train, valid, test = data_preparation(config, create_dataset(config))
        name = config["model"]
        with_texts = name in MODELS or config["text_init"]
        texts_of = {"texts_of": stored_texts} if with_texts else {}
        model = get_model(name)(config, train._dataset, **texts_of).to(config["device"])
    model.load_state_dict(state)
    model.load_other_parameter(_on(config["device"], others))
    return OpenRun(files, config, train, valid, test, model)


def trainer_of(run: OpenRun) -> Any:
    """RecBole's trainer of a run, to evaluate with; the folders it makes are gone."""
    trainer_class = get_trainer(run.config["MODEL_TYPE"], run.config["model"])
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), no_pickles():
        run.config["checkpoint_dir"] = folder
        trainer = trainer_class(run.config, run.model)
        trainer.tensorboard.close()
    return trainer


def _config_of(record: dict[str, Any], data_path: str, checkpoint_dir: str) -> Config:
    """The run's configuration as RecBole's class, which does not read it again.

    Its constructor would read the command line and other files, and might join a process group.
    """
    config = Config.__new__(Config)
    config._init_parameters_category()
    config.yaml_loader = config._build_yaml_loader()
    keys = dict(record["config"])
    if keys.get("ssm_temperature") is None:  # once a rule of training, which ended with it
        keys.pop("ssm_temperature", None)
    if keys["model"] in MODELS:  # keys newer than the run, which no preset of its time set
        keys = {**model_defaults("paper"), **keys}
    elif keys.get("text_init"):
        keys = {**text_defaults("paper"), **keys}
    kinds = {"MODEL_TYPE": ModelType, "MODEL_INPUT_TYPE": InputType, "eval_type": EvaluatorType}
    for key, kind in kinds.items():  # run.json has their text, such as ModelType.GENERAL
        if keys.get(key) is not None:
            keys[key] = kind[str(keys[key]).rpartition(".")[2]]
    keys |= {"show_progress": False, "log_wandb": False, "single_spec": True, "local_rank": 0}
    keys |= dict.fromkeys(("save_dataset", "save_dataloaders"), False)
    keys |= dict.fromkeys(("dataset_save_path", "dataloaders_save_path"))
    keys |= {"data_path": data_path, "checkpoint_dir": checkpoint_dir}
    was_on_gpu = str(record["device"]).startswith("cuda") and torch.cuda.is_available()
    keys["device"] = torch.device("cuda" if was_on_gpu else "cpu")
    config.final_config_dict = keys
    config.model, config.dataset = keys["model"], keys["dataset"]
    return config


def _on(device: torch.device, value: Any) -> Any:
    """Another parameter on the model's device."""
    if isinstance(value, dict):
        return {key: _on(device, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on(device, item) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value
