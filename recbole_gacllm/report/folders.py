"""The folders of a machine, which no page shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from markupsafe import Markup

_NAME = r"""[^\s/\\'"<>|:;,()\[\]{}]+"""
# What a path begins with, where no word, URL or relative path goes on.
_ROOT = r"(?<![\w/:.\\~-])(?:file://)?(?:[A-Za-z]:|~\w*)?[/\\]+"
_HOME = rf"(?:home|Users)[/\\]+{_NAME}(?:[/\\]+|(?![^\s/\\]))"
_FOLDERS = re.compile(rf"{_ROOT}(?:{_HOME}(?:{_NAME}[/\\]+)*|(?:{_NAME}[/\\]+)+)")
_ABSOLUTE = re.compile(r"(?:[A-Za-z]:|~\w*)?[/\\]")


def without_folders(value: Any, with_blanks: Iterable[str] = ()) -> Any:
    """A text with ``…/`` in the place of the folders of each absolute path; all else as it is.

    Args:
        value: What a template shows; nothing is taken from a ``Markup`` or what is no text.
        with_blanks: Paths that hold blanks: elsewhere a blank ends a path.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    for path in with_blanks:
        value = value.replace(path, "…/" + re.split(r"[/\\]", path.rstrip("/\\"))[-1])
    return _FOLDERS.sub("…/", value)


def paths_with_blanks(record: Any) -> list[str]:
    """The absolute paths in a record whose names hold blanks, the longest first."""
    paths = {text for text in _strings(record) if " " in text and _ABSOLUTE.match(text)}
    return sorted(paths, key=len, reverse=True)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
        yield value.partition("=")[2]  # of a flag
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
