"""The MLP that brings text embeddings to the width of ID embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
