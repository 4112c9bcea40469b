"""RecBole's atomic files, read once and alike for RecBole and for the texts.

RecBole reads them with pandas, whose quoting swallows lines where a title holds a lone quote, and
without a word where a file has another encoding, a wrong width or dates as times. Here a row is
read with quoting where that gives a row of the right width, and line by line elsewhere.
``compat_data.py`` puts this reader in the place of RecBole's.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

logger = logging.getLogger(__name__)

TYPES = ("token", "token_seq", "float", "float_seq")
#: What pandas, and so RecBole, reads as missing; an empty cell is missing too.
MISSING = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
    | {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
# The first bytes of a file that name its encoding; utf-32 before utf-16, whose mark begins it.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEPARATORS = {"\t": r"\t", ",": ",", ";": ";", "|": "|", "::": "::", " ": "a blank"}
_TYPED = re.compile(r":(?:token|float)")
_LINE_END = re.compile(r"(?<!\r)\r+(?:\n|\Z)")  # as Windows writes; any other \r is of a text
# A quoted cell has at most so many lines.
_MAX_LINES = 1000
# Of the rows of a feature file so many may fit no reading; more, and the file is refused.
_MAX_DROPPED = 0.05
_MOST_ZERO_BYTES = 0.1


@dataclass
class AtomicFile:
    """What one file holds.

    Attributes:
        path: The file.
        names, types: Of its columns, from the header ``name:type``.
        cells: A row each, a column each, ``str`` or NaN where missing; its columns are ``names``.
        dropped: Line numbers of the rows that fit no reading, with how many cells they have.
        n_spanning: Rows over several lines, by quotes.
        lines: Line number of each row; None where row ``n`` stands in line ``n + 2``.
    """

    path: Path
    names: list[str]
    types: list[str]
    cells: pd.DataFrame
    dropped: dict[int, int] = field(default_factory=dict)
    n_spanning: int = 0
    lines: list[int] | None = None

    def line(self, row: int) -> int:
        """Where a row begins in the file, from 1."""
        return row + 2 if self.lines is None else self.lines[row]


def read_atomic(
    path: Path,
    separator: str = "\t",
    encoding: str | None = None,
    id_field: str | None = None,
    ids: Collection[str] | None = None,
) -> AtomicFile:
    """Read an atomic file.

    Where a cell opens with a quote that its line does not close, the quoted reading over several
    lines counts, unless each of these lines is a row of its own: of the right width and, where
    ``ids`` are known, one of them with an id that occurs.

    Args:
        path: The file.
        separator: RecBole's ``field_separator``.
        encoding: RecBole's key of the same name; a byte order mark at the head of the file wins.
        id_field: The column that ``ids`` are of.
        ids: Ids that occur in the interactions.

    Raises:
        ValueError: Names file, line or column, what was found, what is allowed, the next step.
    """
    text = _decode(path, encoding)
    lines = text.rstrip("\n").split("\n")
    if not text.strip():
        raise ValueError(f"{path} is empty: fill it, or remove it to go without.")
    at = next(n for n, line in enumerate(lines) if line.strip())
    names, types = _header(path, lines[at], separator)
    is_plain = '"' not in text and len(separator) == 1
    if is_plain and all(line.strip() and line.count(separator) < len(names) for line in lines):
        return _plain(path, lines, names, types, separator)
    id_at = names.index(id_field) if id_field in names else 0
    file = AtomicFile(path, names, types, pd.DataFrame())
    numbered = [*_rows(lines, at + 1, separator, file, id_at, ids)]
    _refuse_or_tell(file, len(numbered))
    file.lines = [line for line, _ in numbered]
    rows = [row for _, row in numbered]
    frame = pd.DataFrame(rows, columns=names, dtype=object)
    file.cells = frame.mask(frame.isin(MISSING))
    return file


def read_header(
    path: Path, separator: str = "\t", encoding: str | None = None
) -> tuple[list[str], list[str]]:
    """Names and types of a file's columns.

    Raises:
        ValueError: As :func:`read_atomic`.
    """
    with path.open("rb") as stream:
        start = stream.read(1 << 16)
    marked = _marked(start)
    # Of a long file its first lines will do; what is cut within a character is not decoded.
    decoder = codecs.getincrementaldecoder(_known(marked or encoding or "utf-8"))
    try:
        text = decoder().decode(start)
    except UnicodeDecodeError:
        text = _decode(path, encoding)
    text = _without_zero_bytes(path, text)
    line = next((line for line in re.split(r"\r?\n|\r", text) if line.strip()), None)
    if line is None:
        raise ValueError(f"{path} is empty: fill it, or remove it to go without.")
    return _header(path, line, separator)


def _marked(content: bytes) -> str | None:
    return next((name for mark, name in _MARKS if content.startswith(mark)), None)


def _known(encoding: str) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        raise ValueError(
            f"encoding: {encoding!r} is unknown to Python; give one such as utf-8, latin-1, "
            "cp1252 or gb18030."
        ) from None


def _decode(path: Path, encoding: str | None) -> str:
    content = path.read_bytes()
    encoding = _known(_marked(content) or encoding or "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: not {encoding} text ({error.reason} at byte {error.start}). "
            "Set RecBole's key `encoding` to the file's encoding, such as latin-1, cp1252 or "
            "gb18030."
        ) from error
    text = _without_zero_bytes(path, text)
    if "\n" not in text:  # as old Macs wrote
        return text.replace("\r", "\n")
    return _LINE_END.sub("\n", text) if "\r" in text else text


def _without_zero_bytes(path: Path, text: str) -> str:
    """Drop a few, as stray signs in a text; many are another encoding."""
    if "\0" in text and text.count("\0") > _MOST_ZERO_BYTES * len(text):
        raise ValueError(
            f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: a zero byte; this is "
            "no text file, or RecBole's key `encoding` must name its encoding, such as utf-16-le."
        )
    return text.replace("\0", "")


def _header(path: Path, line: str, separator: str) -> tuple[list[str], list[str]]:
    cells = [_unquoted(cell) for cell in line.split(separator)]
    pairs = [tuple(map(str.strip, cell.rpartition(":")[::2])) for cell in cells]
    names = [name for name, _ in pairs]
    if any(kind not in TYPES or _TYPED.search(name) for name, kind in pairs):
        _refuse_header(path, line, separator, cells)
    for name in names:
        if not name or names.count(name) > 1:
            raise ValueError(
                f"{path}: two columns are called {name!r}; rename one in the header."
                if name
                else f"{path}: a column of the header has a type and no name: {line[:80]!r}."
            )
    return names, [kind for _, kind in pairs]


def _refuse_header(path: Path, line: str, separator: str, cells: list[str]) -> None:
    """Say what is wrong: the separator, the types, or that there is no header."""
    shown = _SEPARATORS.get(separator, separator)
    others = [
        other
        for other in _SEPARATORS
        if other != separator and line.count(other) >= max(1, line.count(separator))
    ]
    by_other = [
        other
        for other in others
        if all(cell.rpartition(":")[2].strip('" ') in TYPES for cell in line.split(other))
    ]
    allowed = f"name:type with a type of {', '.join(TYPES)}, such as item_id:token"
    if by_other or (len(cells) == 1 and others):
        other = (by_other or others)[0]
        advice = (
            f"it seems to be separated by {_SEPARATORS[other]}, not by {shown}: set RecBole's key "
            f"field_separator to {other!r}, which goes for all files of a data set"
        )
        if not by_other:
            advice += f", and write each column of the header as {allowed}"
    elif all(":" not in cell for cell in cells):
        likely = separator.join(f"{cell.strip() or 'name'}:token" for cell in cells[:3])
        advice = (
            f"its first line must name the columns, each as {allowed}. If these are names, write "
            f"{likely!r}…; if it is a row, put a header above it"
        )
    else:
        bad = [cell for cell in cells if cell.rpartition(":")[2].strip() not in TYPES]
        advice = f"column {bad[0] if bad else cells[0]!r} must be {allowed}"
        if not cells[0].strip():
            advice += "; one without a name is pandas' index, write with to_csv(…, index=False)"
    raise ValueError(f"{path}: the header {line[:100]!r} cannot be read; {advice}.")


def _plain(
    path: Path, lines: Sequence[str], names: list[str], types: list[str], separator: str
) -> AtomicFile:
    """All rows at once, of a file without quotes, blank lines and rows beyond the width."""
    cells = pd.read_csv(
        io.StringIO("\n".join(lines)),
        sep=separator,
        header=0,
        names=names,
        index_col=False,
        dtype=str,
        engine="c",
        lineterminator="\n",
        quoting=csv.QUOTE_NONE,
    )
    return AtomicFile(path, names, types, cells)


def _rows(
    lines: Sequence[str],
    start: int,
    separator: str,
    file: AtomicFile,
    id_at: int,
    ids: Collection[str] | None,
) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row, padded to the width of the header."""
    width, at = len(file.names), start
    while at < len(lines):
        line = lines[at]
        n_lines, cells = 1, None
        if '"' in line and len(separator) == 1:
            n_lines, cells = _quoted(lines, at, separator, width)
            if n_lines > 1 and _are_rows(lines[at : at + n_lines], separator, width, id_at, ids):
                n_lines, cells = 1, None
        if cells is None:
            n_lines, cells = 1, _of_width([*map(_unquoted, line.split(separator))], width)
        if ids is not None and width > 1 and cells and len(cells) == 1 and cells[0] not in ids:
            cells = None  # the rest of a text, not a row
        if cells is not None and any(cells):
            file.n_spanning += n_lines > 1
            yield at + 1, cells + [""] * (width - len(cells))
        elif line.strip():
            file.dropped[at + 1] = len(line.split(separator))
        at += n_lines


