r"""RLMRec on LightGCN: texts beside ID embeddings, contrastive (Con) or generative (Gen).

.. math:: L_{\mathrm{Con}} = L_{\mathrm{LightGCN}} + w \sum_{S \in \{u, i, j\}} \frac1B
    \sum_{v \in S} -\log \frac{e^{\cos(z_v, t_v)/\tau}}{\sum_{v'} e^{\cos(z_v, t_{v'})/\tau}},
    \quad t_v = \mathrm{MLP}(x_v)

where ``v'`` is every user for the users of a batch, and every item of its block for the matching
items ``i`` and the negative ones ``j``. Gen masks a share of the nodes before the convolution with
a learned token and tells from what their neighbours bring which text is theirs:

.. math:: L_{\mathrm{Gen}} = L_{\mathrm{LightGCN}}(\text{masked}) + w \frac{1}{|M|}
    \sum_{v \in M} -\log \frac{e^{\cos(\mathrm{MLP}(z_v), x_v)/\tau}}
        {\sum_{v' \in M} e^{\cos(\mathrm{MLP}(z_v), x_{v'})/\tau}}

``w`` is ``align_weight``; at 0 both are RecBole's LightGCN, to the digit. A score is LightGCN's.

Source: Ren et al., "Representation Learning with Large Language Models for Recommendation" (WWW
2024). Departures from the authors' code, all so that ``w = 0`` is RecBole's LightGCN: the mean of
the layers (there: their sum, so that scores are ``(K + 1)^2`` times as large and one ``w`` weighs
less), no dropped edges (there: a fifth), L2 on the embeddings of the batch (there: on all
parameters).
"""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.general_recommender.lightgcn import LightGCN
from recbole.model.init import xavier_uniform_initialization
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_gacllm.alignment.propagation import text_projection
from recbole_gacllm.peers.texts import read_texts
from recbole_gacllm.pipeline import TextsOf


def infonce(
    own: Tensor,
    others: Tensor,
    temperature: float,
    n_own: Tensor,
    place: Tensor | None = None,
    n_others: Tensor | None = None,
) -> Tensor:
    """Mean of ``-log softmax`` of the cosine with one's counterpart among those with all.

    A node that a batch holds several times is computed once and counts so often.

    Args:
        own: Embeddings of distinct nodes.
        others: What the sum goes over, counterparts among them.
        temperature: The cosines' divisor.
        n_own: How often each node counts.
        place: Row of each node's counterpart; None is its own row.
        n_others: How often each of the sum does; None is once.

    Shapes:
        own ``[n, d]``; others ``[m, d]``; n_own and place ``[n]``; n_others ``[m]``; a scalar.
    """
    if place is None:
        place = torch.arange(len(own), device=own.device)
    logits = (F.normalize(own, dim=1) / temperature) @ F.normalize(others, dim=1).T  # [n, m]
    if n_others is not None:
        logits = logits + n_others.log()
    losses = F.cross_entropy(logits, place, reduction="none")
    if n_others is not None:
        losses = losses + n_others.log()[place]
    return (losses * n_own).sum() / n_own.sum()


