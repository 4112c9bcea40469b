"""The text embeddings ``x_v^(l)`` of all nodes, as the model looks them up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from recbole_gacllm.alignment.propagation import Adjacency, propagate_mean
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.layers import SIDES, Layer

#: So many text embeddings are taken to float32 at once: 100 MB of width 384.
MAX_ROWS = 2**16


class TextLayers:
    """Constant text embeddings ``x^(0) .. x^(L)`` of all nodes, looked up by RecBole's node ids.

    Kept outside the model's state: they are files on disk, memory-mapped, in half precision.
    Processes on one machine share the pages; on another device they lie there in half precision.

    Args:
        tables: One array a layer, ``[n_rows, width]``, float16; rows of unit length, but for those
            of :meth:`carried`.
        row_of_node: Row of each node, users first with RecBole's internal ids; -1 for padding.
        run_files: Where the artefacts lie: stage -> folder.
    """

    def __init__(
        self, tables: list[Tensor], row_of_node: Tensor, run_files: dict[str, Path]
    ) -> None:
        self.tables = tables
        self.row_of_node = row_of_node
        self.run_files = run_files
        self.dim = int(tables[0].shape[1])

    @classmethod
    def load(
        cls,
        folders: dict[str, Path],
        n_layers: int,
        text_source: str,
        graph: TrainGraph,
        seed: int,
        text_users: str = "own",
    ) -> TextLayers:
        """Memory-map the embeddings and find each node's row by its token, not by its id.

        Args:
            folders: Where the artefacts lie: stage -> folder.
            n_layers: Number of layers of embeddings, ``L + 1``.
            text_source: ``shuffled`` gives each node another node's texts, drawn by the seed.
            graph: The nodes in RecBole's order, and the training edges.
            seed: RecBole's.
            text_users: ``item_mean``, of either, gives users the mean of their items' texts.
        """
        tokens = Layer.read(folders["inputs"] / "layer_0.parquet").tokens
        rng = np.random.default_rng(seed)
        row_of_node, offset = [], 0
        for side in SIDES:
            rows = np.arange(len(tokens[side])) + offset
            if text_source == "shuffled":
                rows = rng.permutation(rows)
            row_of_token = dict(zip(tokens[side], rows.tolist(), strict=True))
            row_of_node += [
                -1,
                *(row_of_token[token] for token in graph.tokens(side).tolist()),
            ]
            offset += len(rows)
        tables = [
            # Copy-on-write: torch wants a writable array, nothing is ever written.
            torch.from_numpy(np.load(folders["embeddings"] / f"layer_{layer}.npy", mmap_mode="c"))
            for layer in range(n_layers)
        ]
        row_of_each = torch.tensor(row_of_node)
        made = cls(tables, row_of_each, folders)
        is_mean = "item_mean" in (text_source, text_users)
        return made.with_users_as_item_means(graph) if is_mean else made

    def __len__(self) -> int:
        return len(self.tables)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextLayers:
        return self

    def with_users_as_item_means(self, graph: TrainGraph) -> TextLayers:
        """The same, each user's embedding being the mean of those of their training items.

        Ours as a control: a user's text without any LLM; AlphaRec's and LLMInit's users. At unit
        length; a user without training items gets zeros.
        """
        tables = [_users_as_item_means(table, self.row_of_node, graph) for table in self.tables]
        return TextLayers(tables, self.row_of_node, self.run_files)

    def to(self, device: torch.device | str) -> TextLayers:
        """The same embeddings on a device."""
        tables = [table.to(device) for table in self.tables]
        return TextLayers(tables, self.row_of_node.to(device), self.run_files)

    def rows(self, layers: tuple[int, ...], nodes: Tensor) -> Tensor:
        """Text embeddings of nodes, of several layers side by side; zero for padding.

        Shapes:
            nodes: ``[n]``; result ``[n, width * len(layers)]``, float32.
        """
        rows = self.row_of_node[nodes]
        known, place = (rows >= 0)[:, None], rows.clamp(min=0)
        each = [self.tables[layer][place].float().mul_(known) for layer in layers]
        return each[0] if len(each) == 1 else torch.cat(each, dim=1) / len(each) ** 0.5

    def carried(
        self, of_hops: Sequence[tuple[int, ...]], adjacency: Adjacency, n_layers: int
    ) -> TextLayers:
        r"""Text embeddings that were carried through the graph: a table for each of ``of_hops``.

        .. math:: \bar x = \sum_{k=0}^{K} \hat A^k x

        Ours; for features SGC (Wu et al., ICML 2019) takes the last power alone. Constants, as
        ``x`` is: what is linear before the projection need not be done again in each batch.

        Args:
            of_hops: Layers of text of each hop that has text, side by side in its table.
            adjacency: The normalised graph.
            n_layers: ``K``.

        Shapes:
            result: tables ``[n_users + n_items, width * len(layers)]``, float16, a row a node.
        """
        nodes = torch.arange(len(self.row_of_node), device=self.row_of_node.device)

        def carry(columns: Tensor) -> Tensor:
            return propagate_mean(adjacency, columns, n_layers).mul_(n_layers + 1).half()

        # Some columns at a time: of all of them there are one float32 and one float16 table.
        tables = [
            torch.cat([carry(some) for some in torch.split(self.rows(layers, nodes), 64, dim=1)], 1)
            for layers in of_hops
        ]
        return TextLayers(tables, nodes, self.run_files)

    def projected(
        self, layers: tuple[int, ...], nodes: Tensor, projection: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """A projection of :meth:`rows`, some nodes at a time: never all of them in float32.

        Shapes:
            nodes: ``[n]``; projection maps ``[m, width]`` to ``[m, d]``; result ``[n, d]``.
        """
        blocks = torch.split(nodes, MAX_ROWS)
        return torch.cat([projection(self.rows(layers, block)) for block in blocks])


def _users_as_item_means(table: Tensor, row_of_node: Tensor, graph: TrainGraph) -> Tensor:
    """Each user's row is the mean of the rows of their training items, at unit length.

    Shapes:
        table and result: ``[n_users + n_items, width]``, float16, users first; row_of_node
        ``[n_nodes + 2]``, a padding node before each side.
    """
    n_users = len(graph.user_tokens)
    items = row_of_node.numpy()[graph.items + n_users + 2]
    ones = np.ones(len(items), np.float32)
    edges = sparse.csr_array((ones, (graph.users, items)), shape=(n_users, len(table)))
    means = torch.from_numpy(edges @ table.float().numpy())
    made = table.clone()
    made[row_of_node[1 : n_users + 1]] = F.normalize(means, dim=1).to(table.dtype)
    return made
