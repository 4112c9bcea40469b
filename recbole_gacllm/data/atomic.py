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
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

logger = logging.getLogger(__name__)

TYPES = ("token", "token_seq", "float", "float_seq")
#: What pandas, and so RecBole, reads as missing; an empty cell is missing too.
MISSING = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
    | {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
#: The first bytes of a file that name its encoding; utf-32 before utf-16, whose mark begins it.
MARKS = (
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
MAX_LINES = 1000
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
    text = _decode(path, path.read_bytes(), encoding)
    if "\n" not in text:  # as old Macs wrote
        text = text.replace("\r", "\n")
    elif "\r" in text:
        text = _LINE_END.sub("\n", text)
    lines = text.rstrip("\n").split("\n")
    first = next((n for n, line in enumerate(lines) if line.strip()), 0)
    names, types = _header(path, lines[first], separator)
    file = AtomicFile(path, names, types, pd.DataFrame())
    is_plain = '"' not in text and len(separator) == 1
    if is_plain and all(line.strip() and line.count(separator) < len(names) for line in lines):
        file.cells = read_plain(lines, separator, names)
        return file
    id_at = names.index(id_field) if id_field in names else 0
    numbered = [*Lines(lines, separator, len(names), id_at, ids).rows(first + 1, file)]
    _refuse_or_tell(file, len(numbered))
    file.lines = [line for line, _ in numbered]
    frame = pd.DataFrame([row for _, row in numbered], columns=names, dtype=object)
    file.cells = frame.mask(frame.isin(MISSING))
    return file


def read_plain(lines: list[str], separator: str, names: list[str], **more: Any) -> pd.DataFrame:
    """Lines without quotes as text, by pandas; the first is the header, and is not looked at."""
    frame: pd.DataFrame = pd.read_csv(
        io.StringIO("\n".join(lines)),
        sep=separator,
        header=0,
        names=names,
        index_col=False,
        dtype=str,
        engine="c",
        lineterminator="\n",
        quoting=csv.QUOTE_NONE,
        **more,
    )
    return frame


def read_header(
    path: Path, separator: str = "\t", encoding: str | None = None
) -> tuple[list[str], list[str]]:
    """Names and types of a file's columns.

    Raises:
        ValueError: As :func:`read_atomic`.
    """
    with path.open("rb") as stream:  # of a long file its first lines will do
        text = _decode(path, stream.read(1 << 16), encoding, whole=False)
    line = next((line for line in re.split(r"\r?\n|\r", text) if line.strip()), "")
    return _header(path, line, separator)


def _decode(path: Path, content: bytes, encoding: str | None, whole: bool = True) -> str:
    """Text without its few zero bytes; many are another encoding."""
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), encoding)
    try:
        decoder = codecs.getincrementaldecoder(encoding or "utf-8")()
        text = decoder.decode(content, final=whole)
    except LookupError:
        raise ValueError(
            f"encoding: {encoding!r} is unknown to Python; give one such as utf-8, latin-1, "
            "cp1252 or gb18030."
        ) from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: not {encoding or 'utf-8'} text ({error.reason} at byte "
            f"{error.start}). Set RecBole's key `encoding` to the file's encoding, such as "
            "latin-1, cp1252 or gb18030."
        ) from error
    if "\0" in text and text.count("\0") > _MOST_ZERO_BYTES * len(text):
        raise ValueError(
            f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: a zero byte; this is "
            "no text file, or RecBole's key `encoding` must name its encoding, such as utf-16-le."
        )
    return text.replace("\0", "")


def _header(path: Path, line: str, separator: str) -> tuple[list[str], list[str]]:
    if not line.strip():
        raise ValueError(f"{path} is empty: fill it, or remove it to go without.")
    cells = [_unquoted(cell) for cell in line.split(separator)]
    pairs = [tuple(map(str.strip, cell.rpartition(":")[::2])) for cell in cells]
    names = [name for name, _ in pairs]
    if any(kind not in TYPES or _TYPED.search(name) for name, kind in pairs):
        raise ValueError(
            f"{path}: the header {line[:100]!r} cannot be read; "
            f"{_advice_on_header(line, separator, cells)}."
        )
    if "" in names:
        raise ValueError(f"{path}: a column of the header has a type and no name: {line[:80]!r}.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}; rename one in the header.")
    return names, [kind for _, kind in pairs]


