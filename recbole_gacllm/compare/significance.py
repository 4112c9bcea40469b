"""Paired tests between models, from stored per-user metrics.

The unit is the user. Seeds are no further sample of users: the same users come back in every seed,
so a test over all (user, seed) rows would count each user several times and find too much. Hence
for each user the difference between two models is taken within a seed (same split, same test
items), then averaged over the seeds in which the user appears, and one test is made over users.
The tests of each seed alone are given, too. Holm's method corrects for the number of models that
are compared with the baseline, for one metric of one data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

# Per-user values of one metric: seed -> series indexed by user token.
UserScores = Mapping[int, "pd.Series[float]"]
Vector = np.ndarray[Any, np.dtype[Any]]  # one value for each user
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedTest:
    """One model against the baseline, for one metric.

    Attributes:
        seeds: Seeds that both models have.
        difference: Mean over users of model minus baseline, averaged over seeds.
        interval: t confidence interval of the difference.
        t_p, wilcoxon_p: Two-sided; Wilcoxon's leaves out users without a difference.
        t_p_holm, wilcoxon_p_holm: After Holm's correction over the compared models.
        by_seed: seed -> (difference, t_p, wilcoxon_p) of that seed alone.
    """

    n_users: int
    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float]
    t_p: float
    wilcoxon_p: float
    t_p_holm: float
    wilcoxon_p_holm: float
    by_seed: dict[int, tuple[float, float, float]]


def compare(scores: Mapping[str, UserScores], baseline: str) -> dict[str, PairedTest]:
    """Test every model against a baseline.

    Args:
        scores: Model -> its per-user values; a model without a seed in common with the baseline
            is left out.
        baseline: One of the models.

    Raises:
        ValueError: If users of a seed differ between models.
    """
    pairs = {}
    for model, values in scores.items():
        shared = sorted(set(values) & set(scores[baseline]))
        if model != baseline and shared:
            pairs[model] = {
                seed: _differences(values[seed], scores[baseline][seed], model, baseline, seed)
                for seed in shared
            }
    pooled = {model: _pool(by_seed) for model, by_seed in pairs.items()}
    p_values = [_p_values(values) for values in pooled.values()]
    t_holm, wilcoxon_holm = holm([t for t, _ in p_values]), holm([w for _, w in p_values])
    return {
        model: PairedTest(
            n_users=len(means),
            seeds=tuple(pairs[model]),
            difference=float(means.mean()),
            interval=_t_interval(means),
            t_p=p_values[place][0],
            wilcoxon_p=p_values[place][1],
            t_p_holm=t_holm[place],
            wilcoxon_p_holm=wilcoxon_holm[place],
            by_seed={
                seed: (float(alone.mean()), *_p_values(alone.to_numpy()))
                for seed, alone in pairs[model].items()
            },
        )
        for place, (model, means) in enumerate(pooled.items())
    }


def mean_interval(scores: UserScores) -> tuple[float, float]:
    """95 % interval (t, over users) of a model's mean, each user averaged over seeds."""
    return _t_interval(_pool(scores))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: each p-value for the family of all of them."""
    order = np.argsort(p_values, kind="stable")
    corrected = [0.0] * len(p_values)
    running = 0.0
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = running
    return corrected


def marks(values: Mapping[str, float], smaller_is_better: bool = False) -> dict[str, str]:
    """``best`` and ``second`` by the values as printed; equal values share a mark."""
    ranked = sorted(set(values.values()), reverse=not smaller_is_better)
    names = dict(zip(ranked, ("best", "second"), strict=False))
    return {key: names.get(value, "") for key, value in values.items()}


def _differences(
    ours: pd.Series[float], theirs: pd.Series[float], model: str, baseline: str, seed: int
) -> pd.Series[float]:
    if set(ours.index) != set(theirs.index):
        raise ValueError(
            f"seed {seed}: {model} and {baseline} were tested on different users; a paired test "
            "needs the same ones."
        )
    return ours - theirs.reindex(ours.index)


def _pool(by_seed: UserScores) -> Vector:
    """Every user's mean over the seeds in which the user appears."""
    return pd.concat(list(by_seed.values()), axis=1).mean(axis=1).to_numpy(np.float64)


def _p_values(differences: Vector) -> tuple[float, float]:
    """Two-sided p-values of the t and the Wilcoxon test that the differences centre on zero."""
    if len(differences) < 2 or not differences.any():
        return 1.0, 1.0
    t_p = 0.0 if np.ptp(differences) == 0 else float(stats.ttest_1samp(differences, 0.0).pvalue)
    return t_p, float(stats.wilcoxon(differences).pvalue)


def _t_interval(values: Vector) -> tuple[float, float]:
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, mean
    half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return mean - half, mean + half
