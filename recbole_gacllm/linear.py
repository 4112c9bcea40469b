r"""A linear item-item model beside the graph convolution, in closed form.

Linear models beat graph models on dense data, and their errors differ; the sum of both, each
standardised per user, is better than either (see results/). Ours; the paper has no such term.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

# The Gram matrix and its inverse take 8 bytes an entry: 7 GB at this size.
MAX_ITEMS = 30_000


class ItemItemModel:
    r"""EASE on the training interactions: the best item-item weights with a zero diagonal.

    .. math:: B = I - P\,\mathrm{diag}(P)^{-1}, \quad P = (R^T R + \lambda I)^{-1}, \quad
        s(u, \cdot) = R_u B

    Source: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data" (WWW 2019), Eq. 8. Not part
    of a model's state: it follows from the training edges, and copying a model shares it.

    Args:
        users: User index of each training edge.
        items: Item index of each training edge.
        n_users: Number of users.
        n_items: Number of items.
        reg_weight: ``lambda``, above 0.
        device: Where the weights live.

    Shapes:
        users, items: ``[n_edges]``.

    Raises:
        ValueError: If there are more items than fit.
    """

    def __init__(
        self,
        users: np.ndarray,
        items: np.ndarray,
        n_users: int,
        n_items: int,
        reg_weight: float,
        device: torch.device | str = "cpu",
    ) -> None:
        if n_items > MAX_ITEMS:
            raise ValueError(
                f"linear_weight: the item-item weights of {n_items} items do not fit (at most "
                f"{MAX_ITEMS}). Set linear_weight: 0."
            )
        ones = np.ones(len(users), dtype=np.float32)
        self._interactions = sparse.csr_array((ones, (users, items)), shape=(n_users, n_items))
        self._interactions.data[:] = 1.0  # duplicates were summed
        gram = (self._interactions.T @ self._interactions).toarray().astype(np.float64)
        gram[np.diag_indices(n_items)] += reg_weight
        inverse = np.linalg.inv(gram)
        weights = -inverse / np.diag(inverse)[None, :]
        weights[np.diag_indices(n_items)] = 0.0
        self._weights = torch.from_numpy(weights.astype(np.float32)).to(device)

    def __deepcopy__(self, memo: dict[int, object]) -> ItemItemModel:
        return self

    def scores(self, users: Tensor) -> Tensor:
        """Scores of users with every item.

        Shapes:
            users: ``[B]``; result ``[B, n_items]``.
        """
        rows = torch.from_numpy(self._interactions[users.cpu().numpy()].toarray())
        return rows.to(self._weights.device) @ self._weights


def standardize(scores: Tensor) -> Tensor:
    """Each row with mean 0 and deviation 1; a constant row becomes 0.

    Shapes:
        scores and result: ``[B, n_items]``.
    """
    centered = scores - scores.mean(dim=1, keepdim=True)
    return centered / centered.std(dim=1, keepdim=True).clamp(min=1e-12)
