"""What a hyper-parameter search searches: RecBole's ``.hyper`` files and its ``params_dict``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from recbole_gacllm.config import literal, shipped_path

#: Kind -> parameter -> its values or bounds, as RecBole's ``params_dict``.
Space = dict[str, dict[str, list[Any]]]
_KINDS = ("choice", "uniform", "quniform", "loguniform")


def read_space(file: Path) -> Space:
    """Read RecBole's ``.hyper`` file or the yaml of its ``params_dict``.

    Raises:
        ValueError: Names the line or the parameter that is not as RecBole has it.
    """
    if not file.is_file():
        shipped = sorted(path.stem for path in shipped_path("properties", "spaces").glob("*.hyper"))
        raise ValueError(
            f"space: {file} is not a file. Spaces are shipped for {', '.join(shipped)}; for "
            "another model give --space=FILE."
        )
    try:
        content = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"space: {file} is not UTF-8 text ({error}); save it as UTF-8.") from error
    space: Space = {}
    lines: list[tuple[str, str, str, Any]] = []
    if file.suffix in (".yaml", ".yml"):
        lines = _of_yaml(file, content)
    else:
        for number, text in enumerate(content.splitlines(), 1):
            words = text.partition("#")[0].split(maxsplit=2)
            if not words:
                continue
            where = f"{file}, line {number}"
            if len(words) < 3:
                raise ValueError(f"{where}: {text!r} is not 'name kind values'.")
            try:
                # RecBole writes bounds without brackets.
                values = literal(words[2] if "[" in words[2] else f"[{words[2]}]")
            except ValueError as error:
                raise ValueError(f"{where}: {words[2]!r} is not a list of values.") from error
            lines.append((where, words[0], words[1], values))
    for where, name, kind, values in lines:
        if kind not in _KINDS:
            raise ValueError(f"{where}: {kind!r} is not one of {', '.join(_KINDS)}.")
        n_values = {"choice": None, "quniform": 3}.get(kind, 2)
        if not isinstance(values, list) or not values or n_values not in (None, len(values)):
            wanted = "a list of values" if n_values is None else f"{n_values} numbers"
            raise ValueError(f"{where}: {kind} takes {wanted}, not {values!r}.")
        if n_values is not None and not all(isinstance(value, (int, float)) for value in values):
            raise ValueError(f"{where}: {kind} takes {n_values} numbers, not {values!r}.")
        space.setdefault(kind, {})[name] = values
    if not space:
        raise ValueError(f"{file} names no parameter to search.")
    return space


def _of_yaml(file: Path, content: str) -> list[tuple[str, str, str, Any]]:
    """Where it stands, name, kind and values of each parameter."""
    try:
        loaded = yaml.safe_load(content) or {}
        return [
            (f"{file}: {name}", str(name), str(kind), values)
            for kind, parameters in loaded.items()
            for name, values in parameters.items()
        ]
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(
            f"space: {file} is not the yaml of RecBole's params_dict, which is "
            f"{{kind: {{name: values}}}} ({' '.join(str(error).split())})."
        ) from error
