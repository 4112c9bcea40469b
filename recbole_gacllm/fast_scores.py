"""Scores of all items at once, for a model that RecBole asks for them pair by pair."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_HIDDEN_A_BLOCK = 1 << 20  # 4 MiB of float32, which the caches still hold


def neumf_scores(model_class: Any) -> None:
    """Give NeuMF the ``full_sort_predict`` that RecBole 1.2.1 leaves out.

    The first layer of its MLP is linear in the user's and in the item's embedding, so each half is
    multiplied once for a node and only their sum is taken for a pair.

    Source: He et al., arXiv 1708.05031, as RecBole's ``NeuMF.predict``; equal up to rounding.

    Shapes: ``full_sort_predict`` of users [B] is [B, n_items].
    """
    original = model_class.full_sort_predict

    @functools.wraps(original)
    def full_sort_predict(self: Any, interaction: Any) -> Tensor:
        if not self.fast_paths or self.training:  # dropout draws anew for every pair
            pair_by_pair: Tensor = original(self, interaction)  # RecBole's: NotImplementedError
            return pair_by_pair
        users = interaction[self.USER_ID]
        widest = max(self.mlp_layers.layers[1:])
        step = max(1, _HIDDEN_A_BLOCK // (self.n_items * widest))
        return torch.cat([_scores(self, some) for some in users.split(step)])

    model_class.full_sort_predict = full_sort_predict


def _scores(model: Any, users: Tensor) -> Tensor:
    """Probabilities [users, items] of NeuMF without dropout."""
    n_factors = model.mf_embedding_size if model.mf_train else 0
    factors, hidden = model.predict_layer.weight[0].tensor_split([n_factors])
    scores = model.predict_layer.bias.expand(len(users), model.n_items)
    if model.mf_train:
        weighted = model.user_mf_embedding(users) * factors
        scores = scores + weighted @ model.item_mf_embedding.weight.T
    if model.mlp_train:
        _, first, *rest = model.mlp_layers.mlp_layers
        of_user, of_item = first.weight.split(model.mlp_embedding_size, dim=1)
        user_half = model.user_mlp_embedding(users) @ of_user.T + first.bias
        pairs = user_half[:, None] + model.item_mlp_embedding.weight @ of_item.T
        for layer in rest:
            pairs = layer(pairs)
        scores = scores + pairs @ hidden
    return torch.sigmoid(scores)
