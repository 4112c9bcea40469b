"""RecBole's graph models on faster products with their constant sparse matrices; NeuMF's scores.

The models' own ``forward`` runs; ``torch.sparse.mm(matrix, x)`` finds a :class:`ConstantMatrix` in
the place of RecBole's COO tensor and multiplies without a transpose in the backward pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from recbole_gacllm.alignment.propagation import Adjacency, constant_product, csr_tensor
from recbole_gacllm.plugin.import_hooks import replaces

_SCORES_A_BLOCK = 1 << 22  # 16 MiB of float32
_is_fast = operator.attrgetter("fast_paths")  # of a model


class ConstantMatrix:
    """A sparse matrix without gradient that ``torch.sparse.mm`` multiplies from the left.

    Args:
        matrix: In CSR.
        transposed: Its transpose in CSR; the same tensor if it is symmetric.
    """

    def __init__(self, matrix: Tensor, transposed: Tensor) -> None:
        self.matrix = matrix
        self.transposed = transposed

    def to(self, device: torch.device | str) -> ConstantMatrix:
        """The same matrix on a device."""
        matrix = self.matrix.to(device)
        if self.transposed is self.matrix:
            return ConstantMatrix(matrix, matrix)
        return ConstantMatrix(matrix, self.transposed.to(device))

    def __deepcopy__(self, memo: dict[int, Any]) -> ConstantMatrix:
        # RecBole's get_flops deep-copies the model; sparse CSR tensors cannot be deep-copied.
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """``torch.sparse.mm(self, x)``; nothing else is ever asked of it."""
        if function is not torch.sparse.mm or kwargs or not isinstance(args[0], cls):
            return NotImplemented
        left, right = args
        return constant_product(left.matrix, left.transposed, right)


def add_to_model(module: ModuleType) -> None:
    """Let a model's class remember the key before its constructor runs, and change its methods."""
    name, change = _CHANGES[module.__name__.rpartition(".")[2]]
    model_class = getattr(module, name)

    @replaces(model_class, "__init__")
    def construct(original: Any, self: Any, config: Any, dataset: Any, **keys: Any) -> None:
        # Past nn.Module's __setattr__, which wants its own constructor first.
        vars(self)["fast_paths"] = bool(config["fast_paths"])
        original(self, config, dataset, **keys)

    change(model_class)


def normalised_adjacency(model_class: Any) -> None:
    """Give LightGCN, NGCF or NCL its adjacency, built at once and multiplied without transpose.

    NGCF with ``node_dropout`` drops each direction of an edge by itself: its matrix is not
    symmetric, and it keeps RecBole's products.
    """

    @replaces(model_class, "get_norm_adj_mat", _is_fast)
    def get_norm_adj_mat(original: Any, self: Any) -> Any:
        if getattr(self, "node_dropout", 0) > 0:
            return original(self)
        edges = self.interaction_matrix
        adjacency = Adjacency.from_edges(edges.row, edges.col, self.n_users, self.n_items)
        if model_class.__name__ == "NCL":
            degree = adjacency.matrix.crow_indices().diff().numpy()
            self.diag = torch.from_numpy(np.power(degree + 1e-7, -0.5)).to(self.device)
        return ConstantMatrix(adjacency.matrix, adjacency.matrix)


def ncl_paths(model_class: Any) -> None:
    """Give NCL its adjacency, and its contrast of layers once for each node of a batch."""
    normalised_adjacency(model_class)

    @replaces(model_class, "ssl_layer_loss", _is_fast)
    def ssl_layer_loss(
        original: Any, self: Any, current: Tensor, previous: Tensor, user: Any, item: Any
    ) -> Any:
        sizes = [self.n_users, self.n_items]
        users, items = torch.split(current, sizes)
        other_users, other_items = torch.split(previous, sizes)
        of_users = infonce_sum(users, other_users, user, self.ssl_temp)
        of_items = infonce_sum(items, other_items, item, self.ssl_temp)
        return self.ssl_reg * (of_users + self.alpha * of_items)


