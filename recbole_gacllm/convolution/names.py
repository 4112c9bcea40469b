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

#: The file of a run's names among its artefacts, beside the folders of its stages.
NAMES = "item_names"
_MAX_CHARS = 200


def item_names(
    tokens: Sequence[str], features: pd.DataFrame | None, field: str | None
) -> dict[str, str]:
    """Names of items by raw token, each one line; an item without one is called by its token.

    They are printed and looked for in texts. One longer than 200 characters is cut at a word.
    Without a field it is the first whose name holds "title" or "name", else the first of all.

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
    titles = [name for name in fields if "title" in name.lower() or "name" in name.lower()]
    field = field or (titles or fields)[0]
    render = compile_template(f"{{{field}|title}}", fields)
    values = features[field].to_dict()
    names = {}
    for token in tokens:
        name = None if values.get(token) is None else render({field: values[token]})
        names[token] = cut_at_word(one_line(name or ""), _MAX_CHARS) or token
    return names


def write_names(inputs: Path, names: Mapping[str, str]) -> Path:
    """Write the names of a run into the folder of its inputs; returns the file."""
    content = json.dumps(names).encode()
    file = inputs / f"item_names-{hashlib.sha256(content).hexdigest()[:16]}.json"
    write_atomic(file, content)
    return file


def read_names(inputs: Path, file: Path | None = None) -> dict[str, str]:
    """The names in a run's own file, or those that were written last into the inputs.

    Raises:
        ValueError: If there are none, or the file is damaged.
    """
    if file is None:
        files = inputs.glob("item_names*.json")
        file = max(files, key=lambda path: path.stat().st_mtime, default=inputs / "item_names.json")
    try:
        names = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the names of the items cannot be read: {error} ({file})") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{file} holds no names of items.")
    return names


def names_of_people(features: pd.DataFrame) -> dict[str, str]:
    """Names of users by raw token: of the first field called so whose values tell users apart."""
    for field in features.columns:
        values = features[field].dropna()
        if "name" in str(field).lower() and 2 * values.nunique() > len(values):
            return {
                str(token): one_line(value if isinstance(value, str) else " ".join(value))
                for token, value in values.items()
            }
    return {}
