"""Small pieces of HTML; whatever comes from data is escaped here or before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls by itself on a narrow screen.

    Args:
        head: Plain texts of the first row.
        rows: Cells as HTML, ``<th>`` or ``<td>`` included.
        kind: Its class.
    """
    first = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{first}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def definition_list(facts: Mapping[str, str]) -> str:
    """Names (plain text) and values (HTML)."""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in facts.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def figure(caption: str, content: str) -> str:
    """A chart with its caption above it."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def figures(drawn: Sequence[str]) -> str:
    """Charts side by side, below each other on a narrow screen."""
    return f'<div class="columns">{"".join(drawn)}</div>'


def note(words: str) -> str:
    """Small print; plain text."""
    return f'<p class="note">{escape(words)}</p>' if words else ""


def seconds(value: float) -> str:
    """A duration."""
    if value < 90:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    if value < 5400:
        return f"{value / 60:.1f} min"
    return f"{value / 3600:.1f} h"


def signed(value: float, form: str = ".4f") -> str:
    """A difference with its sign, a true minus."""
    return f"{value:+{form}}".replace("-", "−")