def _quoted(
    lines: Sequence[str], at: int, separator: str, width: int
) -> tuple[int, list[str] | None]:
    """Lines and cells of the row that begins here, read with quoting; None if that does not fit."""
    several = (f"{line}\n" for line in lines[at : at + _MAX_LINES])
    reader = csv.reader(several, delimiter=separator, strict=True)
    try:
        cells = next(reader)
    except csv.Error:
        return 1, None
    if reader.line_num > 1 and len(cells) < width:  # a row over several lines is whole
        return 1, None
    return reader.line_num, _of_width(cells, width)


def _of_width(cells: list[str], width: int) -> list[str] | None:
    """The cells without empty ones beyond the width; None if there are others."""
    return None if any(cells[width:]) else cells[:width]


def _are_rows(
    lines: Sequence[str],
    separator: str,
    width: int,
    id_at: int,
    ids: Collection[str] | None,
) -> bool:
    """Whether each line is a row by itself, so that a quote in it is only a sign."""
    rows = [line.split(separator) for line in lines if line.strip()]
    if any(len(row) != width for row in rows):
        return False
    return ids is None or any(_unquoted(row[id_at]) in ids for row in rows[1:])


def _unquoted(cell: str) -> str:
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell


def _refuse_or_tell(file: AtomicFile, n_rows: int) -> None:
    """Name the rows that fit no reading.

    Raises:
        ValueError: If they are interactions, or too many.
    """
    if not file.dropped:
        return
    line, n_cells = next(iter(file.dropped.items()))
    message = (
        f"{file.path}, line {line}: {n_cells} cells for {len(file.names)} columns, quoted or not"
    )
    if file.path.suffix == ".inter" or len(file.dropped) > _MAX_DROPPED * (
        n_rows + len(file.dropped)
    ):
        raise ValueError(
            f"{message} ({len(file.dropped)} such lines). A cell that holds the field separator "
            "or a line break stands between double quotes; a quote within it is written twice."
        )
    logger.warning(
        "%s; %d lines are left out: %s",
        message,
        len(file.dropped),
        ", ".join(map(str, [*file.dropped][:10])) + ("…" if len(file.dropped) > 10 else ""),
    )
