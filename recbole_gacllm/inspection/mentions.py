"""Which nodes a text names: by full name, by a distinctive part of it, or by id.

One rule for texts and names: accents folded, lower case, punctuation and ``(1995)`` dropped. Of
scripts without blanks every character is a word, and so is every Korean syllable, whose particles
stick to a name: so a name is found inside a sentence.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import regex  # `re` knows no scripts
from scipy import sparse

from recbole_gacllm.convolution.layers import Side
from recbole_gacllm.convolution.words import UNSPACED, matches

Kind = Literal["name", "part", "id"]
KINDS: tuple[Kind, ...] = ("name", "part", "id")

# Shorter names ("Go", "M") stand in any text; of scripts without blanks, those of one character.
MIN_NAME_CHARS = 4
_MIN_UNSPACED_CHARS = 2
_MIN_PART_CHARS = 5
_MIN_PHRASE_CHARS = 8
_MIN_ID_DIGITS = 5

_HANGUL = regex.compile(r"\p{Hangul}")
_IS_UNSPACED = regex.compile(rf"[{UNSPACED}\p{{Hangul}}]", regex.V1)
# Few characters of these tell much.
_IS_DENSE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Hangul}]")
_WINDOW = {True: 4, False: 8}  # characters of a distinctive part, by whether the script is dense

# Letters that Unicode does not take apart into a letter and an accent.
_PLAIN = str.maketrans(
    {"_": "*", "&": " and "}
    | dict(zip("øØłŁđĐðı", "oOlLdDdi", strict=True))
    | {"æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "þ": "th", "Þ": "Th"}
)
_ACCENTS = frozenset((*range(10, 37), *range(200, 256)))  # combining classes
_UMLAUTS = str.maketrans(
    {"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "å": "aa", "Å": "Aa"}
)
_IN_WORD = re.compile(r"(?<=\w)[^\w\s](?=\w)")
_YEAR = re.compile(r"\s*[(\[（]\s*(?:19|20)\d\d\s*[)\]）]\s*$")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ARTICLES = _set(
    "the a an le la les l un une el los las il lo gli der die das ein eine de het o os as"
)
_BEHIND_COMMA = re.compile(r"^(.*),\s*([^\W\d_]+)'?$")
_SMALL_WORDS = _ARTICLES | _set(
    "and are for from her his how its not our out over she that their they this was what when "
    "where who why with you your all into one more than"
)
_OPENING = _set("\" ' “ ‘ « ‹ 「 『 《 〈 „ ‚ * _ `")
_SENTENCE_ENDS = frozenset(".!?:;…。！？\n")
_NOUNS: dict[Side, frozenset[str]] = {
    "user": _set("user users person customer customers reader readers viewer viewers id"),
    "item": _set("item items movie movies film films book books product products song songs id"),
}
_BETWEEN_NUMBERS = _set("and or id ids no nr number")

# How much like a name a word is written: anyhow; with a capital; in quotes, or with a capital
# inside a sentence. What a mark demands, and what a word of a text has.
_ANYHOW, _CAPITAL, _STANDS_OUT = range(3)


def fold(text: str) -> str:
    """Text without accents, ligatures and underscores, Korean syllables apart; case stays."""
    if not text.isascii():
        # Vowel signs of Thai, Hindi or kana are letters, not accents: their classes lie between.
        parted = unicodedata.normalize("NFKD", text)
        text = "".join(char for char in parted if unicodedata.combining(char) not in _ACCENTS)
        text = _HANGUL.sub("\\g<0>\u200b", unicodedata.normalize("NFC", text))
    return text.translate(_PLAIN)


def _read(text: str) -> tuple[list[str], list[int], list[str]]:
    """The folded words of a text, how each is written, and what stands before each."""
    text = fold(text)
    words: list[str] = []
    styles: list[int] = []
    gaps: list[str] = []
    end = 0
    for match in matches(text):
        word, gap = match.group(), text[end : match.start()]
        style = _ANYHOW
        # An apostrophe inside a word opens nothing.
        if gap and gap[-1] in _OPENING and (len(gap) > 1 or not words):
            style = _STANDS_OUT
        elif word[0].isupper():
            style = _STANDS_OUT if words and _SENTENCE_ENDS.isdisjoint(gap) else _CAPITAL
        words.append(word.casefold())
        styles.append(style)
        gaps.append(gap)
        end = match.end()
    return words, styles, gaps


def _plain_words(text: str) -> list[str]:
    return [match.group().casefold() for match in matches(fold(text))]


@dataclass(frozen=True)
class Marks:
    """By what texts can name the nodes of one side.

    A sure name or id cannot stand in a text by chance: it is found however it is written.
    """

    side: Side
    kinds: npt.NDArray[np.int8]  # [n_marks], indices into KINDS
    owners: sparse.csr_array  # [n_marks, n_nodes], which nodes a mark names
    has_sure_name: npt.NDArray[np.bool_]  # [n_nodes]
    has_sure_id: npt.NDArray[np.bool_]  # [n_nodes]
    _marks: dict[str, list[tuple[int, int]]]  # words -> (mark, how it must be written)
    _lengths: dict[str, list[int]]  # first word -> lengths of marks in words

    @property
    def is_sure(self) -> npt.NDArray[np.bool_]:
        """Either of them. Shapes: [n_nodes]."""
        return self.has_sure_name | self.has_sure_id

    @classmethod
    def of(cls, side: Side, ids: Sequence[str], names: Sequence[str | None]) -> Marks:
        """Marks of all nodes, by raw tokens and names; None, or the token, where there is none."""
        rows: dict[tuple[str, int, Kind], list[int]] = defaultdict(list)
        has_name, has_id = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
        real_names = [
            "" if name in (id_, None) else name for id_, name in zip(ids, names, strict=True)
        ]
        parts = _distinctive_parts({name for name in real_names if name})
        for node, (id_, name) in enumerate(zip(ids, real_names, strict=True)):
            for key, must_be in _id_marks(id_):
                rows[key, must_be, "id"].append(node)
                has_id[node] = not key.startswith("#") and must_be == _ANYHOW
            for key, must_be, kind in sorted(_marks_of_name(name)):
                rows[key, must_be, kind].append(node)
                has_name[node] |= kind == "name"
            for key, must_be in parts.get(name, ()):
                rows[key, must_be, "part"].append(node)
        marks: dict[str, list[tuple[int, int]]] = defaultdict(list)
        lengths: dict[str, set[int]] = defaultdict(set)
        for mark, (key, must_be, _) in enumerate(rows):
            marks[key].append((mark, must_be))
            words = key.split(" ")
            lengths[words[0]].add(len(words))
        owners = _matrix(rows.values(), len(rows), len(ids))
        kinds = np.array([KINDS.index(kind) for _, _, kind in rows], np.int8)
        in_order = {word: sorted(of_word) for word, of_word in lengths.items()}
        return cls(side, kinds, owners, has_name, has_id, dict(marks), in_order)

    def in_texts(self, texts: Sequence[Iterable[str]], any_case: bool = False) -> sparse.csr_array:
        """Which marks stand in the texts of each node; ``any_case``: however they are written.

        Shapes:
            result: ``[len(texts), n_marks]``, ones.
        """
        rows = (
            {mark for text in of_node for mark in self._in_text(text, any_case)}
            for of_node in texts
        )
        return _matrix(rows, len(texts), len(self.kinds))

    def _in_text(self, text: str, any_case: bool) -> Iterator[int]:
        words, styles, gaps = _read(text)
        is_listing = False
        for at, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                key = " ".join(words[at : at + length])
                for mark, must_be in self._marks.get(key, ()):
                    if any_case or styles[at] >= must_be:
                        yield mark
            # "user 5", "users 5, 7 and 9", "#5"
            if word.isdigit():
                if is_listing or gaps[at].endswith("#"):
                    for mark, _ in self._marks.get(f"#{word}", ()):
                        yield mark
            elif word in _NOUNS[self.side]:
                is_listing = True
            elif word not in _BETWEEN_NUMBERS:
                is_listing = False

    def owned(self, marks_of: sparse.csr_array, kind: Kind) -> Any:
        """From marks in texts to nodes named by marks of a kind. Shapes: [n_texts, n_nodes]."""
        of_kind = np.flatnonzero(self.kinds == KINDS.index(kind))
        return marks_of[:, of_kind] @ self.owners[of_kind]


def _matrix(rows: Iterable[Iterable[int]], n_rows: int, n_columns: int) -> sparse.csr_array:
    """A matrix of ones from the columns of each row."""
    columns: list[int] = []
    starts = [0]
    for row in rows:
        columns += sorted(row)
        starts.append(len(columns))
    ones = np.ones(len(columns), np.int32)
    return sparse.csr_array((ones, columns, starts), shape=(n_rows, n_columns))


def _id_marks(id_: str) -> list[tuple[str, int]]:
    """An id's words and how they must be written; ``#5`` is a number behind "user" or "item"."""
    words = _plain_words(id_)
    joined = "".join(words)
    is_short = joined.isalpha() and not _is_long(words)
    if joined.isdigit() and len(joined) < _MIN_ID_DIGITS:
        if len(words) == 1:
            return [(f"#{joined}", _ANYHOW)]
        is_short = True  # "4.5" may be a rating
    return [(" ".join(words), _STANDS_OUT if is_short else _ANYHOW)] if words else []


