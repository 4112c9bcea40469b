"""The figures of ``quality.py`` as text, for the log of a run and the command ``audit``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from recbole_gacllm.descriptions.quality import LayerQuality, SideQuality

_MAX_PRINTED_CHARS = 600  # of a sample
_MAX_SHARES = 5


def quality_lines(layer: LayerQuality) -> Iterator[str]:
    """What a layer is like, line by line."""
    yield f"layer {layer.number}"
    report = layer.report
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
        yield f"  tokens          {token_line(report)}"
    for side, quality in layer.sides.items():
        yield from ("", f"  {side}s")
        yield from _side_lines(quality)
    yield from ("", "  samples")
    for sample in (sample for quality in layer.sides.values() for sample in quality.samples):
        head = f"{sample.node}, {sample.n_neighbors} neighbours: {sample.below}"
        for words, sign in ((head, "  - "), (sample.text, "    → ")):
            short = textwrap.shorten(words, _MAX_PRINTED_CHARS, placeholder=" …")
            yield from textwrap.wrap(
                short, 96, initial_indent=sign, subsequent_indent=" " * len(sign)
            )


def token_line(report: Mapping[str, Any]) -> str:
    """Tokens in and out, and seconds."""
    return (
        f"{report['n_prompt_tokens']} in ({report['n_cached_tokens']} from the prefix cache), "
        f"{report['n_output_tokens']} out, {report['seconds']:.0f} s"
    )


def _side_lines(quality: SideQuality) -> Iterator[str]:
    lines = {
        "nodes": str(quality.n_nodes),
        "statuses": _counts(quality.statuses),
        "failures": _counts(quality.failures) or "none",
        "words": ", ".join(f"{name} {value}" for name, value in quality.n_words.items()),
        "copies": f"{quality.own_copies:.1%} of the own text below, "
        f"{quality.neighbor_copies:.1%} of a neighbour's",
        "repeated": f"{quality.repeated:.1%} share their text with another node",
        "distinct": f"{quality.distinct[0]:.3f} of words, {quality.distinct[1]:.3f} of word pairs",
        "scripts": _shares(quality.scripts),
        "languages": _shares(quality.languages),
    }
    if quality.own_names is not None:
        lines["own name"] = f"in {quality.own_names:.1%}"
    if quality.neighbor_names is not None:
        lines["item names"] = f"of a neighbour in {quality.neighbor_names:.1%}"
    for name, value in lines.items():
        yield f"    {name:<12}  {value}"


def _shares(shares: dict[str, float]) -> str:
    """The largest ones; small texts in many languages are noise."""
    shown = list(shares.items())[:_MAX_SHARES]
    rest = sum(shares.values()) - sum(share for _, share in shown)
    parts = [f"{name} {share:.1%}" for name, share in shown]
    return ", ".join([*parts, f"others {rest:.1%}"] if len(shares) > len(shown) else parts)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
