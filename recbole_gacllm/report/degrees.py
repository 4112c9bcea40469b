"""Metrics by degree: five groups of users, or of items, by training interactions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from recbole_gacllm.compare.degrees import edges, label
from recbole_gacllm.compare.significance import mean_interval
from recbole_gacllm.report.charts import Chart, Series, bar_chart
from recbole_gacllm.report.scoring import Scored


class Bucket(NamedTuple):
    """One group: its degrees in words, how many it holds, its value with a 95 % interval."""

    label: str
    n: int
    value: float | None
    interval: tuple[float, float] | None


def user_chart(
    values: Mapping[str, pd.Series[float]],
    degrees: Mapping[str, int],
    colours: Mapping[str, int],
    title: str,
) -> Chart:
    """Bars of a metric by the user's degree: name -> value of each user, the same users."""
    users = next(iter(values.values())).index
    ranges = edges(np.array([degrees.get(user, 0) for user in users]))
    groups = {name: metric_by_degree(of_name, degrees, ranges) for name, of_name in values.items()}
    return _chart(groups, colours, title, "user")


def item_chart(scored: Mapping[str, Scored], colours: Mapping[str, int], title: str) -> Chart:
    """Bars of the share of held-out items that were found, by the item's degree."""
    groups = {name: _found_by_degree(one) for name, one in scored.items()}
    return _chart(groups, colours, title, "item")


def metric_by_degree(
    values: pd.Series[float], degrees: Mapping[str, int], ranges: list[tuple[int, int]]
) -> list[Bucket]:
    """Mean of a per-user metric by the user's degree, with t intervals over users."""
    degree = np.array([degrees.get(user, 0) for user in values.index])
    buckets = []
    for low, high in ranges:
        inside = values[(degree >= low) & (degree <= high)]
        mean = float(inside.mean()) if len(inside) else None
        interval = mean_interval({0: inside}) if len(inside) > 1 else None
        buckets.append(Bucket(label(low, high), len(inside), mean, interval))
    return buckets


def _found_by_degree(scored: Scored) -> list[Bucket]:
    """Share of held-out interactions among the recommendations, by the item's degree.

    The groups are equal in number of items, so popular groups hold most interactions. Intervals
    are Wilson's, over interactions.
    """
    degrees = scored.degrees["item"]
    pairs = [(user, item) for user, items in scored.heldout.items() for item in items]
    ranges = edges(np.array([degrees.get(item, 0) for item in {*degrees, *(i for _, i in pairs)}]))
    degree = np.array([degrees.get(item, 0) for _, item in pairs])
    is_found = np.array([item in scored.top.get(user, ()) for user, item in pairs])
    buckets = []
    for low, high in ranges:
        hits = is_found[(degree >= low) & (degree <= high)]
        share = interval = None
        if n := len(hits):
            share = float(hits.mean())
            wilson = stats.binomtest(int(hits.sum()), n).proportion_ci(method="wilson")
            interval = float(wilson.low), float(wilson.high)
        buckets.append(Bucket(label(low, high), n, share, interval))
    return buckets


def _chart(
    groups: Mapping[str, list[Bucket]], colours: Mapping[str, int], title: str, side: str
) -> Chart:
    series = [
        Series(name, [b.value for b in buckets], (), [b.interval for b in buckets], colours[name])
        for name, buckets in groups.items()
    ]
    categories = [(b.label, f"n = {b.n:,}") for b in next(iter(groups.values()))]
    return bar_chart(categories, series, title, f"training interactions of the {side}")
