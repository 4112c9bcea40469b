r"""The linear item-item model of catalogues whose matrix is too large to invert.

What all items share is a product of ``RANK`` factors, and what is particular to an item are its
weights of ``N_NEIGHBORS`` others: no matrix is inverted that is larger than these.

.. math:: B = L V^T + S, \quad C = G + \gamma \bar g X X^T + D,
    \quad D = \beta\,\mathrm{diag}(G) + \lambda I

- :math:`L V^T` is ``B`` of the nearest ``C`` whose inverse is known, :math:`F F^T + \Psi` with
  :math:`F = D^{1/2} U s^{1/2}` of the first eigenvalues and vectors :math:`s, U` of
  :math:`D^{-1/2} (C - D) D^{-1/2}`. :math:`\Psi` is diagonal, and gives it the diagonal of ``C``.
- ``S_j`` has its entries where an item alone would correct ``j``'s column most: where the gradient
  :math:`|C_{ij} - (C b_j)_i|` over :math:`\sqrt{C_{ii}}` is largest. There it is the exact
  minimum, and its diagonal takes that of :math:`L V^T` away.

Source of the regressions on neighbors: Steck, "Markov Random Fields for Collaborative Filtering"
(NeurIPS 2019); the factors before them and the gradient are ours. With all items as neighbors it is
the exact model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.linalg import lapack, solve_triangular
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from recbole_gacllm.objective.unseen import Unseen

# What these lose of the exact model's NDCG@10, and others did: docs/training.md.
N_NEIGHBORS = 200
RANK = 64
BLOCK = 256  # columns at once


@dataclass
class LocalWeights:
    """``B`` as factors and sparse weights.

    Attributes:
        left: ``L``: ``[n_items, rank]``.
        right: ``V``: ``[n_items, rank]``, where scores are made.
        weights: ``S``: ``[n_items, n_items]``.
        unseen: Items whose columns are predicted, if there are any.
        fitted: Mean and slopes of their regression: ``[n_items, 1 + width]``.
    """

    left: np.ndarray
    right: Tensor
    weights: sparse.csr_array
    unseen: Unseen | None = None
    fitted: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        weighted: sparse.csr_array,
        denoising: float,
        reg_weight: float,
        texts: np.ndarray | None,
        text_weight: float,
        device: torch.device | str = "cpu",
    ) -> LocalWeights:
        r"""Fit them.

        Args:
            weighted: :math:`W^{1/2} R`, ``[n_users, n_items]``, float32.
            denoising: ``beta``.
            reg_weight: ``lambda``.
            texts: ``X``, centred: ``[n_items, width]``; None for none.
            text_weight: ``gamma``.
            device: Where scores are made.
        """
        own = weighted.power(2).sum(axis=0)
        # The most popular first: below the diagonal a row is as long as the item is rare.
        order = np.argsort(-own, kind="stable").astype(np.int32)
        weighted, own = weighted[:, order], own[order]
        rows = np.zeros((len(own), 1), np.float32)
        if texts is not None:
            rows = (texts[order] * np.sqrt(text_weight * own.mean())).astype(np.float32)
        ridge = (reg_weight + denoising * own).astype(np.float32)
        squares = own + (rows**2).sum(axis=1) + ridge  # diag(C)
        left, right = _factors(weighted, rows, ridge, squares)
        weights = _corrections(weighted, rows, ridge, squares, left, right)
        places = order[weights.row], order[weights.col]
        back = np.argsort(order)
        return cls(
            left[back],
            torch.from_numpy(right[back]).to(device),
            sparse.csr_array((weights.data, places), shape=weights.shape),
        )

    def complete(self, unseen: Unseen) -> None:
        """Let texts say what the columns of items without training interactions are."""
        n_items, fitted = len(self.left), []
        units = sparse.eye_array(n_items, dtype=np.float32, format="csr")
        for start in range(0, n_items, 4 * BLOCK):
            columns = self.products(units[start : start + 4 * BLOCK])[:, unseen.seen].T
            mean, slopes = unseen.fit(columns)
            fitted.append(torch.cat([mean[None], slopes]).T.cpu())
        self.unseen, self.fitted = unseen, torch.cat(fitted).numpy()

    def products(self, rows: sparse.csr_array | np.ndarray) -> Tensor:
        """Rows times ``B``.

        Shapes:
            rows: ``[m, n_items]``; result likewise.
        """
        local = rows @ self.weights
        dense = local.toarray() if sparse.issparse(local) else local
        scores = torch.from_numpy(dense).to(self.right)
        scores.addmm_(torch.from_numpy(rows @ self.left).to(scores), self.right.T)
        if self.unseen is not None:
            places = self.unseen.unseen
            fitted = torch.from_numpy(rows @ self.fitted).to(scores)  # [m, 1 + width]
            scores[:, places] = self.unseen.apply(places, fitted[:, 0], fitted[:, 1:].T).T
        return scores


def _factors(
    weighted: sparse.csr_array, rows: np.ndarray, ridge: np.ndarray, squares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``L`` and ``V``: ``[n_items, rank]`` each."""
    n_items, root = len(ridge), np.sqrt(ridge)
    transposed = weighted.T.tocsr()

    def scaled(vector: np.ndarray) -> np.ndarray:
        vector = vector.ravel() / root
        product: np.ndarray = transposed @ (weighted @ vector) + rows @ (rows.T @ vector)
        product /= root
        return product

    values, vectors = eigsh(
        LinearOperator((n_items, n_items), matvec=scaled, dtype=np.float32),
        k=min(RANK, n_items - 1),
        v0=np.ones(n_items, np.float32),
        tol=1e-2,
    )
    factors = vectors * np.sqrt(values.clip(min=0)) * root[:, None]
    rest = np.maximum(squares - (factors**2).sum(axis=1), ridge)  # Psi
    scaled_factors = factors / rest[:, None]
    inner = np.eye(factors.shape[1]) + scaled_factors.T @ factors
    left = solve_triangular(np.linalg.cholesky(inner), scaled_factors.T, lower=True).T
    right = left / (1 / rest - (left**2).sum(axis=1))[:, None]
    return left.astype(np.float32), right.astype(np.float32)


