"""Pairs for supervised fine-tuning: descriptions of users and items that match in training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.layers import SIDES, Layer, Side
from recbole_gacllm.convolution.prompts import PromptTemplates
from recbole_gacllm.llm.generator import SFTPair


def told_edges(
    graph: TrainGraph, raw: Layer, nothing_known: Mapping[Side, str]
) -> npt.NDArray[np.int64]:
    """Edges whose ends both have a text that says something; from others nothing is learnt.

    Shapes:
        result: ``[n_told]``, in the graph's order.
    """
    told = np.ones(graph.n_edges, dtype=bool)
    for side in SIDES:
        says = np.array([text != nothing_known[side] for text in raw.texts[side]], dtype=bool)
        told &= says[graph.ends(side)]
    return np.flatnonzero(told)


def sample_pairs(
    graph: TrainGraph,
    raw: Layer,
    templates: PromptTemplates,
    nothing_known: Mapping[Side, str],
    n_pairs: int,
    n_heldout: int,
    seed: int,
) -> tuple[list[SFTPair], list[SFTPair]]:
    """Sample training edges and make a pair of each in both directions.

    They are drawn from :func:`told_edges`, uniformly without replacement; a graph too small for
    both parts gives a fifth of these, at most ``n_heldout``, to the held-out one. Source: the
    paper's supervised fine-tuning; the number of pairs and the two directions are ours.

    Returns:
        Pairs to learn, of ``n_pairs`` edges, and held-out pairs, of ``n_heldout`` others; two for
        each edge.
    """
    told = told_edges(graph, raw, nothing_known)
    order = np.random.default_rng(seed).permutation(graph.n_edges)
    order = order[np.isin(order, told)]
    n_heldout = min(n_heldout, max(len(told) // 5, 1))
    chosen = {"heldout": order[:n_heldout], "train": order[n_heldout : n_heldout + n_pairs]}

    def both_ways(edges: np.ndarray) -> list[SFTPair]:
        pairs = []
        for edge in edges:
            user = raw.texts["user"][graph.users[edge]]
            item = raw.texts["item"][graph.items[edge]]
            pairs.append(SFTPair(templates.sft_messages("user_to_item", user), item))
            pairs.append(SFTPair(templates.sft_messages("item_to_user", item), user))
        return pairs

    return both_ways(chosen["train"]), both_ways(chosen["heldout"])
