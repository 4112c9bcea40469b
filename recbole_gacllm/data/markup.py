"""Texts without HTML."""

from __future__ import annotations

import html
import re

_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z]\w*);")
_BLOCKS = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_TAGS = re.compile(
    r"</?(?:a|abbr|article|b|big|blockquote|body|br|center|cite|code|dd|div|dl|dt|em|figure|font|"
    r"footer|h[1-6]|head|header|hr|html|i|iframe|img|ins|li|link|main|meta|nav|ol|p|pre|section|"
    r"small|span|strong|sub|sup|table|tbody|td|th|thead|title|tr|tt|u|ul|video)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)


def without_markup(text: str) -> str:
    """A text with its HTML entities resolved and without tags."""
    for _ in range(3):  # `&amp;amp;` is met in the wild
        if "&" not in text or not _ENTITY.search(text):
            break
        text = html.unescape(text)
    if "<" in text:
        text = _TAGS.sub(" ", _BLOCKS.sub(" ", text))
    return text
