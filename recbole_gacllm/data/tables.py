"""Tables of other people's files, in chunks: delimited text, JSON, Parquet; packed or not.

Nothing is converted: a cell of text is ``str``, one of JSON or Parquet what it is there, and a
missing one None or an empty text. So an id keeps its zeros.
"""

from __future__ import annotations

import ast
import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow.parquet

from recbole_gacllm.data.atomic import MARKS, MAX_LINES, AtomicFile, Lines, read_plain

SEPARATORS = ("\t", ",", ";", "|", "::", " ")
WIDTH = "rows of another width than the header"
_PACKED: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ", lzma.open),
)
_ROW = 200  # characters that a row of text is taken to have
_SAMPLE = 1000
_UNIT = "\x1f"  # stands for a separator of several signs
_ESCAPED = re.compile(r'\\(["\\])')


@dataclass(frozen=True)
class Form:
    r"""How a file is to be read; None is found out.

    Attributes:
        separator: Of delimited text.
        encoding: Of text.
        names: Of the columns of a file without a header.
        escaped: Quotes within quotes are written as ``\"``, not twice.
        rest_in_last: The last column holds what is left, separators and all.
    """

    separator: str | None = None
    encoding: str | None = None
    names: tuple[str, ...] | None = None
    escaped: bool = False
    rest_in_last: bool = False


@dataclass
class Table:
    """A file, opened.

    Attributes:
        path: The file.
        kind: ``text``, ``json`` or ``parquet``.
        form: How it is read.
        names: Its columns, as they are called there.
        sample: Its first rows, at most 1,000.
        notes: What a person should know of how it is read.
        dropped: Reasons -> rows that were left out, counted while :meth:`chunks` reads.
    """

    path: Path
    kind: str
    form: Form
    names: list[str]
    has_header: bool = True
    sample: pd.DataFrame = field(default_factory=pd.DataFrame)
    notes: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def chunks(self, columns: Sequence[str], n_rows: int = 100_000) -> Iterator[pd.DataFrame]:
        """The rows of some columns, about so many at a time."""
        self.dropped.clear()
        read = {"text": _text_chunks, "json": _json_chunks, "parquet": _parquet_chunks}[self.kind]
        return (chunk for chunk in read(self, columns, n_rows) if len(chunk))


def open_table(path: Path, form: Form | None = None) -> Table:
    """Find out how a file is to be read, and read its first rows.

    Raises:
        ValueError: If it is not there, is empty, or is no table.
    """
    if not path.is_file():
        what = f"a folder: give its files, such as {path}/*.csv" if path.is_dir() else "not a file"
        raise ValueError(f"{path} is {what}.")
    form = form or Form()
    with _binary(path) as stream:
        head = stream.read(1 << 16)
    if not head.strip():
        raise ValueError(f"{path} is empty: leave it out, or fill it.")
    if head.startswith(b"PAR1"):
        names = pyarrow.parquet.read_schema(path).names
        table = Table(path, "parquet", form, list(names))
    else:
        encoding = form.encoding or _encoding(path, head)
        table = Table(path, "text", replace(form, encoding=encoding), [])
        if encoding in ("cp1252", "latin-1") and not form.encoding:
            table.notes.append(f"{path.name}: not UTF-8; it is read as {encoding}")
        first = next((line for line in _lines(table) if line.strip()), "").lstrip()
        if first.startswith("{") or (first.startswith("[") and _is_json(path)):
            table.kind = "json"
            records = itertools.islice(_records(table), _SAMPLE)
            table.names = list(dict.fromkeys(name for record in records for name in record))
            if not table.names:
                raise ValueError(f"{path}: its first lines are no records of JSON.")
        else:
            _find_columns(table)
    chunks = table.chunks(table.names, _SAMPLE)
    table.sample = next(chunks, pd.DataFrame(columns=table.names))[:_SAMPLE]
    return table


def _is_json(path: Path) -> bool:
    return any(suffix in (".json", ".jsonl", ".ndjson") for suffix in path.suffixes)