def _marks_of_name(name: str) -> set[tuple[str, int, Kind]]:
    """Of a name, of "Spiderman" for "Spider-Man", and of "Mueller" for "Müller"."""
    spellings = {name, _IN_WORD.sub("", name), name.translate(_UMLAUTS)}
    return {mark for spelling in spellings for mark in _marks_of_spelling(spelling)}


def _marks_of_spelling(name: str) -> Iterator[tuple[str, int, Kind]]:
    """A name's words without year, its article in front; short ones must stand out."""
    bare = _YEAR.sub("", name)
    behind = _BEHIND_COMMA.match(bare)
    if behind and behind[2].casefold() in _ARTICLES:
        bare = f"{behind[2]} {behind[1]}"
    words = _plain_words(bare) or _plain_words(name)
    if words and _is_long(words):
        yield " ".join(words), _ANYHOW, "name"
    elif words:  # "Go"
        yield " ".join(words), _STANDS_OUT, "part"
    core = words[1:] if words and words[0] in _ARTICLES else []
    if len(core) > 1 and _is_long(core):
        yield " ".join(core), _ANYHOW, "name"
    elif core:  # "Game" of "The Game"
        yield " ".join(core), _STANDS_OUT, "part"


def _is_long(words: Sequence[str]) -> bool:
    if any(map(_IS_UNSPACED.search, words)):
        return len("".join(words)) >= _MIN_UNSPACED_CHARS
    return len(" ".join(words)) >= MIN_NAME_CHARS


