"""Charts as inline SVG: no library in the page, sharp in print, coloured by the page's theme.

Colours are the classes ``c0`` to ``c7`` of ``style.css``; ``other`` is grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 14, 44
N_COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line or one colour of bars.

    Attributes:
        name: In the legend.
        x: Where the values stand; empty for bars, which stand on categories.
        y: Values; None where there is none.
        intervals: (low, high) of each value, for bars.
        colour: Number of the colour, so that a model keeps its own in all charts.
    """

    name: str
    y: Sequence[float | None]
    x: Sequence[float] = ()
    intervals: Sequence[tuple[float, float] | None] = ()
    colour: int = 0


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About ``n`` round numbers that span ``[low, high]``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(n - 1, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def number(value: float) -> str:
    """A value of an axis: short, without the zero before the point."""
    if value and abs(value) < 1:
        text = f"{value:.4f}".rstrip("0")
        return text.replace("0.", ".", 1)
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def line_chart(
    series: Sequence[Series],
    label: str,
    x_label: str,
    marked: tuple[float, float, str] | None = None,
) -> str:
    """Lines over epochs or steps.

    Args:
        series: At least one, each with a value or more.
        label: What is shown, for screen readers.
        x_label: Under the axis.
        marked: A point (x, y) with words, such as the best epoch.
    """
    xs = [x for line in series for x in line.x]
    ys = [y for line in series for y in line.y if y is not None]
    x_ticks = [tick for tick in ticks(min(xs), max(xs), 6) if min(xs) <= tick <= max(xs)]
    y_ticks = ticks(min(ys), max(ys))
    span = max(max(xs) - min(xs), 1e-9)

    def at_x(x: float) -> float:
        return _LEFT + (x - min(xs)) / span * (WIDTH - _LEFT - _RIGHT)

    parts = [_y_axis(y_ticks)]
    parts += [
        f'<text class="tick" x="{at_x(tick):.1f}" y="{HEIGHT - _BOTTOM + 18}" '
        f'text-anchor="middle">{number(tick)}</text>'
        for tick in x_ticks
        if float(tick).is_integer()
    ]
    parts.append(_x_label(x_label))
    for line in series:
        points = [
            f"{at_x(x):.1f},{_at_y(y, y_ticks):.1f}"
            for x, y in zip(line.x, line.y, strict=True)
            if y is not None
        ]
        colour = f"c{line.colour}"
        if len(points) == 1:
            left, top = points[0].split(",")
            parts.append(f'<circle class="fill {colour}" cx="{left}" cy="{top}" r="3.5"/>')
        else:
            parts.append(f'<polyline class="line {colour}" points="{" ".join(points)}"/>')
    if marked is not None:
        x, y, words = marked
        near_right = at_x(x) > WIDTH * 0.6
        anchor, shift = ("end", -8) if near_right else ("start", 8)
        is_at_top = _at_y(y, y_ticks) < _TOP + 16
        parts.append(
            f'<circle class="mark" cx="{at_x(x):.1f}" cy="{_at_y(y, y_ticks):.1f}" r="4"/>'
            f'<text class="note" x="{at_x(x) + shift:.1f}" '
            f'y="{_at_y(y, y_ticks) + (18 if is_at_top else -8):.1f}" text-anchor="{anchor}">'
            f"{escape(words)}</text>"
        )
    return _svg(parts, label) + _legend(series)


def bar_chart(
    categories: Sequence[tuple[str, str]], series: Sequence[Series], label: str, x_label: str
) -> str:
    """Bars from zero, in groups, with whiskers for intervals.

    Args:
        categories: Two lines under each group.
        series: One bar of each group.
        label: What is shown, for screen readers.
        x_label: Under the axis.
    """
    highs = [
        interval[1] if interval else value
        for one in series
        for value, interval in zip(one.y, one.intervals or [None] * len(one.y), strict=True)
        if value is not None
    ]
    y_ticks = ticks(0.0, max([*highs, 1e-6]))
    height = HEIGHT + 16 if x_label else HEIGHT - 18
    slot = (WIDTH - _LEFT - _RIGHT) / len(categories)
    width = min(slot * 0.78 / len(series), 46)
    parts = [_y_axis(y_ticks)]
    for place, (first, second) in enumerate(categories):
        middle = _LEFT + slot * (place + 0.5)
        parts.append(
            f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - _BOTTOM + 18}" '
            f'text-anchor="middle">{escape(first)}</text>'
            f'<text class="tick faint" x="{middle:.1f}" y="{HEIGHT - _BOTTOM + 33}" '
            f'text-anchor="middle">{escape(second)}</text>'
        )
        for offset, one in enumerate(series):
            value = one.y[place]
            if value is None:
                continue
            left = middle + (offset - len(series) / 2) * width
            top = _at_y(value, y_ticks)
            parts.append(
                f'<rect class="fill c{one.colour}" x="{left + 1:.1f}" y="{top:.1f}" '
                f'width="{width - 2:.1f}" height="{max(_at_y(0, y_ticks) - top, 0):.1f}" rx="2">'
                f"<title>{escape(one.name)}, {escape(first)}: {value:.4f}</title></rect>"
            )
            interval = one.intervals[place] if one.intervals else None
            if interval:
                low, high = (_at_y(max(end, 0.0), y_ticks) for end in interval)
                parts.append(
                    f'<path class="whisker" d="M{left + width / 2:.1f} {low:.1f}V{high:.1f}"/>'
                )
    parts.append(_x_label(x_label, height))
    return _svg(parts, label, height) + _legend(series)


