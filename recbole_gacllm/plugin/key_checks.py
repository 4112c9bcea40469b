"""The door for keys: what a user gave is checked before RecBole builds anything, for any model.

RecBole takes any key without a word, reads values as they come, and tells some mistakes by a
traceback hours later. Ours are checked by :mod:`.config`; this is for RecBole's.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import recbole
import yaml

from recbole_gacllm.config import GaCLLMConfig, shipped_path

_RECBOLE = Path(recbole.__file__).parent
# Keys of earlier releases of RecBole, which 1.2.1 takes and does not read.
_FORMER = {
    "eval_setting": "eval_args",
    "split_ratio": "eval_args",
    "leave_one_num": "eval_args",
    "group_by_user": "eval_args",
    "neg_sampling": "train_neg_sample_args",
    "training_neg_sample_num": "train_neg_sample_args",
    "lowest_val": "val_interval",
    "highest_val": "val_interval",
    "min_user_inter_num": "user_inter_num_interval",
    "max_user_inter_num": "user_inter_num_interval",
    "min_item_inter_num": "item_inter_num_interval",
    "max_item_inter_num": "item_inter_num_interval",
}
_OTHER_NAMES = {"hr": "Hit", "hitratio": "Hit", "hitrate": "Hit", "prec": "Precision"}
_EVAL_ARGS = (
    "{split: {RS: [0.8, 0.1, 0.1]}, order: RO, group_by: user, mode: full} (split also LS: "
    "valid_and_test, valid_only or test_only; order also TO; mode also uni100, pop100, labeled)"
)
_NUMBER = r"\s*[-+]?(?:inf|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)\s*"
_INTERVAL = re.compile(rf"\s*[\[(]({_NUMBER}),({_NUMBER})[\])]\s*")
_LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam")  # any other is Adam
_MAX_SEED = 2**32 - 1  # numpy's
_MAY_BE_ZERO = ("epochs", "worker", "stopping_step", "seed", "eval_step", "loss_decimal_place")
_NO_INTERVAL = "is no interval. Write [3,inf), [1,5] or (0,4], several with ';' between them."


def _is_interval(value: Any) -> bool:
    matches = [_INTERVAL.fullmatch(part) for part in str(value).split(";")]
    return all(match and float(match[1]) <= float(match[2]) for match in matches)


def _are_columns(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(names, list) or names in ("*", None) for names in value.values()
    )


#: Key -> whether a value is one that RecBole reads, and what is said of one that is not.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learner": (
        lambda value: str(value).lower() in _LEARNERS,
        f"is not one of {', '.join(_LEARNERS)}. Set one of these.",
    ),
    "user_inter_num_interval": (_is_interval, _NO_INTERVAL),
    "item_inter_num_interval": (_is_interval, _NO_INTERVAL),
    "entity_kg_num_interval": (_is_interval, _NO_INTERVAL),
    "relation_kg_num_interval": (_is_interval, _NO_INTERVAL),
    "rm_dup_inter": (
        lambda value: value in ("first", "last"),
        "is not allowed; of interactions that repeat it keeps the first or the last.",
    ),
    "load_col": (
        _are_columns,
        "must be the columns of each file, such as "
        "--load_col=\"{'inter': ['user_id', 'item_id']}\" or {'inter': '*'}, words in quotes.",
    ),
    "threshold": (
        lambda value: isinstance(value, dict),
        "must be a field and the least value that is liked, such as --threshold=\"{'rating': 4}\".",
    ),
    "val_interval": (
        lambda value: (
            isinstance(value, dict)
            and all(_is_interval(part) for part in value.values() if isinstance(part, str))
        ),
        "must be a field and its interval, such as --val_interval=\"{'rating': '[3,inf)'}\"; "
        "others are [1,5] or (0,4], several with ';' between them.",
    ),
}


@functools.cache
def known_keys() -> frozenset[str]:
    """All keys that RecBole, any of its models or this package reads."""
    keys = {f.name for f in dataclasses.fields(GaCLLMConfig)}
    keys |= {"nproc", "model", "dataset", "config_files", "quiet", "verbose"}
    for file in _RECBOLE.rglob("*.py"):
        source = file.read_text("utf-8")
        keys |= set(re.findall(r"config(?:_dict)?\[\s*[\"'](\w+)[\"']", source))
        keys |= set(re.findall(r"[\"'](\w+)[\"'] (?:not )?in (?:self\.)?(?:final_)?config", source))
        if file.name == "argument_list.py":
            keys |= set(re.findall(r"'(\w+)'", source))
    ours = shipped_path("properties", "model").glob("*.yaml")
    for file in (*(_RECBOLE / "properties").rglob("*.yaml"), *ours):
        if not file.name.endswith("url.yaml"):
            keys |= set(yaml.safe_load(file.read_text("utf-8")) or {})
    return frozenset(keys)


def check_given(keys: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Refuse keys that nobody reads, and values that RecBole would misread or fail on later.

    Args:
        keys: What the user gave: files, dictionary and command line, as RecBole merges them.
        defaults: Of the model, beside those of RecBole for any model; none of GaCLLM's, which
            :class:`.config.GaCLLMConfig` checks.

    Raises:
        ValueError: Names the key, the value, what is allowed and the next step.
    """
    for key in keys:
        _check_name(key)
    _check_types(keys, defaults or {})
    for key, (is_read, message) in _VALUES.items():
        if keys.get(key) is not None and not is_read(keys[key]):
            raise ValueError(f"{key}: {keys[key]!r} {message}")


