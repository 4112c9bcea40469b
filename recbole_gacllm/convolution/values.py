"""What a cell of a feature file says: prose, a list, or nothing that a language model could use."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from recbole_gacllm.data.markup import without_markup

Value = str | tuple[str, ...]

# Names of fields that hold sentences or a name, whatever their type.
PROSE = (
    *("title", "name", "description", "text", "review", "abstract", "summary", "plot"),
    *("overview", "synopsis", "content", "headline", "comment", "body", "blurb"),
    *("author", "artist", "director", "publisher", "brand", "address", "city"),
)
# Names of fields that hold no words, by their last word: item_id, imageUrl, movieid.
_NO_WORDS = re.compile(
    r"(?:^|[_\W]|movie|item|user|product|book|artist|imdb|tmdb)"
    r"(?:id|ids|asin|isbn|isbn10|isbn13|ean|upc|sku|uuid|guid|hash|url|urls|uri|link|links|href|"
    r"image|images|img|imgs|picture|photo|thumbnail|path|file|embedding|entities|"
    r"latitude|longitude|lat|lng|lon)$",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"']+")
# A code: letters and digits mixed, or many digits.
_CODE = re.compile(r"(?=[^\s]*\d)(?=[^\s]*[A-Za-z])[A-Za-z0-9_-]{8,}|\d{6,}|[0-9a-f]{12,}")
# The same as an element of a list: any number, or N86843.
_CODE_IN_LIST = re.compile(rf"\d+|[A-Za-z]{{1,3}}\d{{3,}}|{_CODE.pattern}")
_FUNCTION_WORDS = frozenset(
    {"the", "of", "and", "to", "a", "an", "in", "for", "with", "is", "on", "by", "from", "that"}
    | {"der", "die", "und", "das", "le", "la", "les", "et", "des", "du", "el", "los", "y", "de"}
)
_MOSTLY = 0.9
_FEWEST = 3
_SAMPLE = 1000  # cells of a column that tell what it is
_MAX_LITERAL = 100_000  # characters


def plain(text: str) -> str:
    """A text without HTML entities, tags and addresses."""
    text = without_markup(text)
    if "://" in text or "www." in text:
        text = _URL.sub(" ", text)
    return text


def column_values(
    name: str, kind: str, cells: Sequence[str | None], separator: str
) -> list[Value | None]:
    """The cells of a ``token`` or ``token_seq`` column as prose or lists.

    A cell that is a list of Python or JSON, or quoted words between commas, is that list. Of a
    ``token_seq`` column whose separator is a blank, the cells are prose if its name says so or the
    words do; lists with commas, if elements end with these; else one word an element.
    """
    texts = [None if cell is None else plain(cell) for cell in cells]
    by_name = any(word in name.lower() for word in PROSE)
    is_sequence = kind == "token_seq"
    by_words = is_sequence and separator == " " and not by_name and _is_prose(texts)
    by_comma = is_sequence and separator == " " and not by_words and _has_commas(texts)
    values: list[Value | None] = []
    for text in texts:
        value: Value | None = text
        if text is None or not text.strip():
            value = None
        elif (elements := _literal(text)) is not None:
            value = elements or None
        elif not is_sequence:
            value = _piped(text) if "|" in text and not by_name else text
        elif separator == " " and (by_name or by_words):
            value = text
        else:
            parts = text.split("," if by_comma else separator)
            value = tuple(filter(None, map(str.strip, parts) if by_comma else parts)) or None
        values.append(value)
    return values


def says_nothing(name: str, values: Iterable[Value | None]) -> str | None:
    """Why a field is left out of a sentence that lists all fields; None if it is not."""
    if _NO_WORDS.search(_CAMEL.sub("_", name)):
        return "ids, addresses or places, by its name"
    sample = [value for value in values if value is not None][:_SAMPLE]
    texts = [value if isinstance(value, str) else " ".join(value) for value in sample]
    if not texts:
        return "empty"
    if _share([_is_list_of_codes(value) for value in sample]) >= _MOSTLY:
        return "codes"
    if _share([_CODE.fullmatch(text.strip()) is not None for text in texts]) >= _MOSTLY:
        is_time = any(word in name.lower() for word in ("time", "date", "unix"))
        return "raw times" if is_time else "codes"
    return None


def _is_list_of_codes(value: Value) -> bool:
    """A list of ids, or several of them that a name such as ``authors`` made prose."""
    elements = " ".join(value) if isinstance(value, tuple) else value
    words = elements.replace(",", " ").split()
    several = isinstance(value, tuple) or len(words) > 1
    return several and all(_CODE_IN_LIST.fullmatch(word) for word in words)


def in_order(names: Sequence[str], columns: Mapping[str, Sequence[Value | None]]) -> list[str]:
    """Fields as a sentence tells them: the name, the short ones as in the file, long prose last.

    So a text that is cut loses the end of its description, and nothing else.
    """
    titles = [name for name in names if "title" in name.lower() or "name" in name.lower()]

    def rank(name: str) -> int:
        sample = [value for value in columns[name] if isinstance(value, str)][:_SAMPLE]
        return 0 if name in titles[:1] else 1 if max(map(len, sample), default=0) <= 200 else 2

    return sorted(names, key=rank)


def _literal(text: str) -> tuple[str, ...] | None:
    """The elements of a list or dictionary, or of quoted words between commas; else None."""
    text = text.strip()
    if len(text) < 2 or len(text) > _MAX_LITERAL:
        return None
    readers: list[Callable[[str], object]] = []
    if text[0] in "[{(" and text[-1] in "]})":
        readers = [json.loads, ast.literal_eval]
    elif text[0] == text[-1] and text[0] in "'\"":
        readers, text = [ast.literal_eval], f"[{text}]"
    for read in readers:
        try:
            return tuple(_flat(read(text)))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _flat(value: object) -> Iterable[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if words := ", ".join(_flat(inner)):
                yield f"{key}: {words}"
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from _flat(inner)
    elif value is not None and (word := plain(str(value)).strip()):
        yield word


def _piped(text: str) -> Value | None:
    """``Action|Comedy`` is a list, ``a | b`` is not."""
    parts = text.split("|")
    if any(part != part.strip() for part in parts):
        return text
    return tuple(filter(None, parts)) or None


def _is_prose(texts: Iterable[str | None]) -> bool:
    """Whether the words of a column are those of sentences."""
    cells = _several_words(texts)
    # A list has function words within its elements ("Bed and Breakfast"), sentences have many.
    return (
        _share([len(_FUNCTION_WORDS & {*words}) >= 2 for words in cells]) > 0.2
        or _share([len(words) > 3 and words[-1][-1] in ".!?…" for words in cells]) > 0.5
    )


def _has_commas(texts: Iterable[str | None]) -> bool:
    cells = _several_words(texts)
    return _share([any(word.endswith(",") for word in words[:-1]) for words in cells]) > 0.5


def _several_words(texts: Iterable[str | None]) -> list[list[str]]:
    """Words of the cells that have several; too few cells tell nothing."""
    cells = [text.split() for text in texts if text is not None and " " in text.strip()][:_SAMPLE]
    return cells if len(cells) >= _FEWEST else []


def _share(holds: Sequence[bool]) -> float:
    return sum(holds) / len(holds) if holds else 0.0
