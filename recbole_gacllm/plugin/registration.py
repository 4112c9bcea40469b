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
    HOOK_KEYS,
    MODELS,
    PEERS,
    SPLIT_KEYS,
    GaCLLMConfig,
    check_keys,
    checked,
    dataset_defaults,
    model_defaults,
    of_any_model,
    text_defaults,
)
from recbole_gacllm.plugin.import_hooks import after_import, alias_module, replaces

_GENERAL = "recbole.model.general_recommender"
#: Module of RecBole -> what changes its classes after its import, in that order. By name: importing
#: this package must not load PyTorch, which the children of the stages do without.
CHANGES: dict[str, tuple[str, ...]] = {
    "recbole.config.configurator": ("registration:extend_config",),
    "recbole.sampler.sampler": ("fast:add_to_sampler",),
    "recbole.data.dataset.sequential_dataset": ("fast:add_to_sequences",),
    "recbole.data.dataloader.abstract_dataloader": ("fast:add_to_loader",),
    "recbole.data.dataloader.general_dataloader": (
        "fast:add_to_general_loaders",
        "history:add_to_loaders",
    ),
    "recbole.evaluator.collector": ("fast:add_to_collector",),
    "recbole.evaluator.metrics": ("fast:add_to_metrics",),
    "recbole.trainer.trainer": ("fast:add_to_trainer", "splits:add_to_trainer"),
    **{
        f"{_GENERAL}.{name}": ("fast_graph:add_to_model",)
        for name in ("lightgcn", "ngcf", "ncl", "sgl", "dgcf", "neumf")
    },
    "recbole.model.abstract_recommender": (".peers.text_init:add_to_models",),
    "recbole.data.dataset.dataset": (
        *("splits:add_to_dataset", "history:add_to_dataset", ".data.checks:add_to"),
    ),
}


def register() -> None:
    """Make ``recbole``'s ``Config``, ``get_model`` and all that use them know GaCLLM; idempotent.

    After it ``recbole.quick_start.run_recbole(model="GaCLLM", dataset="ml-100k")`` works, and with
    it ``HyperTuning``, ``objective_function``, ``load_data_and_model`` and ``run(..., nproc=2)``.
    ``save_dataset`` and ``save_dataloaders`` work with RecBole's limits: loaders are reused without
    looking at batch sizes or negative sampling. Save them per setting, or not at all.
    """
    for model, module in MODELS.items():
        alias_module(f"{_GENERAL}.{model.lower()}", module)
    for name in CHANGES:
        after_import(name, _change)


def _change(module: ModuleType) -> None:
    for change in CHANGES[module.__name__]:
        name, function = change.split(":")
        ours = importlib.import_module(f".{name}", __package__)
        getattr(ours, function)(module)


def extend_config(configurator: ModuleType) -> None:
    """Layer and check the configuration of our models; of others only ``SPLIT_KEYS``.

    For ours the layers are, each over the one before: RecBole's ``overall.yaml``;
    ``GaCLLM.yaml`` with the preset; RecBole's ``sample.yaml`` and data set yaml; our data set
    config; what the user gives.
    """
    # They load PyTorch.
    splits, history = (importlib.import_module(f".{n}", __package__) for n in ("splits", "history"))
    # RecBole reuses saved data sets and loaders only where these keys are the same.
    configurator.dataset_arguments.extend(SPLIT_KEYS)

    @replaces(configurator.Config, "_load_internal_config_dict")
    def _load_internal_config_dict(original: Any, self: Any, model: str, *args: Any) -> None:
        external, load = self.external_config_dict, functools.partial(original, self, model, *args)
        if model in MODELS:
            others = [key for keys in self.parameters.values() for key in keys]
            check_keys(external, others, model)
            _load_layers(self, model, load)
        elif external.get("text_init"):
            _load_layers(self, model, load)
        else:
            load()

    @replaces(configurator.Config, "__init__")
    def construct(original: Any, self: Any, *args: Any, **keys: Any) -> None:
        original(self, *args, **keys)
        if self.model in MODELS or self["text_init"]:
            _check(self)
        else:
            of_any_model(self, "n_threads", None)
        splits.check(self)
        history.check(self)


def _load_layers(config: Any, model: str, load_internal: functools.partial[None]) -> None:
    """Fill ``config.internal_config_dict`` with all layers below the user's."""
    external = config.external_config_dict
    takes_all = model in MODELS and model not in PEERS
    preset = external.get("preset")
    defaults = model_defaults(preset) if takes_all else text_defaults(preset, model)
    if takes_all:  # what the user gives wins
        few = defaults["few_interactions"]
        defaults["few_interactions"] = {key: few[key] for key in few if key not in external}
    load_file = config._update_internal_config_dict

    def load_file_and_defaults(file: str) -> Any:
        keys = load_file(file)
        if Path(file).name == "overall.yaml":
            config.internal_config_dict.update(defaults)
        return keys

    config._update_internal_config_dict = load_file_and_defaults
    try:
        load_internal()
    finally:
        del config._update_internal_config_dict  # the class's method again; Config gets pickled

    internal = config.internal_config_dict
    ours = dataset_defaults(config.dataset, external.get("data_path", internal["data_path"]))
    if model not in MODELS:  # what RecBole loads for it stays
        ours = {key: value for key, value in ours.items() if key in HOOK_KEYS}
    internal.update(ours)
    # As RecBole does with its own data set yaml: a saved data set is reused only if these agree.
    compared = config.parameters["Dataset"]
    compared += [key for key in ours if key not in compared and key not in defaults]
    if takes_all and external.get("loss_type", internal["loss_type"]) == "SSM":
        # The model draws the negatives of SSM itself; what the user sets stands.
        internal["train_neg_sample_args"] = None


def _check(config: Any) -> None:
    """Refuse bad values before any data is loaded.

    Raises:
        ValueError: Names the key, the value, what is allowed and the next step.
    """
    keys, model = config.final_config_dict, config.model
    if model not in MODELS or model in PEERS:
        GaCLLMConfig.of_hook(keys)
        for key in text_defaults(model=model).keys() & GaCLLMConfig.__annotations__.keys():
            checked(key, keys[key])
        _check_text_init(config)
        return
    options = GaCLLMConfig.from_mapping(keys)
    _check_text_init(config)
    if options.loss_type == "BPR" and config["train_neg_sample_args"]["distribution"] == "none":
        raise ValueError(
            "train_neg_sample_args: None does not go with loss_type: BPR, which compares each item "
            "with a negative one. Leave train_neg_sample_args out (uniform negatives), or set "
            "loss_type: SSM."
        )


def _check_text_init(config: Any) -> None:
    """Refuse ``text_init`` where it cannot be; whether there is a table is known with the model."""
    if not config["text_init"]:
        return
    if config["model"] in MODELS:
        raise ValueError(
            f"text_init: True is for models that read no texts, and {config['model']} reads them "
            "itself. Leave it out."
        )
    if (kind := config["MODEL_TYPE"].name) not in ("GENERAL", "SEQUENTIAL"):
        raise ValueError(
            f"text_init: True does not go with {config['model']}, a {kind.lower()} model: it is "
            "for general and sequential models with embeddings of items or users. Leave it out."
        )
