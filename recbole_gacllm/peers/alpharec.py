r"""AlphaRec: recommendation from text embeddings alone, mapped and propagated; no ID embeddings.

.. math:: e_v^{(0)} = \mathrm{MLP}(x_v), \quad e^{(l+1)} = \hat A e^{(l)}, \quad
    z = \frac{1}{K+1} \sum_{l=0}^{K} e^{(l)}, \quad s(u, i) = \cos(z_u, z_i)

    L = -\frac1B \sum_{(u,i)} \log \frac{e^{s(u,i)/\tau}}
        {e^{s(u,i)/\tau} + \sum_{j \in N \setminus R_u} e^{s(u,j)/\tau}}

Source: Sheng et al., "Language Representations Can be What Recommenders Need: Findings and
Potentials" (ICLR 2025). Departures from the authors' code: the negatives
``N`` are drawn once a batch and shared by it, from the items with training interactions, without
those that the user has met, ``R_u`` (there: 256 for each pair, from the items that the user has not
met; in a batch of thousands of pairs these are nearly all items, and 256 shared ones learn less);
text embeddings have unit length, those of users too, who are the means of their items
(``text_users: item_mean``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import Tensor
from torch.nn import functional as F

from recbole_gacllm.alignment.propagation import Adjacency, propagate_mean, text_projection
from recbole_gacllm.objective.linear import matrix_of
from recbole_gacllm.peers.texts import read_texts
from recbole_gacllm.pipeline import TextsOf


class AlphaRec(GeneralRecommender):  # type: ignore[misc]
    """Frozen text embeddings, an MLP, a graph convolution, InfoNCE; see the module.

    The map sees text embeddings through its first layer alone: if all of them are rotated and that
    layer's weights are rotated back, every score and every gradient step is the same; Adam's step,
    which looks at single coordinates, is not.
    """

    input_type = InputType.PAIRWISE

    def __init__(self, config: Any, dataset: Dataset, texts_of: TextsOf | None = None) -> None:
        super().__init__(config, dataset)
        self.n_layers, self.n_negatives = config["n_layers"], config["ssm_n_negatives"]
        self.texts, self.layers, data = read_texts(config, dataset, texts_of)
        users, items = data.graph.users + 1, data.graph.items + 1  # RecBole's ids
        self.temperature = config["ssm_temperature"]
        self.projection = text_projection(
            self.texts.dim, config["text_hidden_size"], config["embedding_size"], dropout=0.0
        )
        self.adjacency = Adjacency.from_edges(users, items, self.n_users, self.n_items, self.device)
        self.seen = np.unique(items)
        self.met = matrix_of(users, items, self.n_users, self.n_items)
        self.restored: tuple[Tensor, Tensor] | None = None  # for evaluation only
        self.register_load_state_dict_post_hook(_forget_restored)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Embeddings of all users ``[n_users, d]`` and items ``[n_items, d]``, of unit length."""
        nodes = torch.arange(self.n_users + self.n_items, device=self.device)
        mapped = self.texts.projected(self.layers, nodes, self.projection)
        embeddings = F.normalize(propagate_mean(self.adjacency, mapped, self.n_layers), dim=1)
        return embeddings[: self.n_users], embeddings[self.n_users :]

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """InfoNCE of a batch, a scalar."""
        self.restored = None
        users, items = self.forward()
        user, rows = torch.unique(interaction[self.USER_ID], return_inverse=True)
        drawn = self.seen[torch.randperm(len(self.seen))[: self.n_negatives].numpy()]
        met = self.met[user.cpu().numpy()][:, drawn].toarray() > 0  # [m, C]
        embeddings, negatives = users[user], items[torch.from_numpy(drawn).to(self.device)]
        logits = (embeddings / self.temperature) @ negatives.T
        logits = logits.masked_fill(torch.from_numpy(met).to(self.device), -1e9)
        positive = (embeddings[rows] * items[interaction[self.ITEM_ID]]).sum(1) / self.temperature
        loss: Tensor = (torch.logaddexp(logits.logsumexp(1)[rows], positive) - positive).mean()
        return loss

    def train(self, mode: bool = True) -> AlphaRec:
        """Switch between training and evaluation."""
        self.restored = None
        super().train(mode)
        return self

    @torch.no_grad()
    def scored_embeddings(self) -> tuple[Tensor, Tensor]:
        """Those of :meth:`forward`, computed once per evaluation."""
        if self.restored is None:
            self.restored = self.forward()
        return self.restored

    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of user-item pairs: ``[B]``."""
        users, items = self.scored_embeddings()
        return (users[interaction[self.USER_ID]] * items[interaction[self.ITEM_ID]]).sum(1)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of users with every item: ``[B * n_items]``, a fresh tensor."""
        users, items = self.scored_embeddings()
        return (users[interaction[self.USER_ID]] @ items.T).view(-1)


def _forget_restored(module: AlphaRec, _incompatible_keys: Any) -> None:
    module.restored = None
