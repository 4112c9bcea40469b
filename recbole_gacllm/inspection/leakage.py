"""Leakage audit: do texts know interactions that were held out?

The graph, the prompts and the SFT pairs hold training edges only, by construction. This checks the
outcome. Of each held-out pair: do the user's texts name the item, or the item's texts the user?
Against the same of a matched pair: the user, and an item that they never touched, of nearly the
same training popularity. ``mentions.py`` says what counts as naming.

What a text may have from its neighbours tells nothing: an item whose name stands in the name of a
training item of the user ("Halloween" in "Halloween H20"), or in its text of layer 0, is not
compared, and parts of names that stand there are not looked for. Neither is what stands in a
node's own features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.stats import binomtest

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.convolution.graph import TrainGraph, select_neighbors
from recbole_gacllm.convolution.layers import SIDES, Layer, Side, layer_files
from recbole_gacllm.convolution.names import read_names
from recbole_gacllm.inspection.mentions import KINDS, Marks, named

_ROWS_AT_ONCE = 4096
_ALPHA = 0.05
_MIN_SHARE = 0.5  # of held-out pairs that must be checked before silence means anything

_Pairs = npt.NDArray[np.int64]


def audit_leakage(
    inputs: Path,
    descriptions: Path | None,
    heldout: Sequence[tuple[str, str]],
    seed: int,
    user_names: Mapping[str, str] | None = None,
    names_file: Path | None = None,
) -> dict[str, Any]:
    """Compare what texts name of held-out pairs with what they name of matched random pairs.

    Texts of layer 0 are looked at only where they are imported: the others are features.

    Args:
        inputs: Folder of the inputs stage (graph, layer 0, item names).
        descriptions: Folder of the descriptions stage; None if the run has only layer 0.
        heldout: (user token, item token) of the validation and test interactions.
        seed: Of the draw of matched items.
        user_names: Names of users by token, if the data has any.
        names_file: The run's own names of items; None takes those that were written last.

    Returns:
        ``n_heldout`` pairs held out, ``n_pairs`` of them compared; ``heldout_mentions`` and
        ``matched_mentions``, in how many of them user and item are named; ``kinds``, both for
        each way to name; ``p_value`` of one-sided sign tests that held-out pairs are named more
        often, the smallest one times their number (null if no pair differs); ``n_known_names``,
        pairs not compared since the item's name is in the name of a training item of the user,
        ``n_known_texts`` since it is in a text of layer 0 of one; ``n_checkable``, pairs compared
        of which item or user can be told in plain text; ``not_checked``, held-out pairs by what
        cannot; ``edges_in_graph``, held-out pairs that are training edges too, which must be 0
        unless the data repeats interactions.
    """
    graph = TrainGraph.load(inputs / "graph.npz")
    layer_0 = _layer_0(inputs, graph)
    texts = _texts(layer_0, descriptions)
    item_names = read_names(inputs, names_file)
    names: dict[Side, Mapping[str, str]] = {"user": user_names or {}, "item": item_names}
    marks = {
        side: Marks.of(side, tokens, [names[side].get(token) for token in tokens])
        for side, tokens in layer_0.tokens.items()
    }
    node_of = {s: {token: node for node, token in enumerate(layer_0.tokens[s])} for s in SIDES}
    pairs = sorted((node_of["user"][user], node_of["item"][item]) for user, item in heldout)
    users, items = np.array(pairs, np.int64).reshape(-1, 2).T

    # What stands in names and at layer 0, however it is written, may be known from there.
    in_names = marks["item"].found([[item_names.get(t, "")] for t in layer_0.tokens["item"]], True)
    below = {side: marks[side].found([[t] for t in layer_0.texts[side]], True) for side in SIDES}
    shown = {side: _shown(graph, side, descriptions) for side in SIDES}
    trained = _shown(graph, "user", None)
    by_name = _known_pairs(trained, named(in_names, marks["item"], "name"))
    by_text = _known_pairs(shown["user"], named(below["item"], marks["item"], "name"))

    # A pair as one number: a Python set of all edges of a large graph takes gigabytes.
    n_items = len(graph.item_tokens)
    edges = graph.users.astype(np.int64) * n_items + graph.items
    held = users * n_items + items
    is_known = _among(held, by_name)
    is_known_text = ~is_known & _among(held, by_text)
    is_open = ~is_known & ~is_known_text
    match = np.full(len(held), -1)
    banned = np.sort(np.concatenate([edges, held, by_name, by_text]))
    match[is_open] = _matched(users[is_open], items[is_open], graph, banned, seed)
    compared = match >= 0

    # Whether texts name one another, pair by pair, by kind.
    pairs_of = {"heldout": held[compared], "matched": (users * n_items + match)[compared]}
    mentions: dict[str, dict[str, npt.NDArray[np.bool_]]] = {}
    below["item"] = below["item"] + in_names
    for side in SIDES:
        other: Side = "item" if side == "user" else "user"
        found = marks[side].found(texts[other])
        features = marks[side].found(_features(layer_0, other), True)
        found = _unknown(found, features, shown[other], below[side])
        for kind in KINDS:
            nodes, of = map(np.int64, named(found, marks[side], kind).nonzero())
            at = np.sort(nodes * n_items + of if side == "item" else of * n_items + nodes)
            mentions[f"{side}_{kind}s"] = {name: _among(p, at) for name, p in pairs_of.items()}

    n_named = {name: np.any([of[name] for of in mentions.values()], axis=0) for name in pairs_of}
    has_text = {side: np.array([bool(some) for some in texts[side]]) for side in SIDES}
    is_checkable = has_text["user"][users] & marks["item"].is_sure[items]
    is_checkable |= has_text["item"][items] & marks["user"].is_sure[users]
    return {
        "n_pairs": int(compared.sum()),
        "heldout_mentions": int(n_named["heldout"].sum()),
        "matched_mentions": int(n_named["matched"].sum()),
        "p_value": _p_value(mentions),
        "n_known_names": int(is_known.sum()),
        "edges_in_graph": int(_among(held, edges).sum()),
        "n_heldout": len(held),
        "n_checkable": int((compared & is_checkable).sum()),
        "n_known_texts": int(is_known_text.sum()),
        "kinds": {
            kind: {f"{name}_mentions": int(found.sum()) for name, found in of.items()}
            for kind, of in mentions.items()
        },
        "not_checked": {
            "no_match": int((is_open & ~compared).sum()),
            "item_names": int((~marks["item"].has_sure_name[items]).sum()),
            "item_ids": int((~marks["item"].has_sure_id[items]).sum()),
            "user_names": int((~marks["user"].has_sure_name[users]).sum()),
            "user_ids": int((~marks["user"].has_sure_id[users]).sum()),
            "user_texts": int((~has_text["user"][users]).sum()),
            "item_texts": int((~has_text["item"][items]).sum()),
        },
    }


def verdict(audit: Mapping[str, Any]) -> Literal["suspicious", "unseen", "clean"]:
    """What an audit's record says; unseen: most held-out pairs could not be checked."""
    p_value = audit["p_value"]
    if audit["edges_in_graph"] or (p_value is not None and p_value < _ALPHA):
        return "suspicious"
    # A record without these counts only the pairs that were compared.
    n_checkable = audit.get("n_checkable", audit["n_pairs"])
    n_heldout = audit.get("n_heldout", audit["n_pairs"])
    return "clean" if n_checkable and n_checkable >= _MIN_SHARE * n_heldout else "unseen"


