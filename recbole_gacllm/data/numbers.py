"""Columns of an atomic file as numbers: amounts, and times that may be written as dates."""

from __future__ import annotations

import numpy as np
import pandas as pd

from recbole_gacllm.data.atomic import MISSING, AtomicFile

_UTC = r"(?<=\d)(\s*)(?:UTC|GMT)$"
# Dates that ISO 8601 does not cover; several may fit, then they say the same or are ambiguous.
_DATES = (
    *("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%m %d, %Y"),
    *("%d/%m/%Y %H:%M:%S", "%m/%d/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M"),
    *("%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%b %d, %Y", "%B %d, %Y", "%d %b %Y", "%d %B %Y"),
    *("%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z", "%a %b %d %H:%M:%S %Y"),
)


def numbers(file: AtomicFile, name: str) -> np.ndarray:
    """A column as float64, NaN where missing.

    Raises:
        ValueError: Names the first line that holds something else.
    """
    column = file.cells[name]
    column = column.mask(column.str.strip().isin(MISSING))
    try:
        return column.to_numpy(np.float64)
    except ValueError:
        bad = column.notna() & pd.to_numeric(column, errors="coerce").isna()
        row = int(np.argmax(bad))
        raise ValueError(
            f"{file.path}, line {file.line(row)}, column {name!r}: {column[row]!r} is no number, "
            "and the header says float. Mend it, or call the column token."
        ) from None


def times(file: AtomicFile, name: str) -> np.ndarray:
    """The column of times as float64: numbers as they are, dates in seconds since 1970 (UTC).

    Raises:
        ValueError: If it holds neither, or dates that can be read in two ways.
    """
    column = file.cells[name]
    try:
        return column.to_numpy(np.float64)
    except ValueError:
        column = column.str.strip().str.replace(_UTC, r"\1+00:00", regex=True)
    values = pd.to_numeric(column, errors="coerce")
    present = column.notna() & ~column.isin(MISSING)
    if values[present].notna().all():
        return column.where(present).to_numpy(np.float64)
    dates = _dates(column[present])
    if dates is None:
        bad = column[present & values.isna()]
        raise ValueError(
            f"{file.path}, line {file.line(int(bad.index[0]))}, column {name!r} (TIME_FIELD): "
            f"{bad.iloc[0]!r} is neither a number nor a date that can be read without doubt. "
            "Write all times as numbers, or as 2024-03-31 or 2024-03-31T18:05:00."
        )
    seconds = np.full(len(column), np.nan)
    seconds[present.to_numpy()] = dates
    return seconds


def _dates(column: pd.Series) -> np.ndarray | None:
    """Seconds since 1970; None where not all are dates, or more than one reading fits."""
    readings = []
    for form in ("ISO8601", *_DATES):
        try:
            parsed = pd.to_datetime(column, format=form, utc=True)
        except (ValueError, TypeError, OverflowError):
            continue
        epoch = pd.Timestamp(0, tz="UTC")
        readings.append(((parsed - epoch) / pd.Timedelta(seconds=1)).to_numpy(np.float64))
        if form == "ISO8601":
            break
    if not readings or any(not np.array_equal(readings[0], other) for other in readings[1:]):
        return None
    return readings[0]
