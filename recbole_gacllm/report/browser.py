"""Data of the description browser and the map, compact: lists by node number, compressed."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import numpy as np

from recbole_gacllm.convolution.layers import SIDES, Layer, Side, layer_name
from recbole_gacllm.report.charts import N_COLOURS, scaled
from recbole_gacllm.report.scoring import Scored
from recbole_gacllm.report.texts import Texts

# A data set with more users or items is shown by a sample, so that the page stays a page.
MAX_NODES = {"user": 10_000, "item": 12_000}


def packed(data: Any) -> str:
    """JSON, compressed and in base64: small, and nothing of it is ever read as markup."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    raw = text.encode("utf-8", "backslashreplace")
    return base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode()


def browser_data(texts: Texts, scored: Scored | str) -> dict[str, Any]:
    """Texts, neighbours and recommendations of every node.

    Returns:
        ``user`` and ``item``, each with one list entry a node: token ``t``, training interactions
        ``d``, texts of each layer ``x``, neighbours ``n``; for items names ``c`` and categories
        ``g``; for users recommended items ``r`` and held-out items ``h``. Nodes are named by their
        place in these lists. ``names`` are the layers'. ``s`` holds the statuses that are not the
        usual ones.
    """
    layers = texts.run.layers
    nodes_of = {side: _sample(texts, side) for side in SIDES}
    tokens = {side: texts.tokens(side) for side in SIDES}
    place = {
        side: {tokens[side][node]: number for number, node in enumerate(nodes)}
        for side, nodes in nodes_of.items()
    }
    data: dict[str, Any] = {
        "layers": len(layers),
        "names": [layer_name(*layer).capitalize() for layer in enumerate(texts.run.kinds)],
        "total": {side: len(tokens[side]) for side in SIDES},
    }
    for side, nodes in nodes_of.items():
        data[side] = {
            "t": [tokens[side][node] for node in nodes],
            "d": texts.run.graph.degrees(side)[nodes].tolist(),
            "x": [[layer.texts[side][node] for node in nodes] for layer in layers],
            "s": [_statuses(layer, side, nodes) for layer in layers],
        }
        if texts.run.has_prompts:
            other: Side = "item" if side == "user" else "user"
            lists = texts.run.neighbor_lists(side)
            data[side]["n"] = [
                _places([tokens[other][n] for n in lists.of(node)], place[other]) for node in nodes
            ]
    users, items = data["user"], data["item"]
    items["c"] = [texts.run.names.get(token, token) for token in items["t"]]
    if texts.category is not None:
        values = texts.category[1]
        items["g"] = [", ".join(values.get(token, ())) for token in items["t"]]
    if not isinstance(scored, str):
        if scored.top:
            users["r"] = [_places(scored.top.get(token, []), place["item"]) for token in users["t"]]
        users["h"] = [_places(scored.heldout.get(token, []), place["item"]) for token in users["t"]]
    data["start"] = _start(users)
    return data


def map_data(texts: Texts) -> dict[str, Any] | None:
    """Item texts of every layer in two dimensions, by the principal axes that all layers share.

    None without embeddings. ``groups`` are names of colours, the last for all others; ``share`` is
    the part of the variance that the two axes hold.
    """
    if len(texts.embeddings) < len(texts.run.layers):
        return None
    n_users = len(texts.tokens("user"))
    nodes = np.array(_sample(texts, "item"))
    tokens = [texts.tokens("item")[node] for node in nodes]
    tables = [np.asarray(table[n_users + nodes], np.float64) for table in texts.embeddings]
    # The step from raw to generated prose is the largest of all, and says nothing about items.
    stacked = np.concatenate([table - table.mean(axis=0) for table in tables])
    values, vectors = np.linalg.eigh(stacked.T @ stacked)  # ascending
    points = scaled(stacked @ vectors[:, :-3:-1])  # [n_layers * n_items, 2]
    names, group = _groups(texts, tokens)
    return {
        "layers": [points[at * len(nodes) : (at + 1) * len(nodes)] for at in range(len(tables))],
        "groups": names,
        "group": group,
        "items": tokens,
        "share": float(values[-2:].sum() / max(values.sum(), 1e-12)),
    }


def _groups(texts: Texts, tokens: list[str]) -> tuple[list[str], list[int]]:
    """Colours: the most frequent first values of the category."""
    values = texts.category[1] if texts.category is not None else {}
    first = [values[token][0] if values.get(token) else "" for token in tokens]
    frequent = sorted({name for name in first if name}, key=lambda name: (-first.count(name), name))
    names = frequent[:N_COLOURS]
    number = {name: place for place, name in enumerate(names)}
    return [*names, "other"], [number.get(name, len(names)) for name in first]


def _sample(texts: Texts, side: Side) -> list[int]:
    n = len(texts.tokens(side))
    if n <= MAX_NODES[side]:
        return list(range(n))
    nodes = np.random.default_rng(0).choice(n, MAX_NODES[side], replace=False)
    return sorted(nodes.tolist())


def _places(tokens: list[str], place: dict[str, int]) -> list[int | str]:
    """Numbers of nodes; a node outside the sample is named by its token."""
    return [place.get(token, token) for token in tokens]


def _statuses(layer: Layer, side: Side, nodes: list[int]) -> dict[int, str]:
    """Statuses and reasons of the nodes whose text is not simply raw or generated."""
    words = {}
    for number, node in enumerate(nodes):
        status, reason = layer.statuses[side][node], layer.reasons[side][node]
        if status not in ("raw", "generated"):
            words[number] = f"{status.replace('_', ' ')}{': ' if reason else ''}{reason}"
    return words


def _start(users: dict[str, Any]) -> int:
    """A user to open the page with: several hits among the recommendations, if there is one."""
    if "r" not in users:
        return 0
    hits = [len(set(top) & set(held)) for top, held in zip(users["r"], users["h"], strict=True)]
    several = [number for number, count in enumerate(hits) if 2 <= count <= 4]
    return several[0] if several else int(np.argmax(hits))
