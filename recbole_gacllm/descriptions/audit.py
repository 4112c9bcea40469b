"""Leakage audit: do a user's descriptions know items that were held out?

The graph, the prompts and the SFT pairs hold training edges only, by construction. This checks the
outcome: how often the name of a held-out item appears in the generated descriptions of its user,
against an item that the user never touched, of nearly the same training popularity. A name that a
training item of the user bears, too, tells nothing and is not compared (some films stand in
ml-100k under two ids; "Halloween" is in the name "Halloween H20").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from recbole_gacllm.descriptions.layers import Layer, layer_files
from recbole_gacllm.descriptions.names import read_names
from recbole_gacllm.descriptions.neighbors import TrainGraph

# Shorter names ("Go", "M") are found in any text.
_MIN_NAME_CHARS = 4


def audit_leakage(
    inputs: Path,
    descriptions: Path,
    heldout: Sequence[tuple[str, str]],
    seed: int,
    names_file: Path | None = None,
) -> dict[str, Any]:
    """Compare mentions of held-out items with mentions of matched random items.

    Args:
        inputs: Folder of the inputs stage (graph, item names).
        descriptions: Folder of the descriptions stage.
        heldout: (user token, item token) of the validation and test interactions.
        seed: Of the draw of matched items.
        names_file: The run's own names of items; None takes those that were written last.

    Returns:
        ``n_pairs`` compared; ``heldout_mentions`` and ``matched_mentions``, how many of them name
        the item; ``p_value`` of the one-sided sign test that held-out items are named more often
        (null if no pair differs); ``n_known_names``, pairs not compared since the item's name is
        in the name of a training item of the user; ``edges_in_graph``, held-out pairs that are
        training edges too, which must be 0 unless the data repeats interactions.
    """
    graph = TrainGraph.load(inputs / "graph.npz")
    names = read_names(inputs, names_file)
    user_of = {token: index for index, token in enumerate(graph.user_tokens.tolist())}
    item_of = {token: index for index, token in enumerate(graph.item_tokens.tolist())}
    texts = [""] * len(user_of)
    for file in layer_files(descriptions):
        layer = Layer.read(file)
        for token, text in zip(layer.tokens["user"], layer.texts["user"], strict=True):
            texts[user_of[token]] += f" {_normalize(text)} "
    wanted = [_normalize(names[token]) for token in graph.item_tokens.tolist()]

    # By user, so that the names of one user's training items are joined once and held alone.
    pairs = sorted((user_of[user], item_of[item]) for user, item in heldout)
    # A pair as one number, sorted: a Python set of all edges of a large graph takes gigabytes.
    edges = graph.users.astype(np.int64) * len(wanted) + graph.items
    held = np.array([user * len(wanted) + item for user, item in pairs], np.int64)
    edges_in_graph = int(np.isin(held, edges).sum())
    touched = np.unique(np.concatenate([edges, held]))

    rng = np.random.default_rng(seed)
    degree = graph.degrees("item")
    # Items by popularity, ties in random order: neighbours in this list are matches.
    ranked = np.lexsort((rng.random(len(degree)), degree))
    rank_of = np.argsort(ranked)
    first_edge = np.searchsorted(graph.users, np.arange(len(user_of) + 1))
    n_pairs = heldout_mentions = matched_mentions = heldout_only = matched_only = n_known = 0
    known, known_of = "", -1
    for user, item in pairs:
        if len(wanted[item]) < _MIN_NAME_CHARS:
            continue
        if user != known_of:
            trained = graph.items[first_edge[user] : first_edge[user + 1]].tolist()
            known, known_of = "\n".join(f" {wanted[i]} " for i in trained), user
        if f" {wanted[item]} " in known:
            n_known += 1
            continue
        match = _matched(user, int(rank_of[item]), ranked, touched, wanted, known)
        if match is None:
            continue
        named = f" {wanted[item]} " in texts[user]
        match_named = f" {wanted[match]} " in texts[user]
        n_pairs += 1
        heldout_mentions += named
        matched_mentions += match_named
        heldout_only += named and not match_named
        matched_only += match_named and not named
    differing = heldout_only + matched_only
    p_value = None
    if differing:
        p_value = float(binomtest(heldout_only, differing, alternative="greater").pvalue)
    return {
        "n_pairs": n_pairs,
        "heldout_mentions": heldout_mentions,
        "matched_mentions": matched_mentions,
        "p_value": p_value,
        "n_known_names": n_known,
        "edges_in_graph": edges_in_graph,
    }


def _normalize(text: str) -> str:
    """Lower case, letters and digits only, so that punctuation does not hide a name."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def _matched(
    user: int,
    rank: int,
    ranked: np.ndarray,
    touched: np.ndarray,
    wanted: list[str],
    known: str,
) -> int | None:
    """The item nearest in popularity that the user never touched, with a name to be compared."""
    for distance in range(1, len(ranked)):
        # More and less popular ones in turn, so that neither is preferred over all pairs.
        sign = 1 if (user + rank) % 2 else -1
        for other in (rank + sign * distance, rank - sign * distance):
            if 0 <= other < len(ranked):
                item = int(ranked[other])
                pair = user * len(wanted) + item
                place = int(np.searchsorted(touched, pair))
                is_touched = place < len(touched) and touched[place] == pair
                if is_touched or len(wanted[item]) < _MIN_NAME_CHARS:
                    continue
                if f" {wanted[item]} " not in known:
                    return item
    return None
