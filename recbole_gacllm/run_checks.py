"""Checks of RecBole's own keys: a wrong value is used, or fails far from the key."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

_LEAST = {
    **{"seed": 0, "epochs": 0, "eval_step": 0, "stopping_step": 0, "worker": 0},
    **{"train_batch_size": 1, "eval_batch_size": 1},
}
_MAX_SEED = 2**32 - 1  # numpy's


def check_values(
    given: Mapping[str, Any], overall: Mapping[str, Any], of_model: Mapping[str, Any]
) -> None:
    """Refuse values that are not of the type of RecBole's default, or out of range.

    Args:
        given: Keys of the user.
        overall: RecBole's defaults for all models.
        of_model: Its defaults for this model, where a whole number stands for any number.

    Raises:
        ValueError: Naming key, value and what is allowed.
    """
    for key, value in given.items():
        default = overall.get(key, of_model.get(key))
        if isinstance(default, bool):
            good, kind = value in (True, False), "True or False"
        elif isinstance(default, int) and key in overall:
            good, kind = _is_number(value, int), "a whole number"
        elif isinstance(default, int | float):
            good, kind = _is_number(value, int, float), "a number"
        elif isinstance(default, dict):
            good, kind = value is None or isinstance(value, dict), "a dictionary or None"
        elif key == "topk":
            values = value if isinstance(value, list) else [value]
            good, kind = all(_is_number(k, int) for k in values), "a whole number or a list of such"
        else:
            continue
        if not good:
            raise ValueError(f"{key}: {value!r} is a {type(value).__name__}; it must be {kind}.")
        if (key in _LEAST and value < _LEAST[key]) or (key == "seed" and value > _MAX_SEED):
            most = f" and at most {_MAX_SEED}" if key == "seed" else ""
            raise ValueError(f"{key}: {value!r} must be at least {_LEAST[key]}{most}.")


def check_metrics(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse metrics that RecBole lacks, and a ``valid_metric`` that a run does not compute.

    Args:
        config: The keys as given, or RecBole's defaults.
        known: Names of its metrics, in small letters.

    Raises:
        ValueError: Naming key, value and what is allowed.
    """
    metrics, topk = (
        value if isinstance(value, list) else [value]
        for value in (config["metrics"], config["topk"])
    )
    for name in metrics:
        if str(name).lower() not in known:
            near = difflib.get_close_matches(str(name).lower(), known, n=3)
            raise ValueError(
                f"metrics: {name!r} is not a metric of RecBole; near names: "
                f"{', '.join(near) or 'none'}; all: {', '.join(sorted(known))}."
            )
    name, at, k = str(config["valid_metric"]).partition("@")
    if name.lower() not in map(str.lower, metrics) or (at and k not in map(str, topk)):
        raise ValueError(
            f"valid_metric: {config['valid_metric']!r} is not computed; it must be one of metrics "
            f"({', '.join(metrics)}) at one of topk ({', '.join(map(str, topk))})."
        )


def _is_number(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