def blind_spots(audit: Mapping[str, Any]) -> dict[str, str]:
    """What an audit's record says was not checked, in words; nothing for older versions."""
    if "not_checked" not in audit:
        return {}
    words = {
        "user_texts": "The user has no text that could know too much",
        "item_texts": "The item has no text that could know too much",
        "item_names": "The item has no name, or one found only in quotes or with a capital",
        "item_ids": 'The item\'s id is found only as "item 5"',
        "user_names": "The user has no name, or one found only in quotes or with a capital",
        "user_ids": 'The user\'s id is found only as "user 5"',
        "no_match": "Not compared: no item is left to match",
    }
    n_heldout = audit["n_heldout"]
    shares = {
        "Held-out pairs that a name or an id can tell": audit["n_checkable"],
        "Not compared: a neighbour's text of layer 0 has the name": audit["n_known_texts"],
        **{words[key]: count for key, count in audit["not_checked"].items() if count},
    }
    return {what: f"{count:,} of {n_heldout:,}" for what, count in shares.items()}


def _layer_0(inputs: Path, graph: TrainGraph) -> Layer:
    """Layer 0 in the graph's order; empty texts if it is not kept."""
    tokens: dict[Side, list[str]] = {side: graph.tokens(side).tolist() for side in SIDES}
    layer = Layer.raw(tokens, {side: [""] * len(tokens[side]) for side in SIDES})
    file = inputs / "layer_0.parquet"
    if file.is_file():
        found = Layer.read(file)
        for side in SIDES:
            row_of = {token: row for row, token in enumerate(found.tokens[side])}
            rows = [row_of[token] for token in tokens[side]]
            layer.texts[side] = [found.texts[side][row] for row in rows]
            layer.statuses[side] = [found.statuses[side][row] for row in rows]
    return layer


def _texts(layer_0: Layer, descriptions: Path | None) -> dict[Side, list[list[str]]]:
    """The texts of each node that may know too much: all but its features."""
    texts: dict[Side, list[list[str]]] = {
        side: [
            [text] if status == "imported" else []
            for text, status in zip(layer_0.texts[side], layer_0.statuses[side], strict=True)
        ]
        for side in SIDES
    }
    for file in layer_files(descriptions) if descriptions else []:
        layer = Layer.read(file)
        for side in SIDES:
            of = dict(zip(layer.tokens[side], layer.texts[side], strict=True))
            for token, some in zip(layer_0.tokens[side], texts[side], strict=True):
                some.append(of[token])
    return texts


