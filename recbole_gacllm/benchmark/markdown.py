"""What the pages of a leaderboard are written with."""

from __future__ import annotations

from recbole_gacllm.benchmark import cells

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
