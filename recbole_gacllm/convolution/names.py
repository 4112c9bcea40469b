"""What an item is called, for the leakage audit, the report and the command line; and a user.

Names are of a run, not of its texts: ``text_item_name_field`` may differ between runs that share
the folder of the inputs. So each set of names has a file of its own there, named by its content,
and the run records which one is its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from recbole_gacllm.artifacts.disk import write_atomic
from recbole_gacllm.convolution.neutralize import one_line
from recbole_gacllm.convolution.templates import compile_template
from recbole_gacllm.convolution.text import cut_at_word

#: Among the artefacts of a run, beside the folders of its stages.
NAMES = "item_names"
_MAX_CHARS = 200
_OLD_FILE = "item_names.json"  # of earlier releases: one for all runs


def item_names(
    tokens: Sequence[str], features: pd.DataFrame | None, field: str | None
) -> dict[str, str]:
    """Names of items by raw token, each one line; an item without one is called by its token.

    They are printed and looked for in texts. One longer than 200 characters is cut at a word.

    Args:
        tokens: Raw tokens of the items.
        features: From :func:`.text.read_features`; None if there is no file.
        field: ``text_item_name_field``. None: the first field whose name holds "title" or "name",
            else the first field.

    Raises:
        ValueError: If there is no such field.
    """
    if features is None or features.shape[1] == 0:
        return {token: token for token in tokens}
    fields = [str(name) for name in features.columns]
    if field is not None and field not in fields:
        raise ValueError(
            f"text_item_name_field: {field!r} is not a field of the item file, which has "
            f"{', '.join(fields)}."
        )
    titled = [name for name in fields if "title" in name.lower() or "name" in name.lower()]
    chosen = field or (titled or fields)[0]
    render = compile_template(f"{{{chosen}|title}}", fields)
    values = features[chosen].to_dict()
    names = {}
    for token in tokens:
        value = values.get(token)
        name = None if value is None else render({chosen: value})
        names[token] = cut_at_word(one_line(name or ""), _MAX_CHARS) or token
    return names


def write_names(inputs: Path, names: Mapping[str, str]) -> Path:
    """Write the names of a run into the folder of its inputs; returns the file."""
    content = json.dumps(names).encode()
    file = inputs / f"item_names-{hashlib.sha256(content).hexdigest()[:16]}.json"
    write_atomic(file, content)
    return file


def read_names(inputs: Path, file: Path | None = None) -> dict[str, str]:
    """The names of a run, or those that were written last where no run is asked for.

    Args:
        inputs: Folder of the inputs.
        file: The run's own; one of an earlier release recorded none.

    Raises:
        ValueError: If there are none, or the file is damaged.
    """
    if file is None:
        files = inputs.glob("item_names*.json")
        file = max(files, key=lambda path: path.stat().st_mtime, default=inputs / _OLD_FILE)
    try:
        names = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the names of the items cannot be read: {error} ({file})") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{file} holds no names of items.")
    return names


def names_file_of(folders: Mapping[str, Path]) -> Path | None:
    """The file of names of a run's artefacts; of an earlier release, the one of all runs."""
    own = folders.get(NAMES)
    if own is None and "inputs" in folders and (folders["inputs"] / _OLD_FILE).is_file():
        return folders["inputs"] / _OLD_FILE
    return own


def names_of_people(features: pd.DataFrame) -> dict[str, str]:
    """Names of users by raw token: of the first field called so whose values tell users apart.

    Args:
        features: From :func:`.text.read_features`.
    """
    for field in features.columns:
        values = features[field].dropna()
        if "name" in str(field).lower() and 2 * values.nunique() > len(values):
            told = {str(token): value for token, value in values.items()}
            return {
                token: one_line(value if isinstance(value, str) else " ".join(value))
                for token, value in told.items()
            }
    return {}
