"""The wording of layer 0: templates like ``{movie_title|title}[ ({release_year})]``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

from recbole_gacllm.convolution.values import PROSE, Value

Render = Callable[[Mapping[str, Value]], str | None]

_PIECE = re.compile(r"(?P<escape>\{\{|\}\}|\[\[|\]\])|\{(?P<field>[^{}\[\]]*)\}|(?P<sign>[\[\]{}])")
_ARTICLE = re.compile(
    r"^(.+?), (The|An?|L'|L[aeo]s?|Les|Une?|El|Los|Il|Gli|Der|Die|Das|Eine?)(?= \(|$)(.*)$"
)


def _join(value: Value) -> str:
    return value if isinstance(value, str) else " ".join(value)


def _enumerate(value: Value) -> str:
    if isinstance(value, str):
        return value
    return ", ".join(value[:-1]) + " and " + value[-1] if len(value) > 1 else value[0]


def _title(value: Value) -> str:
    return _ARTICLE.sub(
        lambda title: title[2] + ("" if title[2] == "L'" else " ") + title[1] + title[3],
        _join(value),
    )


_FILTERS: dict[str, Callable[[Value], str]] = {"": _join, "list": _enumerate, "title": _title}


def default_sentence(fields: Sequence[str]) -> Render:
    """A sentence of all fields in this order; it renders None where no field has a value."""

    def join(field: str, value: Value) -> str:
        prose = isinstance(value, str) or any(word in field.lower() for word in PROSE)
        return _join(value) if prose else ", ".join(value)

    def render(values: Mapping[str, Value]) -> str | None:
        parts = [
            f"{field.replace('_', ' ')}: {join(field, values[field])}"
            for field in fields
            if field in values
        ]
        return "; ".join(parts) or None

    return render


def compile_template(template: str, fields: Sequence[str]) -> Render:
    """Compile a template, in the language of :func:`.text.render_descriptions`.

    It renders None where none of the fields it names has a value.

    Raises:
        ValueError: If the template is malformed or names none of ``fields``.
    """
    # A run of text and (field, filter) pairs; the flag tells the bracketed ones.
    runs: list[tuple[bool, list[str | tuple[str, str]]]] = [(False, [])]
    at = 0
    for piece in _PIECE.finditer(template):
        runs[-1][1].append(template[at : piece.start()])
        at = piece.end()
        if piece["escape"]:
            runs[-1][1].append(piece["escape"][0])
        elif piece["sign"]:
            if piece["sign"] != ("]" if runs[-1][0] else "["):
                raise ValueError(
                    f"stray {piece['sign']!r} at character {piece.start() + 1} of the "
                    f"text template {template!r}; they do not nest, write a literal one twice"
                )
            runs.append((not runs[-1][0], []))
        else:
            runs[-1][1].append(_check_field(template, piece["field"], fields))
    runs[-1][1].append(template[at:])
    if runs[-1][0]:
        raise ValueError(f"the text template {template!r} lacks a closing ']'")
    fields_of = [{part[0] for part in parts if isinstance(part, tuple)} for _, parts in runs]
    all_fields = set().union(*fields_of)

    def render(values: Mapping[str, Value]) -> str | None:
        if all_fields and all_fields.isdisjoint(values):
            return None
        text = ""
        for (optional, parts), wanted in zip(runs, fields_of, strict=True):
            if optional and not wanted <= values.keys():
                continue
            for part in parts:
                if isinstance(part, str):
                    text += part
                else:
                    text += _FILTERS[part[1]](values[part[0]]) if part[0] in values else "unknown"
        return text

    return render


def _check_field(template: str, placeholder: str, fields: Sequence[str]) -> tuple[str, str]:
    field, _, name = (part.strip() for part in placeholder.partition("|"))
    if field not in fields:
        close = difflib.get_close_matches(field, fields, n=1)
        raise ValueError(
            f"the text template {template!r} names the field {field!r}, but the feature file has "
            f"{', '.join(fields) or 'no fields'} (float_seq fields are not text)"
            + (f"; did you mean {close[0]!r}?" if close else "; use one of these")
        )
    if name not in _FILTERS:
        raise ValueError(
            f"the text template {template!r} has the filter {name!r}; there are 'list' and 'title'"
        )
    return field, name
