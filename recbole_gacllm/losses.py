"""Loss terms of the objective, in pure PyTorch. Every term is a scalar, a mean over its batch."""

from __future__ import annotations

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
    positives: Tensor,
    negatives: Tensor,
    hits: Tensor,
    temperature: float,
) -> Tensor:
    r"""Softmax cross-entropy of the matching item against negatives, over cosine scores.

    .. math:: -\frac1B \sum_b \log \frac{e^{\cos(u_b, i_b)/\tau}}
        {e^{\cos(u_b, i_b)/\tau} + \sum_{j:\, \text{not hit}} e^{\cos(u_b, i_j)/\tau}}

    Source: Wu et al., "On the Effectiveness of Sampled Softmax Loss for Item Recommendation" (TOIS
    2024), Eq. 5. Ours as the objective of GaCLLM; the paper's is :func:`bpr`.

    Args:
        users: User embeddings.
        positives: Embedding of each user's matching item.
        negatives: Item embeddings, shared by the batch.
        hits: True where a negative is the matching item itself; it does not count.
        temperature: ``tau``, above 0.

    Shapes:
        users, positives ``[B, d]``; negatives ``[C, d]``; hits ``[B, C]``.
    """
    users = F.normalize(users, dim=1)
    positive = (users * F.normalize(positives, dim=1)).sum(1, keepdim=True)  # [B, 1]
    negative = users @ F.normalize(negatives, dim=1).T  # [B, C]
    logits = torch.cat([positive, negative.masked_fill(hits, -torch.inf)], dim=1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def alignment(ids: Tensor, texts: Tensor, temperature: float) -> Tensor:
    r"""InfoNCE between the ID embedding and the text embedding of the same node, both directions.

    .. math:: -\frac{1}{2n} \sum_v
        \log \frac{e^{\cos(e_v, t_v)/\tau}}{\sum_w e^{\cos(e_v, t_w)/\tau}}
        + \log \frac{e^{\cos(e_v, t_v)/\tau}}{\sum_w e^{\cos(e_w, t_v)/\tau}}

    Ours: the paper names the alignment module, not its loss; contrastive as in RLMRec (WWW 2024).

    Args:
        ids: ID embeddings of distinct nodes at one hop.
        texts: Projected text embeddings of the same nodes.
        temperature: ``tau``, above 0.

    Shapes:
        ids, texts: ``[n, d]``.
    """
    logits = F.normalize(ids, dim=1) @ F.normalize(texts, dim=1).T / temperature  # [n, n]
    target = torch.arange(len(ids), device=ids.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def embedding_l2(*embeddings: Tensor, squared: bool) -> Tensor:
    r"""Sum of the L2 norms of embedding blocks over the batch size.

    .. math:: \frac1B \sum_k \|E_k\|_2 \quad\text{or}\quad \frac{1}{2B} \sum_k \|E_k\|_2^2

    Source: RecBole's ``EmbLoss`` (``require_pow`` False or True), so that both give equal numbers.

    Shapes:
        each of embeddings: ``[B, d]``.
    """
    norms = [torch.norm(block, p=2) for block in embeddings]
    batch = embeddings[-1].shape[0]
    if squared:
        return torch.stack([norm.pow(2) for norm in norms]).sum() / batch / 2
    return torch.stack(norms).sum() / batch
