"""Pairs for supervised fine-tuning: descriptions of users and items that match in training."""

from __future__ import annotations

import numpy as np

from recbole_gacllm.descriptions.layers import Layer
from recbole_gacllm.descriptions.neighbors import TrainGraph
from recbole_gacllm.descriptions.prompts import PromptTemplates
from recbole_gacllm.llm.generator import SFTPair


def sample_pairs(
    graph: TrainGraph,
    raw: Layer,
    templates: PromptTemplates,
    n_pairs: int,
    n_heldout: int,
    seed: int,
) -> tuple[list[SFTPair], list[SFTPair]]:
    """Sample training edges and make a pair of each in both directions.

    Edges are drawn uniformly without replacement; a graph too small for both gives a fifth of its
    edges, at most ``n_heldout``, to the held-out part. Source: the paper's supervised fine-tuning;
    the number of pairs and the two directions are ours.

    Args:
        graph: Training edges.
        raw: Layer 0, in the graph's order of nodes.
        templates: With the two SFT templates.
        n_pairs: Edges to learn from.
        n_heldout: Further edges for perplexity.
        seed: Of the draw.

    Returns:
        Pairs to learn and held-out pairs, two for each edge.

    Raises:
        ValueError: If there are fewer than two training edges.
    """
    if graph.n_edges < 2:
        raise ValueError(
            f"SFT needs at least 2 training edges, there are {graph.n_edges}. Set sft: False "
            "or loosen the filters of the data set."
        )
    order = np.random.default_rng(seed).permutation(graph.n_edges)
    n_heldout = min(n_heldout, max(graph.n_edges // 5, 1))
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
