"""GaCLLM in RecBole's look-ups, so that every way into RecBole knows it by name.

RecBole finds a model by the module ``recbole.model.<kind>.<name>`` and its defaults in its own
folder. So our model module answers to such a name, and ``Config`` gets our layers of defaults.
``get_trainer`` and ``create_dataset`` find nothing of ours and take RecBole's general ones, which
is what we want.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from recbole_gacllm.config import (
    MODELS,
    SPLIT_KEYS,
    GaCLLMConfig,
    check_keys,
    dataset_defaults,
    model_defaults,
)
from recbole_gacllm.plugin.import_hooks import after_import, alias_module

_GENERAL = "recbole.model.general_recommender"
#: Modules of RecBole whose classes get the fast paths of ``fast.py`` (key ``fast_paths``).
FAST_MODULES = (
    "recbole.sampler.sampler",
    "recbole.data.dataloader.abstract_dataloader",
    "recbole.data.dataloader.general_dataloader",
    "recbole.evaluator.collector",
    "recbole.evaluator.metrics",
    "recbole.trainer.trainer",
    *(f"{_GENERAL}.{name}" for name in ("lightgcn", "ngcf", "ncl", "sgl", "dgcf", "neumf")),
)
#: Those whose classes get the keys of ``splits.py``.
SPLIT_MODULES = ("recbole.data.dataset.dataset", "recbole.trainer.trainer")


def register() -> None:
    """Make ``recbole``'s ``Config``, ``get_model`` and all that use them know GaCLLM; idempotent.

    After it ``recbole.quick_start.run_recbole(model="GaCLLM", dataset="ml-100k")`` works, and with
    it ``HyperTuning``, ``objective_function``, ``load_data_and_model`` and ``run(..., nproc=2)``.

    Note:
        ``save_dataset`` and ``save_dataloaders`` work as for every RecBole model, with RecBole's
        limits: a saved data set is reused when the data set keys, ``seed`` and ``repeatable`` are
        the same; saved data loaders are reused without looking at batch sizes or negative
        sampling, and the run that saves them shuffles differently from a run that does not. Save
        them per setting, or not at all.
    """
    for model, module in MODELS.items():
        alias_module(f"{_GENERAL}.{model.lower()}", module)
    after_import("recbole.config.configurator", _extend_config)
    for name in FAST_MODULES:
        after_import(name, _add_fast_paths)
    for name in SPLIT_MODULES:
        after_import(name, _add_splits)
    after_import(SPLIT_MODULES[0], _add_checks)


def _add_fast_paths(module: ModuleType) -> None:
    """Here and not at the head: importing this package must not load PyTorch."""
    importlib.import_module("recbole_gacllm.plugin.fast").add_to(module)


def _add_splits(module: ModuleType) -> None:
    """As :func:`_add_fast_paths`."""
    importlib.import_module("recbole_gacllm.plugin.splits").add_to(module)


def _add_checks(module: ModuleType) -> None:
    """As :func:`_add_fast_paths`; after the splits, so that they are seen."""
    importlib.import_module("recbole_gacllm.data.checks").add_to(module)


def _extend_config(configurator: ModuleType) -> None:
    """Layer and check the configuration of our models; of others only the keys of ``splits.py``.

    For ours the layers are, each over the one before: RecBole's ``overall.yaml``;
    ``GaCLLM.yaml`` with the preset; RecBole's ``sample.yaml`` and data set yaml; our data set
    config; what the user gives.
    """
    splits = importlib.import_module("recbole_gacllm.plugin.splits")  # not at the head, as fast
    # RecBole reuses saved data sets and loaders only where these keys are the same.
    configurator.dataset_arguments.extend(SPLIT_KEYS)
    config_class = configurator.Config
    load_internal, init = config_class._load_internal_config_dict, config_class.__init__

    @functools.wraps(load_internal)
    def _load_internal_config_dict(self: Any, model: str, model_class: Any, dataset: str) -> None:
        if model in MODELS:
            _load_layers(self, functools.partial(load_internal, self, model, model_class, dataset))
        else:
            load_internal(self, model, model_class, dataset)

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.model in MODELS:
            _check(self)
        splits.check(self)

    config_class._load_internal_config_dict = _load_internal_config_dict
    config_class.__init__ = construct


def _load_layers(config: Any, load_internal: functools.partial[None]) -> None:
    """Fill ``config.internal_config_dict`` with all layers below the user's."""
    external = config.external_config_dict
    check_keys(external, [key for keys in config.parameters.values() for key in keys])
    defaults = model_defaults(external.get("preset"))
    load_file = config._update_internal_config_dict

    def load_file_and_defaults(file: str) -> Any:
        loaded = load_file(file)
        if Path(file).name == "overall.yaml":
            config.internal_config_dict.update(defaults)
        return loaded

    config._update_internal_config_dict = load_file_and_defaults
    try:
        load_internal()
    finally:
        del config._update_internal_config_dict  # the class's method again; Config gets pickled

    internal = config.internal_config_dict
    ours = dataset_defaults(config.dataset)
    internal.update(ours)
    # As RecBole does with its own data set yaml: a saved data set is reused only if these agree.
    compared = config.parameters["Dataset"]
    compared += [key for key in ours if key not in compared and key not in defaults]
    if external.get("loss_type", internal["loss_type"]) == "SSM":
        # The model draws the negatives of SSM itself; what the user sets stands.
        internal["train_neg_sample_args"] = None


def _check(config: Any) -> None:
    """Refuse bad values before any data is loaded.

    Raises:
        ValueError: Names the key, the value, what is allowed and the next step.
    """
    options = GaCLLMConfig.from_mapping(config.final_config_dict)
    if options.loss_type == "BPR" and config["train_neg_sample_args"]["distribution"] == "none":
        raise ValueError(
            "train_neg_sample_args: None does not go with loss_type: BPR, which compares each item "
            "with a negative one. Leave train_neg_sample_args out (uniform negatives), or set "
            "loss_type: SSM."
        )
