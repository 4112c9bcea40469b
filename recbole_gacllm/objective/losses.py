"""Loss terms of the objective, in pure PyTorch. Every term is a scalar, a mean over its batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    r"""Bayesian personalised ranking.

    .. math:: -\frac1B \sum_b \log(10^{-10} + \sigma(s_b^+ - s_b^-))

    Source: Rendle et al. (UAI 2009); the small constant is RecBole's, so that both agree.
    The paper's objective on matching scores.

    Shapes:
        positive, negative: ``[B]``.
    """
    return -torch.log(1e-10 + torch.sigmoid(positive - negative)).mean()


def sampled_softmax(
    users: Tensor,
    rows: Tensor,
    positives: Tensor,
    negatives: Tensor,
    is_negative: Tensor,
    temperature: float,
) -> Tensor:
    r"""Softmax cross-entropy of the matching item against negatives, over cosine scores.

    .. math:: -\frac1B \sum_b \log \frac{e^{\cos(u_b, i_b)/\tau}}
        {\sum_{j \in \{i_b\} \cup N} e^{\cos(u_b, i_j)/\tau}}

    The sum over the negatives ``N`` is made once for each distinct user, not for each pair. With
    all items as negatives it is the multinomial likelihood of a user's items.

    Source: Wu et al., "On the Effectiveness of Sampled Softmax Loss for Item Recommendation" (TOIS
    2024), Eq. 5. Ours as the objective of GaCLLM; the paper's is :func:`bpr`.

    Args:
        users: Embeddings of the distinct users of the batch.
        rows: Row in ``users`` of each pair.
        positives: Embedding of each pair's item.
        negatives: Embeddings of distinct items, shared by the batch.
        is_negative: True where a pair's item is among the negatives; it counts once.
        temperature: ``tau``, 0.025 or more.

    Shapes:
        users ``[m, d]``; rows ``[B]``; positives ``[B, d]``; negatives ``[C, d]``;
        is_negative ``[B]``.
    """
    users, positives = F.normalize(users, dim=1), F.normalize(positives, dim=1)
    cosine = (users.index_select(0, rows) * positives).sum(1)  # [B]
    positive = (cosine - 1) / temperature
    sums, _ = exponential_sums(users, F.normalize(negatives, dim=1), temperature)  # [m]
    own = positive.exp().masked_fill(is_negative, 0.0)
    return (torch.log(sums.index_select(0, rows) + own) - positive).mean()


def alignment(ids: Tensor, texts: Tensor, temperature: float) -> Tensor:
    r"""InfoNCE between the ID embedding and the text embedding of the same node, both directions.

    .. math:: -\frac{1}{2n} \sum_v
        \log \frac{e^{\cos(e_v, t_v)/\tau}}{\sum_w e^{\cos(e_v, t_w)/\tau}}
        + \log \frac{e^{\cos(e_v, t_v)/\tau}}{\sum_w e^{\cos(e_w, t_v)/\tau}}

    Ours: the paper names the alignment module, not its loss; contrastive as in RLMRec (WWW 2024).

    Shapes:
        ids, texts: ``[n, d]``, of the same distinct nodes at one hop.
    """
    ids, texts = F.normalize(ids, dim=1), F.normalize(texts, dim=1)
    same = ((ids * texts).sum(1) - 1) / temperature  # [n]
    of_ids, of_texts = exponential_sums(ids, texts, temperature)
    return ((torch.log(of_ids) + torch.log(of_texts)) / 2 - same).mean()


class _ExponentialSums(torch.autograd.Function):
    """One exponential for both directions, kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, temperature: float, half: bool
    ) -> tuple[Tensor, Tensor]:
        left, right = (x.bfloat16(), y.bfloat16()) if half else (x, y)
        shift = left.new_full((), -1 / temperature)
        kernel = torch.addmm(shift, left, right.T, alpha=1 / temperature).exp_()  # [m, n]
        ctx.save_for_backward(left, right, kernel)
        ctx.temperature, ctx.dtype = temperature, x.dtype
        ctx.set_materialize_grads(False)
        return kernel.sum(1, dtype=x.dtype), kernel.sum(0, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        left, right, kernel = ctx.saved_tensors
        of_rows, of_columns = gradients
        weight = kernel.new_zeros(())  # of each element, broadcast
        if of_rows is not None:
            weight = weight + (of_rows[:, None] / ctx.temperature).to(kernel.dtype)
        if of_columns is not None:
            weight = weight + (of_columns / ctx.temperature).to(kernel.dtype)
        slope = kernel * weight  # [m, n]
        of_x, of_y = slope @ right, slope.T @ left
        return of_x.to(ctx.dtype), of_y.to(ctx.dtype), None, None


def exponential_sums(x: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    r"""Sums of ``exp((cos - 1) / tau)`` over each row and each column of a cosine matrix.

    .. math:: r_i = \sum_j k_{ij}, \quad c_j = \sum_i k_{ij}, \quad
        k_{ij} = e^{(\langle x_i, y_j \rangle - 1) / \tau}

    A cosine is at most 1, so nothing overflows and no maximum has to be found first; with
    ``tau >= 0.025`` nothing underflows either. Under autocast the matrix is made, kept and
    multiplied in bfloat16; the sums are in the precision of ``x``.

    Shapes:
        x ``[m, d]`` and y ``[n, d]``, rows of unit length; results ``[m]``, ``[n]``.
    """
    half = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(device_type=x.device.type, enabled=False):
        x, y = x.float() if half else x, y.float() if half else y
        sums: tuple[Tensor, Tensor] = _ExponentialSums.apply(x, y, temperature, half)  # type: ignore[no-untyped-call]
    return sums


def embedding_l2(*squares: Tensor, squared: bool) -> Tensor:
    r"""Sum of the L2 norms of embedding blocks over the batch size.

    .. math:: \frac1B \sum_k \|E_k\|_2 \quad\text{or}\quad \frac{1}{2B} \sum_k \|E_k\|_2^2

    Source: RecBole's ``EmbLoss`` (``require_pow`` False or True), so that both give equal numbers.

    Args:
        squares: Of each block ``E_k`` the squared lengths of its rows: they cost less to gather
            than the rows.
        squared: The second form.

    Shapes:
        each of squares: ``[B]``.
    """
    sums = torch.stack([block.sum() for block in squares])
    batch = len(squares[-1])
    return sums.sum() / batch / 2 if squared else sums.sqrt().sum() / batch
