r"""Items without a training interaction, scored from their text alone.

The ID embedding of such an item is untrained and must not speak. What its text says of a user is
learnt from the items that have interactions: a ridge regression of the user's scores of those on
their texts, in closed form.

.. math:: w_u = \arg\min_w \sum_{i} (s(u, i) - \bar s_u - \langle w, x_i - \bar x \rangle)^2
    + \lambda \sigma^2 \|w\|^2, \qquad s(u, j) = \bar s_u + \langle w_u, x_j - \bar x \rangle

with the sums and means over the items with interactions, and :math:`\sigma^2` the mean square
length of :math:`x_i - \bar x`. So the scores of both kinds of items are on one scale, and an item
of which the text tells nothing stands at the user's mean. Large :math:`\lambda` leads to text-kNN.
Ours; the paper does not say what becomes of such items.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# lambda: chosen on validation NDCG@10 of cold items of ml-100k; 3 to 30 differ little.
REG_WEIGHT = 10.0


class UnseenItems:
    """Which items have training interactions, and how the texts of the others are scored.

    Args:
        seen: Items with training interactions; row 0 of the catalogue is padding.
        n_items: Number of items with padding.
        texts: Layer 0 of some items, zero rows where there is no text: ``[n]`` to ``[n, width]``.
        block: So many texts are asked for at once.

    Attributes:
        seen: As given, sorted.
        is_seen: ``[n_items]``; False for padding.

    Shapes:
        seen: ``[S]``.
    """

    def __init__(
        self, seen: Tensor, n_items: int, texts: Callable[[Tensor], Tensor], block: int
    ) -> None:
        self.seen, self._texts, self._block = seen, texts, block
        self.is_seen = torch.zeros(n_items, dtype=torch.bool, device=seen.device)
        self.is_seen[seen] = True
        self._unseen = (~self.is_seen).nonzero()[1:, 0]  # [C], without padding
        width = texts(seen[:1]).shape[1]
        total = torch.zeros(width, dtype=torch.float64, device=seen.device)
        gram = torch.zeros(width, width, dtype=torch.float64, device=seen.device)
        has_text = []
        for items in torch.split(seen, block):
            rows = texts(items)  # [n, width]
            has_text.append(rows.any(dim=1))
            total += rows.sum(0, dtype=torch.float64)
            gram += rows.T @ rows
        self._has_text = torch.cat(has_text)  # [S]
        n = max(int(self._has_text.sum()), 1)
        mean = total / n  # [width]
        gram -= n * torch.outer(mean, mean)
        gram.diagonal().add_(REG_WEIGHT * max(float(gram.trace()) / n, 1e-12))
        self._inverse = torch.linalg.inv(gram).float()  # [width, width]
        self._mean = mean.float()

    @classmethod
    def find(
        cls,
        items: np.ndarray,
        n_items: int,
        texts: Callable[[Tensor], Tensor],
        block: int,
        device: torch.device | str,
    ) -> UnseenItems | None:
        """From the item of each training edge; None where all items have one."""
        seen = np.unique(items)
        if len(seen) == n_items - 1:
            return None
        return cls(torch.from_numpy(seen).to(device), n_items, texts, block)

    def __deepcopy__(self, memo: dict[int, object]) -> UnseenItems:
        return self

    def complete(self, scores: Tensor) -> Tensor:
        """Scores of all items from those of the seen ones; padding has the mean.

        Shapes:
            scores: ``[B, S]``; result ``[B, n_items]``.
        """
        weight = self._has_text / self._has_text.sum().clamp(min=1)  # [S]
        mean = (scores @ weight)[:, None]  # [B, 1]
        centred = scores - mean
        moments = scores.new_zeros(len(scores), len(self._mean))  # sums of score times text
        columns = torch.split(centred, self._block, dim=1)
        for block, items in zip(columns, torch.split(self.seen, self._block), strict=True):
            moments += block @ self._texts(items)
        slopes = moments @ self._inverse  # w_u: [B, width]
        result = mean.repeat(1, len(self.is_seen))
        result[:, self.seen] = scores
        for items in torch.split(self._unseen, self._block):
            rows = self._texts(items)
            rows = torch.where(rows.any(dim=1, keepdim=True), rows - self._mean, 0.0)
            result[:, items] += slopes @ rows.T
        return result
