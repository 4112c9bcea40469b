"""Metrics by degree: five groups of users, or of items, by training interactions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from recbole_gacllm.compare.degrees import edges, label
from recbole_gacllm.compare.significance import mean_interval
from recbole_gacllm.report.charts import Chart, Series, bar_chart
from recbole_gacllm.report.scoring import Scored


@dataclass(frozen=True)
class Bucket:
    """One group: its degrees in words, how many it holds, its value with a 95 % interval."""

    label: str
    n: int
    value: float | None
    interval: tuple[float, float] | None


def metric_by_degree(
    values: pd.Series[float],
    degrees: Mapping[str, int],
    ranges: list[tuple[int, int]] | None = None,
) -> list[Bucket]:
    """Mean of a per-user metric by the user's degree, with t intervals over users."""
    degree = np.array([degrees.get(user, 0) for user in values.index])
    buckets = []
    for low, high in ranges or edges(degree):
        inside = values[(degree >= low) & (degree <= high)]
        if len(inside):
            interval = mean_interval({0: inside}) if len(inside) > 1 else None
            buckets.append(Bucket(label(low, high), len(inside), float(inside.mean()), interval))
        else:
            buckets.append(Bucket(label(low, high), 0, None, None))
    return buckets


def heldout_found(scored: Scored) -> list[Bucket]:
    """Share of held-out interactions among the recommendations, by the item's degree.

    The groups are equal in number of items, so popular groups hold most interactions. Intervals
    are Wilson's, over interactions.
    """
    degrees = scored.degrees["item"]
    items = set(degrees) | {item for held in scored.heldout.values() for item in held}
    ranges = edges(np.array([degrees.get(item, 0) for item in items]))
    counts = [[0, 0] for _ in ranges]
    for user, held in scored.heldout.items():
        top = set(scored.top.get(user, ()))
        for item in held:
            degree = degrees.get(item, 0)
            place = next(at for at, (_, high) in enumerate(ranges) if degree <= high)
            counts[place][0] += item in top
            counts[place][1] += 1
    return [
        Bucket(label(low, high), n, found / n if n else None, _wilson(found, n))
        for (low, high), (found, n) in zip(ranges, counts, strict=True)
    ]


def degree_chart(
    bars: Mapping[str, list[Bucket]], colours: Mapping[str, int], label: str, side: str
) -> Chart:
    """Bars of each name's groups of users, or of items."""
    series = [
        Series(name, [b.value for b in groups], (), [b.interval for b in groups], colours[name])
        for name, groups in bars.items()
    ]
    groups = [(b.label, f"n = {b.n:,}") for b in next(iter(bars.values()))]
    return bar_chart(groups, series, label, f"training interactions of the {side}")


def _wilson(found: int, n: int) -> tuple[float, float] | None:
    if n == 0:
        return None
    interval = stats.binomtest(found, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
