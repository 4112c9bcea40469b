"""What a layer of descriptions is like: figures and samples, and both as lines of text."""

from __future__ import annotations

import random
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import py3langid

from recbole_gacllm.convolution.graph import NeighborLists
from recbole_gacllm.convolution.layers import SIDES, Kind, Side, layer_name
from recbole_gacllm.convolution.words import words as words_of
from recbole_gacllm.inspection.mentions import MIN_NAME_CHARS
from recbole_gacllm.inspection.reading import RunDescriptions

_SHARE_OF_OPENING = 0.95  # of a side's texts begin with its words
_MAX_TEXTS_OF_A_LANGUAGE = 20_000  # two seconds
_QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
_MAX_PRINTED_CHARS = 600  # of a sample
_MAX_SHARES = 5


@dataclass(frozen=True)
class Sample:
    """A description next to what it was made from."""

    node: str  # side and raw token
    below: str  # the node's text at the layer below
    n_neighbors: int  # chosen for its prompt
    text: str


@dataclass(frozen=True)
class SideQuality:
    """Figures of one side of a layer; shares are of its nodes.

    A copy is equal but for case, punctuation and the opening that nearly all texts of the side
    share; carried-over texts are none.
    """

    n_nodes: int
    statuses: dict[str, int]  # how many texts are generated, failed, imported, …
    failures: dict[str, int]  # reason -> nodes that carry the text below for it
    n_words: dict[str, int]  # quantiles of the length
    own_copies: float  # share that copies the node's own text of the layer below
    neighbor_copies: float  # share that copies a neighbour's
    repeated: float  # share that another node of the side has, too
    distinct: tuple[float, float]  # different n-grams of words over all n-grams, for n = 1 and 2
    scripts: dict[str, float]  # shares by the script that most of their letters are of
    languages: dict[str, float]  # by ISO 639-1 code, or none; of a random part of many texts
    own_names: float | None  # share of descriptions that name their own item; None for users
    neighbor_names: float | None  # share that name an item of their prompt; None for items
    samples: list[Sample]  # drawn at random


@dataclass(frozen=True)
class LayerQuality:
    """Layer ``number``, from 1: what the stage's manifest says of it, and figures of both sides."""

    number: int
    kind: Kind
    report: dict[str, Any]
    sides: dict[Side, SideQuality]


