"""RecBole's ranking metrics without a loop over users: the same numbers, bit for bit.

Their ``metric_info`` gets, for each user, which of the top k items are positive (``pos_index``) and
how many positive items there are (``pos_len``), and gives the metric at every cut-off up to k.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def add_to_metrics(module: ModuleType) -> None:
    """Give MRR, MAP and NDCG one pass over all users where ``fast_paths`` is on."""
    base = module.TopkMetric
    init = base.__init__

    @functools.wraps(init)
    def construct(self: Any, config: Any) -> None:
        self.fast_paths = bool(config["fast_paths"])
        init(self, config)

    base.__init__ = construct
    for metric, at_once in (
        (module.MRR, reciprocal_rank),
        (module.MAP, average_precision),
        (module.NDCG, discounted_gain),
    ):
        original = metric.metric_info

        @functools.wraps(original)
        def metric_info(
            self: Any, *found: Any, original: Any = original, at_once: Any = at_once
        ) -> Any:
            return at_once(*found) if self.fast_paths else original(self, *found)

        metric.metric_info = metric_info


def reciprocal_rank(pos_index: npt.NDArray[np.bool_]) -> Floats:
    """One over the rank of the first positive item; 0 above it.

    Shapes:
        pos_index, result: ``[n_users, k]``.
    """
    first = pos_index.argmax(axis=1)  # [n_users]
    found = np.logical_or.accumulate(pos_index, axis=1)
    return np.where(found, 1 / (first + 1)[:, None], 0.0)


def average_precision(pos_index: npt.NDArray[np.bool_], pos_len: npt.NDArray[np.int64]) -> Floats:
    """Mean precision at the positive items, of at most so many as there are.

    Shapes:
        pos_index, result: ``[n_users, k]``; pos_len: ``[n_users]``.
    """
    ranks = np.arange(1, pos_index.shape[1] + 1)
    precision = pos_index.cumsum(axis=1) / ranks
    total = np.cumsum(precision * pos_index.astype(np.float64), axis=1)
    return np.asarray(total / _capped(ranks, pos_len))


def discounted_gain(pos_index: npt.NDArray[np.bool_], pos_len: npt.NDArray[np.int64]) -> Floats:
    """Gain discounted by the logarithm of the rank, as a share of the best that is possible.

    Shapes:
        pos_index, result: ``[n_users, k]``; pos_len: ``[n_users]``.
    """
    ranks = np.arange(1, pos_index.shape[1] + 1)
    discount = 1.0 / np.log2(ranks + 1.0)  # [k]
    ideal = np.cumsum(discount)[_capped(ranks, pos_len) - 1]
    return np.asarray(np.cumsum(np.where(pos_index, discount, 0), axis=1) / ideal)


def _capped(ranks: npt.NDArray[np.int64], pos_len: npt.NDArray[np.int64]) -> Any:
    """Ranks, each at most the number of positive items; RecBole takes k where there is none.

    Shapes:
        ranks ``[k]``; pos_len ``[n_users]``; result ``[n_users, k]``.
    """
    n_positive = pos_len[:, None]
    return np.where(n_positive == 0, ranks[-1], np.minimum(ranks, n_positive))