def _advice_on_header(line: str, separator: str, cells: list[str]) -> str:
    """What is wrong: the separator, the types, or that there is no header."""
    allowed = f"name:type with a type of {', '.join(TYPES)}, such as item_id:token"
    least = max(1, line.count(separator))
    others = [sign for sign in _SEPARATORS if sign != separator and line.count(sign) >= least]
    typed = [
        sign
        for sign in others
        if all(cell.rpartition(":")[2].strip('" ') in TYPES for cell in line.split(sign))
    ]
    if typed or (len(cells) == 1 and others):
        other = (typed or others)[0]
        advice = (
            f"it seems to be separated by {_SEPARATORS[other]}, not by "
            f"{_SEPARATORS.get(separator, separator)}: set RecBole's key field_separator to "
            f"{other!r}, which goes for all files of a data set"
        )
        return advice if typed else f"{advice}, and write each column of the header as {allowed}"
    if all(":" not in cell for cell in cells):
        likely = separator.join(f"{cell.strip() or 'name'}:token" for cell in cells[:3])
        return (
            f"its first line must name the columns, each as {allowed}. If these are names, write "
            f"{likely!r}…; if it is a row, put a header above it"
        )
    bad = [cell for cell in cells if cell.rpartition(":")[2].strip() not in TYPES]
    advice = f"column {bad[0] if bad else cells[0]!r} must be {allowed}"
    if not cells[0].strip():
        advice += "; one without a name is pandas' index, write with to_csv(…, index=False)"
    return advice


@dataclass
class Lines:
    """The lines of a file that has to be read row by row."""

    lines: list[str]
    separator: str
    width: int
    id_at: int
    ids: Collection[str] | None

    def rows(self, at: int, file: AtomicFile) -> Iterator[tuple[int, list[str]]]:
        """Line number and cells of each row, padded to the width of the header."""
        while at < len(self.lines):
            line = self.lines[at]
            n_lines, cells = self._quoted(at) if '"' in line else (1, None)
            if cells is None or (n_lines > 1 and self._are_rows(at, n_lines)):
                n_lines, cells = 1, self._fit([*map(_unquoted, line.split(self.separator))])
            if cells and len(cells) == 1 < self.width and cells[0] not in (self.ids or cells):
                cells = None  # the rest of a text, not a row
            if cells is not None and any(cells):
                file.n_spanning += n_lines > 1
                yield at + 1, cells + [""] * (self.width - len(cells))
            elif line.strip():
                file.dropped[at + 1] = len(line.split(self.separator))
            at += n_lines

    def _quoted(self, at: int) -> tuple[int, list[str] | None]:
        """Lines and cells of the row that begins here, read with quoting, if that fits."""
        if len(self.separator) != 1:
            return 1, None
        several = (f"{line}\n" for line in self.lines[at : at + MAX_LINES])
        reader = csv.reader(several, delimiter=self.separator, strict=True)
        try:
            cells = next(reader)
        except csv.Error:
            return 1, None
        if reader.line_num > 1 and len(cells) < self.width:  # a row over several lines is whole
            return 1, None
        return reader.line_num, self._fit(cells)

    def _fit(self, cells: list[str]) -> list[str] | None:
        """The cells without empty ones beyond the width; None if there are others."""
        return None if any(cells[self.width :]) else cells[: self.width]

    def _are_rows(self, at: int, n_lines: int) -> bool:
        """Whether each line is a row by itself, so that a quote in it is only a sign."""
        lines = filter(str.strip, self.lines[at : at + n_lines])
        rows = [line.split(self.separator) for line in lines]
        if any(len(row) != self.width for row in rows):
            return False
        return self.ids is None or any(_unquoted(row[self.id_at]) in self.ids for row in rows[1:])


def _unquoted(cell: str) -> str:
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell


def _refuse_or_tell(file: AtomicFile, n_rows: int) -> None:
    """Name the rows that fit no reading; interactions, or too many, are refused."""
    n_dropped = len(file.dropped)
    if not n_dropped:
        return
    line, n_cells = next(iter(file.dropped.items()))
    message = (
        f"{file.path}, line {line}: {n_cells} cells for {len(file.names)} columns, quoted or not"
    )
    if file.path.suffix == ".inter" or n_dropped > _MAX_DROPPED * (n_rows + n_dropped):
        raise ValueError(
            f"{message} ({n_dropped} such lines). A cell that holds the field separator "
            "or a line break stands between double quotes; a quote within it is written twice."
        )
    shown = ", ".join(map(str, [*file.dropped][:10])) + ("…" if n_dropped > 10 else "")
    logger.warning("%s; %d lines are left out: %s", message, n_dropped, shown)
