"""Words and sentences of a text in any script.

Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan and others put no blanks between words. There
a character with its marks counts as a word; where a length is meant, as half of one
(:func:`length`). Thai and Lao have no full stop, either: a blank ends a phrase.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

import regex  # `re` knows neither scripts nor combining marks

#: A letter of a script without blanks, as a character class of ``regex.V1``.
UNSPACED: Final = (
    r"[\p{Line_Break=SA}\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Tibetan}\p{Javanese}"
    r"\p{Balinese}\p{Cham}ーｰ〆&&\w]"
)
# With its marks; a consonant below another one (Khmer, Burmese) belongs to it.
_CHARACTER: Final = rf"{UNSPACED}\p{{M}}*(?:(?<=[\u1039\u17d2]){UNSPACED}\p{{M}}*)*"
_character = regex.compile(_CHARACTER, regex.V1)
_ascii_word = re.compile(r"\w+")  # the same there, in a fraction of the time
_word = regex.compile(rf"{_CHARACTER}|[[\w\p{{M}}\p{{No}}]--{UNSPACED}]+", regex.V1)
_in_character = regex.compile(UNSPACED, regex.V1)

_CLOSING: Final = r"[\"'”’»)\]」』）】》〉｣〕］]*"
# The signs of ASCII end a sentence before a blank; not a full stop after an initial or a short
# title. Those of other scripts end it wherever they stand, and so does, before a blank, a phrase
# of five letters in a script without full stop; shorter ones are words such as "and".
_SENTENCE_END = regex.compile(
    r"(?:\.(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)(?<!\bvs\.)|[!?…])"
    rf"{_CLOSING}(?=\s|$|{UNSPACED})"
    rf"|[\p{{Sentence_Terminal}}།༎--[.!?]]+{_CLOSING}"
    r"|(?<=[\p{Thai}\p{Lao}]{5})(?=\s[\p{Thai}\p{Lao}])",
    regex.V1,
)
# Half a character: vowels that stand before their consonant, what puts a consonant below another.
_HALF: Final = "เแโใไເແໂໃໄ\u1039\u17d2"
_OPEN_END: Final = " ,;:-–(、，；：・（「『《〈،؛"  # what an unfinished text does not end with


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    pattern = _ascii_word if text.isascii() else _word
    return list(pattern.findall(text.casefold()))


def matches(text: str) -> Iterator[re.Match[str] | regex.Match[str]]:
    """The words of a text as they are written, with their places."""
    return (_ascii_word if text.isascii() else _word).finditer(text)


def length(words: Sequence[str]) -> float:
    """How many words of a script with blanks say about as much as these."""
    return sum(map(_weight, words))


def _weight(word: str) -> float:
    return 1.0 if word.isascii() or not _in_character.match(word) else 0.5


def is_in_spaced_word(char: str) -> bool:
    """Whether a character is a letter or digit of a script that puts blanks between words."""
    return char.isalnum() and not _in_character.match(char)


def runs(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """All rows of neighbouring words that are as long as ``n`` words."""
    weights = list(map(_weight, words))
    stop, total = 0, 0.0
    for start, weight in enumerate(weights):
        while total < n and stop < len(words):
            total += weights[stop]
            stop += 1
        if total < n:
            return
        yield tuple(words[start:stop])
        total -= weight


def sentences(text: str) -> list[str]:
    """Sentences in order, each with its end and the blanks after it; the last may be unfinished."""
    bounds = [0, *(end.end() for end in _SENTENCE_END.finditer(text))]
    parts: list[str] = []
    for start, stop in zip(bounds, [*bounds[1:], len(text)], strict=True):
        part = text[start:stop]
        rest = part.lstrip()
        if parts:
            parts[-1] += part[: len(part) - len(rest)]
        if rest:
            parts.append(rest)
    return parts


def is_finished(text: str) -> bool:
    """Whether a text ends where a sentence does."""
    return any(end.end() == len(text) for end in _SENTENCE_END.finditer(text))


def cut(text: str) -> str:
    """Without the last word, which may have been cut in two, and with ``…``."""
    return whole_words(text).rstrip(_OPEN_END) + "…"


def whole_words(text: str) -> str:
    """What stands before the last word, which may have been cut in two."""
    start, blank, last = text.rpartition(" ")
    ends = [character.end() for character in _character.finditer(last)]
    if ends and ends[-1] == len(last):
        ends.pop()  # else something follows it: it is whole
    return (start + blank + last[: ends[-1]]).rstrip(_HALF) if ends else start
