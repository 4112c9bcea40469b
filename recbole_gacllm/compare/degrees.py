"""Test results by degree: five groups of users, and of items, by training interactions.

A run stores them once, in ``degrees.npz``; degrees belong to the split, so that those of any run of
a seed hold for all its models.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
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


def edges(degrees: npt.NDArray[Any]) -> list[tuple[int, int]]:
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


def to_npz(degrees: Degrees, users: Sequence[str], items: Sequence[str], hits: ItemHits) -> bytes:
    """``degrees.npz``: degrees of the tested users and of all items; the items' hits.

    Args:
        degrees: Of the training split.
        users: Raw tokens of the tested users.
        items: Raw tokens of all items, in the order of RecBole's ids from 1 on.
        hits: Of the test.
    """
    users = sorted(set(users))
    buffer = io.BytesIO()
    columns: dict[str, Any] = {
        "users": np.asarray(users, dtype=str),
        "user_degree": np.array([degrees["user"].get(user, 0) for user in users], dtype=np.int32),
        "items": np.asarray(items, dtype=str),
        "item_degree": np.array([degrees["item"].get(item, 0) for item in items], dtype=np.int32),
        "item_n_test": hits.n_test[1:].numpy().astype(np.int32),
        "item_n_found": hits.n_found[1:].numpy().astype(np.int32),
        "k": np.array(hits.k),
    }
    np.savez_compressed(buffer, **columns)
    return buffer.getvalue()


def by_degree(runs: dict[str, list[Any]]) -> dict[str, Any] | None:
    """Each model's metrics by the user's degree, and the test items found by the item's degree.

    The ranges are those of all seeds together; a value is the mean over seeds of a seed's mean (of
    users) or share (of test interactions). None if no run stored degrees.

    Args:
        runs: Model -> its finished runs (``results.FinishedRun``).
    """
    stored = {run.name: run.degrees() for of_model in runs.values() for run in of_model}
    of_seed: dict[int, dict[str, npt.NDArray[Any]]] = {}
    for run in (run for of_model in runs.values() for run in of_model):
        if (arrays := stored[run.name]) is not None:
            of_seed.setdefault(run.record["seed"], arrays)
    if not of_seed:
        return None
    ranges = {
        side: edges(np.concatenate([arrays[f"{side}_degree"] for arrays in of_seed.values()]))
        for side in ("user", "item")
    }
    found = f"found@{int(next(iter(of_seed.values()))['k'])}"
    tables: dict[str, Any] = {
        side: {"buckets": [label(*bucket) for bucket in ranges[side]], "models": {}}
        for side in ranges
    }
    for model, of_model in runs.items():
        users: dict[str, Any] = {}
        for metric in _METRICS:
            per_seed = []
            for run in of_model:
                values, arrays = run.per_user(metric), of_seed.get(run.record["seed"])
                if values is not None and arrays is not None:
                    in_order = values.reindex(arrays["users"]).to_numpy()
                    per_seed.append(_means(in_order, arrays["user_degree"], ranges["user"]))
            if per_seed:
                users[metric] = _over_seeds(per_seed)
        if users:
            tables["user"]["models"][model] = users
        shares = [
            _shares(arrays, ranges["item"])
            for run in of_model
            if (arrays := stored[run.name]) is not None
        ]
        if shares:
            tables["item"]["models"][model] = {found: _over_seeds(shares)}
    return tables


def _means(
    values: npt.NDArray[Any], degrees: npt.NDArray[Any], ranges: list[tuple[int, int]]
) -> list[tuple[int, float | None]]:
    inside = [values[(degrees >= low) & (degrees <= high)] for low, high in ranges]
    return [(len(some), float(some.mean()) if len(some) else None) for some in inside]


def _shares(
    arrays: dict[str, npt.NDArray[Any]], ranges: list[tuple[int, int]]
) -> list[tuple[int, float | None]]:
    degrees, counts = arrays["item_degree"], []
    for low, high in ranges:
        inside = (degrees >= low) & (degrees <= high)
        n_test, n_found = (
            int(arrays[f"item_{key}"][inside].sum()) for key in ("n_test", "n_found")
        )
        counts.append((n_test, n_found / n_test if n_test else None))
    return counts


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


def section(tables: dict[str, Any] | None, decimals: int) -> str:
    """The tables in Markdown; empty where no run stored degrees."""
    if tables is None:
        return ""
    parts = [
        "# Results by Degree\n",
        "At most five groups of about equally many users, or items, by their number of training "
        "interactions, over all seeds; n: users, or test interactions, a seed. found@k: share of "
        "the test interactions whose item was among the first k.\n",
    ]
    for side, of_side in tables.items():
        metrics = dict.fromkeys(key for cells in of_side["models"].values() for key in cells)
        for metric in metrics:
            rows = {m: cells[metric] for m, cells in of_side["models"].items() if metric in cells}
            numbers = [f"{cell['n']:g}" for cell in next(iter(rows.values()))]
            name = metric if metric.startswith("found") else markdown.metric_name(metric)
            head = [f"{name} by {side} degree", *of_side["buckets"]]
            body = [
                [markdown.bold(model), *(_cell(c, decimals) for c in row)]
                for model, row in rows.items()
            ]
            parts.append(markdown.table(head, [["n", *numbers], *body]))
    return "\n".join(parts)


def _cell(cell: dict[str, Any], decimals: int) -> str:
    if cell["mean"] is None:
        return "–"
    spread = "" if cell["std"] is None else f" ± {cell['std']:.{decimals}f}"
    return f"{cell['mean']:.{decimals}f}{spread}"
