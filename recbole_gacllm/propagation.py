"""Graph convolution over ID embeddings and its fusion with text, in pure PyTorch.

The adjacency is symmetric, so the backward pass of ``A_hat @ x`` is ``A_hat @ grad``: one CSR
product each way, no transpose.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor


class Adjacency:
    r"""Symmetrically normalised adjacency of the user-item graph, nodes users first.

    .. math:: \hat A = D^{-1/2} A D^{-1/2}, \quad A = \begin{pmatrix} 0 & R \\ R^T & 0 \end{pmatrix}

    Source: He et al., LightGCN (SIGIR 2020), Eq. 8. Not part of a model's state: it is rebuilt
    from the training edges, and copying a model shares it.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix  # sparse CSR [n_users + n_items, n_users + n_items]

    @classmethod
    def from_edges(
        cls,
        users: np.ndarray,
        items: np.ndarray,
        n_users: int,
        n_items: int,
        device: torch.device | str = "cpu",
    ) -> Adjacency:
        """Build from training edges; a repeated edge counts once, a lone node has a zero row.

        Args:
            users: User index of each edge, in ``[0, n_users)``.
            items: Item index of each edge, in ``[0, n_items)``.
            n_users: Number of user nodes.
            n_items: Number of item nodes.
            device: Where the matrix lives.

        Shapes:
            users, items: ``[n_edges]``.
        """
        ones = np.ones(len(users), dtype=np.float32)
        interactions = sparse.csr_array((ones, (users, items)), shape=(n_users, n_items))
        interactions.data[:] = 1.0  # duplicates were summed
        full = sparse.block_array([[None, interactions], [interactions.T, None]], format="csr")
        full.sort_indices()
        degree = np.diff(full.indptr)
        # The epsilon is RecBole's: with it the values equal LightGCN's to the last bit.
        scale = np.power(degree + 1e-7, -0.5)
        rows = np.repeat(np.arange(full.shape[0]), degree)
        values = (scale[rows] * scale[full.indices]).astype(np.float32)
        with warnings.catch_warnings():
            # PyTorch calls all of CSR beta; the product is checked against a dense one in tests.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            matrix = torch.sparse_csr_tensor(
                torch.from_numpy(full.indptr.astype(np.int64)),
                torch.from_numpy(full.indices.astype(np.int64)),
                torch.from_numpy(values),
                size=full.shape,
                check_invariants=False,
            )
        return cls(matrix.to(device))

    def __deepcopy__(self, memo: dict[int, Any]) -> Adjacency:
        # RecBole's get_flops deep-copies the model; sparse CSR tensors cannot be deep-copied.
        return self


class _SymmetricProduct(torch.autograd.Function):
    """``A @ x`` for symmetric ``A``, whose gradient is the same product of the gradient."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor) -> Tensor:
        ctx.matrix = matrix
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.matrix @ gradients[0].contiguous()


def propagate(adjacency: Adjacency, embeddings: Tensor, n_layers: int) -> list[Tensor]:
    r"""Embeddings of every hop, ``e^(0) .. e^(n_layers)``.

    .. math:: e^{(l+1)} = \hat A e^{(l)}

    Source: LightGCN, Eq. 7. In float32 under autocast too: sparse products have no half kernel.

    Args:
        adjacency: The normalised graph.
        embeddings: ``e^(0)``.
        n_layers: Number of hops.

    Shapes:
        embeddings: ``[n_users + n_items, d]``; each result the same.
    """
    hops = [embeddings]
    with torch.autocast(device_type=embeddings.device.type, enabled=False):
        for _ in range(n_layers):
            product = _SymmetricProduct.apply(adjacency.matrix, hops[-1].float())  # type: ignore[no-untyped-call]
            hops.append(product)
    return hops


def fuse(hops: Sequence[Tensor], texts: Sequence[Tensor], text_weight: float) -> Tensor:
    r"""Fused embedding: each hop's text is added to its embedding, then the hops are averaged.

    .. math:: z_v = \frac{1}{K+1} \sum_{l=0}^{K} \big( e_v^{(l)} + w\, t_v^{(l)} \big)

    with ``t_v^(l) = 0`` for hops that have no text layer. Ours: the paper aligns and fuses but
    does not give the fusion equation. Without text it is LightGCN's mean over layers (its Eq. 4).

    Args:
        hops: ``e^(0) .. e^(K)`` of the nodes asked for.
        texts: Projected texts ``t^(0) .. t^(L)``, ``L <= K``, of the same nodes; may be empty.
        text_weight: ``w``.

    Shapes:
        each of hops and texts: ``[n, d]``; result ``[n, d]``.
    """
    mean = torch.stack(list(hops), dim=1).mean(dim=1)  # [n, d]
    for text in texts:
        mean = mean + (text_weight / len(hops)) * text
    return mean
