"""Cells of CSV files: text that a spreadsheet would calculate is written with a quote before it."""

from __future__ import annotations

import io
import re
from typing import Any

import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")  # the wide ones, too


def no_formula(value: Any) -> Any:
    """A cell of CSV: text that a spreadsheet would calculate gets a quote before it."""
    if not isinstance(value, str) or not _FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def as_before(cell: str) -> str:
    """What :func:`no_formula` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def csv_of(frame: pd.DataFrame) -> str:
    r"""The frame as CSV with ``\n`` after each row; a cell that holds ``\r`` is quoted, too.

    ``csv`` quotes the signs of its line terminator only, before Python 3.13.
    """
    rows = _Rows()
    frame.to_csv(rows, index=False, lineterminator="\r\n")
    return rows.getvalue()


class _Rows(io.StringIO):
    def write(self, row: str) -> int:
        return super().write(row.removesuffix("\r\n") + "\n")
