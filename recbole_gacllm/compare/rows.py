"""The rows of a table as a user writes them: ``GaCLLM:n_layers=1:topk=[5,10]:seeds=2,EASE``."""

from __future__ import annotations

from recbole_gacllm.config import SPLIT_KEYS

# What all rows of a table must share; the split is compared by its hash besides.
_SHARED_KEYS = frozenset({"seed", "eval_args", "metrics", "topk", "valid_metric", *SPLIT_KEYS})
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_BEFORE_A_QUOTE = "=,:[({ "  # elsewhere it is an apostrophe


def split_models(text: str) -> list[str]:
    """``BPR,GaCLLM:topk=[5,10]`` -> its rows; a comma in brackets or quotes does not separate.

    Raises:
        ValueError: If a bracket or a quote is not closed.
    """
    return _split(text, ",")


def split_seeds(row: str, n_seeds: int) -> tuple[str, int]:
    """``NeuMF:seeds=5`` -> ``NeuMF`` and 5; a row without ``seeds`` has all of them.

    Raises:
        ValueError: If it is not one number from 1 to ``n_seeds``.
    """
    parts = _split(row, ":")
    counts = [part for part in parts if part.startswith("seeds=")]
    if len(counts) > 1:
        raise ValueError(f"models: {row!r} gives seeds twice; give it once.")
    if not counts:
        return row, n_seeds
    value = counts[0].removeprefix("seeds=")
    if not value.isdecimal() or not 1 <= int(value) <= n_seeds:
        raise ValueError(
            f"models: {counts[0]!r} of {row!r} must be a number from 1 to {n_seeds} (--seeds): the "
            "first so many of all seeds."
        )
    return ":".join(part for part in parts if part != counts[0]), int(value)


def split_variant(row: str) -> tuple[str, dict[str, str]]:
    """``GaCLLM:use_text=False:n_layers=1`` -> ``GaCLLM`` and the variant's own keys.

    Raises:
        ValueError: If a part is not ``key=value``, a key stands there twice, or must be the same
            for all rows.
    """
    model, *parts = _split(row, ":")
    keys = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(
                f"models: {part!r} of {row!r} is not key=value. A variant is written "
                "Model:key=value:key=value; a value that holds ':' outside of brackets and quotes "
                "goes into a config file."
            )
        if key in _SHARED_KEYS:
            raise ValueError(f"models: {key} of {row!r} must be the same for all; give --{key}=….")
        if key in keys:
            raise ValueError(f"models: {row!r} gives {key} twice; give it once.")
        keys[key] = value
    return model, keys


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that stand in no brackets and no quotes."""
    parts, start = [], 0
    open_brackets: list[str] = []  # what closes them
    quote = ""
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote and text[place - 1] != "\\" else quote
        elif sign in "'\"" and place > 0 and text[place - 1] in _BEFORE_A_QUOTE:
            quote = sign
        elif sign in _CLOSING:
            open_brackets.append(_CLOSING[sign])
        elif sign in _CLOSING.values():
            if not open_brackets or open_brackets.pop() != sign:
                raise ValueError(f"models: {text!r} has a {sign!r} that nothing opened; remove it.")
        elif sign == separator and not open_brackets:
            parts.append(text[start:place])
            start = place + 1
    if quote or open_brackets:
        raise ValueError(
            f"models: {text!r} has no {quote or open_brackets[-1]!r} for what was opened; add it, "
            "or put the value into a config file."
        )
    return [*parts, text[start:]]
