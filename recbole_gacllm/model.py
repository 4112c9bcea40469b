"""GaCLLM as a RecBole model: the forward pass is alignment and fusion, the loss is the objective.

Descriptions come from :func:`recbole_gacllm.pipeline.prepare`, the preprocessing hook that the
constructor calls once; from then on they are constants. In a chat of equations:

    e^(l+1) = A_hat e^(l)                          ID embeddings, propagated      (propagation.py)
    t^(l)   = MLP_l(x^(l))                         text embedding of hop l, projected
    z       = mean_l (e^(l) + w t^(l))             fused, hop by hop              (propagation.py)
    s(u, i) = <z_u, z_i>, or their cosine with SSM; plus linear_weight x EASE's, both standardised
    loss    = objective + align_weight * alignment + reg_weight * L2              (losses.py)
"""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.model.init import xavier_uniform_initialization
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_gacllm import losses
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.linear import ItemItemModel, standardize
from recbole_gacllm.pipeline import TextLayers, TrainingData, prepare
from recbole_gacllm.propagation import Adjacency, fuse, propagate


class GaCLLM(GeneralRecommender):  # type: ignore[misc]
    """Large language model with graph convolution for recommendation (Du et al., arXiv 2402.08859).

    Nodes are users first, then items, each with RecBole's internal id (row 0 of a side is padding).
    The paper gives the modules, not every equation; what is ours is said in ``propagation.py``,
    ``losses.py`` and ``docs/paper.md``.

    Args:
        config: RecBole's configuration.
        dataset: RecBole's **training** split; nothing else is ever seen.
    """

    input_type = InputType.PAIRWISE

    def __init__(self, config: Any, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.options = options = GaCLLMConfig.from_mapping(config.final_config_dict)
        self.user_embedding = nn.Embedding(self.n_users, options.embedding_size)
        self.item_embedding = nn.Embedding(self.n_items, options.embedding_size)
        data = TrainingData.from_recbole(config, dataset)
        self.adjacency = Adjacency.from_edges(
            data.graph.users + 1, data.graph.items + 1, self.n_users, self.n_items, self.device
        )
        self.linear: ItemItemModel | None = None
        if options.linear_weight > 0:
            self.linear = ItemItemModel(
                data.graph.users + 1,
                data.graph.items + 1,
                self.n_users,
                self.n_items,
                options.linear_reg_weight,
                self.device,
            )
        self.texts: TextLayers | None = None
        if options.use_text:
            self.texts = prepare(options, data).to(self.device)
            self.projections = nn.ModuleList(self._projection() for _ in range(len(self.texts)))
        self.restored: tuple[Tensor, Tensor] | None = None  # fused embeddings, for evaluation only
        self.register_load_state_dict_post_hook(_forget_restored)
        self.apply(xavier_uniform_initialization)

    def _projection(self) -> nn.Module:
        """MLP from the text width to ``embedding_size``; hidden width 0 is a linear map."""
        assert self.texts is not None
        options, width, hidden = self.options, self.texts.dim, self.options.text_hidden_size
        if hidden == 0:
            return nn.Sequential(
                nn.Dropout(options.text_dropout), nn.Linear(width, options.embedding_size)
            )
        return nn.Sequential(
            nn.Dropout(options.text_dropout),
            nn.Linear(width, hidden),
            nn.LeakyReLU(),
            nn.Linear(hidden, options.embedding_size),
        )

    def project(self, nodes: Tensor) -> list[Tensor]:
        """Projected text embeddings ``t^(0) .. t^(L)`` of some nodes; empty without text.

        Shapes:
            nodes: ``[n]``, users first; each result ``[n, d]``.
        """
        if self.texts is None:
            return []
        return [
            projection(self.texts.rows(layer, nodes))
            for layer, projection in enumerate(self.projections)
        ]

    def hops(self) -> list[Tensor]:
        """ID embeddings of every hop, each ``[n_users + n_items, d]``."""
        ids = torch.cat([self.user_embedding.weight, self.item_embedding.weight])
        return propagate(self.adjacency, ids, self.options.n_layers)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Fused embeddings of all users ``[n_users, d]`` and all items ``[n_items, d]``."""
        nodes = torch.arange(self.n_users + self.n_items, device=self.device)
        fused = fuse(self.hops(), self.project(nodes), self.options.text_weight)
        return fused[: self.n_users], fused[self.n_users :]

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Objective + ``align_weight`` x alignment + ``reg_weight`` x L2 of one batch, a scalar."""
        self.restored = None
        options = self.options
        user, positive = interaction[self.USER_ID], interaction[self.ITEM_ID]  # [B]
        is_bpr = options.loss_type == "BPR"
        negative = interaction[self.NEG_ITEM_ID] if is_bpr else self._draw_negatives()  # [C]
        # Each node of the batch once: a text is projected once, however often its node occurs.
        nodes, place = torch.unique(
            torch.cat([user, positive + self.n_users, negative + self.n_users]),
            return_inverse=True,
        )  # [n], [2B + C]
        hops = [hop[nodes] for hop in self.hops()]  # [n, d] each
        texts = self.project(nodes)  # [n, d] each
        fused = fuse(hops, texts, options.text_weight)[place]  # [2B + C, d]
        z_user, z_positive, z_negative = fused.tensor_split([len(user), 2 * len(user)])
        if is_bpr:
            loss = losses.bpr((z_user * z_positive).sum(1), (z_user * z_negative).sum(1))
        else:
            hits = negative[None, :] == positive[:, None]  # [B, C]
            loss = losses.sampled_softmax(
                z_user, z_positive, z_negative, hits, options.ssm_temperature
            )
        if texts and options.align_weight > 0:
            n_users = int((nodes < self.n_users).sum())  # sorted: users first
            loss = loss + options.align_weight * self._alignment(hops, texts, n_users)
        ego = [self.user_embedding(user), self.item_embedding(positive)]
        if is_bpr:
            ego.append(self.item_embedding(negative))
        return loss + options.reg_weight * losses.embedding_l2(*ego, squared=options.require_pow)

    def _draw_negatives(self) -> Tensor:
        """Items that SSM puts beside the matching one: uniform draws, or all if that is no more."""
        n = self.options.ssm_n_negatives
        if n >= self.n_items - 1:
            return torch.arange(1, self.n_items, device=self.device)
        return torch.randint(1, self.n_items, (n,), device=self.device)

    def _alignment(self, hops: list[Tensor], texts: list[Tensor], n_users: int) -> Tensor:
        """Mean over sides and hops of the alignment loss on distinct nodes, users first."""
        temperature = self.options.align_temperature
        terms = [
            losses.alignment(hop[side], text[side], temperature)
            for hop, text in zip(hops, texts, strict=False)
            for side in (slice(n_users), slice(n_users, None))
        ]
        return torch.stack(terms).mean()

    @torch.no_grad()
    def _restore(self) -> tuple[Tensor, Tensor]:
        """Fused embeddings for scoring, computed once per evaluation; unit length with SSM."""
        if self.restored is None:
            users, items = self.forward()
            if self.options.loss_type == "SSM":
                users, items = F.normalize(users, dim=1), F.normalize(items, dim=1)
            self.restored = users, items
        return self.restored

    def _scores(self, user: Tensor) -> Tensor:
        """Matching scores of users with every item, plus the linear item-item scores if asked for.

        Shapes:
            user: ``[B]``; result ``[B, n_items]``.
        """
        users, items = self._restore()
        scores = users[user] @ items.T
        if self.linear is None:
            return scores
        linear = standardize(self.linear.scores(user))
        return standardize(scores) + self.options.linear_weight * linear

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of user-item pairs: ``[B]``."""
        user, place = torch.unique(interaction[self.USER_ID], return_inverse=True)
        return self._scores(user)[place, interaction[self.ITEM_ID]]

    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of users with every item: ``[B * n_items]``, a fresh tensor."""
        return self._scores(interaction[self.USER_ID]).view(-1)


def _forget_restored(module: nn.Module, _incompatible_keys: Any) -> None:
    """After a checkpoint is loaded, scores must come from its weights."""
    assert isinstance(module, GaCLLM)
    module.restored = None
