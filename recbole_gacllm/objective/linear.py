r"""A linear item-item model beside the graph convolution, in closed form.

Linear models beat graph models on dense data, and their errors differ; the sum of both, each
standardised per user, is better than either (see results/). Ours; the paper has no such term.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.linalg import lapack
from torch import Tensor
from torch.nn import functional as F

from recbole_gacllm.objective.local import LocalWeights
from recbole_gacllm.objective.unseen import Unseen

# Matrix and weights take 12 bytes an entry: 5 GB at this size, and minutes to invert.
MAX_ITEMS = 20_000
# Chosen on validation NDCG@10 of ml-100k, ml-1m and sparse parts of ml-1m; see ``ItemItemModel``.
USER_POWER = 0.5
DENOISING = 0.5
BLOCK = 1024  # rows of weights at once
# Share of a batch's histories that is filled: below it sums over their items beat a dense product,
# on 1,700 to 17,000 items and one thread.
SPARSE = 0.03
KEPT = 1 << 26  # scores that are kept between evaluations, at most: 256 MiB


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
    - ``lambda`` differs by orders of magnitude between data sets (``choice.py``).
    - Each dimension of the items' text embeddings ``X`` is one more row to reconstruct: items of
      like text explain each other, and an item without interactions is explained by its text
      alone. ``X`` is centred and scaled to rows of mean square length 1, and ``g`` is the mean of
      ``diag(G)``, so that ``gamma`` means the same for any encoder and any number of interactions.

    Source: with ``a`` = ``beta`` = ``gamma`` = 0 it is EASE, Steck, "Embarrassingly Shallow
    Autoencoders for Sparse Data" (WWW 2019), Eq. 8; ``beta`` is from Steck, "Autoencoders that
    don't overfit towards the Identity" (NeurIPS 2020); texts as in Jeunen et al., "Closed-Form
    Models for Collaborative Filtering with Side-Information" (RecSys 2020). Not part of a model's
    state: it follows from training edges and texts, and copying a model shares it.

    Of more than ``MAX_ITEMS`` items ``B`` is nearly so, and not dense (``local.py``).

    Args:
        users: User of each training edge.
        items: Item of each.
        n_users: Number of users.
        n_items: Number of items.
        reg_weight: ``lambda``, above 0.
        texts: Text embedding of each item, a zero row where it has none; None for plain EASE.
        text_weight: ``gamma``.
        device: Where the weights live.
        recency: What each edge counts in its user's scores; None is 1. An edge that repeats counts
            as often as it is there.
        user_power: ``a``.
        denoising: ``beta``.

    Shapes:
        users, items, recency: ``[n_edges]``; texts: ``[n_items, width]``.
    """

    def __init__(
        self,
        users: np.ndarray,
        items: np.ndarray,
        n_users: int,
        n_items: int,
        reg_weight: float,
        texts: Tensor | None = None,
        text_weight: float = 0.0,
        device: torch.device | str = "cpu",
        recency: np.ndarray | None = None,
        user_power: float = USER_POWER,
        denoising: float = DENOISING,
    ) -> None:
        interactions = matrix_of(users, items, n_users, n_items)
        histories = interactions
        if recency is not None:
            counts = recency.astype(np.float32)
            histories = sparse.csr_array((counts, (users, items)), shape=(n_users, n_items))
        self._histories = histories
        rows = None if texts is None else centred(texts.double().cpu().numpy())
        self._weights: Tensor | LocalWeights
        if n_items > MAX_ITEMS:
            counts = np.sqrt(user_counts(interactions, user_power))
            weighted = interactions.multiply(counts[:, None]).tocsr()
            keys = denoising, reg_weight, rows, text_weight, device
            self._weights = LocalWeights.of(weighted, *keys)
        else:
            gram = Gram.of(interactions, user_power, denoising)
            self._weights = item_weights(gram.with_texts(rows, text_weight), reg_weight).to(device)
        # Each user's mean and deviation of scores, the mean over the deviation; NaN: not known yet.
        self._moments = torch.full((2, n_users), torch.nan, device=device)
        # Scores of all users, standardised, if they are few: constants of a run, too.
        few = n_users * n_items <= KEPT
        self._kept = torch.empty(n_users, n_items, device=device) if few else None
        self._of_unseen: tuple[Unseen, Tensor, Tensor] | None = None  # predicted scores

    def __deepcopy__(self, memo: dict[int, object]) -> ItemItemModel:
        return self

    def complete_items(self, unseen: Unseen) -> None:
        """Let the texts of items without training interactions say what their scores are.

        What :class:`.Unseen` predicts is linear in the other items' scores, so it predicts the
        columns of ``B``.
        """
        if isinstance(self._weights, LocalWeights):
            self._weights.complete(unseen)
            return
        for rows in torch.split(self._weights, BLOCK):
            rows[:, unseen.unseen] = unseen.predict(rows[:, unseen.seen].T).T

    def complete_users(self, unseen: Unseen, items: slice | Tensor) -> None:
        """Let the texts of users without training interactions say what their scores are.

        Shapes:
            items: as in :meth:`standardized`.
        """
        if self._of_unseen is not None:
            return
        for block in torch.split(unseen.seen, BLOCK):
            self.standardized(block, items)
        deviations = self._moments[1, unseen.seen].cpu().numpy()
        histories = self._histories[unseen.seen.cpu().numpy()].multiply(1 / deviations[:, None])
        mean, slopes = [], []
        for first in range(0, histories.shape[1], BLOCK):
            table = torch.from_numpy(histories.tocsc()[:, first : first + BLOCK].toarray())
            fitted = unseen.fit(table.to(self._moments))
            mean.append(fitted[0])
            slopes.append(fitted[1])
        rows = torch.cat([torch.cat(mean)[None], torch.cat(slopes, dim=1)])  # [1 + width, n]
        if isinstance(self._weights, LocalWeights):
            scores = self._weights.products(rows.cpu().numpy())
        else:
            scores = rows @ self._weights
        scores -= scores[:, items].mean(dim=1, keepdim=True)
        self._of_unseen = unseen, scores[0], scores[1:]

    def scores(self, users: Tensor) -> Tensor:
        """Scores of users with every item.

        Shapes:
            users: ``[B]``; result ``[B, n_items]``.
        """
        return self._products(self._histories[users.cpu().numpy()], None)

    def scores_of(self, histories: sparse.csr_array) -> Tensor:
        """Scores for histories of users who were not in training.

        Shapes:
            histories: ``[B, n_items]``, what each item counts; result ``[B, n_items]``.
        """
        return self._products(histories, None)

    def standardized(self, users: Tensor, items: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Scores over their deviation over some items, and the means of these.

        Each user's mean and deviation are constants of a run: they are computed once, as are the
        scores where they are at most ``KEPT``. A user whose scores are all alike has 0.

        Shapes:
            users: ``[B]``; results ``[B, n_items]`` and ``[B]``; items: ``[S]``, always the same.
        """
        is_new = bool(self._moments[1, users].isnan().any())
        if is_new:
            scores = self.scores(users)[:, items]
            deviation, mean = torch.std_mean(scores, dim=1)
            deviation = deviation.clamp(min=1e-12)
            self._moments[:, users] = torch.stack([mean / deviation, deviation])
        mean, deviation = self._moments[:, users]
        if self._kept is None or is_new:
            scores = self._products(self._histories[users.cpu().numpy()], 1 / deviation)
            if self._kept is not None:
                self._kept[users] = scores
        else:
            scores = self._kept[users]
        if self._of_unseen is not None:
            unseen, *fitted = self._of_unseen
            rows = (~unseen.is_seen[users]).nonzero()[:, 0]
            scores[rows], mean[rows] = unseen.apply(users[rows], *fitted), 0.0
        return scores, mean

    def _products(self, rows: sparse.csr_array, scale: Tensor | None) -> Tensor:
        """Histories times weights, and times ``scale`` of each user: ``[B, n_items]``."""
        if isinstance(self._weights, LocalWeights):
            scores = self._weights.products(rows)
            return scores if scale is None else scores.mul_(scale[:, None])
        device, n_rows = self._weights.device, rows.shape[0]
        items, counts = (torch.from_numpy(part).to(device) for part in (rows.indices, rows.data))
        lengths = torch.from_numpy(np.diff(rows.indptr)).to(device)
        if scale is not None:
            counts = counts * scale.repeat_interleave(lengths)
        if rows.nnz < SPARSE * n_rows * rows.shape[1]:
            starts = torch.from_numpy(rows.indptr[:-1]).to(device)
            return F.embedding_bag(
                items, self._weights, starts, mode="sum", per_sample_weights=counts
            )
        # Made dense where they are multiplied: a host's rows would take longer to copy.
        of_row = torch.arange(n_rows, device=device).repeat_interleave(lengths)
        history = self._weights.new_zeros(rows.shape)
        return history.index_put_((of_row, items.long()), counts) @ self._weights


def matrix_of(users: np.ndarray, items: np.ndarray, n_users: int, n_items: int) -> sparse.csr_array:
    """Training edges as ``[n_users, n_items]``, entries 1."""
    ones = np.ones(len(users), dtype=np.float32)
    interactions = sparse.csr_array((ones, (users, items)), shape=(n_users, n_items))
    interactions.data[:] = 1.0  # duplicates were summed
    return interactions


def user_counts(interactions: sparse.csr_array, power: float) -> np.ndarray:
    """How often each user counts, the diagonal of ``W``: ``[n_users]``, float32."""
    degrees = np.diff(interactions.indptr)
    counts: np.ndarray = (degrees[degrees > 0].mean() / degrees.clip(min=1)) ** power
    return counts.astype(np.float32)


@dataclass
class Gram:
    """What is inverted, but for texts and L2 weight.

    Attributes:
        matrix: ``[n_items, n_items]``, float64.
        scale: ``g``, the mean of its diagonal without denoising.
    """

    matrix: np.ndarray
    scale: float

    @classmethod
    def of(
        cls,
        interactions: sparse.csr_array,
        user_power: float = USER_POWER,
        denoising: float = DENOISING,
    ) -> Gram:
        """From interactions, ``[n_users, n_items]``, entries 1."""
        counts = user_counts(interactions, user_power)
        weighted = interactions.multiply(counts[:, None]).tocsr()
        columns, matrix = interactions.tocsc(), np.empty((interactions.shape[1],) * 2)
        for start in range(0, len(matrix), BLOCK):  # the whole product takes as much memory again
            block = slice(start, start + BLOCK)
            matrix[block] = (columns[:, block].T @ weighted).toarray()
        own = matrix.diagonal().copy()
        matrix[np.diag_indices(len(matrix))] += denoising * own
        return cls(matrix, float(own.mean()))

    def with_texts(self, rows: np.ndarray | None, weight: float) -> np.ndarray:
        """The matrix with texts as further rows, in its place; None for none."""
        if rows is not None:
            for start in range(0, len(rows), BLOCK):
                block = slice(start, start + BLOCK)
                self.matrix[block] += (weight * self.scale * rows[block]) @ rows.T
        return self.matrix


def item_weights(gram: np.ndarray, reg_weight: float) -> Tensor:
    """``B``: ``[n_items, n_items]``, float32; the inverse is made in the place of ``gram``."""
    n = len(gram)
    gram[np.diag_indices(n)] += reg_weight
    # Positive definite: half the time of a general inverse. LAPACK reads columns, so its lower
    # triangle is our upper one.
    factor, failed = lapack.dpotrf(gram.T, lower=1, overwrite_a=1)
    inverse, failed_too = lapack.dpotri(factor, lower=1, overwrite_c=1)
    if failed or failed_too:
        raise np.linalg.LinAlgError("the matrix of the linear item-item model is not definite")
    rows, diagonal = inverse.T, inverse.diagonal().copy()
    weights = torch.empty(n, n)
    for start in range(0, n, BLOCK):
        block = slice(start, min(start + BLOCK, n))
        whole = np.triu(rows[block, start:])
        own = whole[:, : block.stop - start]
        own += np.triu(own, 1).T
        rows[start:, block] = whole.T  # for the rows below
        weights[block, :start] = torch.from_numpy(rows[block, :start] / -diagonal[:start])
        weights[block, start:] = torch.from_numpy(whole / -diagonal[start:])
    return weights.fill_diagonal_(0.0)


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
