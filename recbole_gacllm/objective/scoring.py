r"""From fused embeddings to a user's scores of all items, in one matrix product and sums of rows.

.. math:: s(u, i) = \mathrm{std}_u \langle z_u, z_i \rangle + w\, \mathrm{std}_u (R_u B)_i

Both parts have mean 0 and deviation 1 over the items with training interactions. The first is
scaled in the embeddings, the second in the histories, so that no pass over scores is needed. Rows
of nodes without training interactions are predicted (``unseen.py``). Ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_gacllm.objective.linear import ItemItemModel
from recbole_gacllm.objective.unseen import Unseen


class Scoring:
    """How a model's embeddings score.

    Args:
        linear: The linear item-item model; None for the products alone, as they are.
        linear_weight: ``w``.
        unseen_items: Items without training interactions; None where there are none, or no text.
        unseen_users: Users without.
    """

    def __init__(
        self,
        linear: ItemItemModel | None,
        linear_weight: float,
        unseen_items: Unseen | None,
        unseen_users: Unseen | None,
    ) -> None:
        self.linear, self.linear_weight = linear, linear_weight
        self.unseen_items, self.unseen_users = unseen_items, unseen_users
        #: Items over which scores are standardised.
        self.ranked: slice | Tensor = slice(None) if unseen_items is None else unseen_items.seen
        if linear is not None and unseen_items is not None:
            linear.complete_items(unseen_items)

    def __deepcopy__(self, memo: dict[int, object]) -> Scoring:
        return self

    def embeddings(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`scores` multiplies, from fused embeddings of all nodes, padding first.

        Shapes:
            ``[n_users, d]`` and ``[n_items, d]``; beside a linear model the results are as wide as
            ``d + 1``.
        """
        if self.linear is not None:
            users, items = standardize(users, items, self.ranked)
        if self.unseen_items is not None:
            items = self.unseen_items.complete(items)
        if self.unseen_users is not None:
            users = self.unseen_users.complete(users)
        if self.linear is None:
            return users, items
        if self.unseen_users is not None:
            self.linear.complete_users(self.unseen_users, self.ranked)
        ones, zeros = items.new_ones(len(items), 1), users.new_zeros(len(users), 1)
        # The last column takes the mean of the linear scores away.
        return torch.cat([users, zeros], dim=1), torch.cat([items, ones], dim=1)

    def scores(self, users: Tensor, items: Tensor, user: Tensor) -> Tensor:
        """Scores of some users with every item.

        Args:
            users: As :meth:`embeddings` gives them.
            items: Likewise.
            user: ``[B]``.

        Returns:
            ``[B, n_items]``, a fresh tensor.
        """
        rows = users[user]
        if self.linear is None:
            return rows @ items.T
        scores, mean = self.linear.standardized(user, self.ranked)
        rows[:, -1] = -self.linear_weight * mean
        return scores.addmm_(rows, items.T, beta=self.linear_weight)


def standardize(users: Tensor, items: Tensor, among: slice | Tensor) -> tuple[Tensor, Tensor]:
    r"""Embeddings whose products have mean 0 and deviation 1 over some items, for each user.

    .. math:: \mathrm{std}_i \langle z_u, z_i \rangle = \sqrt{z_u^T \mathrm{Cov}(z) z_u}

    A user whose scores are all alike gets nearly 0.

    Shapes:
        users and items: ``[n_users, d]``, ``[n_items, d]``; among: ``[S]``; results the same.
    """
    chosen = items[among].double()
    mean = chosen.mean(0)
    of_users = users.double()
    variances = ((of_users @ (chosen - mean).T.cov()) * of_users).sum(1)
    deviations = variances.clamp(min=0).sqrt().clamp(min=1e-12)
    return (of_users / deviations[:, None]).to(users.dtype), (items - mean).to(items.dtype)