class _RLMRec(LightGCN):  # type: ignore[misc]
    """What both have: texts, a map, and the embeddings that LightGCN's loss was made of."""

    maps_texts = True  #: To embeddings; else embeddings to texts.

    def __init__(self, config: Any, dataset: Dataset, texts_of: TextsOf | None = None) -> None:
        # Before anything is on the card, which the stages need; no random number is drawn.
        texts, layers, _ = read_texts(config, dataset, texts_of)
        super().__init__(config, dataset)
        self.texts, self.layers = texts, layers
        self.weight, self.temperature = config["align_weight"], config["align_temperature"]
        sizes = texts.dim, self.latent_dim
        width, dim = sizes if self.maps_texts else sizes[::-1]
        self.map = text_projection(width, (width + dim) // 2, dim, dropout=0.0)
        self.map.apply(xavier_uniform_initialization)
        self.propagated: tuple[Tensor, Tensor] | None = None  # of the batch in training
        self.register_load_state_dict_post_hook(_forget_restored)

    def forward(self) -> tuple[Tensor, Tensor]:
        """LightGCN's embeddings of all users ``[n_users, d]`` and items ``[n_items, d]``."""
        embeddings: tuple[Tensor, Tensor] = super().forward()
        self.propagated = embeddings if self.training and self.weight > 0 else None
        return embeddings

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """LightGCN's loss and the texts', a scalar."""
        loss: Tensor = super().calculate_loss(interaction)
        if self.propagated is None:
            return loss
        (users, items), self.propagated = self.propagated, None
        return loss + self.text_loss(users, items, interaction) * float(self.weight)

    def text_loss(self, users: Tensor, items: Tensor, interaction: Interaction) -> Tensor:
        """The model's own part, a scalar."""
        raise NotImplementedError

    def rows(self, nodes: Tensor) -> Tensor:
        """Text embeddings of nodes, users first: ``[n, width]``."""
        return self.texts.rows(self.layers, nodes)


def _forget_restored(module: _RLMRec, _incompatible_keys: Any) -> None:
    """After a checkpoint is loaded, scores must come from its weights."""
    module.restore_user_e = module.restore_item_e = None


class RLMRecCon(_RLMRec):
    """Contrastive: a node's embedding is near its own mapped text; see the module."""

    def text_loss(self, users: Tensor, items: Tensor, interaction: Interaction) -> Tensor:
        """Users against the texts of all users, items against those of their block."""
        user, n = torch.unique(interaction[self.USER_ID], return_counts=True)
        texts = self.map(self.rows(torch.arange(1, self.n_users, device=self.device)))
        loss = infonce(users[user], texts, self.temperature, n, user - 1)
        drawn = torch.stack([interaction[self.ITEM_ID], interaction[self.NEG_ITEM_ID]])
        item, place = torch.unique(drawn, return_inverse=True)
        mapped, embeddings = self.map(self.rows(self.n_users + item)), items[item]
        for places in place:
            block, n = torch.unique(places, return_counts=True)
            loss = loss + infonce(embeddings[block], mapped[block], self.temperature, n, n_others=n)
        return loss


class RLMRecGen(_RLMRec):
    """Generative: texts of masked nodes are told from their neighbours; see the module."""

    maps_texts = False

    def __init__(self, config: Any, dataset: Dataset, texts_of: TextsOf | None = None) -> None:
        if not 0 < config["mask_ratio"] < 1:
            raise ValueError(
                f"mask_ratio: {config['mask_ratio']} is not allowed; it is the share of the nodes "
                "that are masked in a batch, above 0 and below 1."
            )
        super().__init__(config, dataset, texts_of)
        self.mask_token = nn.Parameter(torch.zeros(1, self.latent_dim))
        self.nodes = (self.texts.row_of_node >= 0).nonzero()[:, 0]  # without padding
        self.n_masked = max(1, int(config["mask_ratio"] * len(self.nodes)))
        self.masked: Tensor | None = None

    def get_ego_embeddings(self) -> Tensor:
        """LightGCN's ``e^(0)``, the mask token in the place of masked nodes."""
        embeddings: Tensor = super().get_ego_embeddings()
        if self.masked is None:
            return embeddings
        is_masked = torch.zeros(len(embeddings), 1, dtype=torch.bool, device=self.device)
        is_masked[self.masked] = True
        return torch.where(is_masked, self.mask_token, embeddings)

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """LightGCN's loss of the masked graph and the reconstruction's, a scalar."""
        if self.weight > 0:
            drawn = torch.randperm(len(self.nodes), device=self.device)[: self.n_masked]
            self.masked = self.nodes[drawn]
        try:
            return super().calculate_loss(interaction)
        finally:
            self.masked = None

    def text_loss(self, users: Tensor, items: Tensor, interaction: Interaction) -> Tensor:
        """Masked nodes against the texts of all masked nodes."""
        assert self.masked is not None
        made = self.map(torch.cat([users, items])[self.masked])
        return infonce(made, self.rows(self.masked), self.temperature, torch.ones_like(self.masked))
