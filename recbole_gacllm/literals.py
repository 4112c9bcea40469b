"""Python literals in configurations and spaces, which RecBole would evaluate."""

from __future__ import annotations

import ast
from typing import Any


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
