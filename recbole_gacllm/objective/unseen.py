r"""Users and items without a training interaction, predicted from their text.

The ID embedding of such a node is untrained and must not speak. What texts say of embeddings is
learnt from the nodes of the same side that have interactions: a ridge regression of their rows
:math:`t_i` of a table on their texts :math:`x_i`, in closed form.

.. math:: A = \arg\min_A \sum_i \| t_i - \bar t - A (x_i - \bar x) \|^2
    + \lambda \sigma^2 \|A\|^2, \qquad \hat t_j = \bar t + A (x_j - \bar x)

with the sums and means over the nodes with interactions and text, and :math:`\sigma^2` the mean
square length of :math:`x_i - \bar x`. The tables are the fused embeddings and what the linear model
says of items (of users): scores of both kinds of nodes are on one scale, and a node of which the
text tells nothing stands at the mean. Large :math:`\lambda` leads to text-kNN. Ours; the paper does
not say what becomes of such nodes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class Unseen:
    """Which nodes of a side have training interactions, and how rows of the others are predicted.

    Args:
        seen: Nodes with training interactions.
        unseen: Those without, and padding, which has no text.
        n_nodes: Number of nodes of the side with padding.
        texts: Embeddings of some nodes, zero rows where there is no text: ``[n]`` to
            ``[n, width]``; None where there is no text at all: all are predicted at the mean.
        block: So many texts are asked for at once.
        reg_weight: ``lambda``.

    Attributes:
        seen, unseen: As given.
        is_seen: ``[n_nodes]``.

    Shapes:
        seen: ``[S]``; unseen: ``[C]``.
    """

    def __init__(
        self,
        seen: Tensor,
        unseen: Tensor,
        n_nodes: int,
        texts: Callable[[Tensor], Tensor] | None = None,
        block: int = 1,
        reg_weight: float = 1.0,
    ) -> None:
        self.seen, self.unseen = seen, unseen
        self._texts, self._block = texts, block
        self.is_seen = torch.zeros(n_nodes, dtype=torch.bool, device=seen.device)
        self.is_seen[seen] = True
        self._counts = torch.ones(len(seen), device=seen.device)  # [S]: 1 with text
        if texts is None:
            return
        width = texts(seen[:1]).shape[1]
        total = torch.zeros(width, dtype=torch.float64, device=seen.device)
        gram = torch.zeros(width, width, dtype=torch.float64, device=seen.device)
        has_text = []
        for nodes in torch.split(seen, block):
            rows = texts(nodes)  # [n, width]
            has_text.append(rows.any(dim=1))
            total += rows.sum(0, dtype=torch.float64)
            gram += rows.T @ rows
        self._counts = torch.cat(has_text).float()
        n = max(float(self._counts.sum()), 1.0)
        mean = total / n  # [width]
        gram -= n * torch.outer(mean, mean)
        gram.diagonal().add_(reg_weight * max(float(gram.trace()) / n, 1e-12))
        self._inverse = torch.linalg.inv(gram).float()  # [width, width]
        self._mean = mean.float()

    @classmethod
    def find(
        cls,
        nodes: np.ndarray,
        n_nodes: int,
        texts: Callable[[Tensor], Tensor] | None,
        block: int,
        reg_weight: float,
        device: torch.device | str,
    ) -> Unseen | None:
        """From the node of each training edge; None where all but padding have one."""
        seen = np.unique(nodes)
        if len(seen) == n_nodes - 1:
            return None
        unseen = np.setdiff1d(np.arange(n_nodes), seen)
        known, missing = (torch.from_numpy(part).to(device) for part in (seen, unseen))
        return cls(known, missing, n_nodes, texts, block, reg_weight)

    def __deepcopy__(self, memo: dict[int, object]) -> Unseen:
        return self

    def fit(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and slopes of the regression.

        Shapes:
            table, of the seen nodes: ``[S, d]``; results ``[d]`` and ``[width, d]``, width 0
            without text.
        """
        mean = self._counts @ table / self._counts.sum().clamp(min=1)
        if self._texts is None:
            return mean, table.new_zeros(0, table.shape[1])
        moments = table.new_zeros(len(self._mean), table.shape[1])
        blocks = zip(*(torch.split(part, self._block) for part in (self.seen, table)), strict=True)
        for nodes, rows in blocks:
            moments += self._texts(nodes).T @ (rows - mean)
        return mean, self._inverse @ moments

    def apply(self, nodes: Tensor, mean: Tensor, slopes: Tensor) -> Tensor:
        """Predicted rows of some nodes.

        Shapes:
            nodes: ``[n]``; mean and slopes as from :meth:`fit`; result ``[n, d]``.
        """
        if self._texts is None:
            return mean.repeat(len(nodes), 1)
        rows = self._texts(nodes)
        rows = torch.where(rows.any(dim=1, keepdim=True), rows - self._mean, 0.0)
        return torch.addmm(mean, rows, slopes)

    def complete(self, table: Tensor) -> Tensor:
        """The table with predicted rows of the unseen nodes: ``[n_nodes, d]``."""
        return table.index_copy(0, self.unseen, self.predict(table[self.seen]))

    def predict(self, table: Tensor) -> Tensor:
        """Rows of the unseen nodes from those of the seen ones.

        Shapes:
            table: ``[S, d]``; result ``[C, d]``.
        """
        fitted = self.fit(table)
        blocks = torch.split(self.unseen, self._block)
        return torch.cat([self.apply(nodes, *fitted) for nodes in blocks])