def _binary(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    with path.open("rb") as stream:
        start = stream.read(6)
    for mark, unpack in _PACKED:
        if start.startswith(mark):
            return unpack(path)  # type: ignore[no-any-return]
    if start.startswith(b"PK\x03\x04"):
        archive = zipfile.ZipFile(path)
        members = [name for name in archive.namelist() if not name.endswith("/")]
        if len(members) != 1:
            raise ValueError(
                f"{path} holds {len(members)} files: unpack it, and give those that are meant."
            )
        return archive.open(members[0])
    return path.open("rb")


def _encoding(path: Path, head: bytes) -> str:
    """By a byte order mark, else UTF-8 where the whole file is, else Windows' or Latin 1."""
    if marked := [name for mark, name in MARKS if head.startswith(mark)]:
        return marked[0]
    for name in ("utf-8", "cp1252"):
        decoder = codecs.getincrementaldecoder(name)()
        with _binary(path) as stream:
            try:
                while block := stream.read(1 << 22):
                    decoder.decode(block)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                continue
        return name
    return "latin-1"


def _lines(table: Table) -> Iterator[str]:
    r"""Lines without their ends; a lone ``\r`` ends one only in files that have no other end."""
    with _binary(table.path) as stream:
        text = io.TextIOWrapper(stream, table.form.encoding, newline="\n")
        start = text.readline(1 << 16)
        if not start.endswith("\n") and "\r" in start:
            text = io.TextIOWrapper(_binary(table.path), table.form.encoding, newline=None)
            start = ""
        for line in itertools.chain([start] if start else [], text):
            yield line.rstrip("\r\n").replace("\0", "")


# Delimited text


def _find_columns(table: Table) -> None:
    """Separator, header and names."""
    lines = [line for line in itertools.islice(_lines(table), 200) if line.strip()]
    separator = table.form.separator or _separator(lines)
    rows = _split(lines, separator)
    width = Counter(map(len, rows)).most_common(1)[0][0]
    if table.form.names:
        table.has_header, table.names = False, list(table.form.names)
    elif _is_header(rows, width):
        table.names = _unique([name.strip().rpartition("\ufeff")[2] for name in rows[0]])
    else:
        table.has_header, table.names = False, [f"column {n}" for n in range(1, width + 1)]
    escaped = table.form.escaped
    if not escaped and any('\\"' in line for line in lines):
        fits = [sum(len(row) == width for row in _split(lines, separator, e)) for e in (0, 1)]
        escaped = fits[1] > fits[0]
    table.form = replace(table.form, separator=separator, escaped=escaped)


def _separator(lines: Sequence[str]) -> str:
    """What gives most rows one width, the widest of these."""

    def fit(separator: str) -> tuple[float, int]:
        widths = Counter(map(len, _split(lines, separator)))
        width, n = widths.most_common(1)[0]
        return (n / widths.total() if width > 1 else 0.0), width

    best = max(SEPARATORS[:-1], key=fit)
    return best if fit(best)[0] > 0.5 else max((best, " "), key=fit)


def _split(lines: Iterable[str], separator: str, escaped: object = False) -> list[list[str]]:
    if len(separator) > 1:
        return [line.split(separator) for line in lines]
    if escaped:
        lines = map(_doubled, lines)
    return [row for row in csv.reader((f"{line}\n" for line in lines), delimiter=separator) if row]


def _doubled(line: str) -> str:
    return _ESCAPED.sub(lambda sign: '""' if sign[1] == '"' else "\\", line)


def _is_header(rows: Sequence[Sequence[str]], width: int) -> bool:
    """Whether the first row names columns: no numbers, nothing twice, nothing of the rows below."""
    first = [cell.strip() for cell in rows[0]]
    if len(first) > width or len(set(first)) < len(first) or any(map(is_number, first)):
        return False
    below = [{row[n] for row in rows[1:] if n < len(row)} for n in range(len(first))]
    if any(cell and cell in column for cell, column in zip(first, below, strict=True)):
        return False
    return not all(re.search(r"\d", cell) for cell in first)


def is_number(text: str) -> bool:
    """Whether a cell is one."""
    try:
        float(text)
    except ValueError:
        return False
    return text.strip().lower() not in ("nan", "inf", "infinity")


def _unique(names: Iterable[str]) -> list[str]:
    """Names of columns, those without one by their place."""
    named: list[str] = []
    for place, name in enumerate(names, 1):
        name = name or f"column {place}"
        named.append(name if name not in named else f"{name} {place}")
    return named


def _text_chunks(table: Table, columns: Sequence[str], n_rows: int) -> Iterator[pd.DataFrame]:
    """By pandas where no quote stands in a block, else row by row, as ``atomic.py`` reads."""
    form, width = table.form, len(table.names)
    separator = form.separator or "\t"
    lines = _lines(table)
    if table.has_header:
        next(line for line in lines if line.strip())
    carried: list[str] = []
    while True:
        block, n_signs = carried, 0
        for line in lines:
            block.append(line)
            n_signs += len(line)
            if n_signs > n_rows * _ROW:
                break
        is_last = n_signs <= n_rows * _ROW
        carried = []
        if form.rest_in_last:
            rows = [line.split(separator, width - 1) for line in block if line.strip()]
            yield pd.DataFrame(rows, columns=table.names, dtype=object)[list(columns)]
        elif '"' in (text := "\n".join(block)):
            rows, carried = _quoted_rows(table, separator, block, is_last)
            yield pd.DataFrame(rows, columns=table.names, dtype=object)[list(columns)]
        else:
            yield _plain_rows(table, separator, text, columns)
        if is_last:
            return


def _plain_rows(table: Table, separator: str, text: str, columns: Sequence[str]) -> pd.DataFrame:
    if not text.strip():
        return pd.DataFrame(columns=list(columns))
    if len(separator) > 1:
        text, separator = text.replace(separator, _UNIT), _UNIT
    # pandas cuts a long first row without a word.
    width, lines = len(table.names), text.split("\n")
    fits = [line if line.count(separator) < width else line.rstrip(separator) for line in lines]
    fits = [line for line in fits if line.count(separator) < width]
    if n_long := len(lines) - len(fits):
        table.dropped[WIDTH] += n_long
    header = separator.join("x" * width)  # names may hold anything
    return read_plain([header, *fits], separator, table.names, na_filter=False)[list(columns)]


def _quoted_rows(
    table: Table, separator: str, block: list[str], is_last: bool
) -> tuple[list[list[str]], list[str]]:
    """Rows, and the lines that are left for the next block, where a row may go on."""
    if table.form.escaped:
        block = [_doubled(line) for line in block]
    file = AtomicFile(table.path, table.names, [], pd.DataFrame())
    end = len(block) if is_last else len(block) - MAX_LINES
    rows: list[list[str]] = []
    carried: list[str] = []
    for line, cells in Lines(block, separator, len(table.names), 0, None).rows(0, file):
        if line > end:
            carried = block[line - 1 :]
            break
        rows.append(cells)
    if file.dropped:
        table.dropped[WIDTH] += len(file.dropped)
    return rows, carried


# JSON and Parquet


def _records(table: Table) -> Iterator[dict[str, Any]]:
    """Records, a line each, of JSON or (as Steam's) Python literals; or one list of all."""
    lines = (line for line in _lines(table) if line.strip())
    first = next(lines)
    if first.lstrip().startswith("[") or first.strip() == "{":
        whole = json.loads("\n".join([first, *lines]))
        yield from (record for record in (whole if isinstance(whole, list) else [whole]))
        return
    read: Callable[[str], Any] = json.loads
    try:
        json.loads(first)
    except ValueError:
        read = ast.literal_eval
    for line in itertools.chain([first], lines):
        try:
            record = read(line)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield record
        else:
            table.dropped["lines that are no record"] += 1


def _json_chunks(table: Table, columns: Sequence[str], n_rows: int) -> Iterator[pd.DataFrame]:
    records = _records(table)
    while some := list(itertools.islice(records, n_rows)):
        cells = {
            name: pd.Series([record.get(name) for record in some], dtype=object) for name in columns
        }
        yield pd.DataFrame(cells, columns=list(columns))


def _parquet_chunks(table: Table, columns: Sequence[str], n_rows: int) -> Iterator[pd.DataFrame]:
    file = pyarrow.parquet.ParquetFile(table.path)
    for batch in file.iter_batches(n_rows, columns=list(columns)):
        yield batch.to_pandas(integer_object_nulls=True)[list(columns)]
