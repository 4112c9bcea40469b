"""Features of users and items out of other people's files, as RecBole's atomic files have them."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow
import pyarrow.csv

from recbole_gacllm.data.guessing import TEXT_NAMES, plain_name, texts
from recbole_gacllm.data.markup import without_markup

#: Between the elements of a list in a cell.
SEQ_SEPARATOR = "|"
_PROSE = (*TEXT_NAMES["text"], "text", "body", "content", "about")
_ROWS = 1_000_000  # written at a time
_LONG = 60  # characters, of an element of a list that is a paragraph
_FEW = 0.5  # of the ids meet: other ways of writing them are tried


def collect(
    chunks: Iterator[pd.DataFrame],
    id_column: str,
    known: Mapping[str, int],
    dropped: Counter[str],
    notes: list[str],
) -> pd.DataFrame:
    """The first row of each id that has interactions; its index is the id as it stands there.

    Args:
        chunks: Rows.
        id_column: The column of ids.
        known: Ids with interactions.
        dropped: Counts what is left out.
        notes: Told if ids meet only when they are written otherwise.
    """
    frames: list[pd.DataFrame] = []
    seen: set[str] = set()
    change: Callable[[str], str] | None = None
    written: Mapping[str, str] = {}
    for chunk in chunks:
        ids = texts(chunk[id_column])
        if not frames:
            change, words = _way_to_meet(ids.dropna().tolist(), known)
            if change is not None:
                written = {change(token): token for token in known}
                notes.append(f"ids of {id_column!r} meet those of the interactions {words}")
        if change is not None:
            ids = pd.Series(
                [token and written.get(change(token), token) for token in ids],
                index=ids.index,
                dtype=object,
            )
        is_known = ids.isin(known)
        repeated = is_known & (ids.duplicated() | ids.isin(seen))
        dropped["rows without an id"] += int(ids.isna().sum())
        dropped["rows of nodes without interactions"] += int((~is_known & ids.notna()).sum())
        dropped["rows with the id of an earlier one"] += int(repeated.sum())
        rows = is_known & ~repeated
        seen.update(ids[rows])
        frames.append(chunk[rows].drop(columns=id_column).set_axis(ids[rows], axis=0))
    return pd.concat(frames) if frames else pd.DataFrame()


def _way_to_meet(
    ids: Sequence[str], known: Mapping[str, int]
) -> tuple[Callable[[str], str] | None, str]:
    """What makes the ids of both files alike, where few are as they stand."""
    ways: dict[str, Callable[[str], str]] = {
        "without '.0'": lambda token: token.removesuffix(".0"),
        "without zeros in front": lambda token: token.removesuffix(".0").lstrip("0") or "0",
        "in lower case": str.lower,
    }
    n_met = len(known.keys() & set(ids))
    if n_met > _FEW * min(len(known), len(set(ids))):
        return None, ""
    for words, change in ways.items():
        changed = {change(token) for token in known}
        if len(changed) == len(known) and len(changed & set(map(change, ids))) > 2 * n_met:
            return change, words
    return None, ""


def cells(column: pd.Series) -> tuple[str, list[str]]:
    """RecBole's type of a column and its cells as they are written.

    Lists of words become ``token_seq``, paragraphs one text; anything nested stays JSON. Texts have
    no HTML, and one blank where there was white space.
    """
    lists = column.map(lambda cell: isinstance(cell, (list, tuple, np.ndarray)))
    if lists.any():
        values = [_elements(cell) for cell in column]
        if all(value is not None for value in values):
            return _of_lists(str(column.name), [value or [] for value in values])
    if lists.any() or column.map(lambda cell: isinstance(cell, dict)).any():
        return "token", [_json(cell) for cell in column]
    words = texts(column)
    present = words.dropna()
    numbers = pd.to_numeric(present, errors="coerce")
    if len(present) and numbers.notna().all() and present.str.contains(".", regex=False).any():
        return "float", words.fillna("").tolist()
    return "token", ["" if word is None else clean(word) for word in words]


def clean(text: str) -> str:
    """One line without HTML."""
    return " ".join(without_markup(text).split())


def _elements(cell: object) -> list[str] | None:
    """The words of a flat list; None where it is nested."""
    if cell is None or isinstance(cell, float):
        return []
    if isinstance(cell, str):
        return [clean(cell)] if cell.strip() else []
    if not isinstance(cell, (list, tuple, np.ndarray)):
        return None
    while len(cell) == 1 and isinstance(cell[0], list):  # Amazon's [["Books", "Crime"]]
        cell = cell[0]
    if any(isinstance(element, (list, tuple, dict, np.ndarray)) for element in cell):
        return None
    return [word for element in cell if element is not None and (word := clean(str(element)))]


def _of_lists(name: str, values: list[list[str]]) -> tuple[str, list[str]]:
    words = [word for value in values for word in value]
    is_prose = plain_name(name) in _PROSE and plain_name(name) != "features"
    if is_prose or (words and np.mean([len(word) for word in words]) > _LONG):
        return "token", [" ".join(value) for value in values]
    if any(SEQ_SEPARATOR in word for word in words):
        return "token", [_json(value) if value else "" for value in values]
    return "token_seq", [SEQ_SEPARATOR.join(dict.fromkeys(value)) for value in values]


def _json(cell: object) -> str:
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return ""
    if isinstance(cell, np.ndarray):
        cell = cell.tolist()
    return clean(cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False))


def safe_name(name: str, taken: Sequence[str]) -> str:
    """A column's name in RecBole's header: letters, digits and underscores, and unique."""
    name = re.sub(r":\w+$", "", name)
    name = re.sub(r"\W+", "_", name).strip("_").lower() or "column"
    while name in taken:
        name += "_"
    return name


def write_features(
    file: Path, id_field: str, rows: pd.DataFrame
) -> tuple[dict[str, str], dict[str, str]]:
    """Write an atomic file of features.

    Args:
        file: The file.
        id_field: RecBole's name of the id column.
        rows: Index: ids; columns: features.

    Returns:
        The file's names of its columns, with their types; and those of the columns that hold
        nothing and are left out, with why.
    """
    header, columns, empty = [f"{id_field}:token"], [rows.index.tolist()], {}
    names: dict[str, str] = {}
    for place, column in enumerate(rows.columns):
        kind, written = cells(rows.iloc[:, place])
        if not any(written):
            empty[str(column)] = "empty"
            continue
        name = safe_name(str(column), [id_field, *names])
        names[name] = kind
        header.append(f"{name}:{kind}")
        columns.append(written)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(zip(*columns, strict=True))
    return names, empty


def write_interactions(
    file: Path,
    tokens: Mapping[str, tuple[npt.NDArray[np.int32], Sequence[str]]],
    numbers: Mapping[str, npt.NDArray[np.float64]],
) -> None:
    """Write an atomic file of interactions.

    Args:
        file: The file.
        tokens: Name of a column -> number of each row's token, and the tokens.
        numbers: Name of a column -> its values, NaN where missing.
    """
    header = [*(f"{name}:token" for name in tokens), *(f"{name}:float" for name in numbers)]
    n_rows = len(next(iter(tokens.values()))[0])
    special = any(re.search(r'["\t\n\r]', word) for _, words in tokens.values() for word in words)
    whole = {
        name: bool((values[~np.isnan(values)] % 1 == 0).all()) for name, values in numbers.items()
    }
    words = {name: pyarrow.array(list(of_name)) for name, (_, of_name) in tokens.items()}
    with file.open("wb") as stream:
        stream.write(("\t".join(header) + "\n").encode())
        for start in range(0, n_rows, _ROWS):
            rows = slice(start, start + _ROWS)
            columns = {name: words[name].take(codes[rows]) for name, (codes, _) in tokens.items()}
            for name, values in numbers.items():
                column = pyarrow.array(values[rows], from_pandas=True)
                columns[name] = column.cast(pyarrow.int64()) if whole[name] else column
            table = pyarrow.table(columns)
            if special:
                table.to_pandas(integer_object_nulls=True).to_csv(
                    stream, sep="\t", index=False, header=False, lineterminator="\n"
                )
            else:
                options = pyarrow.csv.WriteOptions(
                    include_header=False, delimiter="\t", quoting_style="none"
                )
                pyarrow.csv.write_csv(table, stream, options)
