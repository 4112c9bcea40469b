r"""``text_init``: the embedding tables of RecBole's own models begin as texts.

.. math:: e_v = s\,(x_v - \bar x)\,P, \qquad \text{frozen:}\quad e_v = W x_v + b

``P`` are the first ``d`` principal axes of the items' text embeddings (``whitened``: each divided
by its spread), and ``s`` gives the table the standard deviation that the model gave it. Users are
centred at their own mean and turned by the same axes, so that users and items lie in one space.
With ``text_init_frozen`` texts stay as they are and ``W``, ``b`` are learned, which begin as the
same table. A node without training interactions has its text's embedding like any other.

Source: LLMInit (Zhang et al., arXiv 2503.01814) for general models, whose users come from their
items (``text_users: item_mean``); Harte et al., "Leveraging Large Language Models for Sequential
Recommendation" (RecSys 2023), principal components for BERT4Rec; AlphaFuse (SIGIR 2025),
standardised along the texts' own axes; UniSRec (KDD 2022), frozen texts with a learned map.
Departures: LLMInit keeps single dimensions of most variance, here they are principal components;
the spread is the model's own; UniSRec's map is a mixture of experts, here it is linear; AlphaFuse
freezes the texts' part and trains the rest. Where a table is wider than the texts, the further
columns stay as the model made them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONSTRUCTING = "_text_init_waits"
#: Words in the names of tables that are no node's vectors, whatever their number of rows.
_NO_NODES = ("position", "entity", "relation", "feature", "lambda", "bias")


def add_to_models(module: ModuleType) -> None:
    """Let every model that is defined from now on begin with texts where its key says so."""

    def extend_subclass(cls: type[Any], /, **keys: Any) -> None:
        super(module.AbstractRecommender, cls).__init_subclass__(**keys)
        if "__init__" in vars(cls):
            cls.__init__ = _then_texts(cls.__init__)

    module.AbstractRecommender.__init_subclass__ = classmethod(extend_subclass)


def _then_texts(construct: Callable[..., None]) -> Callable[..., None]:
    """A model's constructor, and the texts after the outermost one of its classes."""

    @functools.wraps(construct)
    def constructing(self: Any, config: Any, dataset: Any, *args: Any, **keys: Any) -> None:
        is_outermost = not vars(self).get(_CONSTRUCTING)
        if not (is_outermost and config["text_init"]):
            construct(self, config, dataset, *args, **keys)
            return
        texts_of = keys.pop("texts_of", None)
        vars(self)[_CONSTRUCTING] = True  # past nn.Module, whose constructor has not run
        construct(self, config, dataset, *args, **keys)
        del vars(self)[_CONSTRUCTING]
        start_from_texts(self, config, dataset, texts_of)

    return constructing


def start_from_texts(model: Any, config: Any, dataset: Any, texts_of: Any = None) -> None:
    """Put texts into a model's tables of items and users.

    Args:
        model: As its constructor left it.
        config: RecBole's configuration.
        dataset: RecBole's training split.
        texts_of: Gives the text embeddings; None runs the stages, or reuses what they made.

    Raises:
        ValueError: If the model has no such table, before any stage; and as :func:`.read_texts`.
    """
    n_users, n_items = dataset.num(dataset.uid_field), dataset.num(dataset.iid_field)
    tables = find_tables(model, n_users, n_items)
    if not tables:
        raise ValueError(
            f"text_init: True does not go with {config['model']}, which has no table of embeddings "
            f"(nn.Embedding) with a row for each of the {n_items - 1} items or {n_users - 1} "
            "users. Leave it out."
        )
    from recbole_gacllm.peers.texts import read_texts  # loads what other models do without

    model.texts, layers, _ = read_texts(config, dataset, texts_of)
    texts = {
        side: model.texts.rows(layers, nodes.to(config["device"])).cpu()
        for side, nodes in (
            ("user", torch.arange(n_users)),
            ("item", torch.arange(n_users, n_users + n_items)),
        )
    }
    axes = principal_axes(texts["item"][1:], config["text_init_reduction"] == "whitened")
    for name, side in tables.items():
        table = model.get_submodule(name)
        started = MappedTexts(table, texts[side], axes)
        if config["text_init_frozen"]:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, started.to(table.weight.device))
        else:
            with torch.no_grad():
                table.weight.copy_(started.weight)
        model.logger.info(
            f"text_init: {name}, {tuple(table.weight.shape)}, begins as the {side}s' texts of "
            f"layer {layers[0]}"
        )


