"""What the tables of a leaderboard are written with: cells of Markdown, LaTeX and CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from recbole_gacllm.artifacts.csv_cells import csv_of, no_formula

_METRIC_NAMES = {"mrr": "MRR", "ndcg": "NDCG", "map": "MAP", "auc": "AUC", "gauc": "GAUC"}
_MARKDOWN = re.compile(
    r"[\\`*<|~$]|\](?=\()|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)"  # not the _ in a_b
)
_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"},
    **{"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"},
}


def metric_name(metric: str) -> str:
    """``ndcg@10`` -> ``NDCG@10``, ``recall@10`` -> ``Recall@10``."""
    name, at, k = metric.partition("@")
    return _METRIC_NAMES.get(name, name.capitalize()) + at + k


def mean_std(mean: float, std: float | None, decimals: int) -> str:
    """``0.1234 ± 0.0012``, or the mean alone."""
    return f"{mean:.{decimals}f}" + ("" if std is None else f" ± {std:.{decimals}f}")


def markdown(text: object) -> str:
    """One line that Markdown shows as it is, in a table, too."""
    return _MARKDOWN.sub(r"\\\g<0>", _one_line(text))


def markdown_code(text: object) -> str:
    """The same as code: within a fence longer than any in the text."""
    line = _one_line(text).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if "`" in line[:1] + line[-1:] else ""
    return f"{fence}{space}{line}{space}{fence}"


def bold(name: str) -> str:
    """A model's name in the first column."""
    return f"**{markdown(name)}**"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns, of cells that are Markdown.

    By hand: tabulate's ``pipe`` and ``github`` have no blank before the dashes of the second line.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = [map(str.ljust, line, widths) for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def latex(text: object) -> str:
    r"""One line that LaTeX shows as it is; ``\\`` before it would read a first ``[`` or ``*``."""
    shown = "".join(_LATEX.get(char, char) for char in _one_line(text))
    return re.sub(r"^[\[*]", r"{\g<0>}", shown)


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """A CSV file of which a spreadsheet calculates nothing; numbers stay numbers."""
    frame = pd.DataFrame(list(rows), dtype=object).map(no_formula)
    return csv_of(frame)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