def _features(layer_0: Layer, side: Side) -> list[list[str]]:
    """The text of each node's features; none where the text is imported."""
    return [
        [text] if status == "raw" else []
        for text, status in zip(layer_0.texts[side], layer_0.statuses[side], strict=True)
    ]


def _shown(graph: TrainGraph, side: Side, descriptions: Path | None) -> sparse.csr_array:
    """Which neighbours' texts a node's text may be made from. Shapes: [n_nodes, n_neighbors].

    Those chosen for its prompt; of imported texts nobody knows, so it is all.
    """
    manifest = manifests.read_manifest(descriptions) if descriptions else None
    key = (manifest or {}).get("key", {})
    other: Side = "item" if side == "user" else "user"
    shape = (len(graph.tokens(side)), len(graph.tokens(other)))
    if "imported" not in key and "neighbor_rule" in key:
        rule, n_neighbors, seed = (key[name] for name in ("neighbor_rule", "n_neighbors", "seed"))
        lists = select_neighbors(graph, side, rule, n_neighbors, seed)
        ones = np.ones(len(lists.indices), np.int32)
        return sparse.csr_array((ones, lists.indices, lists.indptr), shape=shape)
    ones = np.ones(graph.n_edges, np.int32)
    return sparse.csr_array((ones, (graph.ends(side), graph.ends(other))), shape=shape)


def _known_pairs(around: sparse.csr_array, named_there: Any) -> _Pairs:
    """User and item, where what is around the user names the item. Shapes: [n_pairs], sorted."""
    n_users, n_items = around.shape
    blocks = [np.empty(0, np.int64)]
    for first in range(0, n_users, _ROWS_AT_ONCE):
        rows, columns = (around[first : first + _ROWS_AT_ONCE] @ named_there).nonzero()
        blocks.append((rows.astype(np.int64) + first) * n_items + columns)
    return np.sort(np.concatenate(blocks))


def _unknown(
    found: sparse.csr_array,
    features: sparse.csr_array,
    around: sparse.csr_array,
    below: sparse.csr_array,
) -> sparse.csr_array:
    """Marks in nodes' texts that stand neither in their features nor in what is around them.

    Shapes:
        found, features, result: ``[n_nodes, n_marks]``; around: ``[n_nodes, n_neighbors]``;
        below: ``[n_neighbors, n_marks]``.
    """
    blocks = []
    for first in range(0, found.shape[0], _ROWS_AT_ONCE):
        here = slice(first, first + _ROWS_AT_ONCE)
        known = (around[here] @ below + features[here]) > 0
        new = found[here] - found[here].multiply(known)
        new.eliminate_zeros()
        blocks.append(new)
    return sparse.vstack(blocks, format="csr")


def _among(keys: _Pairs, keys_sorted: _Pairs) -> npt.NDArray[np.bool_]:
    if not len(keys_sorted):
        return np.zeros(len(keys), bool)
    at = np.searchsorted(keys_sorted, keys)
    found: npt.NDArray[np.bool_] = keys_sorted[np.minimum(at, len(keys_sorted) - 1)] == keys
    return found


def _matched(users: _Pairs, items: _Pairs, graph: TrainGraph, banned: _Pairs, seed: int) -> _Pairs:
    """For each pair the item nearest in popularity that is not banned for the user, or -1."""
    rng = np.random.default_rng(seed)
    degree = graph.degrees("item")
    # Items by popularity, ties in random order: neighbours in this list are matches.
    ranked = np.lexsort((rng.random(len(degree)), degree))
    ranks = np.argsort(ranked)[items]
    # More and less popular ones in turn, so that neither is preferred over all pairs.
    signs = np.where((users + ranks) % 2, 1, -1)
    match = np.full(len(users), -1)
    left = np.arange(len(users))
    for distance in range(1, len(ranked)):
        for sign in (1, -1):
            at = ranks[left] + sign * signs[left] * distance
            other = ranked[np.clip(at, 0, len(ranked) - 1)]
            is_free = (at >= 0) & (at < len(ranked))
            is_free &= ~_among(users[left] * len(ranked) + other, banned)
            match[left[is_free]] = other[is_free]
            left = left[~is_free]
        if not len(left):
            break
    return match


def _p_value(mentions: Mapping[str, Mapping[str, npt.NDArray[np.bool_]]]) -> float | None:
    """The smallest of one-sided sign tests, a kind each, times their number (Bonferroni)."""
    values = []
    for found in mentions.values():
        heldout_only = int((found["heldout"] & ~found["matched"]).sum())
        differing = heldout_only + int((found["matched"] & ~found["heldout"]).sum())
        if differing:
            values.append(binomtest(heldout_only, differing, alternative="greater").pvalue)
    return min(1.0, float(min(values)) * len(values)) if values else None
