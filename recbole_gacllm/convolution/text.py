"""Layer 0: what RecBole's feature files say about a node, as one line of text.

The files are read here and not through RecBole: loading ``.item`` text with RecBole changes the
task itself (``item_num`` grows, interactions are dropped, every batch carries the features).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from recbole_gacllm.convolution.neutralize import neutralize
from recbole_gacllm.convolution.templates import compile_template, default_sentence
from recbole_gacllm.convolution.values import Value, column_values, in_order, says_nothing
from recbole_gacllm.convolution.words import whole_words
from recbole_gacllm.data.atomic import MISSING, read_atomic

logger = logging.getLogger(__name__)

_MISSING = MISSING | {"NAN"}


def read_features(
    path: Path,
    id_field: str,
    field_separator: str = "\t",
    encoding: str | None = None,
    seq_separator: str = " ",
    ids: Collection[str] | None = None,
) -> pd.DataFrame:
    """Read an atomic feature file (``.user`` or ``.item``) with :func:`.atomic.read_atomic`.

    Of rows with the same id the first counts, as in RecBole. Fields of type ``float_seq`` are
    vectors, not text, and are not read. A cell of a ``float`` field that is no number stays the
    text it is.

    Separators and encoding are RecBole's keys of these names; ``ids`` occur in the interactions.

    Returns:
        Index: the raw token, as RecBole keeps it. Columns: the fields in file order. Cells: a
        ``str``, for ``token_seq`` a tuple of ``str``, or None where missing.

    Raises:
        ValueError: If the file cannot be read, is empty or has no ``id_field``.
    """
    file = read_atomic(path, field_separator, encoding, id_field, ids)
    if id_field not in file.names:
        raise ValueError(
            f"{path} has no column {id_field!r}, it has {', '.join(file.names)}; "
            "rename the column or set RecBole's USER_ID_FIELD / ITEM_ID_FIELD"
        )
    if file.cells.empty:
        raise ValueError(
            f"{path} is empty: it holds a header and no rows; fill it, or remove it to go without"
        )
    cells = file.cells[file.cells[id_field].notna()].drop_duplicates(id_field)
    columns = {
        name: pd.Series(_column(name, kind, cells[name], seq_separator), dtype=object)
        for name, kind in zip(file.names, file.types, strict=True)
        if name != id_field and kind != "float_seq"
    }
    index = pd.Index(cells[id_field], dtype=object, name=id_field)
    return pd.DataFrame(columns).set_axis(index)


def _column(
    name: str, kind: str, cells: Iterable[object], seq_separator: str
) -> list[Value | None]:
    texts = [
        cell if isinstance(cell, str) and cell.strip() and cell.strip() not in _MISSING else None
        for cell in cells
    ]
    if kind == "float":
        return [None if text is None else _read_number(text) for text in texts]
    return column_values(name, kind, texts, seq_separator)


def _read_number(cell: str) -> str | None:
    try:
        number = float(cell)
    except ValueError:
        return cell
    if not math.isfinite(number):
        return None
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else f"{number:.12g}"


def nothing_known(noun: str) -> str:
    """The description of a node without any feature; compare with it to count such nodes."""
    return f"{_with_article(noun)} of which nothing is known."


def _with_article(noun: str) -> str:
    return f"{'An' if noun[:1].lower() in 'aeio' else 'A'} {noun}"


def render_descriptions(
    tokens: Sequence[str],
    features: pd.DataFrame | None,
    template: str | None,
    noun: str,
    value_names: Mapping[str, Mapping[str, str]],
    max_chars: int,
    allow_ids: bool,
) -> list[str]:
    """Describe nodes in one line of text each: ``T_v^(0)``.

    A template is text with ``{field}`` placeholders. ``[part {field}]`` is left out where a field
    in it is missing; outside brackets a missing field reads "unknown". A sequence is joined by
    blanks (words of a title); ``{field|list}`` joins it as "a, b and c"; ``{field|title}`` joins it
    by blanks and turns "Net, The" into "The Net". ``{{ }} [[ ]]`` stand for single braces and
    brackets; brackets do not nest. Without a template all fields are listed, "title: Toy Story;
    release year: 1995; …": the name first, long prose last; fields that say nothing to a language
    model (ids, codes, addresses, raw times) are left out and named in the log.

    Args:
        tokens: Raw tokens of the nodes to describe.
        features: From :func:`read_features`; None if this side has no file.
        template: ``text_user_template`` or ``text_item_template``.
        noun: ``text_user_noun`` or ``text_item_noun``.
        value_names: ``{field: {raw value: words}}``; also applied within sequences. A value whose
            words are empty counts as missing.
        max_chars: A longer text is cut at a word and ends with "…".
        allow_ids: Say "A movie with id 5." where the side has no features at all; otherwise, and
            for a node without values, the text is :func:`nothing_known`.

    Raises:
        ValueError: If the template is malformed or names a field that the file lacks.
    """
    features = pd.DataFrame() if features is None else features
    fields = [str(name) for name in features.columns]
    if template is not None:
        render = compile_template(template, fields)
    else:
        render = default_sentence(_fields_to_tell(features, noun))
    row_of = {token: row for row, token in enumerate(features.index)}
    table = {field: _words(features[field], value_names.get(field, {})) for field in fields}
    unknown = nothing_known(noun)
    texts: list[str] = []
    n_cut = 0
    for token in tokens:
        row = row_of.get(token)
        values = {} if row is None else {field: column[row] for field, column in table.items()}
        text = render({field: value for field, value in values.items() if value is not None})
        if text is None and not fields and allow_ids:
            text = f"{_with_article(noun)} with id {token}."
        # Once more over the whole: adjacent harmless values must not add up to a token.
        line = unknown if text is None else neutralize(text)
        n_cut += len(line) > max_chars
        texts.append(cut_at_word(line, max_chars))
    if n_cut:
        logger.info(
            "%d of %d %s texts are cut at text_max_chars: %d", n_cut, len(texts), noun, max_chars
        )
    n_unknown = texts.count(unknown)
    if n_unknown:
        logger.info("nothing is known of %d of %d %s nodes", n_unknown, len(texts), noun)
    return texts


def _fields_to_tell(features: pd.DataFrame, noun: str) -> list[str]:
    columns = {str(name): list(features[name]) for name in features.columns}
    reasons = {name: says_nothing(name, values) for name, values in columns.items()}
    if silent := [f"{name} ({reason})" for name, reason in reasons.items() if reason]:
        logger.info("fields left out of the %s texts: %s", noun, ", ".join(silent))
    return in_order([name for name, reason in reasons.items() if reason is None], columns)


def cut_at_word(text: str, max_chars: int) -> str:
    """Cut a text longer than ``max_chars`` between words, if it has any, and end it with "…"."""
    if len(text) <= max_chars:
        return text
    start = whole_words(text[:max_chars]) or text[: max_chars - 1]
    return start.rstrip(" ,;:.-、，；：。") + "…"


def _words(column: Iterable[Value | None], names: Mapping[str, str]) -> list[Value | None]:
    """Name coded values and neutralize the rest; None for what is missing or becomes empty."""

    @functools.cache
    def word(raw: str) -> str:
        return neutralize(names.get(raw, raw))

    return [
        (tuple(filter(None, map(word, value))) or None)
        if isinstance(value, tuple)
        else (word(value) or None if value is not None else None)
        for value in column
    ]
