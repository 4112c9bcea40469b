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

import copy
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
from recbole_gacllm.inspection.mentions import KINDS, Marks

_ROWS_AT_ONCE = 4096
_ALPHA = 0.05
_MIN_SHARE = 0.5  # of held-out pairs that must be checked before silence means anything

# A pair is one number, user * n_items + item: a Python set of all edges takes gigabytes.
_Pairs = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]
_Texts = dict[Side, list[list[str]]]


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
    tokens: dict[Side, list[str]] = {side: graph.tokens(side).tolist() for side in SIDES}
    raw, features, texts = _texts(tokens, inputs, descriptions)
    item_names = read_names(inputs, names_file)
    names: dict[Side, Mapping[str, str]] = {"user": user_names or {}, "item": item_names}
    marks = {s: Marks.of(s, tokens[s], [names[s].get(token) for token in tokens[s]]) for s in SIDES}
    node_of = {side: {token: node for node, token in enumerate(tokens[side])} for side in SIDES}
    nodes = sorted((node_of["user"][user], node_of["item"][item]) for user, item in heldout)
    users, items = np.array(nodes, np.int64).reshape(-1, 2).T
    n_items = len(tokens["item"])
    edges = graph.users.astype(np.int64) * n_items + graph.items
    pairs = users * n_items + items

    # What stands in names and at layer 0, however it is written, may come from there.
    in_names = marks["item"].in_texts([[item_names.get(t, "")] for t in tokens["item"]], True)
    below = {side: marks[side].in_texts(raw[side], True) for side in SIDES}
    shown = {side: _shown(graph, side, descriptions) for side in SIDES}
    trained = _shown(graph, "user", None)
    by_name = _pairs_named_around(trained, marks["item"].owned(in_names, "name"))
    by_text = _pairs_named_around(shown["user"], marks["item"].owned(below["item"], "name"))
    is_by_name = _among(pairs, by_name)
    is_by_text = ~is_by_name & _among(pairs, by_text)
    is_open = ~is_by_name & ~is_by_text

    match = np.full(len(pairs), -1)
    banned = np.sort(np.concatenate([edges, pairs, by_name, by_text]))
    match[is_open] = _matched(users[is_open], items[is_open], graph, banned, seed)
    is_compared = match >= 0
    sets = {"heldout": pairs[is_compared], "matched": (users * n_items + match)[is_compared]}

    # Whether texts name one another, pair by pair, by kind.
    mentions: dict[str, dict[str, _Bools]] = {}
    below["item"] = below["item"] + in_names
    for side in SIDES:
        other: Side = "item" if side == "user" else "user"
        in_texts = marks[side].in_texts(texts[other])
        in_features = marks[side].in_texts(features[other], True)
        new = _new(in_texts, in_features, shown[other], below[side])
        for kind in KINDS:
            of, to = map(np.int64, marks[side].owned(new, kind).nonzero())
            at = np.sort(of * n_items + to if side == "item" else to * n_items + of)
            mentions[f"{side}_{kind}s"] = {name: _among(some, at) for name, some in sets.items()}

    n_named = {
        f"{name}_mentions": int(np.any([of[name] for of in mentions.values()], axis=0).sum())
        for name in sets
    }
    has_text = {side: np.array([bool(of_node) for of_node in texts[side]]) for side in SIDES}
    is_checkable = has_text["user"][users] & marks["item"].is_sure[items]
    is_checkable |= has_text["item"][items] & marks["user"].is_sure[users]
    missing = {
        "no_match": is_open & ~is_compared,
        "item_names": ~marks["item"].has_sure_name[items],
        "item_ids": ~marks["item"].has_sure_id[items],
        "user_names": ~marks["user"].has_sure_name[users],
        "user_ids": ~marks["user"].has_sure_id[users],
        "user_texts": ~has_text["user"][users],
        "item_texts": ~has_text["item"][items],
    }
    return {
        "n_pairs": int(is_compared.sum()),
        **n_named,
        "p_value": _p_value(mentions),
        "n_known_names": int(is_by_name.sum()),
        "edges_in_graph": int(_among(pairs, edges).sum()),
        "n_heldout": len(pairs),
        "n_checkable": int((is_compared & is_checkable).sum()),
        "n_known_texts": int(is_by_text.sum()),
        "kinds": {
            kind: {f"{name}_mentions": int(is_named.sum()) for name, is_named in of.items()}
            for kind, of in mentions.items()
        },
        "not_checked": {what: int(is_missing.sum()) for what, is_missing in missing.items()},
    }


