"""Texts that stand for values: Python literals, which RecBole would evaluate, and yaml."""

from __future__ import annotations

import ast
import copy
import functools
from typing import Any

import yaml


def literal(text: str) -> Any:
    """What a Python literal stands for: numbers, strings, lists, tuples, dicts, None, True, False.

    Nothing is evaluated, so text of any origin may be given.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text!r} is not a literal value.") from error


def parse_yaml(text: str) -> Any:
    """What a text in yaml stands for.

    Raises:
        yaml.YAMLError: If it is none.
    """
    return copy.deepcopy(_parsed(text))


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """Parsed once: it takes longer than all else that a configuration does."""
    return yaml.safe_load(text)
