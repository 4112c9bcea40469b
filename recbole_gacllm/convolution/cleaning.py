"""What the LLM wrote becomes a description by stated rules, or is refused by stated rules."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import regex

from recbole_gacllm.convolution.words import (
    UNSPACED,
    cut,
    is_finished,
    is_in_spaced_word,
    length,
    runs,
    sentences,
    words,
)

CLEANING_VERSION = 6  # part of a description's address: raise it when a rule changes a result
Problem = Literal["empty", "truncated", "echo", "loop"]

_MIN_WORDS = 3  # fewer say nothing about a node
_MIN_REQUEST_WORDS = 4  # shorter sentences of a request could stand in any text
_MIN_COPIED_WORDS = 8  # after a beginning; fewer may be a list of kinds, as a text has one
_LOOP_WORDS, _LOOP_TIMES = 4, 3  # so many words in a row, so often: a text that goes in circles
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`", "「": "」", "『": "』"}

# At the start of a line: headings, quotations, bullets, numbers of a list.
_LINE_START = re.compile(r"^(?:#{1,6}\s+|>\s*|[-*+•–]\s+|\d{1,2}[.)]\s+)+")
_EMPHASIS = re.compile(r"\*+|_+|`+")
_MARKUP = re.compile(r"[<>{}\[\]|]")
_BLANKS = re.compile(r"\s+([,.;:!?)])|(\()\s+")  # that markup leaves around punctuation
_LABEL = r"(?:description|summary|answer|response|profile|overview|output|paragraph|preferences)"
# "Sure, here is the description:", "Updated user profile:", "Summary of the film Heat:". Titles
# begin like that, too ("Here Comes the Bride: a comedy", "Profile of a Killer: a thriller"): hence
# a verb and a noun of these, and before and after a label known words only.
_LEAD_IN = re.compile(
    r"(?:(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|yes|so)\b[\s!.,–—-]+)*"
    r"(?:(?:here (?:is|are)|here['’]s|below (?:is|are)|the following (?:is|are))\b[^:.!?]{0,100}?"
    rf"\b(?:{_LABEL}|descriptions|text|version|list|sentences?|kinds?|types?|genres?)\b"
    r"[^:.!?]{0,100}?"
    rf"|(?P<before>(?:[\w'-]+ ){{0,2}}){_LABEL}(?: of (?P<of>[^:.!?]{{1,80}}))?)\s?:(?:\s+|$)",
    re.IGNORECASE,
)
_KIND = re.compile(r"an? ")
_ARTICLES = frozenset(("the", "a", "an", "this", "that", "my", "your", "its"))
_LABEL_WORDS = _ARTICLES.union(
    words(
        "updated new revised rewritten improved short brief concise final one two sentence user "
        "item person people viewer reader customer movie film book product plot character general"
    )
)
_LIST_COMMA = re.compile(r"([,;]\s+|\s?[、，；،؛]\s*)")
_LIST_END = re.compile(r"[.!?…。！？؟۔।]+$")


@dataclass(frozen=True)
class CleaningContext:
    """What a completion was an answer to."""

    prompt: str  # all messages of the chat but the beginning of the answer
    request: str  # its lines that are the prompt files' own, without any inserted text
    beginning: str = ""  # what the answer was begun with; the completion goes on from there
    max_chars: int | None = None  # what is over it goes unread: longer than any such completion


@dataclass(frozen=True)
class Cleaned:
    """A cleaned completion."""

    text: str  # one line; where there is a problem, what was left, for inspection only
    problem: Problem | None


def clean(raw: str, finish_reason: str, context: CleaningContext) -> Cleaned:
    """Turn a completion into a description; ours: the paper does not say.

    In this order:

    0. What is over the context's longest completion goes, as if the length limit had ended it. The
       beginning that the prompt gave is put before it.
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

    What a word and a sentence are in scripts without blanks or full stops: :mod:`.words`. There a
    character counts as a word in rule 5, as half of one in 9 and 10.
    """
    if context.max_chars is not None and len(raw) > context.max_chars:
        raw, finish_reason = raw[: context.max_chars], "length"
    text = _strip_frame(_one_line(_with_beginning(raw, context.beginning)), context)
    parts = _without_repetition(sentences(text))
    text = "".join(parts).rstrip()
    if not _says_something(text, context):
        return Cleaned(text, "empty")
    if finish_reason == "length" and not is_finished(text):
        finished = "".join(parts[:-1]).rstrip()
        is_whole = is_finished(finished) or _says_something(finished, context)  # or a phrase
        text = finished if is_whole and len(words(finished)) >= _MIN_WORDS else cut(text)
        if len(words(text)) < _MIN_WORDS or not _says_something(text, context):
            return Cleaned(text, "truncated")
    text = "".join(map(_without_repeated_elements, sentences(text))).rstrip()
    text = _without_markup(text)
    if not _says_something(text, context):
        return Cleaned(text, "empty")
    if _is_echo(text, context):
        return Cleaned(text, "echo")
    rows = Counter(runs(words(text), _LOOP_WORDS))
    goes_in_circles = max(rows.values(), default=0) >= _LOOP_TIMES
    return Cleaned(text, "loop" if goes_in_circles else None)


def _with_beginning(raw: str, beginning: str) -> str:
    if not beginning:
        return raw
    begun_anew = rf"\s*{regex.escape(beginning)}(?:(?<={UNSPACED})|(?!\w))"  # a server may do so
    return raw if regex.match(begun_anew, raw, regex.V1) else beginning + raw


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
    return _without_emphasis(text).strip("*`# ")


def _without_emphasis(text: str) -> str:
    """Drop marks around words, never those inside one: `M*A*S*H` and snake_case stay."""
    openings: dict[str, deque[list[int]]] = defaultdict(deque)  # mark -> [place, how many] of each
    places: set[int] = set()  # of marks that go
    for marks in _EMPHASIS.finditer(text):
        place, stop = marks.span()
        before, after, waiting = (
            text[place - 1 : place],
            text[stop : stop + 1],
            openings[marks[0][0]],
        )
        while place < stop and waiting and before.strip() and not is_in_spaced_word(after):
            opening = waiting[0]
            n = min(stop - place, opening[1])
            places.update(range(place, place + n), range(opening[0], opening[0] + n))
            place, opening[0], opening[1] = place + n, opening[0] + n, opening[1] - n
            if not opening[1]:
                waiting.popleft()
        if place < stop and after.strip() and not is_in_spaced_word(before):
            waiting.append([place, stop - place])
    if not places:
        return text
    return "".join(char for place, char in enumerate(text) if place not in places)


def _without_markup(text: str) -> str:
    if not _MARKUP.search(text):
        return text
    parts = text.split('"')
    # Every second part stands between two marks, but for the last after a mark of its own.
    outside = [n for n in range(len(parts)) if n % 2 == 0 or n == len(parts) - 1]
    for n in outside:
        parts[n] = _BLANKS.sub(r"\1\2", _MARKUP.sub(" ", parts[n]))
    return " ".join('"'.join(parts).split())


def _strip_frame(text: str, context: CleaningContext) -> str:
    """Drop lead-ins and surrounding quotes until there are none."""
    while True:
        inner = text
        if (lead_in := _LEAD_IN.match(inner)) and _is_lead_in(lead_in, context):
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


def _is_lead_in(match: re.Match[str], context: CleaningContext) -> bool:
    """Whether what stands around a label is of the request or usual there, not a title's.

    A title goes on with its kind in lower case: ``The Answer: a drama``.
    """
    if match["before"] and _KIND.match(match.string, match.end()):
        return False
    usual = _LABEL_WORDS | _request_words(context.request)
    if not usual.issuperset(words(match["before"] or "")):
        return False
    of = [word for word in words(match["of"] or "") if word not in _ARTICLES]
    return not of or of[0] in usual or _padded(match["of"]) in _padded(context.prompt)


def _without_repetition(parts: list[str]) -> list[str]:
    first: dict[str, str] = {}
    for sentence in parts:
        first.setdefault(" ".join(words(sentence)) or sentence.strip(), sentence)
    return list(first.values())


def _without_repeated_elements(sentence: str) -> str:
    """Each element of a list once; the first element is whatever stands before the first comma."""
    head, *rest = _LIST_COMMA.split(sentence.rstrip())
    parts, seen = [head], {""}
    before = _padded(head)
    group = ""  # the semicolon before an element that goes, if the next one has a comma
    for position in range(0, len(rest), 2):
        comma, element = rest[position : position + 2]
        names = words(element)
        names = names[1:] if names[:1] in (["and"], ["or"]) else names
        name = " ".join(names)
        cut_off = element.endswith("…") and position == len(rest) - 2
        if (
            name in seen
            or (length(names) >= 1 and before.endswith(f" {name} "))
            or (cut_off and any(other.startswith(name) for other in seen))
        ):
            group = group or (comma if comma.strip() in ";；؛" else "")
            continue
        seen.add(name)
        parts += [group or comma, element]
        group = ""
    if len(parts) == 1 + len(rest):
        return sentence
    end = _LIST_END.search(sentence.rstrip())
    blank = sentence[len(sentence.rstrip()) :]
    return _LIST_END.sub("", "".join(parts)) + (end[0] if end else "") + blank


def _is_echo(text: str, context: CleaningContext) -> bool:
    added = _new_words(text, context)
    new = f" {' '.join(added)} "
    copy = new if length(added) >= _MIN_COPIED_WORDS else _padded(text)
    folded = context.prompt.casefold()
    # The first look rules most answers out in a tenth of the time.
    if all(word in folded for word in copy.split()) and copy in _padded(context.prompt):
        return True
    return any(sentence in new for sentence in _request_sentences(context.request))


def _new_words(text: str, context: CleaningContext) -> list[str]:
    """The words that the model added to the beginning it was given."""
    answer, beginning = words(text), words(context.beginning)
    begins_so = answer[: len(beginning)] == beginning
    return answer[len(beginning) :] if begins_so else answer


def _says_something(text: str, context: CleaningContext) -> bool:
    return any(char.isalpha() for word in _new_words(text, context) for char in word)


@lru_cache(maxsize=64)  # a run has a few requests
def _request_sentences(request: str) -> list[str]:
    return [
        _padded(sentence)
        for line in request.splitlines()
        for sentence in sentences(line)
        if length(words(sentence)) >= _MIN_REQUEST_WORDS
    ]


@lru_cache(maxsize=64)
def _request_words(request: str) -> frozenset[str]:
    return frozenset(words(request))


def _padded(text: str) -> str:
    """Words between blanks, so that a part of one is a sequence of whole words."""
    return f" {' '.join(words(text))} "
