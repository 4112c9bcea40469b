"""GaCLLM's scores as sums of parts: of users in the training graph, and of users outside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.alignment.propagation import csr_tensor, product
from recbole_gacllm.objective.choice import Layers
from recbole_gacllm.objective.scoring import standardize

#: Part -> its summand of each score, ``[B, n_items]``.
Parts = dict[str, Tensor]


class ScoreParts:
    r"""What the graph, the texts and the linear model add to GaCLLM's scores.

    With ``z = g + t``, the mean of the hops and the projected texts, and both scaled as the model
    scales ``z``, the graph's part is :math:`\langle g_u, g_i \rangle` and the texts' part is the
    rest of :math:`\langle z_u, z_i \rangle`. Beside a linear model both are standardised as their
    sum is. A user or item without training interactions has no part of the graph. The sum of the
    parts is ``full_sort_predict``'s score.

    Holds the hops of all nodes: ``4 (K + 4) (n_users + n_items) d`` bytes at most.
    """

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        self.model, self.n_users = model, int(model.n_users)
        nodes = torch.arange(model.n_users + model.n_items, device=model.device)
        hops, _, fused = model.embed(nodes)
        graph = torch.stack(hops).mean(0)
        text: Tensor = fused - graph
        self._graph, self._text = graph, text  # g and t of all nodes
        # e^(0) + .. + e^(K-1) of the items: what they send to a user outside the graph.
        self._sent = torch.stack(hops[:-1] or [torch.zeros_like(graph)]).sum(0)[self.n_users :]
        self._sent_texts: TextLayers | None = None  # the same of texts, with early fusion
        if model.carried is not None and len(hops) > 1:
            carried = model.text_layers, model.adjacency, len(hops) - 2
            self._sent_texts = model.texts.carried(*carried)

    @torch.no_grad()
    def of_users(self, users: Tensor) -> Parts:
        """Parts of users of the training graph.

        Shapes:
            users: ``[B]``, RecBole's ids; each result ``[B, n_items]``.
        """
        model, linear = self.model, None
        if model.linear is not None:
            scores, mean = model.linear.standardized(users, model.scoring.ranked)
            linear = scores - mean[:, None]
        parts = self._parts(self._graph[users], self._text[users], linear)
        if (unseen := model.unseen_users) is not None:
            rows = (~unseen.is_seen[users]).nonzero()[:, 0]
            of_users, of_items = model.scored_embeddings()
            parts["graph"][rows] = 0.0
            parts["text"][rows] = of_users[users[rows]] @ of_items.T
        return parts

    @torch.no_grad()
    def of_histories(self, counts: sparse.csr_array) -> Parts:
        r"""Parts of users who are known by their items only.

        .. math:: g_u = \frac{1}{K+1} \sum_{l=1}^{K} \sum_{i \in N_u}
            \frac{e_i^{(l-1)}}{\sqrt{|N_u|\,|N_i|}}, \qquad
            t_u = \frac{w}{K+1} \sum_l \mathrm{MLP}_l
            \Big( \frac{\sum_i x_i^{(l)}}{\|\sum_i x_i^{(l)}\|} \Big)

        The operator of the graph convolution, for a node whose own ``e^(0)`` is zero; ``N_i`` are
        the training users of an item, so that nobody else's score changes. An item without any
        sends nothing. Their text is the mean of their items' texts, layer by layer; with early
        fusion it receives as ``g_u`` does what their items send. The linear model takes their
        items, each with its count. Ours; the paper scores training users.

        Shapes:
            counts: ``[B, n_items]``, an entry for each item of a history, 1 or what
                :func:`.linear.recency_weights` gives; each result ``[B, n_items]``.
        """
        model, linear = self.model, None
        n_layers = model.options.n_layers
        starts = model.adjacency.matrix.crow_indices().cpu().numpy()
        degrees = np.diff(starts)[self.n_users :]  # training users of each item
        edges = counts.copy()
        edges.data = (degrees[edges.indices] > 0).astype(np.float32)
        edges.eliminate_zeros()
        n_items_of = np.diff(edges.indptr)
        rows = np.repeat(np.arange(edges.shape[0]), n_items_of)
        edges.data = ((n_items_of[rows] * degrees[edges.indices]) ** -0.5).astype(np.float32)
        receiving = csr_tensor(edges).to(model.device)
        graph = product(receiving, self._sent) / (n_layers + 1)
        text = torch.zeros_like(graph)
        if model.texts is not None and model.options.text_weight > 0:
            weight = model.options.text_weight / (n_layers + 1)
            of_hops = zip(model.text_layers, model.projections, strict=True)
            for hop, (layers, projection) in enumerate(of_hops):
                texts = self._mean_text(layers, counts)
                if self._sent_texts is not None:
                    items = self.n_users + torch.arange(model.n_items, device=model.device)
                    texts += product(receiving, self._sent_texts.rows((hop,), items))
                text += weight * projection(texts)
        if model.linear is not None:
            linear = model.linear.scores_of(counts)
            deviation, mean = torch.std_mean(linear[:, model.scoring.ranked], dim=1, keepdim=True)
            linear = (linear - mean) / deviation.clamp(min=1e-12)
        return self._parts(graph, text, linear)

    def item_embeddings(self) -> Tensor:
        """Fused embeddings of the items: ``[n_items, d]``."""
        return (self._graph + self._text)[self.n_users :]

    def _mean_text(self, layers: Layers, counts: sparse.csr_array) -> Tensor:
        """Text embeddings of users as the mean of their items', at unit length: ``[B, width]``."""
        model = self.model
        items = np.unique(counts.indices)
        ones = counts[:, items]
        ones.data = np.ones_like(ones.data, dtype=np.float32)
        rows = model.texts.rows(layers, self.n_users + torch.from_numpy(items).to(model.device))
        return F.normalize(product(csr_tensor(ones).to(model.device), rows), dim=1)

    def _parts(self, graph: Tensor, text: Tensor, linear: Tensor | None) -> Parts:
        """Parts of users from both sides ``[B, d]`` and standardised linear scores."""
        model, ranked = self.model, self.model.scoring.ranked
        item_graph, item_text = (side[self.n_users :] for side in (self._graph, self._text))
        if model.options.loss_type == "SSM":
            graph, text = _at_unit_length(graph, text)
            item_graph, item_text = _at_unit_length(item_graph, item_text)
        users, items = graph + text, item_graph + item_text
        of_graph = graph @ item_graph.T
        if linear is not None:
            deviation = (users @ items[ranked].T).std(dim=1, keepdim=True).clamp(min=1e-12)
            users, items = standardize(users, items, ranked)
            of_graph = (of_graph - of_graph[:, ranked].mean(dim=1, keepdim=True)) / deviation
        if model.unseen_items is not None:
            items = model.unseen_items.complete(items)
            of_graph[:, model.unseen_items.unseen] = 0.0
        parts = {"graph": of_graph, "text": users @ items.T - of_graph}
        if linear is not None:
            parts["linear"] = model.options.linear_weight * linear
        return parts


def _at_unit_length(graph: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    length = (graph + text).norm(dim=1, keepdim=True).clamp(min=1e-12)
    return graph / length, text / length