def infonce_sum(views: Tensor, others: Tensor, nodes: Tensor, temperature: float) -> Tensor:
    """InfoNCE of each of ``nodes`` against all nodes of the other view, summed.

    The loss of a node depends on nothing else of a batch, so one that stands in it several times
    is computed once: on ml-1m half of the products of a batch of 4,096.

    Source: van den Oord et al., arXiv 1807.03748, as RecBole 1.2.1 has it in SGL's
    ``calc_ssl_loss`` and NCL's ``ssl_layer_loss``; equal to them up to rounding.

    Shapes: ``views``, ``others`` [n, d], ``nodes`` [batch] with repetitions; the sum is a scalar.
    """
    times = torch.bincount(nodes, minlength=len(views))
    distinct = times.nonzero()[:, 0]
    view, other = F.normalize(views[distinct]), F.normalize(others)
    positive = (view * other[distinct]).sum(dim=1) / temperature
    # In blocks: the allocator gives larger ones back to the system each time, whose pages then cost
    # more than the products.
    rows = max(1, _SCORES_A_BLOCK // len(others))
    blocks = torch.split(view / temperature, rows)
    total = torch.cat([(block @ other.T).exp().sum(dim=1) for block in blocks])
    loss = total.log() - positive
    return torch.dot(times[distinct].to(loss.dtype), loss)  # autocast rounds some of its parts


def sgl_paths(model_class: Any) -> None:
    """Give SGL its graph and its augmented views, all of them symmetric, and a faster contrast."""

    @replaces(model_class, "calc_ssl_loss", _is_fast)
    def calc_ssl_loss(original: Any, self: Any, user: Any, item: Any, *views: Any) -> Any:
        user1, user2, item1, item2 = views
        of_users = infonce_sum(user1, user2, user, self.ssl_tau)
        return self.ssl_weight * (of_users + infonce_sum(item1, item2, item, self.ssl_tau))

    @replaces(model_class, "csr2tensor", _is_fast)
    def csr2tensor(original: Any, self: Any, matrix: Any) -> Any:
        tensor = csr_tensor(matrix).to(self.device)
        return ConstantMatrix(tensor, tensor)


def dgcf_products(model_class: Any) -> None:
    """Give DGCF its maps between edges and their ends, each with its transpose."""

    @replaces(model_class, "_build_sparse_tensor", _is_fast)
    def _build_sparse_tensor(
        original: Any, self: Any, indices: Tensor, values: Tensor, size: Any
    ) -> Any:
        matrix = sparse.csr_array((values.cpu().numpy(), indices.cpu().numpy()), shape=size)
        transposed = sparse.csr_array(matrix.T)
        return ConstantMatrix(csr_tensor(matrix), csr_tensor(transposed)).to(self.device)


_HIDDEN_A_BLOCK = 1 << 20  # 4 MiB of float32, which the caches still hold


def neumf_scores(model_class: Any) -> None:
    """Give NeuMF the ``full_sort_predict`` that RecBole 1.2.1 leaves out.

    The first layer of its MLP is linear in the user's and in the item's embedding, so each half is
    multiplied once for a node and only their sum is taken for a pair.

    Source: He et al., arXiv 1708.05031, as RecBole's ``NeuMF.predict``; equal up to rounding.

    Shapes: ``full_sort_predict`` of users [B] is [B, n_items].
    """

    @replaces(model_class, "full_sort_predict", _is_fast)
    def full_sort_predict(original: Any, self: Any, interaction: Any) -> Tensor:
        if self.training:  # dropout draws anew for every pair
            pair_by_pair: Tensor = original(self, interaction)  # RecBole's: NotImplementedError
            return pair_by_pair
        users = interaction[self.USER_ID]
        widest = max(self.mlp_layers.layers[1:])
        step = max(1, _HIDDEN_A_BLOCK // (self.n_items * widest))
        return torch.cat([_scores(self, block) for block in users.split(step)])


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


#: Module of a model -> its class, and what gives it the fast paths.
_CHANGES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "lightgcn": ("LightGCN", normalised_adjacency),
    "ngcf": ("NGCF", normalised_adjacency),
    "ncl": ("NCL", ncl_paths),
    "sgl": ("SGL", sgl_paths),
    "dgcf": ("DGCF", dgcf_products),
    "neumf": ("NeuMF", neumf_scores),
}
