"""Test results by degree: five groups of users, and of items, by training interactions.

A run stores them once, in ``degrees.npz``; degrees belong to the split, so that those of any run of
a seed hold for all its models.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recbole_gacllm.compare import markdown

DEGREES_FILE = "degrees.npz"
N_BUCKETS = 5
_METRICS = ("ndcg@10", "recall@10")

Degrees = dict[str, dict[str, int]]  # side -> raw token -> training interactions
Ranges = list[tuple[int, int]]  # of degrees, ends included


def edges(degrees: npt.NDArray[Any]) -> Ranges:
    """At most five ranges of degrees, ends included, that hold about equally many nodes.

    Shapes:
        degrees: ``[n]``, one for each node.
    """
    cuts = np.quantile(degrees, np.linspace(0, 1, N_BUCKETS + 1)[1:], method="lower")
    highs = sorted({int(cut) for cut in cuts[:-1]} | {int(degrees.max())})
    lows = [int(degrees.min()), *(high + 1 for high in highs[:-1])]
    return list(zip(lows, highs, strict=True))


def label(low: int, high: int) -> str:
    """A range in words."""
    return str(low) if low == high else f"{low}–{high}"


def count_degrees(pairs: set[tuple[str, str]]) -> Degrees:
    """Training interactions of each user and item that has any, by raw token."""
    degrees: Degrees = {"user": {}, "item": {}}
    for user, item in pairs:
        degrees["user"][user] = degrees["user"].get(user, 0) + 1
        degrees["item"][item] = degrees["item"].get(item, 0) + 1
    return degrees


class ItemHits:
    """How often each item was among the test items of a user, and among the first k for them.

    Args:
        n_items: Number of items with padding.
        k: Length of the lists.
    """

    def __init__(self, n_items: int, k: int) -> None:
        self.k = min(k, n_items - 1)
        self.n_test = torch.zeros(n_items, dtype=torch.int64)
        self.n_found = torch.zeros(n_items, dtype=torch.int64)

    def add(self, scores: Tensor, positive_u: Tensor, positive_i: Tensor) -> None:
        """Count one batch, as RecBole's collector gets it.

        Shapes:
            scores: ``[n, n_items]``; positive_u, positive_i: ``[m]``, row and item of each.
        """
        top = scores.topk(self.k, dim=1).indices.cpu()  # [n, k]
        rows, items = positive_u.cpu(), positive_i.cpu()
        hit = (top[rows] == items[:, None]).any(dim=1)  # [m]
        self.n_test += items.bincount(minlength=len(self.n_test))
        self.n_found += items[hit].bincount(minlength=len(self.n_found))


def npz(arrays: Mapping[str, Any]) -> bytes:
    """A compressed npz file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def to_npz(degrees: Degrees, users: Sequence[str], items: Sequence[str], hits: ItemHits) -> bytes:
    """``degrees.npz``: degrees of the tested users and of all items; the items' hits.

    Args:
        degrees: Of the training split.
        users: Raw tokens of the tested users.
        items: Raw tokens of all items, in the order of RecBole's ids from 1 on.
        hits: Of the test.
    """
    columns: dict[str, Any] = {}
    for side, tokens in (("user", sorted(set(users))), ("item", items)):
        columns[f"{side}s"] = np.asarray(tokens, dtype=str)
        of_side = [degrees[side].get(token, 0) for token in tokens]
        columns[f"{side}_degree"] = np.array(of_side, dtype=np.int32)
    columns["item_n_test"] = hits.n_test[1:].numpy().astype(np.int32)
    columns["item_n_found"] = hits.n_found[1:].numpy().astype(np.int32)
    return npz({**columns, "k": np.array(hits.k)})


def by_degree(runs: dict[str, list[Any]]) -> dict[str, Any]:
    """Each model's metrics by the user's degree, and the test items found by the item's degree.

    The ranges are those of all seeds together; a value is the mean over seeds of a seed's mean (of
    users) or share (of test interactions).

    Args:
        runs: Model -> its finished runs (``results.FinishedRun``).
    """
    of_runs = {
        model: [(run, run.degrees()) for run in of_model] for model, of_model in runs.items()
    }
    of_seed = {run.record["seed"]: arrays for pairs in of_runs.values() for run, arrays in pairs}
    share = f"found@{int(next(iter(of_seed.values()))['k'])}"
    tables: dict[str, Any] = {}
    for side in ("user", "item"):
        ranges = edges(np.concatenate([arrays[f"{side}_degree"] for arrays in of_seed.values()]))
        tables[side] = {"buckets": [label(*bounds) for bounds in ranges], "models": {}}
        for model, pairs in of_runs.items():
            per_seed: dict[str, list[Any]] = {}
            for run, arrays in pairs:
                degrees = arrays[f"{side}_degree"]
                if side == "item":
                    counts = arrays["item_n_found"], arrays["item_n_test"]
                    per_seed.setdefault(share, []).append(_groups(*counts, degrees, ranges))
                    continue
                for metric in _METRICS:
                    if (values := run.per_user(metric)) is not None:
                        of_users = values.reindex(arrays["users"]).to_numpy()
                        groups = _groups(of_users, np.ones(len(of_users), int), degrees, ranges)
                        per_seed.setdefault(metric, []).append(groups)
            if per_seed:
                tables[side]["models"][model] = {
                    name: _over_seeds(groups) for name, groups in per_seed.items()
                }
    return tables


def _groups(
    sums: npt.NDArray[Any], counts: npt.NDArray[Any], degrees: npt.NDArray[Any], ranges: Ranges
) -> list[tuple[int, float | None]]:
    """Of each range of degrees: the count of what is inside, and the sum divided by it."""
    groups = []
    for low, high in ranges:
        inside = (degrees >= low) & (degrees <= high)
        n = int(counts[inside].sum())
        groups.append((n, float(sums[inside].sum() / n) if n else None))
    return groups


def _over_seeds(per_seed: list[list[tuple[int, float | None]]]) -> list[dict[str, Any]]:
    """Of each bucket: mean number a seed, mean and deviation of the values over seeds."""
    cells = []
    for bucket in zip(*per_seed, strict=True):
        values = [value for _, value in bucket if value is not None]
        cells.append(
            {
                "n": round(statistics.fmean(n for n, _ in bucket), 1),
                "mean": statistics.fmean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None,
            }
        )
    return cells


def section(tables: dict[str, Any], decimals: int) -> str:
    """The tables in Markdown."""
    parts = [
        "# Results by Degree\n",
        "At most five groups of about equally many users, or items, by their number of training "
        "interactions, over all seeds; n: users, or test interactions, a seed. found@k: share of "
        "the test interactions whose item was among the first k.\n",
    ]
    for side, of_side in tables.items():
        metrics = dict.fromkeys(name for cells in of_side["models"].values() for name in cells)
        for metric in metrics:
            rows = {m: cells[metric] for m, cells in of_side["models"].items() if metric in cells}
            numbers = [f"{cell['n']:g}" for cell in next(iter(rows.values()))]
            name = metric if metric.startswith("found") else markdown.metric_name(metric)
            body = [
                [markdown.bold(model), *(_cell(cell, decimals) for cell in cells)]
                for model, cells in rows.items()
            ]
            head = [f"{name} by {side} degree", *of_side["buckets"]]
            parts.append(markdown.table(head, [["n", *numbers], *body]))
    return "\n".join(parts)


def _cell(cell: dict[str, Any], decimals: int) -> str:
    return "–" if cell["mean"] is None else markdown.mean_std(cell["mean"], cell["std"], decimals)