def _check_name(key: str) -> None:
    if key in _FORMER:
        raise ValueError(
            f"unknown key {key!r}: RecBole 1.2.1 does not read it any more; set {_FORMER[key]}"
            f"{', such as ' + _EVAL_ARGS if _FORMER[key] == 'eval_args' else ''}."
        )
    if key in known_keys() or key.startswith("alias_of_"):
        return
    near = difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}?" if near else "it has no near match."
    raise ValueError(
        f"unknown key {key!r}: {hint} Neither RecBole, any of its models nor this package reads it."
    )


@functools.cache
def _defaults() -> dict[str, Any]:
    """RecBole's keys for any model, with their default values."""
    defaults: dict[str, Any] = {}
    for file in ("overall.yaml", "dataset/sample.yaml"):
        defaults |= yaml.safe_load((_RECBOLE / "properties" / file).read_text("utf-8"))
    return defaults


def _check_types(keys: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """A key whose default is a number or a switch takes nothing else."""
    names = {bool: "True or False", int: "a whole number", float: "a number"}
    for key, value in keys.items():
        of_any_model = _defaults().get(key)
        kind = type(defaults.get(key) if of_any_model is None else of_any_model)
        if value is None or kind not in names:
            continue
        if kind is int and of_any_model is None:
            kind = float  # a model's weight of 1 may be .5 as well
        least = 0 if kind is float or key in _MAY_BE_ZERO else 1
        allowed = None
        is_kind = isinstance(value, (kind, int) if kind is float else kind)
        if not is_kind or (kind is not bool and isinstance(value, bool)):
            allowed = names[kind]
        elif kind is not bool and of_any_model is not None and value < least:
            allowed = f"{least} or more"
        elif key == "seed" and value > _MAX_SEED:
            allowed = f"from 0 to {_MAX_SEED}"
        if allowed is not None:
            raise ValueError(f"{key}: {value!r} is not allowed; it must be {allowed}.")


def check_evaluation(keys: Mapping[str, Any]) -> None:
    """Check how a run splits and ranks: ``eval_args``, ``metrics``, ``topk``, ``valid_metric``.

    Args:
        keys: Everything that is set, defaults included, before RecBole changes it.

    Raises:
        ValueError: Names the key, the value, what is allowed and the next step.
    """
    from recbole.evaluator.register import metric_types, metrics_dict

    cutoffs = keys["topk"] if isinstance(keys["topk"], list) else [keys["topk"]]
    if not cutoffs or any(type(k) is not int or k < 1 for k in cutoffs):
        raise ValueError(
            f"topk: {keys['topk']!r} is not allowed; give a whole number above 0 or a list of "
            'them, such as --topk="[5,10]".'
        )
    metrics = keys["metrics"]
    names = [metrics] if isinstance(metrics, str) else metrics
    if isinstance(metrics, str) and metrics.lower() not in metric_types and "," in metrics:
        quoted = ",".join(f"'{name.strip()}'" for name in metrics.split(","))
        raise ValueError(f'metrics: {metrics!r} is one name; a list is --metrics="[{quoted}]".')
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"metrics: {metrics!r} must be a list of names, such as ['Recall','NDCG']."
        )
    proper = {metric.__name__.lower(): metric.__name__ for metric in metrics_dict.values()}
    for name in names:
        if name.lower() not in metric_types:
            folded = re.sub(r"[^a-z]", "", name.lower())
            near = difflib.get_close_matches(folded, metric_types, n=1)
            likely = _OTHER_NAMES.get(folded) or (proper[near[0]] if near else None)
            raise ValueError(
                f"metrics: there is no {name!r}{f'; did you mean {likely}?' if likely else ';'} "
                f"Allowed: {', '.join(sorted(proper.values()))}."
            )
    kinds = {metric_types[name.lower()].name for name in names}
    by_value = sorted(n for n, kind in metric_types.items() if kind.name == "VALUE")
    if len(kinds) > 1:
        raise ValueError(
            f"metrics: {list(names)} mixes metrics of rankings with metrics of values "
            f"({', '.join(proper[n] for n in by_value)}). RecBole computes one kind in a run."
        )
    modes = _check_eval_args(keys)
    if kinds == {"VALUE"} and "full" in modes:
        raise ValueError(
            f"metrics: {', '.join(names)} does not go with full ranking. Set eval_args mode: "
            "labeled (with a column of labels or `threshold`) or uni100, and valid_metric."
        )
    _check_valid_metric(keys, [name.lower() for name in names], cutoffs, kinds)
    if "labeled" in modes and kinds == {"RANKING"}:
        raise ValueError(
            "eval_args: mode labeled scores the labelled rows alone, so it goes with "
            f"{', '.join(proper[n] for n in by_value)}, not with metrics of rankings. Set metrics, "
            "or mode: full."
        )


