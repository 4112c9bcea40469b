"""What the LLM wrote becomes a description by stated rules, or is refused by stated rules."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

CLEANING_VERSION = 5  # part of a description's address: raise it when a rule changes a result
Problem = Literal["empty", "truncated", "echo", "loop"]

_MIN_WORDS = 3  # fewer say nothing about a node
_MIN_REQUEST_WORDS = 4  # shorter sentences of a request could stand in any text
_MIN_COPIED_WORDS = 8  # after a beginning; fewer may be a list of kinds, as a text has one
_LOOP_WORDS, _LOOP_TIMES = 4, 3  # so many words in a row, so often: a text that goes in circles
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`"}

# At the start of a line: headings, quotations, bullets, numbers of a list.
_LINE_START = re.compile(r"^(?:#{1,6}\s+|>\s*|[-*+•–]\s+|\d{1,2}[.)]\s+)+")
# Around words, never inside one: `M*A*S*H` and snake_case stay.
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)")
_MARKUP = re.compile(r"[<>{}\[\]|]")
_BLANKS = re.compile(r"\s+([,.;:!?)])|(\()\s+")  # that markup leaves around punctuation
_OPENER = r"(?:sure|certainly|of course|absolutely|okay|ok|yes|here|below|the following)\b"
_LABEL = (
    r"(?:[\w'-]+ ){0,2}"
    r"(?:description|summary|answer|response|profile|overview|output|paragraph|preferences)"
)
_LEAD_IN = re.compile(
    rf"(?:{_OPENER}(?:[!.,]\s)?[^:.!?]{{0,100}}|{_LABEL}(?: of [^:.!?]{{1,80}})?)\s?:(?:\s+|$)",
    re.IGNORECASE,
)
# After . ! ? … and closing quotes, before a blank; not after an initial or a short title.
_SENTENCE_END = re.compile(
    r"(?:\.(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)(?<!\bvs\.)|[!?…])"
    r"[\"'”’»)\]]*(?=\s|$)|[。！？]"
)

_LIST_COMMA = re.compile(r"[,;]\s+")
_LIST_END = re.compile(r"[.!?…]+$")


@dataclass(frozen=True)
class CleaningContext:
    """What a completion was an answer to.

    Attributes:
        prompt: All messages of the chat but the beginning of the answer.
        request: Its lines that are the prompt files' own, without any inserted text.
        beginning: What the answer was begun with; the completion goes on from there.
    """

    prompt: str
    request: str
    beginning: str = ""


@dataclass(frozen=True)
class Cleaned:
    """A cleaned completion.

    Attributes:
        text: One line. Where there is a problem: what was left, for inspection only.
        problem: Why it is no description, or None if it is one.
    """

    text: str
    problem: Problem | None


def clean(raw: str, finish_reason: str, context: CleaningContext) -> Cleaned:
    """Turn a completion into a description; ours: the paper does not say.

    In this order:

    0. The beginning that the prompt gave is put before it.
    1. Control, format, private and unassigned characters and U+FFFD go.
    2. Lines without a letter or digit go; so do marks of headings, quotations, bullets and lists
       at the start of a line, and emphasis and code marks around words. All lines become one,
       white space one blank.
    3. A lead-in that ends in a colon goes: a label (``Description:``, ``Summary of the film:``) or
       an opening phrase (``Sure, here is the description:``). So do quotes around the whole.
    4. A sentence that was there before, but for case and punctuation, goes.
    5. If the length limit ended it: an unfinished last sentence goes when the finished ones before
       it have at least 3 words. Otherwise the text is cut after its last whole word and gets
       ``…``; with fewer than 3 whole words the problem is ``truncated``.
    6. In a sentence, an element of a list between commas that was there before goes: a small model
       that repeats itself ("comedy, drama, comedy, comedy…") does so until the length limit.
    7. Angle, square and curly brackets and bars go, unless they stand between double quotation
       marks: markup is no prose, whoever wrote it into a title.
    8. No letter left after the beginning: ``empty``.
    9. The whole text, or at least 8 words and all that follow its beginning, stand in the prompt
       word by word, but for case and punctuation, or a sentence (of at least 4 words) of the
       request stands after the beginning: ``echo``.
    10. The same 4 words in a row stand in it three times or more: ``loop``.

    Args:
        raw: The decoded completion.
        finish_reason: ``stop``, or ``length`` if the length limit ended it.
        context: What it answers.
    """
    text = _strip_frame(_one_line(_with_beginning(raw, context.beginning)))
    sentences = _without_repetition(_split_sentences(text))
    text = " ".join(sentences)
    if not _says_something(text, context):
        return Cleaned(text, "empty")
    if finish_reason == "length" and not _is_finished(text):
        finished = " ".join(sentences[:-1])
        text = finished if len(_words(finished)) >= _MIN_WORDS else _cut_at_word(text)
        if len(_words(text)) < _MIN_WORDS or not _says_something(text, context):
            return Cleaned(text, "truncated")
    text = " ".join(map(_without_repeated_elements, _split_sentences(text)))
    text = _without_markup(text)
    if not _says_something(text, context):
        return Cleaned(text, "empty")
    if _is_echo(text, context):
        return Cleaned(text, "echo")
    return Cleaned(text, "loop" if _goes_in_circles(text) else None)


def _with_beginning(raw: str, beginning: str) -> str:
    begins_anew = beginning and re.match(rf"\s*{re.escape(beginning)}(?!\w)", raw)
    return raw if begins_anew else beginning + raw  # a server may begin anew


def _one_line(raw: str) -> str:
    visible = raw
    if not (raw.isascii() and raw.isprintable()):
        visible = "".join(
            char
            for char in raw
            if char.isspace() or (unicodedata.category(char)[0] != "C" and char != "\ufffd")
        )
    lines = (
        _LINE_START.sub("", line.strip())
        for line in visible.splitlines()
        if any(map(str.isalnum, line))
    )
    text = " ".join(" ".join(lines).split())
    while (plain := _EMPHASIS.sub(r"\2", text)) != text:
        text = plain
    return text.strip("*`# ")


def _without_markup(text: str) -> str:
    if not _MARKUP.search(text):
        return text
    parts = text.split('"')
    # Every second part stands between two marks, but for the last after a mark of its own.
    outside = [n for n in range(len(parts)) if n % 2 == 0 or n == len(parts) - 1]
    for n in outside:
        parts[n] = _BLANKS.sub(r"\1\2", _MARKUP.sub(" ", parts[n]))
    return " ".join('"'.join(parts).split())


def _strip_frame(text: str) -> str:
    """Drop lead-ins and surrounding quotes until there are none."""
    while True:
        inner = text
        if lead_in := _LEAD_IN.match(inner):
            inner = inner[lead_in.end() :]
        closing = _QUOTES.get(inner[:1])
        if closing and closing not in inner[1:-1] and inner[0] not in inner[1:-1]:
            if inner[1:].endswith(closing):
                inner = inner[1:-1]
            elif closing not in inner[1:] and closing != "'":  # opened, never closed
                inner = inner[1:]
        inner = inner.strip()
        if inner == text:
            return text
        text = inner


def _split_sentences(text: str) -> list[str]:
    """Sentences in order, each with its end; the last may be unfinished."""
    sentences, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        sentences.append(text[start : end.end()].strip())
        start = end.end()
    return [*sentences, rest] if (rest := text[start:].strip()) else sentences


def _without_repetition(sentences: list[str]) -> list[str]:
    first: dict[str, str] = {}
    for sentence in sentences:
        first.setdefault(" ".join(_words(sentence)) or sentence, sentence)
    return list(first.values())


def _without_repeated_elements(sentence: str) -> str:
    """Each element of a list once; the first element is whatever stands before the first comma."""
    head, *elements = _LIST_COMMA.split(sentence)
    kept, seen = [head], {""}
    for element in elements:
        words = _words(element)
        name = " ".join(words[1:] if words[:1] in (["and"], ["or"]) else words)
        cut = element.endswith("…") and any(other.startswith(name) for other in seen)
        if cut or name in seen or _padded(head).endswith(f" {name} "):
            continue
        seen.add(name)
        kept.append(element)
    if len(kept) == 1 + len(elements):
        return sentence
    end = _LIST_END.search(sentence)
    return _LIST_END.sub("", ", ".join(kept)) + (end[0] if end else "")


def _is_finished(text: str) -> bool:
    return any(end.end() == len(text) for end in _SENTENCE_END.finditer(text))


def _cut_at_word(text: str) -> str:
    """Without the last word, which the limit may have cut in two."""
    return f"{text.rpartition(' ')[0].rstrip(' ,;:-–(')}…"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _is_echo(text: str, context: CleaningContext) -> bool:
    new = f" {' '.join(_new_words(text, context))} "
    copy = new if len(new.split()) >= _MIN_COPIED_WORDS else _padded(text)
    folded = context.prompt.casefold()
    # The first look rules most answers out in a tenth of the time.
    if all(word in folded for word in copy.split()) and copy in _padded(context.prompt):
        return True
    return any(sentence in new for sentence in _request_sentences(context.request))


def _new_words(text: str, context: CleaningContext) -> list[str]:
    """The words that the model added to the beginning it was given."""
    words, given = _words(text), _words(context.beginning)
    return words[len(given) :] if words[: len(given)] == given else words


def _says_something(text: str, context: CleaningContext) -> bool:
    return any(char.isalpha() for word in _new_words(text, context) for char in word)


@lru_cache(maxsize=64)  # a run has a few requests
def _request_sentences(request: str) -> list[str]:
    return [
        _padded(sentence)
        for line in request.splitlines()
        for sentence in _split_sentences(line)
        if len(_words(sentence)) >= _MIN_REQUEST_WORDS
    ]


def _goes_in_circles(text: str) -> bool:
    words = _words(text)
    rows = Counter(zip(*(words[start:] for start in range(_LOOP_WORDS)), strict=False))
    return max(rows.values(), default=0) >= _LOOP_TIMES


def _padded(text: str) -> str:
    """Words between blanks, so that a part of one is a sequence of whole words."""
    return f" {' '.join(_words(text))} "
