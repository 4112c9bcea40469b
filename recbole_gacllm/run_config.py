"""RecBole's configuration of any model, with what RecBole demands of it and the user left out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recbole
import yaml
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import ModelType, get_model, init_seed

from recbole_gacllm.config import GaCLLMConfig, shipped_path
from recbole_gacllm.data import TrainingData
from recbole_gacllm.registration import MODELS

_RECBOLE = Path(recbole.__file__).parent
_MAX_SEED = 2**32 - 1  # numpy's
# RecBole's documentation of each: "this model is a non-sampling model, so you must set
# train_neg_sample_args=None when you run this model".
NON_SAMPLING_MODELS = frozenset(
    {"CDAE", "DiffRec", "ENMF", "LDiffRec", "MacridVAE", "MultiDAE", "MultiVAE", "RaCT", "RecVAE"}
)


def build_config(
    model: str,
    dataset: str,
    config_files: Sequence[str | Path] = (),
    config_dict: dict[str, Any] | None = None,
) -> Config:
    """RecBole's configuration of any model, on the data as our dataset config describes it.

    The dataset config comes first, then ``config_files``, ``config_dict`` and the command line.
    Models that take item or user features keep RecBole's own choice of columns. For a split by time
    the times are loaded, unless the user says which columns are.

    Raises:
        ValueError: If the model or a config file is unknown, a value of a key is bad, or a split by
            time would have no times.
    """
    model_class = _find_model(model)
    files = [str(file) for file in config_files]
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"config_files: {file!r} is not a file.")
        _check_yaml(file)
    overrides = dict(config_dict or {})
    given, defaults = _external_and_internal(model, model_class, dataset, files, overrides)
    if model not in MODELS:  # whose keys GaCLLMConfig checks
        _check_numbers(given, defaults)
    seed = {**defaults, **given}["seed"]
    if type(seed) is not int or not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"seed: {seed!r} must be a whole number from 0 to {_MAX_SEED}.")
    _check_dataset(dataset, {**defaults, **given}["data_path"])
    takes_features = model_class.type in (
        ModelType.CONTEXT,
        ModelType.DECISIONTREE,
        ModelType.KNOWLEDGE,
    ) or "selected_features" in {**defaults, **given}
    shipped = shipped_path("dataset_configs", f"{dataset}.yaml")
    if shipped.is_file() and not takes_features:
        files.insert(0, str(shipped))
    elif "load_col" not in given:
        overrides.update(_columns_with_times({**defaults, **given}))
    cross_entropy = (
        model_class.type == ModelType.SEQUENTIAL and {**defaults, **given}.get("loss_type") == "CE"
    )
    if "train_neg_sample_args" not in given and (model in NON_SAMPLING_MODELS or cross_entropy):
        overrides["train_neg_sample_args"] = None
    config = Config(model=model, dataset=dataset, config_file_list=files, config_dict=overrides)
    _check_times(config)
    return config


def _check_numbers(given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse words in the place of the numbers and switches of a model's defaults."""
    for key, value in given.items():
        default = defaults.get(key)
        if isinstance(default, bool):
            good, kind = value in (True, False), "True or False"
        elif isinstance(default, int | float):
            good, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        else:
            continue
        if not good:
            raise ValueError(f"{key}: {value!r} is a {type(value).__name__}; it must be {kind}.")


def _check_yaml(file: str) -> None:
    """Refuse a file that holds no keys, with the place of the mistake."""
    try:
        content = yaml.safe_load(Path(file).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config_files: {file!r} is not yaml in UTF-8: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"config_files: {file!r} holds no lines of the form 'key: value'.")


def _find_model(model: str) -> Any:
    """The class of a model by its name."""
    try:
        return get_model(model)
    except (ValueError, ModuleNotFoundError) as error:
        # RecBole's search for an unknown name ends in an import of lightgbm.
        known = [path.stem for path in (_RECBOLE / "properties" / "model").glob("*.yaml")]
        if model in known and isinstance(error, ModuleNotFoundError):
            raise ValueError(
                f"model: {model!r} needs the package {error.name}, which is not installed."
            ) from error
        near = difflib.get_close_matches(model, [*MODELS, *known], n=3)
        raise ValueError(
            f"model: {model!r} is neither GaCLLM nor a model of RecBole (names are "
            f"case-sensitive); near names: {', '.join(near) or 'none'}."
        ) from error


