"""GaCLLM as a RecBole model: the forward pass is alignment and fusion, the loss is the objective.

Descriptions come from :func:`recbole_gacllm.pipeline.prepare`, the preprocessing hook that the
constructor calls once; from then on they are constants. In a chat of equations:

    e^(l+1) = A_hat e^(l)                          ID embeddings, propagated      (propagation.py)
    t^(l)   = MLP_l(x^(l))                         text embedding of hop l, projected
    z       = mean_l (e^(l) + w t^(l))             fused, hop by hop              (propagation.py)
    s(u, i) = <z_u, z_i>, or their cosine with SSM; plus linear_weight x EASE's, both standardised
    loss    = objective + align_weight * alignment + reg_weight * L2              (losses.py)

An item without training interactions has an untrained e: with text, s comes from that (unseen.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.model.init import xavier_uniform_initialization
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_gacllm.alignment.propagation import (
    Adjacency,
    PeriodicPropagation,
    fuse,
    propagate,
    propagate_mean,
    text_projection,
)
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.inputs import MAX_ROWS, TextLayers, TextsOf, TrainingData
from recbole_gacllm.objective import losses
from recbole_gacllm.objective.linear import ItemItemModel, recency_weights, standardize
from recbole_gacllm.objective.unseen import UnseenItems
from recbole_gacllm.pipeline import prepare


class GaCLLM(GeneralRecommender):  # type: ignore[misc]
    """Large language model with graph convolution for recommendation (Du et al., arXiv 2402.08859).

    Nodes are users first, then items, each with RecBole's internal id (row 0 of a side is padding).
    The paper gives the modules, not every equation; what is ours is said in ``propagation.py``,
    ``losses.py`` and ``docs/paper.md``.

    Args:
        config: RecBole's configuration.
        dataset: RecBole's **training** split; nothing else is ever seen.
        texts_of: Gives the text embeddings; None runs the stages, or reuses what they made.
    """

    input_type = InputType.PAIRWISE

    def __init__(self, config: Any, dataset: Dataset, texts_of: TextsOf | None = None) -> None:
        super().__init__(config, dataset)
        self.options = options = GaCLLMConfig.from_mapping(config.final_config_dict)
        self.user_embedding = nn.Embedding(self.n_users, options.embedding_size)
        self.item_embedding = nn.Embedding(self.n_items, options.embedding_size)
        data = TrainingData.from_recbole(config, dataset)
        self.texts: TextLayers | None = None
        if options.use_text:
            self.texts = (texts_of or prepare)(options, data).to(self.device)
            self.projections = nn.ModuleList(
                text_projection(
                    self.texts.dim,
                    options.text_hidden_size,
                    options.embedding_size,
                    options.text_dropout,
                )
                for _ in range(len(self.texts))
            )
        # After the stages, which need the GPU's memory for themselves.
        self.adjacency = Adjacency.from_edges(
            data.graph.users + 1, data.graph.items + 1, self.n_users, self.n_items, self.device
        )
        self.periodic: PeriodicPropagation | None = None
        if options.propagate_every > 1:
            self.periodic = PeriodicPropagation(
                self.adjacency, options.n_layers, options.propagate_every
            )
        self.unseen: UnseenItems | None = None  # that only text can speak for
        if self.texts is not None:
            items = data.graph.items + 1
            self.unseen = UnseenItems.find(
                items, self.n_items, self._raw_texts, MAX_ROWS, self.device
            )
        self.linear: ItemItemModel | None = None
        if options.linear_weight > 0:
            item_texts = None
            if self.texts is not None and options.linear_text_weight > 0:
                item_texts = self._raw_texts(torch.arange(self.n_items, device=self.device))
            self.linear = ItemItemModel(
                data.graph.users + 1,
                data.graph.items + 1,
                self.n_users,
                self.n_items,
                options.linear_reg_weight,
                item_texts,
                options.linear_text_weight,
                self.device,
                self._recency(config, data),
            )
            if self.linear.held_out_ndcg:
                self.logger.info(
                    f"linear_reg_weight: {self.linear.reg_weight:g}, by NDCG@10 on held-out "
                    f"training interactions: {_listed(self.linear.held_out_ndcg)}"
                )
            if self.linear.n_covered < self.n_items:
                self.logger.warning(
                    f"linear_weight: of {self.n_items} items the linear model covers the "
                    f"{self.linear.n_covered} with most interactions"
                )
        self.restored: tuple[Tensor, Tensor] | None = None  # fused embeddings, for evaluation only
        self.register_load_state_dict_post_hook(_forget_restored)
        self.apply(xavier_uniform_initialization)

    def _recency(self, config: Any, data: TrainingData) -> np.ndarray | None:
        """What training edges count in the linear scores, if the split says what comes next."""
        power, times = self.options.linear_recency, data.graph.timestamps
        if power == 0 or config["eval_args"]["order"] != "TO" or times is None:
            return None
        return recency_weights(data.graph.users, times, power)

    def _raw_texts(self, items: Tensor) -> Tensor:
        """Layer 0 of items: what neighbours say of an item, the interactions say already."""
        assert self.texts is not None
        return self.texts.rows(0, self.n_users + items)

    def project(self, nodes: Tensor) -> list[Tensor]:
        """Projected text embeddings ``t^(0) .. t^(L)`` of some nodes; empty without text.

        Shapes:
            nodes: ``[n]``, users first; each result ``[n, d]``.
        """
        if self.texts is None:
            return []
        return [
            self.texts.projected(layer, nodes, projection)
            for layer, projection in enumerate(self.projections)
        ]

    def node_embeddings(self) -> Tensor:
        """ID embeddings of all nodes, users first: ``[n_users + n_items, d]``."""
        return torch.cat([self.user_embedding.weight, self.item_embedding.weight])

    def forward(self) -> tuple[Tensor, Tensor]:
        """Fused embeddings of all users ``[n_users, d]`` and all items ``[n_items, d]``."""
        ids, n_layers = self.node_embeddings(), self.options.n_layers
        if self.texts is None:
            fused = propagate_mean(self.adjacency, ids, n_layers)
        else:
            nodes = torch.arange(len(ids), device=self.device)
            hops = propagate(self.adjacency, ids, n_layers)
            texts = self.project(nodes) if self.options.text_weight > 0 else []
            fused = fuse(hops, texts, self.options.text_weight)
        return fused[: self.n_users], fused[self.n_users :]

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Objective + ``align_weight`` x alignment + ``reg_weight`` x L2 of one batch, a scalar."""
        self.restored = None
        options = self.options
        user, positive = interaction[self.USER_ID], interaction[self.ITEM_ID]  # [B]
        is_bpr = options.loss_type == "BPR"
        negative = self._negatives(interaction) if is_bpr else self._draw_negatives()  # [C]
        blocks = [user, positive + self.n_users, negative + self.n_users]  # nodes
        alignment: Tensor | None = None
        if self.periodic is None:
            ids = self.node_embeddings()
        if self.texts is None and is_bpr and self.periodic is None:
            fused = propagate_mean(self.adjacency, ids, options.n_layers)
            places = blocks
        else:
            # Each node of the batch once, users first, however often it occurs.
            nodes, place = torch.unique(torch.cat(blocks), return_inverse=True)  # [n], [2B + C]
            places = list(place.tensor_split([len(user), 2 * len(user)]))
            n_users = int((nodes < self.n_users).sum())
            if self.periodic is None:
                hops = propagate(self.adjacency, ids, options.n_layers, nodes)  # [n, d] each
            else:
                users, items = self.user_embedding.weight, self.item_embedding.weight
                hops = self.periodic(users, items, nodes)  # [n, d] each
                ids, blocks = hops[0], places  # of these nodes
            texts = self.project(nodes) if options.text_weight > 0 else []  # [n, d] each
            fused = fuse(hops, texts, options.text_weight)
            if options.align_weight > 0 and self.texts is not None:
                alignment = self._alignment(nodes, n_users, hops, texts)
        z_positive, z_negative = (fused.index_select(0, place) for place in places[1:])
        if is_bpr:
            z_user = fused.index_select(0, places[0])
            loss = losses.bpr((z_user * z_positive).sum(1), (z_user * z_negative).sum(1))
        else:
            is_negative = torch.zeros(self.n_items, dtype=torch.bool, device=self.device)
            is_negative[negative] = True
            loss = losses.sampled_softmax(
                fused[:n_users],
                places[0],
                z_positive,
                z_negative,
                is_negative[positive],
                options.ssm_temperature,
            )
        if alignment is not None:
            loss = loss + options.align_weight * alignment
        squares = ids.square().sum(1)  # [n_users + n_items], or [n]
        regularised = [
            squares.index_select(0, nodes) for nodes in (blocks if is_bpr else blocks[:2])
        ]
        return loss + options.reg_weight * losses.embedding_l2(
            *regularised, squared=options.require_pow
        )

    def _negatives(self, interaction: Interaction) -> Tensor:
        """RecBole's negatives; items without training interactions are drawn anew from the rest."""
        negative: Tensor = interaction[self.NEG_ITEM_ID]
        if self.unseen is None:
            return negative
        seen = self.unseen.seen
        drawn = seen[torch.randint(len(seen), negative.shape, device=self.device)]
        return torch.where(self.unseen.is_seen[negative], negative, drawn)

    def _draw_negatives(self) -> Tensor:
        """Distinct items that SSM puts beside the matching one, drawn uniformly; at most all.

        Items without training interactions are not drawn where their text speaks for them.
        """
        n = self.options.ssm_n_negatives
        if self.unseen is not None:
            seen = self.unseen.seen
            return seen[torch.randperm(len(seen), device=self.device)[:n]]
        if n >= self.n_items - 1:
            return torch.arange(1, self.n_items, device=self.device)
        return 1 + torch.randperm(self.n_items - 1, device=self.device)[:n]

    def _alignment(
        self, nodes: Tensor, n_users: int, hops: list[Tensor], texts: list[Tensor]
    ) -> Tensor:
        """Mean over sides and hops of the alignment loss on distinct nodes, users first.

        Shapes:
            nodes ``[n]``; each of hops and texts ``[n, d]``; texts may be empty: then the nodes
            that are aligned are projected here.
        """
        drawn = [self._draw_aligned(n_users), self._draw_aligned(len(nodes) - n_users)]
        n_drawn = len(drawn[0])  # users
        places = torch.cat([drawn[0], n_users + drawn[1]])
        if texts:
            texts = [text.index_select(0, places) for text in texts]
        else:
            texts = self.project(nodes.index_select(0, places))
        terms = [
            losses.alignment(ids, of_ids, self.options.align_temperature)
            for hop, text in zip(hops, texts, strict=False)
            for ids, of_ids in zip(
                hop.index_select(0, places).tensor_split([n_drawn]),
                text.tensor_split([n_drawn]),
                strict=True,
            )
        ]
        return torch.stack(terms).mean()

    def _draw_aligned(self, n: int) -> Tensor:
        """Which of the ``n`` nodes of a side are aligned in this batch."""
        limit = self.options.align_n_nodes
        if limit is None or limit >= n:
            return torch.arange(n, device=self.device)
        return torch.randperm(n, device=self.device)[:limit]

    def train(self, mode: bool = True) -> GaCLLM:
        """Switch between training and evaluation; scores made under dropout are forgotten."""
        self.restored = None
        super().train(mode)
        return self

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

        Where items without training interactions have text, these are of the others only, and
        ``unseen.py`` scores the rest.

        Shapes:
            user: ``[B]``; result ``[B, n_items]``.
        """
        users, items = self._restore()
        seen = slice(None) if self.unseen is None else self.unseen.seen
        scores = users[user] @ items[seen].T
        if self.linear is not None:
            linear = standardize(self.linear.scores(user)[:, seen])
            scores = standardize(scores) + self.options.linear_weight * linear
        return scores if self.unseen is None else self.unseen.complete(scores)

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of user-item pairs: ``[B]``."""
        user, item = interaction[self.USER_ID], interaction[self.ITEM_ID]
        if self.linear is None and self.unseen is None:
            users, items = self._restore()
            return (users[user] * items[item]).sum(dim=1)
        # Standardised over all items, or fitted to them: all of a user's scores are needed.
        distinct, place = torch.unique(user, return_inverse=True)
        return self._scores(distinct)[place, item]

    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of users with every item: ``[B * n_items]``, a fresh tensor."""
        return self._scores(interaction[self.USER_ID]).view(-1)


def _listed(scores: dict[float, float]) -> str:
    return ", ".join(f"{weight:g} {score:.4f}" for weight, score in sorted(scores.items()))


def _forget_restored(module: nn.Module, _incompatible_keys: Any) -> None:
    """After a checkpoint is loaded, scores and hops must come from its weights."""
    assert isinstance(module, GaCLLM)
    module.restored = None
    if module.periodic is not None:
        module.periodic.forget()
