"""What the pages of a leaderboard are written with."""

from __future__ import annotations

import re

from recbole_gacllm.compare import markdown as cells

_METRIC_NAMES = {"mrr": "MRR", "ndcg": "NDCG", "map": "MAP", "auc": "AUC", "gauc": "GAUC"}


def metric_name(metric: str) -> str:
    """``ndcg@10`` -> ``NDCG@10``, ``recall@10`` -> ``Recall@10``."""
    name, at, k = metric.partition("@")
    return _METRIC_NAMES.get(name, name.capitalize()) + at + k


def bold(name: str) -> str:
    """A model's name in the first column."""
    return f"**{cells.markdown(name)}**"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; its cells are Markdown, of :mod:`.cells`."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = [
        [f"{text:<{width}}" for text, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


_MARKDOWN = re.compile(
    r"[\\`*<|~$]|\](?=\()|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)"  # not the _ in a_b
)
_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"},
    **{"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"},
}


def markdown(text: object) -> str:
    """One line that Markdown shows as it is, in a table, too."""
    return _MARKDOWN.sub(r"\\\g<0>", _one_line(text))


def markdown_code(text: object) -> str:
    """The same as code: within a fence longer than any in the text."""
    line = _one_line(text).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if "`" in line[:1] + line[-1:] else ""
    return f"{fence}{space}{line}{space}{fence}"


def latex(text: object) -> str:
    r"""One line that LaTeX shows as it is; ``\\`` before it would read a first ``[`` or ``*``."""
    shown = "".join(_LATEX.get(char, char) for char in _one_line(text))
    return re.sub(r"^[\[*]", r"{\g<0>}", shown)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