def _check_valid_metric(
    keys: Mapping[str, Any], names: list[str], cutoffs: list[int], kinds: set[str]
) -> None:
    value = keys["valid_metric"]
    name, at, k = str(value).partition("@")
    is_cutoff = k.isdecimal() and int(k) in cutoffs
    if name.lower() not in names or not (is_cutoff if at else kinds == {"VALUE"}):
        metric = name if name.lower() in names else names[0]
        likely = f"{metric}@{cutoffs[0]}" if kinds == {"RANKING"} else metric
        raise ValueError(
            f"valid_metric: {value!r} is not computed: metrics are {', '.join(names)}, topk is "
            f"{cutoffs}. Set valid_metric, such as {likely}, or add to metrics and topk."
        )


def _check_eval_args(keys: Mapping[str, Any]) -> set[str]:
    """Modes of validation and test."""
    args = keys["eval_args"]
    if not isinstance(args, dict):
        raise ValueError(f"eval_args: {args!r} is of an earlier RecBole; write {_EVAL_ARGS}.")
    foreign = set(args) - {"split", "order", "group_by", "mode"}
    if foreign:
        raise ValueError(
            f"eval_args: {', '.join(sorted(foreign))} is not one of split, order, group_by, mode; "
            f"write {_EVAL_ARGS}."
        )
    if args.get("order", "RO") not in ("RO", "TO"):
        raise ValueError(f"eval_args: order {args['order']!r} is not RO (random) or TO (by time).")
    if str(args.get("group_by", "user")).lower() not in ("user", "none"):
        raise ValueError(f"eval_args: group_by {args['group_by']!r} is not user or none.")
    if keys.get("benchmark_filename") is None:
        _check_split(args.get("split", {"RS": [0.8, 0.1, 0.1]}))
    mode = args.get("mode", "full")
    modes = set(mode.values()) if isinstance(mode, dict) else {mode}
    for name in modes:
        if not re.fullmatch(r"full|labeled|(uni|pop)\d+", str(name)):
            raise ValueError(
                f"eval_args: mode {name!r} is not full, labeled, uniN or popN (such as uni100)."
            )
    return {str(name) for name in modes}


def _check_split(split: Any) -> None:
    if isinstance(split, dict) and len(split) == 1:
        (kind, value), *_ = split.items()
        if kind in ("RS", "TS") and isinstance(value, list) and len(value) == 3:
            if all(isinstance(v, (int, float)) and v >= 0 for v in value) and value[0] > 0:
                return
        elif kind == "LS" and value in ("valid_and_test", "valid_only", "test_only"):
            return
    raise ValueError(
        f"eval_args: split {split!r} is not allowed. Write {{RS: [0.8, 0.1, 0.1]}} (three shares: "
        "training, validation, test) or {LS: valid_and_test} (also valid_only, test_only)."
    )
