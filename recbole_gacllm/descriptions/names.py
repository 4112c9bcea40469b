"""What an item is called, for the leakage audit and the command line; and a user, for the audit."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from recbole_gacllm.descriptions.neutralize import one_line
from recbole_gacllm.descriptions.templates import compile_template
from recbole_gacllm.descriptions.text import cut_at_word

_MAX_CHARS = 200


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