def layer_qualities(run: RunDescriptions, n_samples: int, seed: int) -> Iterator[LayerQuality]:
    """Figures of every layer above 0, and of each ``n_samples`` descriptions of both sides."""
    reports = run.manifest.get("layers", [])
    rng = random.Random(seed)
    for number in range(1, len(run.layers)):
        n_of_side = {"user": n_samples // 2, "item": n_samples - n_samples // 2}
        yield LayerQuality(
            number,
            run.kinds[number],
            reports[number - 1] if number <= len(reports) else {},
            {side: _side_quality(run, number, side, n_of_side[side], rng) for side in SIDES},
        )


def _side_quality(
    run: RunDescriptions, number: int, side: Side, n_samples: int, rng: random.Random
) -> SideQuality:
    other: Side = "item" if side == "user" else "user"
    layer, below = run.layers[number], run.layers[number - 1]
    texts, statuses, n_nodes = layer.texts[side], layer.statuses[side], len(layer.tokens[side])
    words = [words_of(text) for text in texts]
    plain = [" ".join(of_text) for of_text in words]
    new = _without_opening(words)
    own, around = (
        list(zip(map(" ".join, of_side), _without_opening(of_side), strict=True))
        for of_side in ([words_of(text) for text in below.texts[s]] for s in (side, other))
    )
    # Between blanks, so that a name is a sequence of whole words.
    names = [f" {' '.join(words_of(run.names[token]))} " for token in layer.tokens["item"]]
    neighbors = run.neighbor_lists(side)
    if run.kinds[number] == "knowledge":  # its prompts show none
        neighbors = NeighborLists(np.zeros_like(neighbors.indptr), neighbors.indices[:0])
    times = Counter(plain)
    new_nodes = [node for node in range(n_nodes) if statuses[node] in ("generated", "imported")]

    def share(count: int, of: int = n_nodes) -> float:
        return count / of if of else 0.0

    def names_one(node: int, items: Sequence[int]) -> bool:
        long_names = (names[item] for item in items if len(names[item]) >= MIN_NAME_CHARS + 2)
        return any(name in f" {plain[node]} " for name in long_names)

    sampled = sorted(rng.sample(new_nodes, min(n_samples, len(new_nodes))))
    lengths = [len(of_text) for of_text in words]
    scripts = Counter(map(_script, texts)).most_common()
    n_copies = sum(any(new[node] in around[n] for n in neighbors.of(node)) for node in new_nodes)
    naming = [names_one(n, [n] if side == "item" else neighbors.of(n).tolist()) for n in new_nodes]
    share_of_names = share(sum(naming), len(new_nodes))
    return SideQuality(
        n_nodes=n_nodes,
        statuses=dict(Counter(statuses)),
        failures=dict(Counter(reason for reason in layer.reasons[side] if reason)),
        n_words={
            name: int(np.quantile(lengths, q, method="nearest")) for name, q in _QUANTILES.items()
        },
        own_copies=share(sum(new[node] in own[node] for node in new_nodes)),
        neighbor_copies=share(n_copies),
        repeated=share(sum(times[text] > 1 for text in plain)),
        distinct=(_distinct(words, 1), _distinct(words, 2)),
        scripts={name: share(count) for name, count in scripts},
        languages=_languages(texts, rng),
        own_names=share_of_names if side == "item" else None,
        neighbor_names=share_of_names if side == "user" else None,
        samples=[
            Sample(
                node=f"{side} {layer.tokens[side][node]}",
                below=below.texts[side][node],
                n_neighbors=len(neighbors.of(node)),
                text=texts[node],
            )
            for node in sampled
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


def _distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams; n-grams do not cross texts (Li et al., 2016)."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _script(text: str) -> str:
    """The script of most letters, as Unicode names it: LATIN, CYRILLIC, CJK, …; none without."""
    scripts = Counter(unicodedata.name(char, "?").split()[0] for char in text if char.isalpha())
    return scripts.most_common(1)[0][0] if scripts else "none"


def _languages(texts: Sequence[str], rng: random.Random) -> dict[str, float]:
    """Shares by py3langid, a naive Bayes over byte n-grams; texts of few words may mislead it."""
    if len(texts) > _MAX_TEXTS_OF_A_LANGUAGE:
        texts = rng.sample(texts, _MAX_TEXTS_OF_A_LANGUAGE)
    languages = Counter(
        py3langid.classify(text)[0] if any(map(str.isalpha, text)) else "none" for text in texts
    )
    return {name: count / len(texts) for name, count in languages.most_common()}


def quality_lines(layer: LayerQuality) -> Iterator[str]:
    """What a layer is like, line by line."""
    report = layer.report
    yield layer_name(layer.number, layer.kind)
    if report.get("imported"):
        yield (
            f"  imported        {report['n_imported']} nodes, {report['n_missing']} missing, "
            f"{report['n_unknown']} rows about unknown nodes"
        )
    elif report:
        others = ""
        if "n_from_store" in report:  # of a stage that has finished
            others = (
                f", {report['n_from_store']} from "
                f"the store, {report.get('n_duplicates', 0)} nodes with the prompt of another, "
                f"{report['n_retried']} retried, {report['n_failed']} nodes failed, "
                f"{report['n_truncated']} cut by the length limit"
            )
        yield f"  generated       {report['n_generated']} prompts{others}"
        yield (
            f"  tokens          {report['n_prompt_tokens']} in ({report['n_cached_tokens']} from "
            f"the prefix cache), {report['n_output_tokens']} out, {report['seconds']:.0f} s"
        )
    for side, quality in layer.sides.items():
        yield from ("", f"  {side}s")
        yield from (f"    {name:<12}  {value}" for name, value in _side_lines(quality))
    yield from ("", "  samples")
    for sample in (sample for quality in layer.sides.values() for sample in quality.samples):
        head = f"{sample.node}, {sample.n_neighbors} neighbours: {sample.below}"
        for words, sign in ((head, "  - "), (sample.text, "    → ")):
            short = textwrap.shorten(words, _MAX_PRINTED_CHARS, placeholder=" …")
            indent = " " * len(sign)
            yield from textwrap.wrap(short, 96, initial_indent=sign, subsequent_indent=indent)


def _side_lines(quality: SideQuality) -> Iterator[tuple[str, str]]:
    yield "nodes", str(quality.n_nodes)
    yield "statuses", _counts(quality.statuses)
    yield "failures", _counts(quality.failures) or "none"
    yield "words", _counts(quality.n_words)
    own, neighbor = quality.own_copies, quality.neighbor_copies
    yield "copies", f"{own:.1%} of the own text below, {neighbor:.1%} of a neighbour's"
    yield "repeated", f"{quality.repeated:.1%} share their text with another node"
    words, pairs = quality.distinct
    yield "distinct", f"{words:.3f} of words, {pairs:.3f} of word pairs"
    yield "scripts", _shares(quality.scripts)
    yield "languages", _shares(quality.languages)
    if quality.own_names is not None:
        yield "own name", f"in {quality.own_names:.1%}"
    if quality.neighbor_names is not None:
        yield "item names", f"of a neighbour in {quality.neighbor_names:.1%}"


def _shares(shares: dict[str, float]) -> str:
    """The largest ones; small texts in many languages are noise."""
    largest = dict(list(shares.items())[:_MAX_SHARES])
    if len(shares) > len(largest):
        largest["others"] = sum(shares.values()) - sum(largest.values())
    return ", ".join(f"{name} {share:.1%}" for name, share in largest.items())


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