def find_tables(model: nn.Module, n_users: int, n_items: int) -> dict[str, str]:
    """Name of each embedding table of a node's vectors in a model, and whose nodes they are.

    A table has a row for each node, padding included (of items also one more, a mask token), and is
    wider than 1. Its name says whose it is where it holds ``item`` or ``user`` and the number of
    rows does not say otherwise.
    """
    tables = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.embedding_dim < 2:
            continue
        own = name.rpartition(".")[2].lower()
        sides = ["user"] if module.num_embeddings == n_users else []
        sides += ["item"] if module.num_embeddings in (n_items, n_items + 1) else []
        if not sides or any(word in own for word in _NO_NODES):
            continue
        named = [side for side in sides if side in own]
        tables[name] = (named or sides)[0]
    return tables


def principal_axes(rows: Tensor, whitened: bool) -> Tensor:
    """Axes of most spread first, each with a fixed sign: ``[width, rank]``.

    Shapes:
        rows: ``[n, width]``, not centred.
    """
    centred = rows.double() - rows.double().mean(0)
    values, axes = torch.linalg.eigh(centred.T @ centred / max(len(rows), 1))
    values, axes = values.flip(0), axes.flip(1)
    spoken = values > 1e-9 * values[0].clamp(min=1e-12)  # the others are rounding
    values, axes = values[spoken], axes[:, spoken]
    largest = axes.abs().argmax(0)
    signs = axes[largest, torch.arange(axes.shape[1])].sign()
    turned: Tensor = axes * (signs / values.sqrt() if whitened else signs)
    return turned


class MappedTexts(nn.Module):
    """In the place of ``nn.Embedding``: a linear map of constant texts, one row a node.

    Rows that no text speaks for, padding and what comes after the last node, and columns beyond the
    rank of the texts are learned as they are. Texts are no part of the state.

    Args:
        table: The model's own, with the spread that is kept.
        texts: ``[n_nodes, width]``, row 0 padding.
        axes: ``[width, rank]``.

    Attributes:
        weight: The table: ``[n_rows, d]``.
    """

    texts: Tensor

    def __init__(self, table: nn.Embedding, texts: Tensor, axes: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx
        own = table.weight.detach().cpu()
        axes = axes[:, : self.embedding_dim]
        nodes = slice(1, len(texts))
        mean = texts[nodes].double().mean(0)
        scores = (texts[nodes].double() - mean) @ axes
        axes = axes * (own[nodes].double().std() / scores.std().clamp(min=1e-12))
        self.register_buffer("texts", texts[nodes].float(), persistent=False)
        self.map = nn.Linear(axes.shape[0], axes.shape[1], device="meta").to_empty(
            device="cpu"
        )  # draws no number
        with torch.no_grad():
            self.map.weight.copy_(axes.T)
            self.map.bias.copy_(-mean @ axes)
        self.others = nn.Parameter(torch.cat([own[:1], own[len(texts) :]]).clone())
        rest = own[nodes, axes.shape[1] :].clone()
        self.further = nn.Parameter(rest) if rest.numel() else None  # DDP reduces no empty tensor

    @property
    def weight(self) -> Tensor:  # noqa: D102
        mapped: Tensor = self.map(self.texts)
        if self.further is not None:
            mapped = torch.cat([mapped, self.further], dim=1)
        return torch.cat([self.others[:1], mapped, self.others[1:]])

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table."""
        return F.embedding(ids, self.weight, self.padding_idx)
