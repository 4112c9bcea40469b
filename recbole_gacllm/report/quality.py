"""What the descriptions of each layer are like, as a section of a run's page."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from recbole_gacllm.report.markup import note, table
from recbole_gacllm.report.source import Source


def quality(source: Source) -> str:
    """The figures that the run recorded of each layer and side."""
    layers = source.record.get("description_quality")
    if not layers:
        why = source.texts if isinstance(source.texts, str) else "the run recorded no such figures"
        raise LookupError(why)
    columns = [
        (f"Layer {layer['number']}, {side}s", figures)
        for layer in layers
        for side, figures in layer["sides"].items()
    ]
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "Nodes": lambda q: f"{q['n_nodes']:,}",
        "Statuses": lambda q: ", ".join(f"{k} {n:,}" for k, n in q["statuses"].items()),
        "Words, median (10 % to 90 %)": lambda q: (
            f"{q['n_words']['median']} ({q['n_words']['p10']}–{q['n_words']['p90']})"
        ),
        "Copies of the own text below": lambda q: _share(q["own_copies"]),
        "Copies of a neighbour's": lambda q: _share(q["neighbor_copies"]),
        "Shared with another node": lambda q: _share(q["repeated"]),
        "Distinct words": lambda q: f"{q['distinct'][0]:.3f}",
        "Distinct word pairs": lambda q: f"{q['distinct'][1]:.3f}",
        "Most frequent language": lambda q: _first(q["languages"]),
        "Names its own item": lambda q: _share(q["own_names"]),
        "Names an item of its prompt": lambda q: _share(q["neighbor_names"]),
    }
    rows = [
        [
            f'<th scope="row">{escape(label)}</th>',
            *(f"<td>{escape(cell(figures))}</td>" for _, figures in columns),
        ]
        for label, cell in lines.items()
    ]
    words = (
        "Copies are found behind the words that nearly all texts of a side begin with. Distinct: "
        "different words (or pairs) over all."
    )
    return table(["", *(name for name, _ in columns)], rows, "numbers") + note(words)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _first(shares: dict[str, Any]) -> str:
    name, share = next(iter(shares.items()), ("none", 1.0))
    return f"{name} {share:.1%}"
