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
from torch import Tensor, nn
from torch.nn import functional as F


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

        Shapes:
            users, items: ``[n_edges]``, from 0.
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
        full.data = (scale[rows] * scale[full.indices]).astype(np.float32)
        return cls(csr_tensor(full).to(device))

    def __deepcopy__(self, memo: dict[int, Any]) -> Adjacency:
        # RecBole's get_flops deep-copies the model; sparse CSR tensors cannot be deep-copied.
        return self


def csr_tensor(matrix: Any) -> Tensor:
    """A SciPy matrix in CSR as a float32 tensor.

    Indices are int32 where they fit: half the bytes to read in every product.
    """
    fits = max(matrix.nnz, *matrix.shape) < 2**31
    index_type = np.int32 if fits else np.int64
    with warnings.catch_warnings():
        # PyTorch calls all of CSR beta; the product is checked against a dense one in tests. Its
        # CUDA builds warn of unchecked invariants, although the call says so.
        warnings.filterwarnings("ignore", "Sparse (CSR tensor|invariant)", UserWarning)
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(index_type)),
            torch.from_numpy(matrix.indices.astype(index_type)),
            torch.from_numpy(matrix.data.astype(np.float32)),
            size=matrix.shape,
            check_invariants=False,
        )


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """``M @ x`` of a CSR matrix and a dense one, without gradient.

    On CPU it is a weighted sum of rows of ``x``, ``embedding_bag``: that kernel is vectorised over
    the width, and three times as fast as PyTorch's CSR product.

    Shapes:
        matrix ``[m, n]``; x ``[n, d]``; result ``[m, d]``.
    """
    if x.device.type != "cpu":
        return matrix @ x
    return F.embedding_bag(
        matrix.col_indices(),
        x.contiguous(),
        matrix.crow_indices(),
        mode="sum",
        per_sample_weights=matrix.values(),
        include_last_offset=True,
    )