def verdict(audit: Mapping[str, Any]) -> Literal["suspicious", "unseen", "clean"]:
    """What an audit's record says; unseen: most held-out pairs could not be checked."""
    p_value = audit["p_value"]
    if audit["edges_in_graph"] or (p_value is not None and p_value < _ALPHA):
        return "suspicious"
    # Some committed runs count only the pairs that were compared.
    n_checkable = audit.get("n_checkable", audit["n_pairs"])
    n_heldout = audit.get("n_heldout", audit["n_pairs"])
    return "clean" if n_checkable and n_checkable >= _MIN_SHARE * n_heldout else "unseen"


def _texts(
    tokens: Mapping[Side, list[str]], inputs: Path, descriptions: Path | None
) -> tuple[_Texts, _Texts, _Texts]:
    """Of each node its text of layer 0, its features, and its texts that may know too much."""
    raw: _Texts = {side: [[] for _ in tokens[side]] for side in SIDES}
    features, texts = copy.deepcopy(raw), copy.deepcopy(raw)
    files = [inputs / "layer_0.parquet", *(layer_files(descriptions) if descriptions else [])]
    for number, file in enumerate(files):
        layer = Layer.read(file)
        for side in SIDES:
            row_of = {token: row for row, token in enumerate(layer.tokens[side])}
            for node, token in enumerate(tokens[side]):
                text, status = (of[side][row_of[token]] for of in (layer.texts, layer.statuses))
                if number == 0:
                    raw[side][node].append(text)
                is_feature = number == 0 and status == "raw"
                (features if is_feature else texts)[side][node].append(text)
    return raw, features, texts


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


def _pairs_named_around(around: sparse.csr_array, named_there: Any) -> _Pairs:
    """Pairs where what is around the user names the item. Shapes: [n_pairs], sorted."""
    n_users, n_items = around.shape
    blocks = [np.empty(0, np.int64)]
    for first in range(0, n_users, _ROWS_AT_ONCE):
        rows, columns = (around[first : first + _ROWS_AT_ONCE] @ named_there).nonzero()
        blocks.append((rows.astype(np.int64) + first) * n_items + columns)
    return np.sort(np.concatenate(blocks))


def _new(
    in_texts: sparse.csr_array,
    in_features: sparse.csr_array,
    around: sparse.csr_array,
    below: sparse.csr_array,
) -> sparse.csr_array:
    """Marks in nodes' texts that stand neither in their features nor in what is around them.

    Shapes:
        in_texts, in_features, result: ``[n_nodes, n_marks]``; around: ``[n_nodes, n_neighbors]``;
        below: ``[n_neighbors, n_marks]``.
    """
    blocks = []
    for first in range(0, in_texts.shape[0], _ROWS_AT_ONCE):
        here = slice(first, first + _ROWS_AT_ONCE)
        is_old = (around[here] @ below + in_features[here]) > 0
        new = in_texts[here] - in_texts[here].multiply(is_old)
        new.eliminate_zeros()
        blocks.append(new)
    return sparse.vstack(blocks, format="csr")


def _among(pairs: _Pairs, pairs_sorted: _Pairs) -> _Bools:
    if not len(pairs_sorted):
        return np.zeros(len(pairs), bool)
    at = np.minimum(np.searchsorted(pairs_sorted, pairs), len(pairs_sorted) - 1)
    is_among: _Bools = pairs_sorted[at] == pairs
    return is_among


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


def _p_value(mentions: Mapping[str, Mapping[str, _Bools]]) -> float | None:
    """The smallest of one-sided sign tests, a kind each, times their number (Bonferroni)."""
    values = []
    for is_named in mentions.values():
        heldout_only = int((is_named["heldout"] & ~is_named["matched"]).sum())
        differing = heldout_only + int((is_named["matched"] & ~is_named["heldout"]).sum())
        if differing:
            values.append(binomtest(heldout_only, differing, alternative="greater").pvalue)
    return min(1.0, float(min(values)) * len(values)) if values else None
