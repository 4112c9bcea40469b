"""What a layer of descriptions is like: figures and samples, for the command ``audit``."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import py3langid

from recbole_gacllm.descriptions.layers import SIDES, Side
from recbole_gacllm.descriptions.reading import RunDescriptions
from recbole_gacllm.descriptions.words import words as _words

# Shorter names ("Go", "M") stand in any text.
_MIN_NAME_CHARS = 4
_SHARE_OF_OPENING = 0.95  # of a side's texts begin with its words
_MAX_TEXTS_OF_A_LANGUAGE = 20_000  # two seconds
_QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


@dataclass(frozen=True)
class Sample:
    """A description next to what it was made from.

    Attributes:
        node: Side and raw token.
        below: The node's text at the layer below.
        n_neighbors: Neighbours chosen for its prompt.
        text: The description.
    """

    node: str
    below: str
    n_neighbors: int
    text: str


@dataclass(frozen=True)
class SideQuality:
    """Figures of one side of a layer; shares are of its nodes.

    Attributes:
        n_nodes: Nodes.
        statuses: How many texts are generated, failed, imported, …
        failures: Reason -> nodes that carry the text below for it.
        n_words: Quantiles of the length in words.
        own_copies: Share of texts that are the node's own text of the layer below, but for case,
            punctuation and the opening that nearly all texts of the side share, carried-over ones
            left out.
        neighbor_copies: Share of texts that are a neighbour's text of the layer below.
        repeated: Share of texts that another node of the side has, too.
        distinct: Different n-grams of words over all n-grams, for n = 1 and 2.
        scripts: Share of texts by the script that most of their letters are of.
        languages: Share of texts by their most likely language, an ISO 639-1 code; none without a
            letter. Of a random part where there are more than 20,000.
        own_names: Share of descriptions that name their own item; None for users.
        neighbor_names: Share that name an item of their prompt; None for items.
        samples: Descriptions drawn at random.
    """

    n_nodes: int
    statuses: dict[str, int]
    failures: dict[str, int]
    n_words: dict[str, int]
    own_copies: float
    neighbor_copies: float
    repeated: float
    distinct: tuple[float, float]
    scripts: dict[str, float]
    languages: dict[str, float]
    own_names: float | None
    neighbor_names: float | None
    samples: list[Sample]


@dataclass(frozen=True)
class LayerQuality:
    """A layer.

    Attributes:
        number: Of the layer, from 1.
        report: What the stage's manifest says: retries, truncated answers, tokens, seconds, …
        sides: Figures of users and items.
    """

    number: int
    report: dict[str, Any]
    sides: dict[Side, SideQuality]


def layer_qualities(found: RunDescriptions, n_samples: int, seed: int) -> Iterator[LayerQuality]:
    """Figures of every layer above 0.

    Args:
        found: Finished descriptions.
        n_samples: Descriptions to show of each layer, of both sides together.
        seed: Of their draw.
    """
    reports = found.manifest.get("layers", [])
    rng = random.Random(seed)
    for number in range(1, len(found.layers)):
        shown = {"user": n_samples // 2, "item": n_samples - n_samples // 2}
        yield LayerQuality(
            number,
            reports[number - 1] if number <= len(reports) else {},
            {side: _side_quality(found, number, side, shown[side], rng) for side in SIDES},
        )


def _side_quality(
    found: RunDescriptions, number: int, side: Side, n_samples: int, rng: random.Random
) -> SideQuality:
    other: Side = "item" if side == "user" else "user"
    layer, below = found.layers[number], found.layers[number - 1]
    statuses, n_nodes = layer.statuses[side], len(layer.tokens[side])
    words = [_words(text) for text in layer.texts[side]]
    plain = [" ".join(text) for text in words]
    new = _without_opening(words)
    own, around = (
        list(zip(map(" ".join, texts), _without_opening(texts), strict=True))
        for texts in ([_words(text) for text in below.texts[s]] for s in (side, other))
    )
    names = [_padded(" ".join(_words(found.names[token]))) for token in layer.tokens["item"]]
    neighbors = found.neighbor_lists(side)
    times = Counter(plain)
    made = [node for node in range(n_nodes) if statuses[node] in ("generated", "imported")]

    def share(count: int, of: int = n_nodes) -> float:
        return count / of if of else 0.0

    def names_one(node: int, items: Sequence[int]) -> bool:
        text = _padded(plain[node])
        return any(
            len(names[item]) >= _MIN_NAME_CHARS + 2 and names[item] in text for item in items
        )

    drawn = sorted(rng.sample(made, min(n_samples, len(made))))
    return SideQuality(
        n_nodes=n_nodes,
        statuses=dict(Counter(statuses)),
        failures=dict(Counter(reason for reason in layer.reasons[side] if reason)),
        n_words={
            name: int(np.quantile([len(text) for text in words], q, method="nearest"))
            for name, q in _QUANTILES.items()
        },
        own_copies=share(sum(new[node] in own[node] for node in made)),
        neighbor_copies=share(
            sum(any(new[node] in around[n] for n in neighbors.of(node)) for node in made)
        ),
        repeated=share(sum(times[text] > 1 for text in plain)),
        distinct=(_distinct(words, 1), _distinct(words, 2)),
        scripts={
            name: share(count)
            for name, count in Counter(map(_script, layer.texts[side])).most_common()
        },
        languages=_languages(layer.texts[side], rng),
        own_names=share(sum(names_one(node, [node]) for node in made), len(made))
        if side == "item"
        else None,
        neighbor_names=share(
            sum(names_one(node, neighbors.of(node).tolist()) for node in made), len(made)
        )
        if side == "user"
        else None,
        samples=[
            Sample(
                node=f"{side} {layer.tokens[side][node]}",
                below=below.texts[side][node],
                n_neighbors=len(neighbors.of(node)),
                text=layer.texts[side][node],
            )
            for node in drawn
        ],
    )


def _without_opening(texts: Sequence[Sequence[str]]) -> list[str]:
    """Each text without the words that nearly all begin with, such as "this person enjoys".

    A prompt begins the answer, so a copy of a text below has another opening than that.
    """
    shared: list[str] = []
    least = max(2, _SHARE_OF_OPENING * len(texts))
    while True:
        n = len(shared)
        follows = Counter(text[n] for text in texts if len(text) > n + 1 and text[:n] == shared)
        word, count = next(iter(follows.most_common(1)), ("", 0))
        if count < least:
            return [" ".join(text[n:] if text[:n] == shared else text) for text in texts]
        shared.append(word)


def _padded(text: str) -> str:
    """Between blanks, so that a part of it is a sequence of whole words."""
    return f" {text} "


def _distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams; n-grams do not cross texts (Li et al., 2016)."""
    grams = Counter(tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1))
    total = sum(grams.values())
    return len(grams) / total if total else 0.0


def _script(text: str) -> str:
    """The script of most letters, as Unicode names it: LATIN, CYRILLIC, CJK, …; none without."""
    scripts = Counter(unicodedata.name(char, "?").split()[0] for char in text if char.isalpha())
    return scripts.most_common(1)[0][0] if scripts else "none"


def _languages(texts: Sequence[str], rng: random.Random) -> dict[str, float]:
    """Shares by py3langid, a naive Bayes over byte n-grams; texts of few words may mislead it."""
    if len(texts) > _MAX_TEXTS_OF_A_LANGUAGE:
        texts = rng.sample(texts, _MAX_TEXTS_OF_A_LANGUAGE)
    found = Counter(
        py3langid.classify(text)[0] if any(map(str.isalpha, text)) else "none" for text in texts
    )
    return {name: count / len(texts) for name, count in found.most_common()}