def _check_dataset(dataset: str, data_path: str) -> None:
    """Refuse a data set that is neither on disk nor among those RecBole can download."""
    folders = (Path(data_path), _RECBOLE / "dataset_example")
    listed = yaml.safe_load((_RECBOLE / "properties" / "dataset" / "url.yaml").read_text())
    local = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}
    if dataset not in local | set(listed):
        near = difflib.get_close_matches(dataset, [*sorted(local), *listed], n=3)
        raise ValueError(
            f"dataset: {dataset!r} is neither a folder of data_path ({data_path}) nor a data set "
            f"that RecBole downloads; near names: {', '.join(near) or 'none'}."
        )


def _columns_with_times(keys: dict[str, Any]) -> dict[str, Any]:
    """RecBole's own ``load_col``, which is users and items only, with times for a split by them."""
    load_col, time = keys.get("load_col") or {}, keys.get("TIME_FIELD")
    columns = load_col.get("inter")
    if keys["eval_args"].get("order") != "TO" or columns is None or time in columns:
        return {}
    return {"load_col": {**load_col, "inter": [*columns, time]}}


def _check_times(config: Config) -> None:
    """Refuse a split by time without the column of times: RecBole's error names no key."""
    if config["eval_args"]["order"] != "TO":
        return
    columns, time = (config["load_col"] or {}).get("inter"), config["TIME_FIELD"]
    if columns is not None and time not in columns:
        raise ValueError(
            f"load_col: {columns} of the .inter file are without TIME_FIELD {time!r}, and a split "
            "in order of time (eval_args' order: TO) needs it. Load it, with a file for "
            f"config_files that holds load_col: {{inter: [{', '.join([*columns, str(time)])}]}}."
        )
    file = Path(config["data_path"], f"{config['dataset']}.inter")
    if file.is_file():
        with file.open(encoding=config["encoding"] or "utf-8") as lines:
            header = lines.readline().rstrip("\n").split(config["field_separator"])
        names = [column.partition(":")[0] for column in header]
        if time not in names:
            raise ValueError(
                f"TIME_FIELD: {time!r} is not a column of {file} ({', '.join(names)}), and a split "
                "in order of time (eval_args' order: TO) needs it. Name the column of times, or "
                "split at random (order: RO)."
            )


def _external_and_internal(
    model: str, model_class: Any, dataset: str, files: list[str], config_dict: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the user gave, and RecBole's defaults, as RecBole merges them.

    A whole ``Config`` cannot be asked: it refuses SASRec before we can set what SASRec demands, and
    it starts process groups.
    """
    probe = Config.__new__(Config)
    probe.compatibility_settings()
    probe._init_parameters_category()
    probe.yaml_loader = probe._build_yaml_loader()
    probe.file_config_dict = probe._load_config_files(files)
    probe.variable_config_dict = probe._load_variable_config_dict(dict(config_dict))
    probe.cmd_config_dict = probe._load_cmd_line()
    probe._merge_external_config_dict()
    probe.model, probe.model_class, probe.dataset = model, model_class, dataset
    probe._load_internal_config_dict(model, model_class, dataset)
    return dict(probe.external_config_dict), dict(probe.internal_config_dict)


def training_data(
    dataset: str, config_files: Sequence[str | Path] = ()
) -> tuple[GaCLLMConfig, TrainingData]:
    """Options and training split that a run of GaCLLM has, without its model.

    Raises:
        ValueError: As :func:`build_config`.
    """
    config = build_config("GaCLLM", dataset, config_files)
    init_seed(config["seed"], config["reproducibility"])
    train_data, _, _ = data_preparation(config, create_dataset(config))
    options = GaCLLMConfig.from_mapping(config.final_config_dict)
    return options, TrainingData.from_recbole(config, train_data._dataset)
