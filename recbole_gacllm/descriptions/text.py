"""Layer 0: what RecBole's feature files say about a node, as one line of text.

The files are read here and not through RecBole: loading ``.item`` text with RecBole changes the
task itself (``item_num`` grows, interactions are dropped, every batch carries the features).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from recbole_gacllm.descriptions.neutralize import neutralize
from recbole_gacllm.descriptions.templates import Value, compile_template, default_sentence
from recbole_gacllm.descriptions.words import whole_words

logger = logging.getLogger(__name__)

_TYPES = ("token", "token_seq", "float", "float_seq")
# What pandas, and so RecBole, reads as missing; a blank cell is missing too.
_MISSING = frozenset(
    {"nan", "NaN", "NAN", "-nan", "NA", "N/A", "n/a", "<NA>", "null", "NULL", "None"}
)


def read_features(
    path: Path,
    id_field: str,
    field_separator: str = "\t",
    encoding: str = "utf-8",
    seq_separator: str = " ",
) -> pd.DataFrame:
    """Read an atomic feature file (``.user`` or ``.item``).

    One line is one row: a quote never swallows the next line, but a pair around a value is
    stripped, as in RecBole. Of rows with the same id the first counts, as in RecBole. Fields of
    type ``float_seq`` are vectors, not text, and are not read. A cell of a ``float`` field that is
    no number stays the text it is.

    Args:
        path: The file; its header holds ``name:type`` for each column.
        id_field: Name of the id column (RecBole's ``USER_ID_FIELD`` or ``ITEM_ID_FIELD``).
        field_separator: RecBole's key of the same name.
        encoding: RecBole's key of the same name; a byte order mark is skipped in UTF-8.
        seq_separator: RecBole's key of the same name.

    Returns:
        Index: the raw token, as RecBole keeps it. Columns: the fields in file order. Cells: a
        ``str``, for ``token_seq`` a tuple of ``str``, or None where missing.

    Raises:
        ValueError: If the file is empty, not in ``encoding``, not an atomic file, has no
            ``id_field``, or a row longer than its header.
    """
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        encoding = "utf-8-sig"
    try:
        with path.open(encoding=encoding, newline="\n") as file:
            lines = [line.rstrip("\r\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not {encoding} text ({error.reason} at byte {error.start}); "
            "set RecBole's key `encoding` to the file's encoding"
        ) from error
    rows = [(number, line) for number, line in enumerate(lines[1:], start=2) if line.strip()]
    if not rows:
        found = "a header and no rows" if lines and lines[0].strip() else "nothing"
        raise ValueError(f"{path} is empty: it holds {found}; fill it, or remove it to go without")

    names, types = _read_header(path, lines[0], id_field, field_separator)
    id_at = names.index(id_field)
    kept = [at for at, kind in enumerate(types) if at != id_at and kind != "float_seq"]
    index: list[str] = []
    columns: list[list[Value | None]] = [[] for _ in kept]
    seen: set[str] = set()
    for number, line in rows:
        cells = line.split(field_separator)
        if len(cells) > len(names) and any(cells[len(names) :]):
            raise ValueError(
                f"{path}, line {number}: {len(cells)} cells for {len(names)} columns; a value must "
                f"not contain the field separator {field_separator!r}"
            )
        cells += [""] * (len(names) - len(cells))
        token = _unquote(cells[id_at])
        if not token or token in _MISSING or token in seen:
            continue
        seen.add(token)
        index.append(token)
        for column, at in zip(columns, kept, strict=True):
            column.append(_read_cell(cells[at], types[at], seq_separator))
    frame = pd.DataFrame(
        {
            names[at]: pd.Series(column, dtype=object)
            for at, column in zip(kept, columns, strict=True)
        }
    )
    frame.index = pd.Index(index, dtype=object, name=id_field)
    return frame


def _read_header(
    path: Path, line: str, id_field: str, field_separator: str
) -> tuple[list[str], list[str]]:
    names: list[str] = []
    types: list[str] = []
    for column in line.split(field_separator):
        name, _, kind = _unquote(column).partition(":")
        if not name or kind not in _TYPES:
            raise ValueError(
                f"{path}: column {column!r} of the header is not name:type with a type of "
                f"{', '.join(_TYPES)}; check the header and RecBole's key `field_separator` "
                f"(now {field_separator!r})"
            )
        if name in names:
            raise ValueError(f"{path}: two columns are called {name!r}; rename one in the header")
        names.append(name)
        types.append(kind)
    if id_field not in names:
        raise ValueError(
            f"{path} has no column {id_field!r}, it has {', '.join(names)}; "
            "rename the column or set RecBole's USER_ID_FIELD / ITEM_ID_FIELD"
        )
    return names, types


def _unquote(cell: str) -> str:
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell


def _read_cell(cell: str, kind: str, seq_separator: str) -> Value | None:
    cell = _unquote(cell)
    if not cell.strip() or cell.strip() in _MISSING:
        return None
    if kind == "token_seq":
        return tuple(filter(None, cell.split(seq_separator))) or None
    if kind == "float":
        return _read_number(cell)
    return cell


def _read_number(cell: str) -> str | None:
    try:
        number = float(cell)
    except ValueError:
        return cell
    if not math.isfinite(number):
        return None
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else f"{number:.12g}"


def require_some_text(
    user_features: pd.DataFrame | None, item_features: pd.DataFrame | None, allow_ids: bool
) -> None:
    """Refuse a data set without any text, unless ids were asked for.

    Raises:
        ValueError: If neither side has a feature and ``allow_ids`` is False.
    """
    sides = (user_features, item_features)
    if not allow_ids and all(side is None or side.shape[1] == 0 for side in sides):
        raise ValueError(
            "the data set has no text: neither its .user nor its .item file exists with a field "
            "besides the id. Add one beside the .inter file, or set text_allow_ids: True to "
            "describe nodes by their ids, or use_text: False to go without text"
        )


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
    special_tokens: Iterable[str] = (),
) -> list[str]:
    """Describe nodes in one line of text each: ``T_v^(0)``.

    A template is text with ``{field}`` placeholders. ``[part {field}]`` is left out where a field
    in it is missing; outside brackets a missing field reads "unknown". A sequence is joined by
    blanks (words of a title); ``{field|list}`` joins it as "a, b and c"; ``{field|title}`` joins it
    by blanks and turns "Net, The" into "The Net". ``{{ }} [[ ]]`` stand for single braces and
    brackets; brackets do not nest. Without a template all fields are listed in file order, "release
    year: 1995; …", sequences with commas unless the field's name says that it is prose (title,
    name, description, …).

    Args:
        tokens: Raw tokens of the nodes to describe.
        features: From :func:`read_features`; None if this side has no file.
        template: ``text_user_template`` or ``text_item_template``.
        noun: ``text_user_noun`` or ``text_item_noun``.
        value_names: ``{field: {raw value: words}}``; also applied within sequences. A value whose
            words are empty counts as missing.
        max_chars: Longest text in characters; a longer one is cut at a word and ends with "…".
        allow_ids: Say "A movie with id 5." where the side has no features at all; otherwise, and
            for a node without values, the text is :func:`nothing_known`.
        special_tokens: Of the language model, see :func:`neutralize`.

    Returns:
        One text for each token, in their order.

    Raises:
        ValueError: If the template is malformed or names a field that the file lacks.
    """
    special = frozenset(special_tokens)
    fields = [] if features is None else [str(name) for name in features.columns]
    render = default_sentence(fields) if template is None else compile_template(template, fields)
    table: dict[str, list[Value | None]] = {}
    row_of: dict[str, int] = {}
    if features is not None:
        row_of = {token: row for row, token in enumerate(features.index)}
        for field in fields:
            table[field] = _words(features[field], value_names.get(field, {}), special)

    unknown = nothing_known(noun)
    texts: list[str] = []
    for token in tokens:
        row = row_of.get(token)
        values = {} if row is None else {field: column[row] for field, column in table.items()}
        text = render({field: value for field, value in values.items() if value is not None})
        if text is None and not fields and allow_ids:
            text = f"{_with_article(noun)} with id {token}."
        # Once more over the whole: adjacent harmless values must not add up to a token.
        texts.append(cut_at_word(unknown if text is None else neutralize(text, special), max_chars))
    n_unknown = texts.count(unknown)
    if n_unknown:
        logger.info("nothing is known of %d of %d %s nodes", n_unknown, len(texts), noun)
    return texts


def cut_at_word(text: str, max_chars: int) -> str:
    """Cut a text longer than ``max_chars`` between words, if it has any, and end it with "…"."""
    if len(text) <= max_chars:
        return text
    kept = whole_words(text[:max_chars]) or text[: max_chars - 1]
    return kept.rstrip(" ,;:.-、，；：。") + "…"


def _words(
    column: Iterable[Value | None], names: Mapping[str, str], special: frozenset[str]
) -> list[Value | None]:
    """Name coded values and neutralize the rest; None for what is missing or becomes empty."""
    known: dict[str, str] = {}

    def word(raw: str) -> str:
        if raw not in known:
            known[raw] = neutralize(names.get(raw, raw), special)
        return known[raw]

    return [
        (tuple(filter(None, map(word, value))) or None)
        if isinstance(value, tuple)
        else (word(value) or None if value is not None else None)
        for value in column
    ]