class _ConstantProduct(torch.autograd.Function):
    """``M @ x`` for constant ``M``; the gradient is the product with a transpose made before."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transposed: Tensor, x: Tensor) -> Tensor:
        ctx.transposed = transposed
        return product(matrix, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        return None, None, product(ctx.transposed, gradients[0])


def constant_product(matrix: Tensor, transposed: Tensor, x: Tensor) -> Tensor:
    """``M @ x`` for a constant sparse ``M``; a symmetric one is its own transpose.

    In the precision of ``M`` under autocast too: sparse products have no half kernel.

    Shapes:
        matrix ``[m, n]`` and transposed ``[n, m]``, in CSR; x ``[n, d]``; result ``[m, d]``.
    """
    with torch.autocast(device_type=x.device.type, enabled=False):
        result: Tensor = _ConstantProduct.apply(matrix, transposed, x.to(matrix.dtype))  # type: ignore[no-untyped-call]
    return result


class _MeanOfHops(torch.autograd.Function):
    """``1/(K+1) sum_l A^l x`` for symmetric ``A``, whose gradient is the same map."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor, n_layers: int) -> Tensor:
        ctx.matrix, ctx.n_layers = matrix, n_layers
        return _mean_of_hops(matrix, x, n_layers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        return None, _mean_of_hops(ctx.matrix, gradients[0], ctx.n_layers), None


def _mean_of_hops(matrix: Tensor, x: Tensor, n_layers: int) -> Tensor:
    total = x
    for _ in range(n_layers):
        total = product(matrix, total).add_(x)  # Horner: x + A (x + A (x + ...))
    return total / (n_layers + 1)


def propagate_mean(adjacency: Adjacency, embeddings: Tensor, n_layers: int) -> Tensor:
    r"""Mean of the hops, without keeping them: what :func:`fuse` makes of hops without text.

    .. math:: z = \frac{1}{K+1} \sum_{l=0}^{K} \hat A^l e^{(0)}

    Source: LightGCN, Eq. 4 with equal weights.

    Shapes:
        embeddings: ``[n_users + n_items, d]``; result the same.
    """
    matrix = adjacency.matrix
    with torch.autocast(device_type=embeddings.device.type, enabled=False):
        mean: Tensor = _MeanOfHops.apply(matrix, embeddings.to(matrix.dtype), n_layers)  # type: ignore[no-untyped-call]
    return mean


class _Hops(torch.autograd.Function):
    """All hops of some nodes; the backward pass carries one gradient down through the hops."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor, nodes: Tensor, n_layers: int) -> Any:
        ctx.matrix, ctx.shape = matrix, x.shape
        ctx.save_for_backward(nodes)
        hops = [x.index_select(0, nodes)]
        for _ in range(n_layers):
            x = product(matrix, x)
            hops.append(x.index_select(0, nodes))
        return tuple(hops)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        (nodes,) = ctx.saved_tensors
        last, *others = reversed(gradients)
        total = last.new_zeros(ctx.shape).index_add_(0, nodes, last)
        for gradient in others:
            total = product(ctx.matrix, total).index_add_(0, nodes, gradient)
        return None, total, None, None


def propagate(
    adjacency: Adjacency, embeddings: Tensor, n_layers: int, nodes: Tensor | None = None
) -> list[Tensor]:
    r"""Embeddings of every hop, ``e^(0) .. e^(n_layers)``.

    .. math:: e^{(l+1)} = \hat A e^{(l)}

    Source: LightGCN, Eq. 7.

    Shapes:
        embeddings, ``e^(0)``: ``[n_users + n_items, d]``; nodes, whose hops are wanted (None is
        all): ``[n]``; each result ``[n, d]``.
    """
    matrix = adjacency.matrix
    if nodes is not None:
        with torch.autocast(device_type=embeddings.device.type, enabled=False):
            x = embeddings.to(matrix.dtype)
            return list(_Hops.apply(matrix, x, nodes, n_layers))  # type: ignore[no-untyped-call]
    hops = [embeddings]
    for _ in range(n_layers):
        hops.append(constant_product(matrix, matrix, hops[-1]))
    return hops


class PeriodicPropagation:
    r"""Hops of some nodes, carried through the graph every ``k`` batches only.

    .. math:: e^{(l)}_t = \hat A^l e^{(0)}_s, \qquad
        \nabla e^{(0)}_t = g^{(0)}_t + [t = s + k - 1]
        \sum_{l=1}^{K} \hat A^l \sum_{r=s}^{t} g^{(l)}_r

    where ``s`` is the first batch of the cycle of ``k`` that batch ``t`` belongs to, and ``g^(l)``
    the gradient that reaches hop ``l``. Hop 0 is as in :func:`propagate` in every batch. Hops above
    it are those of the cycle's first batch; their gradients are summed over the cycle and carried
    down in its last batch: none is lost, some come late. With ``k = 1`` this is :func:`propagate`.
    A loss scaler must not change its scale within a cycle for that sum to be right. Ours: the paper
    propagates in every batch.

    Holds ``2 K`` tables of the size of the embeddings, which are no part of a model's state.

    Args:
        adjacency: The normalised graph.
        n_layers: Number of hops, ``K``.
        every: ``k``.
    """

    def __init__(self, adjacency: Adjacency, n_layers: int, every: int) -> None:
        self.adjacency, self.n_layers, self.every = adjacency, n_layers, every
        self.forget()

    def forget(self) -> None:
        """Begin a new cycle with the next batch; gradients not carried down yet are dropped."""
        self.n_batches = 0
        self.hops: list[Tensor] = []  # e^(1) .. e^(K) of all nodes
        self.gradients: list[Tensor] = []  # theirs, summed over the cycle

    def __call__(self, users: Tensor, items: Tensor, nodes: Tensor) -> list[Tensor]:
        """Hops ``0 .. K`` of the nodes of a batch, without a pass over all nodes but one a cycle.

        Shapes:
            users and items, ``e^(0)`` of all: ``[n_users, d]``, ``[n_items, d]``; nodes, users
            first: ``[n]``; each result ``[n, d]``.
        """
        with torch.autocast(device_type=users.device.type, enabled=False):
            dtype = self.adjacency.matrix.dtype
            return list(_PeriodicHops.apply(self, users.to(dtype), items.to(dtype), nodes))  # type: ignore[no-untyped-call]


class _PeriodicHops(torch.autograd.Function):
    """The forward and backward of a batch of :class:`PeriodicPropagation`."""

    @staticmethod
    def forward(
        ctx: Any, cycle: PeriodicPropagation, users: Tensor, items: Tensor, nodes: Tensor
    ) -> Any:
        if cycle.n_batches % cycle.every == 0:
            x = torch.cat([users, items])
            cycle.hops = propagate(cycle.adjacency, x, cycle.n_layers)[1:]
            cycle.gradients = [torch.zeros_like(x) for _ in cycle.hops]
        cycle.n_batches += 1
        ctx.cycle, ctx.is_last = cycle, cycle.n_batches % cycle.every == 0
        ctx.shapes = users.shape, items.shape
        n_users = int((nodes < len(users)).sum())
        user, item = nodes[:n_users], nodes[n_users:] - len(users)
        ctx.save_for_backward(nodes, user, item)
        own = torch.cat([users.index_select(0, user), items.index_select(0, item)])
        return own, *(hop.index_select(0, nodes) for hop in cycle.hops)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, None]:
        (nodes, user, item), cycle = ctx.saved_tensors, ctx.cycle
        own, *others = gradients
        for total, gradient in zip(cycle.gradients, others, strict=True):
            total.index_add_(0, nodes, gradient)
        if ctx.is_last and others:
            matrix = cycle.adjacency.matrix
            result = cycle.gradients[-1]
            for gradient in reversed(cycle.gradients[:-1]):
                result = product(matrix, result).add_(gradient)
            users, items = product(matrix, result).tensor_split([ctx.shapes[0][0]])
        else:
            users, items = (own.new_zeros(shape) for shape in ctx.shapes)
        users.index_add_(0, user, own[: len(user)])
        items.index_add_(0, item, own[len(user) :])
        return None, users, items, None


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


def text_projection(width: int, hidden: int, dim: int, dropout: float) -> nn.Sequential:
    """MLP from ``width`` to ``dim`` with dropout on its input; hidden width 0 is a linear map."""
    if hidden == 0:
        return nn.Sequential(Dropout(dropout), nn.Linear(width, dim))
    return nn.Sequential(
        Dropout(dropout), nn.Linear(width, hidden), nn.LeakyReLU(), nn.Linear(hidden, dim)
    )


class Dropout(nn.Module):
    """Dropout that draws 16 bits an element: ``p`` is rounded to 1/65536, the mean is exact.

    On CPU it takes a tenth of the time of PyTorch's, which draws a double an element.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.n_dropped = min(round(p * 2**16), 2**16 - 1)  # of 2^16 equally likely values

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with a share ``p`` of its elements 0 and the rest scaled up, in training."""
        if not self.training or self.n_dropped == 0:
            return x
        words = torch.empty(x.numel() // 4 + 1, dtype=torch.int64, device=x.device)
        bits = words.random_(-(2**63), None).view(torch.int16)[: x.numel()].view_as(x)
        return x * (bits >= self.n_dropped - 2**15) * (2**16 / (2**16 - self.n_dropped))
