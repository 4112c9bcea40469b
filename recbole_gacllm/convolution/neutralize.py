"""Text from a data set made safe to stand in a prompt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

# What chat templates and tokenizers of common models use: <|im_start|>, <|turn>, <s>, </s>,
# <start_of_turn>, <<SYS>>, DeepSeek's fullwidth bars, [INST] and Mistral's other control words.
# `<b>` is broken too.
_TOKENS = (
    r"<[|｜][^<>\n]{0,64}>",
    r"</?[a-z_][^<>\n]{0,64}>",
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|IMG|IMG_BREAK"
    r"|IMG_END|PREFIX|MIDDLE|SUFFIX|CLS|SEP|PAD|MASK|UNK|BOS|EOS|gMASK|THINK)\]",
)
_COMMON = re.compile("|".join(_TOKENS), re.IGNORECASE)


def one_line(text: str) -> str:
    """Make a text one line of visible characters.

    Control characters, bidirectional marks, zero-width and other invisible format characters go;
    any white space becomes one blank; the rest is in Unicode NFC. Applying it twice changes
    nothing.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(
            char
            for char in text
            if char.isspace() or unicodedata.category(char) not in ("Cc", "Cf", "Cs")
        )
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def neutralize(text: str, special_tokens: Iterable[str] = ()) -> str:
    """Make a text one plain line that no chat template or tokenizer reads as structure.

    :func:`one_line`, and special tokens, of common models and those given, are broken by blanks
    (``<|im_end|>`` becomes ``< |im_end| >``): readable, but plain text to a tokenizer. Where only
    the compatibility form of a text (NFKC, which some tokenizers apply) holds one, such as
    ``＜s＞``, the text becomes that form. Applying it twice changes nothing.
    """
    pattern = _pattern(frozenset(special_tokens))
    text = _broken(one_line(text), pattern)
    if not text.isascii():
        compatible = one_line(unicodedata.normalize("NFKC", text))
        if pattern.search(compatible):
            text = _broken(compatible, pattern)
    return text


@lru_cache(maxsize=8)
def _pattern(special_tokens: frozenset[str]) -> re.Pattern[str]:
    # A token with a blank inside cannot be told from its broken form; one sign cannot be broken.
    # Some models have thousands like <unused42>: those that are common anyway would cost time.
    tokens = {
        token
        for token in special_tokens
        if len(token) > 1 and not any(map(str.isspace, token)) and not _COMMON.fullmatch(token)
    }
    exact = [re.escape(token) for token in sorted(tokens, key=lambda token: (-len(token), token))]
    return re.compile("|".join([*exact, *_TOKENS]), re.IGNORECASE)


def _broken(text: str, pattern: re.Pattern[str]) -> str:
    while (broken := pattern.sub(_break, text)) != text:
        text = broken
    return text


def _break(match: re.Match[str]) -> str:
    token = match[0]
    return " ".join(filter(None, (token[0], token[1:-1].strip(), token[-1])))
