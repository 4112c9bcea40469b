"""The training graph and which neighbours of a node a prompt shows.

Made for graphs of 10^6 nodes and 10^7 edges: edges are only touched by numpy.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recbole_gacllm.artifacts import disk
from recbole_gacllm.convolution.layers import Side
from recbole_gacllm.errors import GaCLLMError

RULES = ("random", "recent", "rare_first")

_EDGES_A_BLOCK = 1 << 18

_Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class TrainGraph:
    """The bipartite graph of the training interactions, with raw tokens for nodes.

    Two interactions of the same user and item are one edge, at the later time. Edges are held
    sorted by user, then item.

    Raises:
        ValueError: If tokens repeat, lengths differ, an index is out of range or a time is not
            finite.
    """

    user_tokens: npt.NDArray[np.str_]  # RecBole's raw token of each user, without padding
    item_tokens: npt.NDArray[np.str_]
    users: _Ints  # [n_edges], indices into user_tokens
    items: _Ints  # [n_edges]
    timestamps: npt.NDArray[np.float64] | None = None  # [n_edges]; None if the data has no times

    def __post_init__(self) -> None:
        user_tokens = _check_tokens("user", self.user_tokens)
        item_tokens = _check_tokens("item", self.item_tokens)
        users = _check_indices("user", self.users, len(user_tokens))
        items = _check_indices("item", self.items, len(item_tokens))
        times = self.timestamps
        if len(users) != len(items):
            raise ValueError(f"{len(users)} users but {len(items)} items of edges; give pairs")
        if times is not None:
            times = np.asarray(times, dtype=np.float64)
            if times.shape != users.shape:
                raise ValueError(f"{times.shape} timestamps for {users.shape} edges; give one each")
            if not np.isfinite(times).all():
                raise ValueError("a timestamp is NaN or infinite; fix the time field of .inter")

        keys = users.astype(np.int64) * max(len(item_tokens), 1) + items  # [n_edges]
        if not (keys[1:] > keys[:-1]).all():
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            last = np.append(keys[1:] != keys[:-1], True)
            if times is not None and not last.all():  # of edges that repeat, the latest last
                repeated = np.flatnonzero(~(last & np.append(True, last[:-1])))
                among = np.lexsort((times[order[repeated]], keys[repeated]))
                order[repeated] = order[repeated[among]]
            order = order[last]
            users, items = users[order], items[order]
            times = None if times is None else times[order]
        for name, value in (
            ("user_tokens", user_tokens),
            ("item_tokens", item_tokens),
            ("users", users),
            ("items", items),
            ("timestamps", times),
        ):
            object.__setattr__(self, name, value)

    @property
    def n_edges(self) -> int:
        """Number of distinct (user, item) pairs."""
        return len(self.users)

    def tokens(self, side: Side) -> npt.NDArray[np.str_]:
        """Raw tokens of the nodes of one side."""
        return self.user_tokens if side == "user" else self.item_tokens

    def ends(self, side: Side) -> _Ints:
        """Where each edge ends on one side. Shapes: [n_edges]."""
        return self.users if side == "user" else self.items

    def degrees(self, side: Side) -> npt.NDArray[np.int64]:
        """Training degree of each node of one side. Shapes: [n_nodes]."""
        return np.bincount(self.ends(side), minlength=len(self.tokens(side))).astype(np.int64)

    def fingerprint(self) -> str:
        """Hash of what the graph says, whatever the order of its nodes and edges."""
        digest = hashlib.sha256()
        for hashes in self.token_hashes.values():
            digest.update(np.sort(hashes).tobytes() + b"|")
        edges = _mix(self.token_hashes["user"][self.users])
        edges = _mix(edges + self.token_hashes["item"][self.items])
        if self.timestamps is not None:
            digest.update(b"times|")
            edges = _mix(edges + (self.timestamps + 0.0).view(np.uint64))  # -0.0 is 0.0
        digest.update(np.sort(edges).tobytes())
        return digest.hexdigest()

    @cached_property
    def token_hashes(self) -> dict[Side, _Hashes]:
        """64-bit hash of each node's token, by side. Shapes: [n_nodes]."""
        return {"user": _hash_tokens(self.user_tokens), "item": _hash_tokens(self.item_tokens)}

    def save(self, path: Path) -> None:
        """Write as npz, whole or not at all."""
        arrays = {
            name: getattr(self, name) for name in ("user_tokens", "item_tokens", "users", "items")
        }
        if self.timestamps is not None:
            arrays["timestamps"] = self.timestamps
        with disk.atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> TrainGraph:
        """Read what :meth:`save` wrote.

        Raises:
            GaCLLMError: If the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in arrays.files})
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise GaCLLMError(
                f"{path} is damaged: {error}. Delete it and start again: it is made anew."
            ) from error


@dataclass(frozen=True, eq=False)
class NeighborLists:
    """The chosen neighbours of every node of one side, best first."""

    indptr: npt.NDArray[np.int64]  # [n_nodes + 1], where each node's list starts, and the end
    indices: _Ints  # [indptr[-1]], indices into the tokens of the other side

    def of(self, node: int) -> _Ints:
        """Neighbours of one node, best first; empty if it has none."""
        return self.indices[self.indptr[node] : self.indptr[node + 1]]


def check_rule(graph: TrainGraph, rule: str) -> None:
    """Refuse a rule that is unknown or that the graph cannot serve.

    Raises:
        ValueError: If the rule is unknown, or ``recent`` is asked of a graph without timestamps.
    """
    if rule not in RULES:
        raise ValueError(f"neighbor_rule is {rule!r}; there are {', '.join(RULES)}")
    if rule == "recent" and graph.timestamps is None:
        raise ValueError(
            "neighbor_rule is 'recent', but the interactions have no timestamps; name the time "
            "field in RecBole's TIME_FIELD and load_col, or choose 'random' or 'rare_first'"
        )


def select_neighbors(
    graph: TrainGraph, side: Side, rule: str, n_neighbors: int, seed: int
) -> NeighborLists:
    """Choose at most ``n_neighbors`` training neighbours for every node of a side: ``N(v)``.

    The paper does not say how; the rules are ours. ``random`` ranks by a hash of (seed, side, token
    of the node, token of the neighbour), so a list depends neither on internal ids and edge order
    nor on other nodes. ``recent`` puts the latest interactions first, ``rare_first`` the neighbours
    of lowest training degree, which tell most about a node; both break ties by that hash.

    Raises:
        ValueError: As :func:`check_rule`, or if ``n_neighbors`` is negative.
    """
    check_rule(graph, rule)
    if n_neighbors < 0:
        raise ValueError(f"n_neighbors is {n_neighbors}; give 0 or more")
    other: Side = "item" if side == "user" else "user"
    nodes, neighbors = graph.ends(side), graph.ends(other)

    salt = _hash_tokens([f"{seed}|{side}"])[0]
    hashes = _mix(graph.token_hashes[side] + salt)  # [n_nodes]
    degrees, other_degrees = graph.degrees(side), graph.degrees(other)
    starts = np.concatenate([[0], np.cumsum(degrees)])  # [n_nodes + 1]
    by_node = None if side == "user" else np.argsort(nodes, kind="stable")  # [n_edges]
    chosen: list[npt.NDArray[Any]] = [neighbors[:0]]
    # A few hundred thousand edges at a time: sorting them in the cache takes half the time.
    cuts = np.searchsorted(starts, np.arange(0, graph.n_edges, _EDGES_A_BLOCK))
    for first, last in pairwise(np.unique([*cuts, len(degrees)]).tolist()):
        here = slice(starts[first], starts[last])
        block = here if by_node is None else by_node[here]
        ends, others = nodes[block], neighbors[block]  # [n_edges of the block]
        ranks = _mix(hashes[ends] + graph.token_hashes[other][others])
        if rule == "recent" and graph.timestamps is not None:
            order = np.lexsort((ranks, -graph.timestamps[block], ends))
        elif rule == "rare_first":
            order = np.lexsort((ranks, other_degrees[others], ends))
        else:
            order = np.lexsort((ranks, ends))
        position = np.arange(here.start, here.stop) - starts[ends]  # within the node's list
        chosen.append(others[order[position < n_neighbors]])

    indptr = np.zeros(len(degrees) + 1, dtype=np.int64)
    np.cumsum(np.minimum(degrees, n_neighbors), out=indptr[1:])
    return NeighborLists(indptr, np.concatenate(chosen))


def _check_tokens(side: Side, tokens: Sequence[str] | npt.NDArray[np.str_]) -> npt.NDArray[np.str_]:
    array = np.asarray(tokens, dtype=np.str_)
    if array.ndim != 1:
        raise ValueError(f"{side}_tokens has {array.ndim} dimensions; give a list of tokens")
    if len(np.unique(array)) != len(array):
        raise ValueError(f"{side}_tokens repeats a token; give each {side} once")
    return array


def _check_indices(side: Side, indices: _Ints, n_nodes: int) -> _Ints:
    array = np.asarray(indices)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{side}s of edges: {array.dtype}{list(array.shape)}; give a list of ints")
    if array.size and (array.min() < 0 or array.max() >= n_nodes):
        raise ValueError(
            f"{side}s of edges lie in {array.min()}..{array.max()}, but there are {n_nodes}; "
            "count from 0 and leave RecBole's padding id out"
        )
    return array.astype(np.int32)


def _hash_tokens(tokens: Sequence[str] | npt.NDArray[np.str_]) -> _Hashes:
    digests = b"".join(
        hashlib.blake2b(str(token).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for token in tokens
    )
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _mix(hashes: _Hashes) -> _Hashes:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection that scatters all bits."""
    mixed = hashes + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