def _corrections(
    weighted: sparse.csr_array,
    rows: np.ndarray,
    ridge: np.ndarray,
    squares: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
) -> sparse.coo_array:
    """``S``, with items in the order of ``weighted``'s columns, which are by popularity."""
    n_items = len(ridge)
    transposed = weighted.T.tocsr()
    below = sparse.vstack(
        [
            sparse.tril(transposed[start : start + BLOCK] @ weighted, start - 1, format="csr")
            for start in range(0, n_items, BLOCK)
        ],
        format="csr",
    )
    product = transposed @ (weighted @ left) + rows @ (rows.T @ left) + ridge[:, None] * left
    diagonal, n_neighbors = (left * right).sum(axis=1), min(N_NEIGHBORS, n_items - 1)
    inputs = np.empty((n_items, 1 + n_neighbors), np.int32)
    weights = np.empty((n_items, 1 + n_neighbors), np.float32)
    inputs[:, 0], weights[:, 0] = np.arange(n_items), -diagonal
    scale = np.sqrt(squares).astype(np.float32)
    for start in range(0, n_items, BLOCK):
        block = slice(start, min(start + BLOCK, n_items))
        targets = np.arange(block.start, block.stop)
        # C b_j is that of the factors without their diagonal entry.
        gradient = (transposed[block] @ weighted).toarray() + rows[block] @ rows.T
        gradient *= 1 + diagonal[block, None]
        gradient -= right[block] @ product.T
        gains = np.abs(gradient) / scale
        gains[targets - start, targets] = -1.0
        neighbors = torch.from_numpy(gains).topk(n_neighbors).indices.sort().values.numpy()
        for target, near in zip(targets, neighbors, strict=True):
            matrix = below[near][:, near].toarray()
            # LAPACK reads columns: its upper triangle is our lower one.
            matrix += np.tril(rows[near] @ rows[near].T)
            matrix[np.diag_indices(n_neighbors)] = squares[near]
            _, solution, failed = lapack.sposv(matrix.T, gradient[target - start, near])
            if failed:
                raise np.linalg.LinAlgError(
                    "a matrix of the linear item-item model is not definite"
                )
            inputs[target, 1:], weights[target, 1:] = near, solution
    targets = np.repeat(np.arange(n_items, dtype=np.int32), 1 + n_neighbors)
    return sparse.coo_array((weights.ravel(), (inputs.ravel(), targets)), shape=(n_items, n_items))
