"""GaCLLM as a RecBole model: the forward pass is alignment and fusion, the loss is the objective.

Descriptions come from :func:`recbole_gacllm.pipeline.prepare`, the preprocessing hook that the
constructor calls once; from then on they are constants. In a chat of equations:

    e^(l+1) = A_hat e^(l)                          ID embeddings, propagated      (propagation.py)
    t^(l)   = MLP_l(x^(l))                         text embedding of hop l, projected
    z       = mean_l (e^(l) + w t^(l))             fused, hop by hop              (propagation.py)
              early fusion: x^(l) is carried through the graph first, sum_k A_hat^k x^(l)
    s(u, i) = <z_u, z_i>, or their cosine with SSM; plus linear_weight x EASE's, both standardised
    loss    = objective + align_weight * alignment + reg_weight * L2              (losses.py)

A node without training interactions has an untrained e: its text predicts its z    (unseen.py).
Which layers of text speak is chosen on held-out training interactions and items    (choice.py).
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

from recbole_gacllm import estimate
from recbole_gacllm.alignment.embeddings import MAX_ROWS, TextLayers
from recbole_gacllm.alignment.propagation import (
    Adjacency,
    PeriodicPropagation,
    fuse,
    propagate,
    propagate_mean,
    text_projection,
)
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.inputs import TrainingData
from recbole_gacllm.objective import losses
from recbole_gacllm.objective.choice import USUAL_REG_WEIGHT, Layers, are_few, choose
from recbole_gacllm.objective.linear import ItemItemModel, matrix_of, recency_weights
from recbole_gacllm.objective.scoring import Scoring
from recbole_gacllm.objective.unseen import Unseen
from recbole_gacllm.pipeline import TextsOf, prepare


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
        data = TrainingData.from_recbole(config, dataset)
        users, items = data.graph.users + 1, data.graph.items + 1  # RecBole's ids
        interactions = matrix_of(users, items, self.n_users, self.n_items)
        options = GaCLLMConfig.from_mapping(config.final_config_dict)
        #: Keys whose values the data decide.
        self.of_data = dict(options.few_interactions) if are_few(interactions) else {}
        if self.of_data:
            options = GaCLLMConfig.from_mapping(config.final_config_dict | self.of_data)
            self.logger.info(f"as the data have it: {self.of_data}")
        self.options = options
        self.user_embedding = nn.Embedding(self.n_users, options.embedding_size)
        self.item_embedding = nn.Embedding(self.n_items, options.embedding_size)
        self.texts: TextLayers | None = None
        if texts_of is None:
            estimate.announce(options, data)
        if options.use_text:
            self.texts = (texts_of or prepare)(options, data).to(self.device)
        n_text_layers = 0 if self.texts is None else len(self.texts)
        self.choices = choose(
            interactions,
            n_text_layers,
            self._text_rows,
            text_layers=options.text_layers,
            reg_weight=options.linear_reg_weight if options.linear_weight > 0 else USUAL_REG_WEIGHT,
            text_weight=options.linear_text_weight,
        )
        for name, chosen in self.choices.items():
            if chosen.ndcg:
                self.logger.info(f"chosen on held-out training interactions, {name}: {chosen}")
        #: Layers of text of each hop that has text, from hop 0.
        self.text_layers: list[Layers] = [self.choices["linear"].layers]
        if options.text_layers == "hops":
            self.text_layers = [(layer,) for layer in range(n_text_layers)]
        if self.texts is not None:
            sizes = options.text_hidden_size, options.embedding_size, options.text_dropout
            self.projections = nn.ModuleList(
                text_projection(self.texts.dim * len(layers), *sizes) for layers in self.text_layers
            )
        # After the stages, which need the GPU's memory for themselves.
        self.adjacency = Adjacency.from_edges(users, items, self.n_users, self.n_items, self.device)
        self.carried: TextLayers | None = None  # texts carried through the graph: early fusion
        if self.texts is not None and options.text_fusion == "early" and options.text_weight > 0:
            self.carried = self.texts.carried(self.text_layers, self.adjacency, options.n_layers)
        self.periodic: PeriodicPropagation | None = None
        if (every := options.propagate_every) > 1:
            self.periodic = PeriodicPropagation(self.adjacency, options.n_layers, every)
        self.unseen_items = self._unseen("item", items) if self.texts is not None else None
        self.unseen_users = self._unseen("user", users)
        self.linear: ItemItemModel | None = None
        if options.linear_weight > 0:
            by_time = config["eval_args"]["order"] == "TO"
            times = data.graph.timestamps if by_time else None
            self.linear = self._linear_model(users, items, times)
        unseen = self.unseen_items, self.unseen_users
        self.scoring = Scoring(self.linear, options.linear_weight, *unseen)
        self.restored: tuple[Tensor, Tensor] | None = None  # for evaluation only
        self.register_load_state_dict_post_hook(_forget_restored)
        self.apply(xavier_uniform_initialization)

    def _linear_model(
        self, users: np.ndarray, items: np.ndarray, times: np.ndarray | None
    ) -> ItemItemModel:
        """The linear item-item model; of ``times``, if given, the last count most."""
        chosen, recency, item_texts = self.choices["linear"], None, None
        if times is not None and self.options.linear_recency != 0:
            recency = recency_weights(users, times, self.options.linear_recency)
        if chosen.text_weight > 0:
            item_texts = torch.from_numpy(self._text_rows("item", chosen.layers))
        return ItemItemModel(
            *(users, items, self.n_users, self.n_items, chosen.reg_weight),
            *(item_texts, chosen.text_weight, self.device, recency),
        )

    def _unseen(self, side: str, nodes: np.ndarray) -> Unseen | None:
        """Nodes of a side without training interactions; None where all have some."""
        n_nodes, offset = (self.n_users, 0) if side == "user" else (self.n_items, self.n_users)
        texts, chosen = None, self.choices.get(f"unseen {side}")
        if chosen is not None and self.texts is not None:
            layers, rows = chosen.layers, self.texts.rows
            texts = lambda ids: rows(layers, offset + ids)  # noqa: E731
        reg_weight = 1.0 if chosen is None else chosen.reg_weight
        return Unseen.find(nodes, n_nodes, texts, MAX_ROWS, reg_weight, self.device)

    def _text_rows(self, side: str, layers: Layers) -> np.ndarray:
        """Text embeddings of all nodes of a side: ``[n_nodes, width]``."""
        assert self.texts is not None
        nodes = torch.arange(self.n_users + self.n_items, device=self.device)
        nodes = nodes[: self.n_users] if side == "user" else nodes[self.n_users :]
        return self.texts.rows(layers, nodes).cpu().numpy()

    # Forward: alignment and fusion

    def node_embeddings(self) -> Tensor:
        """ID embeddings ``e^(0)`` of all nodes, users first: ``[n_users + n_items, d]``."""
        return torch.cat([self.user_embedding.weight, self.item_embedding.weight])

    def hops(self, nodes: Tensor | None = None) -> list[Tensor]:
        r"""ID embeddings ``e^(0) .. e^(K)`` of some nodes; None is all.

        .. math:: e^{(l+1)} = \hat A e^{(l)}

        Source: LightGCN (SIGIR 2020), Eq. 7. Those of a batch come from
        :class:`.PeriodicPropagation` where ``propagate_every`` is above 1.

        Shapes:
            nodes: ``[n]``, users first; each result ``[n, d]``.
        """
        if nodes is not None and self.periodic is not None:
            return self.periodic(self.user_embedding.weight, self.item_embedding.weight, nodes)
        return propagate(self.adjacency, self.node_embeddings(), self.options.n_layers, nodes)

    def project(self, nodes: Tensor | None = None) -> list[Tensor]:
        r"""Projected text embeddings ``t^(0) .. t^(L)`` of some nodes, None is all; empty without.

        .. math:: t^{(l)} = \mathrm{MLP}_l(x^{(l)})

        Ours: the paper aligns text with ids, but does not say by which map. With ``text_layers``
        other than ``hops`` it is ``t^(0)`` alone, of the layers that speak. ``text_fusion: early``
        puts :math:`\sum_{k=0}^{K} \hat A^k x^{(l)}` in the place of ``x^(l)``, once a run: a user
        receives the texts of their items.

        Shapes:
            nodes: ``[n]``, users first; each result ``[n, d]``.
        """
        if self.texts is None:
            return []
        if nodes is None:
            nodes = torch.arange(self.n_users + self.n_items, device=self.device)
        texts, of_hops = self.texts, self.text_layers
        if self.carried is not None:
            texts, of_hops = self.carried, [(hop,) for hop in range(len(self.carried))]
        return [
            texts.projected(layers, nodes, projection)
            for layers, projection in zip(of_hops, self.projections, strict=True)
        ]

    def embed(self, nodes: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        r"""Hops, projected texts and fused embeddings of some nodes; None is all.

        .. math:: z = \frac{1}{K+1} \sum_{l=0}^{K} \big( e^{(l)} + w\, t^{(l)} \big)

        Ours, see :func:`.fuse`. Texts of weight 0 are not projected; without text, of all nodes
        there is only the mean of the hops (LightGCN, Eq. 4), and no hop.

        Shapes:
            nodes: ``[n]``, users first; each hop, each text and the fused ``[n, d]``.
        """
        n_layers, weight = self.options.n_layers, self.options.text_weight
        if nodes is None and self.texts is None:
            return [], [], propagate_mean(self.adjacency, self.node_embeddings(), n_layers)
        hops = self.hops(nodes)
        texts = self.project(nodes) if weight > 0 else []
        return hops, texts, fuse(hops, texts, weight)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Fused embeddings of all users ``[n_users, d]`` and all items ``[n_items, d]``."""
        _, _, fused = self.embed()
        return fused[: self.n_users], fused[self.n_users :]

    # Loss: the objective

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        r"""Objective + ``align_weight`` x alignment + ``reg_weight`` x L2 of one batch, a scalar.

        .. math:: L = L_{\mathrm{match}}(z_u, z_i, z_j)
            + w_a \, L_{\mathrm{align}}(e^{(l)}, t^{(l)}) + w_r \, \|e^{(0)}\|

        Source: modules 3 and 4 of the paper, whose matching loss is BPR; sampled softmax, the
        alignment's form and the weights are ours (``losses.py``).
        """
        self.restored = None
        options, is_bpr = self.options, self.options.loss_type == "BPR"
        user, positive = interaction[self.USER_ID], interaction[self.ITEM_ID]  # [B]
        negative = self._negatives(interaction) if is_bpr else self._draw_negatives()  # [C]
        blocks = [user, positive + self.n_users, negative + self.n_users]  # nodes
        nodes, places = self._distinct(blocks)
        hops, texts, fused = self.embed(nodes)
        z_positive, z_negative = (fused.index_select(0, place) for place in places[1:])
        if is_bpr:
            z_user = fused.index_select(0, places[0])
            loss = losses.bpr((z_user * z_positive).sum(1), (z_user * z_negative).sum(1))
        else:
            z_users = fused[: int(places[0].max()) + 1]  # the distinct ones
            loss = losses.sampled_softmax(
                *(z_users, places[0], z_positive, z_negative),
                torch.isin(positive, negative),
                options.ssm_temperature,
            )
        if options.align_weight > 0 and self.texts is not None:
            loss = loss + options.align_weight * self._alignment(nodes, hops, texts)
        squares = self._squared_lengths(blocks, places, hops)
        norm = losses.embedding_l2(*squares[: 3 if is_bpr else 2], squared=options.require_pow)
        return loss + options.reg_weight * norm

    def _distinct(self, blocks: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """Each node of a batch once, users first, and where those of each block stand.

        None for the first is all nodes: with BPR and without text the mean of their hops costs no
        more, unless hops are periodic.

        Shapes:
            blocks: ``[B]``, ``[B]``, ``[C]``; nodes ``[n]``; places as the blocks.
        """
        if self.texts is None and self.options.loss_type == "BPR" and self.periodic is None:
            return None, blocks
        nodes, place = torch.unique(torch.cat(blocks), return_inverse=True)
        return nodes, list(place.split([len(block) for block in blocks]))

    def _squared_lengths(
        self, blocks: list[Tensor], places: list[Tensor], hops: list[Tensor]
    ) -> list[Tensor]:
        """Of each node of a block the squared length of ``e^(0)``, shaped as the blocks.

        Where hops are periodic no table of all nodes is gone through.
        """
        if self.periodic is None:
            sides = self.user_embedding.weight, self.item_embedding.weight
            squares = torch.cat([side.square().sum(1) for side in sides])  # [n_users + n_items]
            return [squares.index_select(0, block) for block in blocks]
        squares = hops[0].square().sum(1)  # [n]
        return [squares.index_select(0, place) for place in places]

    def _negatives(self, interaction: Interaction) -> Tensor:
        """RecBole's negatives; where its loader draws none uniform ones, a user's own items too.

        Items without training interactions are drawn anew from the rest. Shapes: result ``[B]``.
        """
        if self.NEG_ITEM_ID in interaction:
            negative: Tensor = interaction[self.NEG_ITEM_ID]
        else:
            shape = interaction[self.ITEM_ID].shape
            negative = torch.randint(1, self.n_items, shape, device=self.device)
        if self.unseen_items is None:
            return negative
        seen = self.unseen_items.seen
        fresh = seen[torch.randint(len(seen), negative.shape, device=self.device)]
        return torch.where(self.unseen_items.is_seen[negative], negative, fresh)

    def _draw_negatives(self) -> Tensor:
        """Distinct items that SSM puts beside the matching one, drawn uniformly; at most all.

        Items without training interactions are not drawn where their text speaks for them.
        """
        n = self.options.ssm_n_negatives
        if self.unseen_items is not None:
            seen = self.unseen_items.seen
            return seen[torch.randperm(len(seen), device=self.device)[:n]]
        if n >= self.n_items - 1:
            return torch.arange(1, self.n_items, device=self.device)
        return 1 + torch.randperm(self.n_items - 1, device=self.device)[:n]

    def _alignment(self, nodes: Tensor | None, hops: list[Tensor], texts: list[Tensor]) -> Tensor:
        r"""Mean over sides and hops of the alignment loss on distinct nodes, users first.

        At most ``align_n_nodes`` of a side are aligned. Texts that are not fused are projected for
        these alone.

        Shapes:
            nodes ``[n]``; each of hops and texts ``[n, d]``; texts may be empty.
        """
        assert nodes is not None  # with text it is never all of them
        n_users = int((nodes < self.n_users).sum())
        users, items = self._draw_aligned(n_users), self._draw_aligned(len(nodes) - n_users)
        places = torch.cat([users, n_users + items])
        if texts:
            texts = [text.index_select(0, places) for text in texts]
        else:
            texts = self.project(nodes.index_select(0, places))
        terms = [
            losses.alignment(ids, of_ids, self.options.align_temperature)
            for hop, text in zip(hops, texts, strict=False)
            for ids, of_ids in zip(
                hop.index_select(0, places).tensor_split([len(users)]),
                text.tensor_split([len(users)]),
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

    # Scores

    def train(self, mode: bool = True) -> GaCLLM:
        """Switch between training and evaluation; scores made under dropout are forgotten."""
        self.restored = None
        super().train(mode)
        return self

    @torch.no_grad()
    def scored_embeddings(self) -> tuple[Tensor, Tensor]:
        """Embeddings for scoring, computed once per evaluation; of unit length before with SSM."""
        if self.restored is None:
            users, items = self.forward()
            if self.options.loss_type == "SSM":
                users, items = F.normalize(users, dim=1), F.normalize(items, dim=1)
            self.restored = self.scoring.embeddings(users, items)
        return self.restored

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of user-item pairs: ``[B]``."""
        user, item = interaction[self.USER_ID], interaction[self.ITEM_ID]
        if self.linear is None:
            users, items = self.scored_embeddings()
            return (users[user] * items[item]).sum(dim=1)
        # The linear model's scores of a user are made for all items at once.
        distinct, place = torch.unique(user, return_inverse=True)
        return self.scoring.scores(*self.scored_embeddings(), distinct)[place, item]

    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of users with every item: ``[B * n_items]``, a fresh tensor."""
        return self.scoring.scores(*self.scored_embeddings(), interaction[self.USER_ID]).view(-1)


def _forget_restored(module: nn.Module, _incompatible_keys: Any) -> None:
    """After a checkpoint is loaded, scores and hops must come from its weights."""
    assert isinstance(module, GaCLLM)
    module.restored = None
    if module.periodic is not None:
        module.periodic.forget()
