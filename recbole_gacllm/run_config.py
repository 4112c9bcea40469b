"""RecBole's configuration of any model, with what RecBole demands of it and the user left out."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recbole
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import ModelType, get_model, init_seed

from recbole_gacllm.config import HOOK_KEYS, MODELS, PEERS, GaCLLMConfig, dataset_file, load_yaml
from recbole_gacllm.data.atomic import read_header
from recbole_gacllm.inputs import TrainingData
from recbole_gacllm.literals import parse_yaml
from recbole_gacllm.plugin.key_checks import check_evaluation, check_given

_RECBOLE = Path(recbole.__file__).parent
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

    The dataset config comes first, then ``config_files``, then ``config_dict``, whose strings are
    read as RecBole reads its command line. Models that take item or user features keep RecBole's
    own choice of columns. For a split by time the times are loaded, unless the user says which
    columns are.

    Raises:
        ValueError: If the model or a config file is unknown, a value of a key is bad, or a split by
            time would have no times.
    """
    model_class = _find_model(model)
    files = [str(file) for file in config_files]
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"config_files: {file!r} is not a file.")
        load_yaml(file, f"config_files: {file!r}")
    overrides = dict(config_dict or {})
    external, internal = _external_and_internal(model, model_class, dataset, files, overrides)
    keys = {**internal, **external}
    is_ours = model in MODELS and model not in PEERS
    checked_elsewhere = internal if is_ours else HOOK_KEYS
    check_given(external, {k: v for k, v in internal.items() if k not in checked_elsewhere})
    check_evaluation(keys)
    _check_dataset(dataset, keys["data_path"])
    feature_models = (ModelType.CONTEXT, ModelType.DECISIONTREE, ModelType.KNOWLEDGE)
    takes_features = model_class.type in feature_models or "selected_features" in keys
    described = dataset_file(dataset, keys["data_path"])
    if described is not None and not takes_features:
        load_yaml(described, f"the data set's own file: {str(described)!r}")
        files.insert(0, str(described))
    elif "load_col" not in external:
        overrides.update(_columns(keys))
    cross_entropy = model_class.type == ModelType.SEQUENTIAL and keys.get("loss_type") == "CE"
    if "train_neg_sample_args" not in external and (model in NON_SAMPLING_MODELS or cross_entropy):
        overrides["train_neg_sample_args"] = None
    argv, sys.argv = sys.argv, sys.argv[:1]  # which ``Config`` reads, whatever program it is of
    try:
        config = Config(model=model, dataset=dataset, config_file_list=files, config_dict=overrides)
    finally:
        sys.argv = argv
    _check_columns(config)
    return config


def _find_model(model: str) -> Any:
    """The class of a model by its name."""
    try:
        return get_model(model)
    except (ValueError, ModuleNotFoundError) as error:
        # RecBole's search for an unknown name ends in an import of lightgbm.
        names = [path.stem for path in (_RECBOLE / "properties" / "model").glob("*.yaml")]
        if model in names and isinstance(error, ModuleNotFoundError):
            raise ValueError(
                f"model: {model!r} needs the package {error.name}, which is not installed."
            ) from error
        near = difflib.get_close_matches(model, [*MODELS, *names], n=3)
        raise ValueError(
            f"model: {model!r} is neither GaCLLM nor a model of RecBole (names are "
            f"case-sensitive); near names: {', '.join(near) or 'none'}."
        ) from error


def _check_dataset(dataset: str, data_path: str) -> None:
    """Refuse a data set that is neither on disk nor among those RecBole can download."""
    folders = (Path(data_path), _RECBOLE / "dataset_example")
    downloads = parse_yaml((_RECBOLE / "properties" / "dataset" / "url.yaml").read_text())
    local = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}
    if dataset in local | set(downloads):
        return
    inside = Path(data_path).resolve()
    if any(inside.glob(f"{dataset}.*inter")):
        raise ValueError(
            f"data_path: {data_path!r} holds the files of {dataset!r} themselves. RecBole reads "
            f"data_path/{dataset}/{dataset}.inter: give the folder above"
            + (
                f", --data_path={inside.parent}."
                if inside.name == dataset
                else f", and name this one {dataset!r}."
            )
        )
    near = difflib.get_close_matches(dataset, [*sorted(local), *downloads], n=3)
    raise ValueError(
        f"dataset: {dataset!r} is neither a folder of data_path ({data_path}) nor a data set "
        f"that RecBole downloads; near names: {', '.join(near) or 'none'}."
    )


def _columns(keys: dict[str, Any]) -> dict[str, Any]:
    """RecBole's own ``load_col``, which is ``user_id`` and ``item_id``, made to fit the other keys.

    It follows USER_ID_FIELD and ITEM_ID_FIELD, and takes the columns that a filter, a split by
    time or the rule ``recent`` need.
    """
    load_col = keys.get("load_col") or {}
    if "inter" not in load_col:
        return {}
    columns = [keys["USER_ID_FIELD"], keys["ITEM_ID_FIELD"]]
    by_time = keys["eval_args"].get("order") == "TO" or keys.get("neighbor_rule") == "recent"
    columns += [keys["TIME_FIELD"]] if by_time else []
    columns += [*(keys.get("val_interval") or {}), *(keys.get("threshold") or {})]
    return {"load_col": {**load_col, "inter": list(dict.fromkeys(columns))}}


