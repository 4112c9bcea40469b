"""Charts as inline SVG: no library in the page, sharp in print, coloured by the page's theme.

A chart is a list of shapes; ``templates/macros.html`` writes them. Colours are the classes ``c0``
to ``c7`` of ``style.css``; ``other`` is grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 14, 44
N_COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line or one colour of bars."""

    name: str  # in the legend
    y: Sequence[float | None]  # None where there is no value
    x: Sequence[float] = ()  # empty for bars, which stand on categories
    intervals: Sequence[tuple[float, float] | None] = ()  # (low, high) of each value, for bars
    colour: int = 0  # its number, so that a model keeps its own in all charts


@dataclass(frozen=True)
class Shape:
    """An element of SVG: its name, its attributes, the words in it or those of its tooltip."""

    tag: str
    attributes: dict[str, str]
    words: str = ""
    tooltip: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing: its label for screen readers, viewBox, legend (names, classes) and class."""

    label: str
    box: str
    shapes: list[Shape]
    legend: list[tuple[str, str]]
    kind: str = "chart"


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
        return f"{value:.4f}".rstrip("0").replace("0.", ".", 1)
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def line_chart(
    series: Sequence[Series],
    label: str,
    x_label: str,
    marked: tuple[float, float, str] | None = None,
) -> Chart:
    """Lines over epochs or steps, each with a value or more; ``marked`` is a point with words."""
    xs = [x for line in series for x in line.x]
    ys = [y for line in series for y in line.y if y is not None]
    low, high = min(xs), max(xs)
    at_y, shapes = _y_axis(min(ys), max(ys))

    def at_x(x: float) -> float:
        return _LEFT + (x - low) / max(high - low, 1e-9) * (WIDTH - _LEFT - _RIGHT)

    for tick in ticks(low, high, 6):
        if low <= tick <= high and float(tick).is_integer():
            shapes.append(_text(number(tick), at_x(tick), HEIGHT - _BOTTOM + 18))
    shapes.append(_x_label(x_label, HEIGHT))
    for line in series:
        pairs = zip(line.x, line.y, strict=True)
        points = [(at_x(x), at_y(y)) for x, y in pairs if y is not None]
        if len(points) == 1:
            shapes.append(_circle(f"fill c{line.colour}", *points[0], 3.5))
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            shapes.append(Shape("polyline", {"class": f"line c{line.colour}", "points": path}))
    if marked is not None:
        x, y = at_x(marked[0]), at_y(marked[1])
        anchor, shift = ("end", -8) if x > WIDTH * 0.6 else ("start", 8)
        below = y + (18 if y < _TOP + 16 else -8)
        shapes += [_circle("mark", x, y, 4), _text(marked[2], x + shift, below, "note", anchor)]
    return Chart(label, f"0 0 {WIDTH} {HEIGHT}", shapes, _legend(series))


def bar_chart(
    categories: Sequence[tuple[str, str]], series: Sequence[Series], label: str, x_label: str
) -> Chart:
    """Bars from zero with whiskers: a group for each category, which are two lines of text."""
    highs = [
        interval[1] if interval else value
        for one in series
        for value, interval in zip(one.y, one.intervals or [None] * len(one.y), strict=True)
        if value is not None
    ]
    at_y, shapes = _y_axis(0.0, max([*highs, 1e-6]))
    height = HEIGHT + 16 if x_label else HEIGHT - 18
    slot = (WIDTH - _LEFT - _RIGHT) / len(categories)
    width = min(slot * 0.78 / len(series), 46)
    for place, (first, second) in enumerate(categories):
        middle = _LEFT + slot * (place + 0.5)
        shapes.append(_text(first, middle, HEIGHT - _BOTTOM + 18))
        shapes.append(_text(second, middle, HEIGHT - _BOTTOM + 33, "tick faint"))
        for offset, one in enumerate(series):
            value = one.y[place]
            if value is None:
                continue
            left, top = middle + (offset - len(series) / 2) * width, at_y(value)
            bar = {"class": f"fill c{one.colour}", "x": f"{left + 1:.1f}", "y": f"{top:.1f}"}
            bar |= {"width": f"{width - 2:.1f}", "height": f"{max(at_y(0) - top, 0):.1f}"}
            tooltip = f"{one.name}, {first}: {value:.4f}"
            shapes.append(Shape("rect", bar | {"rx": "2"}, tooltip=tooltip))
            interval = one.intervals[place] if one.intervals else None
            if interval:
                low, high = (at_y(max(end, 0.0)) for end in interval)
                shapes.append(_path("whisker", f"M{left + width / 2:.1f} {low:.1f}V{high:.1f}"))
    shapes.append(_x_label(x_label, height))
    return Chart(label, f"0 0 {WIDTH} {height}", shapes, _legend(series))


def interval_chart(rows: Sequence[tuple[str, float, float, float]], label: str) -> Chart:
    """Means with intervals, one below the other: (name, mean, low, high)."""
    row_height, left = 30, 30 + 7.5 * min(max(len(row[0]) for row in rows), 26)
    height = _TOP + row_height * len(rows) + 30
    marks = ticks(min(row[2] for row in rows), max(row[3] for row in rows), 6)

    def at(value: float) -> float:
        return left + (value - marks[0]) / (marks[-1] - marks[0]) * (WIDTH - left - 24)

    shapes = []
    for tick in marks:
        shapes.append(_path("grid", f"M{at(tick):.1f} {_TOP}V{height - 28}"))
        shapes.append(_text(number(tick), at(tick), height - 10))
    for place, (name, mean, start, end) in enumerate(rows):
        y, colour = _TOP + row_height * (place + 0.5), f"c{place % N_COLOURS}"
        short = name if len(name) <= 26 else f"{name[:25]}…"
        tooltip = f"{name}: {mean:.4f} [{start:.4f}, {end:.4f}]"
        shapes.append(_text(short, left - 12, y + 4.5, "name", "end"))
        shapes.append(_path(f"line {colour}", f"M{at(start):.1f} {y:.1f}H{at(end):.1f}"))
        shapes.append(_circle(f"fill {colour}", at(mean), y, 5, tooltip))
    return Chart(label, f"0 0 {WIDTH} {height}", shapes, [])


def point_map(groups: Sequence[Sequence[tuple[int, int]]], label: str) -> Chart:
    """Points of a 1000 x 800 field, one colour a group; the last group is grey.

    Each group is one path of round dots, so that thousands of points stay small.
    """
    shapes = []
    for place, points in reversed(list(enumerate(groups))):
        if points:
            colour = "other" if place == len(groups) - 1 else f"c{place % N_COLOURS}"
            shapes.append(_path(f"dots {colour}", "".join(f"M{x} {y}h0" for x, y in points)))
    shapes.append(Shape("circle", {"class": "found", "r": "13", "hidden": ""}))
    return Chart(label, "-12 -12 1024 824", shapes, [], "map")


def scaled(points: np.ndarray) -> list[tuple[int, int]]:
    """Points ``[n, 2]`` as whole numbers of a 1000 x 800 field, outliers drawn to its edge."""
    low, high = np.quantile(points, 0.003, axis=0), np.quantile(points, 0.997, axis=0)
    unit = (points - low) / np.maximum(high - low, 1e-9)
    field = np.clip(unit, 0, 1) * [1000, 800]
    return [(int(x), int(y)) for x, y in np.rint(field)]


def _y_axis(low: float, high: float) -> tuple[Callable[[float], float], list[Shape]]:
    """Where a value stands, and the lines of the axis."""
    marks = ticks(low, high)

    def at_y(value: float) -> float:
        share = (value - marks[0]) / (marks[-1] - marks[0])
        return HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP)

    shapes = []
    for mark in marks:
        shapes.append(_path("grid", f"M{_LEFT} {at_y(mark):.1f}H{WIDTH - _RIGHT}"))
        shapes.append(_text(number(mark), _LEFT - 8, at_y(mark) + 4.5, anchor="end"))
    return at_y, shapes


def _x_label(words: str, height: int) -> Shape:
    return _text(words, (_LEFT + WIDTH - _RIGHT) / 2, height - 5, "tick faint")


def _text(words: str, x: float, y: float, kind: str = "tick", anchor: str = "middle") -> Shape:
    place = {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    return Shape("text", place, words)


def _path(kind: str, d: str) -> Shape:
    return Shape("path", {"class": kind, "d": d})


def _circle(kind: str, x: float, y: float, r: float, tooltip: str = "") -> Shape:
    place = {"class": kind, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{r:g}"}
    return Shape("circle", place, tooltip=tooltip)


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Names of the colours; one series needs none."""
    return [(one.name, f"c{one.colour}") for one in series] if len(series) > 1 else []