def interval_chart(rows: Sequence[tuple[str, float, float, float]], label: str) -> str:
    """Means with intervals, one below the other: (name, mean, low, high)."""
    row_height, left = 30, 30 + 7.5 * min(max(len(row[0]) for row in rows), 26)
    height = _TOP + row_height * len(rows) + 30
    low, high = min(row[2] for row in rows), max(row[3] for row in rows)
    marks = ticks(low, high, 6)

    def at(value: float) -> float:
        return left + (value - marks[0]) / (marks[-1] - marks[0]) * (WIDTH - left - 24)

    parts = [
        f'<path class="grid" d="M{at(tick):.1f} {_TOP}V{height - 28}"/>'
        f'<text class="tick" x="{at(tick):.1f}" y="{height - 10}" text-anchor="middle">'
        f"{number(tick)}</text>"
        for tick in marks
    ]
    for place, (name, mean, start, end) in enumerate(rows):
        y = _TOP + row_height * (place + 0.5)
        shown = name if len(name) <= 26 else f"{name[:25]}…"
        parts.append(
            f'<text class="name" x="{left - 12}" y="{y + 4.5:.1f}" text-anchor="end">'
            f'{escape(shown)}</text><path class="line c{place % N_COLOURS}" '
            f'd="M{at(start):.1f} {y:.1f}H{at(end):.1f}"/>'
            f'<circle class="fill c{place % N_COLOURS}" cx="{at(mean):.1f}" cy="{y:.1f}" r="5">'
            f"<title>{escape(name)}: {mean:.4f} [{start:.4f}, {end:.4f}]</title></circle>"
        )
    return _svg(parts, label, height)


def point_map(groups: Sequence[Sequence[tuple[int, int]]], label: str) -> str:
    """Points of a 1000 x 800 field, one colour a group; the last group is grey.

    Each group is one path of round dots, so that thousands of points stay small.
    """
    parts = []
    for place, points in reversed(list(enumerate(groups))):
        if not points:
            continue
        colour = "other" if place == len(groups) - 1 else f"c{place % N_COLOURS}"
        path = "".join(f"M{x} {y}h0" for x, y in points)
        parts.append(f'<path class="dots {colour}" data-group="{place}" d="{path}"/>')
    return (
        f'<svg class="map" viewBox="-12 -12 1024 824" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + '<circle class="found" r="13" hidden=""/></svg>'
    )


def scaled(points: np.ndarray) -> list[tuple[int, int]]:
    """Coordinates as whole numbers of a 1000 x 800 field, outliers drawn to its edge.

    Shapes:
        points: ``[n, 2]``.
    """
    low, high = np.quantile(points, 0.003, axis=0), np.quantile(points, 0.997, axis=0)
    unit = (points - low) / np.maximum(high - low, 1e-9)
    field = np.clip(unit, 0, 1) * [1000, 800]
    return [(int(x), int(y)) for x, y in np.rint(field)]


def _at_y(value: float, marks: Sequence[float]) -> float:
    share = (value - marks[0]) / (marks[-1] - marks[0])
    return HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP)


def _y_axis(marks: Sequence[float]) -> str:
    return "".join(
        f'<path class="grid" d="M{_LEFT} {_at_y(mark, marks):.1f}H{WIDTH - _RIGHT}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{_at_y(mark, marks) + 4.5:.1f}" '
        f'text-anchor="end">{number(mark)}</text>'
        for mark in marks
    )


def _x_label(words: str, height: int = HEIGHT) -> str:
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return (
        f'<text class="tick faint" x="{middle:.0f}" y="{height - 5}" text-anchor="middle">'
        f"{escape(words)}</text>"
    )


def _svg(parts: Sequence[str], label: str, height: int = HEIGHT) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _legend(series: Sequence[Series]) -> str:
    """Names of the colours; one series needs none."""
    if len(series) < 2:
        return ""
    return legend([(one.name, f"c{one.colour}") for one in series])


def legend(keys: Sequence[tuple[str, str]]) -> str:
    """Names and the classes of their colours."""
    rows = "".join(f'<li><i class="key {colour}"></i>{escape(name)}</li>' for name, colour in keys)
    return f'<ul class="legend">{rows}</ul>'