def _distinctive_parts(names: set[str]) -> dict[str, list[tuple[str, int]]]:
    """Name -> what stands in no other name: words with a capital, phrases, runs of characters."""
    parts_of = {name: set(_parts(_plain_words(_YEAR.sub("", name)))) for name in names}
    times = Counter(part for parts in parts_of.values() for part in parts)
    return {name: [p for p in sorted(parts) if times[p] == 1] for name, parts in parts_of.items()}


def _parts(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    for at, word in enumerate(words):
        if _IS_UNSPACED.match(word):
            size = _WINDOW[_IS_DENSE.match(word) is not None]
            window = words[at : at + size]
            if len(window) == size < len(words) and all(map(_IS_UNSPACED.match, window)):
                yield " ".join(window), _ANYHOW
            continue
        if len(word) >= _MIN_PART_CHARS and not word.isdigit() and len(words) > 1:
            yield word, _CAPITAL
        for length in (2, 3):
            phrase = words[at : at + length]
            ends_well = all(len(w) > 2 and w not in _SMALL_WORDS for w in (word, phrase[-1]))
            if length == len(phrase) < len(words) and ends_well:
                joined = " ".join(phrase)
                if len(joined) >= _MIN_PHRASE_CHARS and not any(map(_IS_UNSPACED.search, phrase)):
                    yield joined, _ANYHOW