def _check_columns(config: Config) -> None:
    """Refuse interaction files without the columns that the keys name: RecBole names no key."""
    load_col = (config["load_col"] or {"inter": "*"}).get("inter", [])
    parts = config["benchmark_filename"]
    if parts is not None and (not isinstance(parts, list) or len(parts) != 3):
        raise ValueError(
            f"benchmark_filename: {parts!r} must name three files, of training, validation and "
            f"test: [train, valid, test] for {config['dataset']}.train.inter and so on."
        )
    names = [f"{config['dataset']}.{part}.inter" for part in parts or []]
    for name in names or [f"{config['dataset']}.inter"]:
        file = Path(config["data_path"], name)
        if not file.is_file():
            if not Path(config["data_path"]).is_dir():
                return  # RecBole will download it
            raise ValueError(
                f"{file} is not there. The interactions of a data set lie in "
                "data_path/NAME/NAME.inter, or in the files that benchmark_filename names."
            )
        columns, _ = read_header(file, config["field_separator"], config["encoding"])
        _check_column_names(config, file, columns, load_col)
        lists = f"{config['ITEM_ID_FIELD']}{config['LIST_SUFFIX']}"
        if parts and config["MODEL_TYPE"] == ModelType.SEQUENTIAL and lists not in columns:
            raise ValueError(
                f"benchmark_filename: {file} has no column {lists!r}, and the sequential model "
                f"{config['model']} reads a user's history from there. Write the items before each "
                f"target into {lists}:token_seq, or leave benchmark_filename out and split by time."
            )


# What needs the column that a key names.
_USES = {
    "USER_ID_FIELD": "every run",
    "ITEM_ID_FIELD": "every run",
    "TIME_FIELD": "a split in order of time (eval_args' order: TO)",
    "val_interval": "the filter of its values",
    "threshold": "the making of labels",
    "normalize_field": "its scaling",
    "LABEL_FIELD": "a model or an evaluation of labels (or `threshold`, which makes them)",
}


def _check_column_names(
    config: Config, file: Path, columns: list[str], load_col: list[str] | str
) -> None:
    needs = [(key, config[key]) for key in ("USER_ID_FIELD", "ITEM_ID_FIELD")]
    if needs[0][1] == needs[1][1]:
        raise ValueError(
            f"USER_ID_FIELD and ITEM_ID_FIELD: both are {needs[0][1]!r}; each needs a column of "
            f"its own, {file} has {', '.join(columns)}."
        )
    if config["eval_args"]["order"] == "TO" and config["benchmark_filename"] is None:
        needs.append(("TIME_FIELD", config["TIME_FIELD"]))
    others = (names for source, names in (config["load_col"] or {}).items() if source != "inter")
    elsewhere = {name for names in others for name in names}
    for key in ("val_interval", "threshold", "normalize_field"):
        fields = [field for field in config[key] or {} if field not in elsewhere]
        needs += [(key, field) for field in fields if "*" not in elsewhere]
    by_label = "labeled" in config["eval_args"]["mode"].values() or (
        config["MODEL_TYPE"] in (ModelType.CONTEXT, ModelType.DECISIONTREE)
        and config["train_neg_sample_args"]["distribution"] == "none"
    )
    if by_label and not config["threshold"]:
        needs.append(("LABEL_FIELD", config["LABEL_FIELD"]))
    for key, field in needs:
        if field not in columns:
            raise ValueError(
                f"{key}: {field!r} is not a column of {file} ({', '.join(columns)}), and "
                f"{_USES[key]} needs it. Set {key} to the column that is meant, or rename it."
            )
        if load_col != "*" and field not in load_col:
            raise ValueError(
                f"load_col: {load_col} of the .inter file are without {field!r}, and {_USES[key]} "
                "needs it. Load it, with a file for config_files that holds "
                f"load_col: {{inter: [{', '.join([*load_col, str(field)])}]}}."
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
    probe.cmd_config_dict = {}
    probe._merge_external_config_dict()
    probe.model, probe.model_class, probe.dataset = model, model_class, dataset
    probe._load_internal_config_dict(model, model_class, dataset)
    return dict(probe.external_config_dict), dict(probe.internal_config_dict)


def training_data(
    dataset: str,
    config_files: Sequence[str | Path] = (),
    config_dict: dict[str, Any] | None = None,
) -> tuple[GaCLLMConfig, TrainingData]:
    """Options and training split that a run of GaCLLM has, without its model.

    Raises:
        ValueError: As :func:`build_config`.
    """
    config = build_config("GaCLLM", dataset, config_files, config_dict)
    init_seed(config["seed"], config["reproducibility"])
    train_data, _, _ = data_preparation(config, create_dataset(config))
    options = GaCLLMConfig.from_mapping(config.final_config_dict)
    return options, TrainingData.from_recbole(config, train_data._dataset)
