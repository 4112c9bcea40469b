r"""A linear item-item model beside the graph convolution, in closed form.

Linear models beat graph models on dense data, and their errors differ; the sum of both, each
standardised per user, is better than either (see results/). Ours; the paper has no such term.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

# Matrix, inverse and weights take 20 bytes an entry: 8 GB at this size, and minutes to invert.
MAX_ITEMS = 20_000
# Chosen on validation NDCG@10 of ml-100k, ml-1m and sparse parts of ml-1m; see ``ItemItemModel``.
USER_POWER = 0.5
DENOISING = 0.5
# What the L2 weight is chosen from, and on what; of near equals the smallest, as a fit on fewer
# interactions favours large ones.
REG_WEIGHTS = (25.0, 100.0, 400.0, 1600.0, 6400.0, 25600.0)
USUAL_REG_WEIGHT = 400.0  # where nothing can be held out
NEAR = 0.995  # of the best NDCG@10
HELD_OUT = 0.1  # of the training interactions
MAX_ITEMS_OF_CHOICE = 3_000
MAX_USERS_OF_CHOICE = 10_000
# Share of a batch's histories that is filled: below it sums over their items beat a dense product,
# on 1,700 to 17,000 items and one thread.
SPARSE = 0.03


class ItemItemModel:
    r"""The best item-item weights with a zero diagonal, on the training interactions and texts.

    .. math:: B = I - P\,\mathrm{diag}(P)^{-1}, \quad
        P = (G + \gamma \bar g X X^T + \beta\,\mathrm{diag}(G) + \lambda I)^{-1}, \quad
        G = R^T W R, \quad s(u, \cdot) = R_u B

    - ``W`` is diagonal: a user of degree ``d`` counts ``(mean d / d)^a`` times, so that the few
      with long histories do not decide alone; with ``a`` = 1/2 as on the user's side of the graph
      convolution's normalisation. Ours.
    - ``beta diag(G)`` is what dropping interactions from the input does on average (a share of
      1/3 for 1/2): items with many interactions are not explained by too few others.
    - In a score, and nowhere else, a user's ``k``-th last item may count ``k^-r`` (``recency``):
      who is asked what comes next was last told what came last. Ours.
    - ``lambda`` differs by orders of magnitude between data sets. Unless given, it is the one of
      ``REG_WEIGHTS`` with the best NDCG@10 on a tenth of the training interactions, held out; of
      those within half a percent of it the smallest.
    - Each dimension of the items' text embeddings ``X`` is one more row to reconstruct: items of
      like text explain each other, and an item without interactions is explained by its text
      alone. ``X`` is centred and scaled to rows of mean square length 1, and ``g`` is the mean of
      ``diag(G)``, so that ``gamma`` means the same for any encoder and any number of interactions.

    Source: with ``a`` = ``beta`` = ``gamma`` = 0 it is EASE, Steck, "Embarrassingly Shallow
    Autoencoders for Sparse Data" (WWW 2019), Eq. 8; ``beta`` is from Steck, "Autoencoders that
    don't overfit towards the Identity" (NeurIPS 2020); texts as in Jeunen et al., "Closed-Form
    Models for Collaborative Filtering with Side-Information" (RecSys 2020). Not part of a model's
    state: it follows from training edges and texts, and copying a model shares it.

    Of more than ``MAX_ITEMS`` items it covers those with most interactions; the others score 0.

    Args:
        users: User of each training edge.
        items: Item of each.
        n_users: Number of users.
        n_items: Number of items.
        reg_weight: ``lambda``, above 0; None chooses it, without regard to recency.
        texts: Text embedding of each item, a zero row where it has none; None for plain EASE.
        text_weight: ``gamma``.
        device: Where the weights live.
        recency: What each edge counts in its user's scores; None is 1. An edge that repeats counts
            as often as it is there.
        user_power: ``a``.
        denoising: ``beta``.

    Attributes:
        reg_weight: ``lambda`` as given or chosen.
        held_out_ndcg: NDCG@10 on the held-out interactions by ``lambda``; empty if it was given.
        n_covered: Items that have a score.

    Shapes:
        users, items, recency: ``[n_edges]``; texts: ``[n_items, width]``.
    """

    def __init__(
        self,
        users: np.ndarray,
        items: np.ndarray,
        n_users: int,
        n_items: int,
        reg_weight: float | None,
        texts: Tensor | None = None,
        text_weight: float = 0.0,
        device: torch.device | str = "cpu",
        recency: np.ndarray | None = None,
        user_power: float = USER_POWER,
        denoising: float = DENOISING,
    ) -> None:
        ones = np.ones(len(users), dtype=np.float32)
        interactions = sparse.csr_array((ones, (users, items)), shape=(n_users, n_items))
        interactions.data[:] = 1.0  # duplicates were summed
        histories = interactions
        if recency is not None:
            counts = recency.astype(np.float32)
            histories = sparse.csr_array((counts, (users, items)), shape=(n_users, n_items))
        self._covered: Tensor | None = None  # [MAX_ITEMS] at most; None for all items
        if n_items > MAX_ITEMS:
            columns = _most_interacted(interactions, MAX_ITEMS)
            interactions, histories = interactions[:, columns], histories[:, columns]
            self._covered = torch.from_numpy(columns).to(device)
            texts = None if texts is None else texts[self._covered.to(texts.device)]
        self._histories, self._n_items = histories, n_items
        self.n_covered = interactions.shape[1]
        rows = None if texts is None else centred(texts.double().cpu().numpy())
        keys = {"text_weight": text_weight, "user_power": user_power, "denoising": denoising}
        self.held_out_ndcg: dict[float, float] = {}
        if reg_weight is None:
            self.held_out_ndcg = _held_out_ndcg(interactions, rows, keys)
            reg_weight = _smallest_near_best(self.held_out_ndcg)
        self.reg_weight = reg_weight
        self._weights = _item_weights(_gram(interactions, rows, **keys), reg_weight).to(device)

    def __deepcopy__(self, memo: dict[int, object]) -> ItemItemModel:
        return self

    def scores(self, users: Tensor) -> Tensor:
        """Scores of users with every item.

        Shapes:
            users: ``[B]``; result ``[B, n_items]``.
        """
        rows, device = self._histories[users.cpu().numpy()], self._weights.device
        items, counts = (torch.from_numpy(part).to(device) for part in (rows.indices, rows.data))
        if rows.nnz < SPARSE * len(users) * self.n_covered:
            starts = torch.from_numpy(rows.indptr[:-1]).to(device)
            scores = F.embedding_bag(
                items, self._weights, starts, mode="sum", per_sample_weights=counts
            )
        else:
            # Made dense where they are multiplied: a host's rows would take longer to copy.
            of_row = np.repeat(np.arange(len(users)), np.diff(rows.indptr))
            places = torch.from_numpy(of_row).to(device), items.long()
            history = self._weights.new_zeros(len(users), self.n_covered)
            scores = history.index_put_(places, counts) @ self._weights
        if self._covered is None:
            return scores
        return scores.new_zeros(len(users), self._n_items).index_copy_(1, self._covered, scores)


def _most_interacted(interactions: sparse.csr_array, n: int) -> np.ndarray:
    """Columns of the ``n`` items with most interactions, in ascending order."""
    degrees = np.bincount(interactions.indices, minlength=interactions.shape[1])
    return np.sort(np.argsort(-degrees, kind="stable")[:n])


def _gram(
    interactions: sparse.csr_array,
    text_rows: np.ndarray | None,
    text_weight: float,
    user_power: float,
    denoising: float,
) -> np.ndarray:
    """What is inverted but for the L2 weight: ``[n_items, n_items]``, float64."""
    degrees = np.diff(interactions.indptr)  # [n_users]
    counts = (degrees[degrees > 0].mean() / degrees.clip(min=1)) ** user_power
    weighted = interactions.multiply(counts[:, None].astype(np.float32)).tocsr()
    gram: np.ndarray = (interactions.T @ weighted).toarray().astype(np.float64)
    own = gram.diagonal().copy()
    if text_rows is not None:
        gram += text_weight * own.mean() * (text_rows @ text_rows.T)
    gram[np.diag_indices(len(gram))] += denoising * own
    return gram


def _item_weights(gram: np.ndarray, reg_weight: float) -> Tensor:
    """``B``: ``[n_items, n_items]``, float32; adds the L2 weight to ``gram`` in place."""
    gram[np.diag_indices(len(gram))] += reg_weight
    # Positive definite: half the time of a general inverse.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(gram)))
    return (inverse / -inverse.diagonal()).float().fill_diagonal_(0.0)


def _smallest_near_best(ndcg: dict[float, float]) -> float:
    """The smallest weight whose NDCG is near the best."""
    return min(weight for weight, value in ndcg.items() if value >= NEAR * max(ndcg.values()))


def _held_out_ndcg(
    interactions: sparse.csr_array, text_rows: np.ndarray | None, keys: dict[str, float]
) -> dict[float, float]:
    """NDCG@10 of each of ``REG_WEIGHTS`` on held-out training interactions.

    Of more than ``MAX_ITEMS_OF_CHOICE`` items those with most interactions are used, and about
    ``MAX_USERS_OF_CHOICE`` users at most are ranked for.
    """
    if interactions.shape[1] > MAX_ITEMS_OF_CHOICE:
        used = _most_interacted(interactions, MAX_ITEMS_OF_CHOICE)
        interactions = interactions[:, used]
        text_rows = None if text_rows is None else text_rows[used]
    is_held_out = np.random.default_rng(0).random(interactions.nnz) < HELD_OUT
    rest, held_out = (interactions.copy() for _ in range(2))
    rest.data, held_out.data = np.float32(~is_held_out), np.float32(is_held_out)
    for part in (rest, held_out):
        part.eliminate_zeros()
    if not (rest.nnz and held_out.nnz):
        return {USUAL_REG_WEIGHT: 0.0}
    gram = _gram(rest, text_rows, **keys)
    return {
        # Of fewer interactions, a weight that is less by as much.
        weight: _ndcg(rest, held_out, _item_weights(gram.copy(), (1 - HELD_OUT) * weight))
        for weight in REG_WEIGHTS
    }


def _ndcg(
    histories: sparse.csr_array, held_out: sparse.csr_array, weights: Tensor, k: int = 10
) -> float:
    """Mean NDCG@k over users with held-out items, ranked among all that are not in their history.

    Of more than ``MAX_USERS_OF_CHOICE`` such users it takes each second, third, …

    Shapes:
        histories, held_out: ``[n_users, n_items]``, entries 1; weights: ``[n_items, n_items]``.
    """
    k = min(k, len(weights))
    discounts = 1 / torch.log2(torch.arange(2.0, k + 2))
    users = np.flatnonzero(np.diff(held_out.indptr))
    users = users[:: -(-len(users) // MAX_USERS_OF_CHOICE)]
    total = 0.0
    for batch in np.array_split(users, -(-len(users) // 1024)):
        history = torch.from_numpy(histories[batch].toarray())
        scores = (history @ weights).masked_fill_(history > 0, -torch.inf)
        relevant = torch.from_numpy(held_out[batch].toarray())
        gains = relevant.gather(1, scores.topk(k, dim=1).indices) @ discounts
        best = discounts.cumsum(0)[relevant.sum(1).long().clamp(max=k) - 1]
        total += float((gains / best).sum())
    return total / len(users)


def recency_weights(users: np.ndarray, times: np.ndarray, power: float) -> np.ndarray:
    r"""What each training edge counts in its user's scores: ``k^-power`` for the ``k``-th last.

    Edges of a user at the same time have the mean of their ranks ``k``; power 0 counts all alike.

    Shapes:
        users, times and result: ``[n_edges]``.
    """
    order = np.lexsort((-times, users))  # each user's edges, the last first
    user, time = users[order], times[order]
    place = np.arange(len(order))
    is_first = np.append(True, user[1:] != user[:-1])
    k = place - np.maximum.accumulate(np.where(is_first, place, 0)) + 1
    tie = np.cumsum(is_first | np.append(True, time[1:] != time[:-1])) - 1
    mean_k = np.bincount(tie, weights=k) / np.bincount(tie)
    counts = np.empty(len(order))
    counts[order] = mean_k[tie] ** -power
    return counts


class TextNeighbors:
    r"""A user's training items by their text: text-kNN with all items as neighbors.

    .. math:: s(u, j) = \sum_{i \in R_u} \langle x_i, x_j \rangle

    What an item's text alone says of it. With rows ``x`` of unit length it is a sum of cosines.

    Shapes:
        users, items: ``[n_edges]``, of training; texts: ``[n_items, width]``.
    """

    def __init__(self, users: np.ndarray, items: np.ndarray, n_users: int, texts: Tensor) -> None:
        pairs = np.unique(np.stack([users, items], axis=1), axis=0)
        of_users, of_items = torch.from_numpy(pairs).to(texts.device).T
        self._texts = texts
        self._profiles = texts.new_zeros(n_users, texts.shape[1])  # [n_users, width]
        self._profiles.index_add_(0, of_users, texts[of_items])

    def __deepcopy__(self, memo: dict[int, object]) -> TextNeighbors:
        return self

    def scores(self, users: Tensor) -> Tensor:
        """Scores of users with every item.

        Shapes:
            users: ``[B]``; result ``[B, n_items]``.
        """
        return self._profiles[users] @ self._texts.T


def centred(texts: np.ndarray) -> np.ndarray:
    """Rows with mean 0 and mean square length 1; a zero row, which is no text, stays zero."""
    has_text = texts.any(axis=1)
    rows = np.zeros_like(texts)
    if has_text.any():
        rows[has_text] = texts[has_text] - texts[has_text].mean(axis=0)
        rows /= max(np.sqrt((rows[has_text] ** 2).sum(axis=1).mean()), 1e-12)
    return rows


def standardize(scores: Tensor) -> Tensor:
    """Each row with mean 0 and deviation 1; a constant row becomes 0.

    Shapes:
        scores and result: ``[B, n_items]``.
    """
    centered = scores - scores.mean(dim=1, keepdim=True)
    return centered / centered.std(dim=1, keepdim=True).clamp(min=1e-12)
