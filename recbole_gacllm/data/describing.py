"""The yaml of an imported data set: its columns, and how its nodes become sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from recbole_gacllm.config import dataset_defaults
from recbole_gacllm.data import features, guessing, interactions
from recbole_gacllm.data.interactions import Interactions
from recbole_gacllm.data.recipes import Recipe
from recbole_gacllm.data.sources import Source

_BRACKETS = re.compile(r"\[[^\]]*\]")


def lines(
    made: Interactions,
    source: Source,
    recipe: Recipe | None,
    columns: Mapping[str, Mapping[str, str]],
    parts: Sequence[str],
) -> list[str]:
    """Lines of yaml, each key below what it says.

    Args:
        made: The interactions.
        source: The first file of them.
        recipe: Of a public data set.
        columns: Side -> the columns of its file, with their types.
        parts: Of a ready split.
    """
    fields = {"rating": made.rating, "timestamp": made.time}
    loaded = ["user_id", "item_id", *(name for name, of in fields.items() if of is not None)]
    guessed = guessing.noun_of(source.columns["item"], source.table.path), "user"
    item, user = recipe.nouns if recipe else guessed
    keys: dict[str, tuple[Any, str]] = {
        "USER_ID_FIELD": ("user_id", "Column of users."),
        "ITEM_ID_FIELD": ("item_id", "Column of items."),
        "RATING_FIELD": ("rating", "Column of ratings."),
        "TIME_FIELD": ("timestamp", "Column of times."),
        "load_col": ({"inter": loaded}, "What RecBole loads; texts are read outside of it."),
        "seq_separator": (features.SEQ_SEPARATOR, "Between the elements of a list."),
    }
    if parts:
        keys["benchmark_filename"] = (["train", "valid", "test"], "The ready split.")
    elif n := interactions.n_repeats(made):
        keys["rm_dup_inter"] = ("first", f"{n:,} rows repeat a user and an item. None keeps them.")
    keys["text_user_noun"] = (user, "What a user is called.")
    keys["text_item_noun"] = (item, "What an item is called.")
    for side, template in _templates(recipe, columns, item).items():
        what = f"A sentence of the .{side} file; without this line it tells all columns."
        keys[f"text_{side}_template"] = (template, what)
    if words := _value_names(recipe, columns):
        keys["text_value_names"] = (words, "Words for coded values.")
    written = []
    for key, (value, comment) in keys.items():
        text = yaml.safe_dump(
            value, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=True
        )
        written += [f"# {comment}", f"{key}: {text.removesuffix('...' + chr(10)).strip()}"]
    return written


def _templates(
    recipe: Recipe | None, columns: Mapping[str, Mapping[str, str]], noun: str
) -> dict[str, str]:
    """Side -> its template, without optional parts of columns that are not there."""
    if recipe is None:
        of_item = guessing.item_template(list(columns.get("item", ())), noun)
        return {"item": of_item} if of_item else {}
    templates = {}
    for side, template in (("user", recipe.user_template), ("item", recipe.item_template)):
        there = set(columns.get(side, ()))
        if template and _fields(_BRACKETS.sub("", template)) <= there:
            for part in _BRACKETS.findall(template):
                if not _fields(part) <= there:
                    template = template.replace(part, "")
            templates[side] = template
    return templates


def _fields(template: str) -> set[str]:
    return {name.partition("|")[0] for name in re.findall(r"\{([^{}]+)\}", template)}


def _value_names(
    recipe: Recipe | None, columns: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    if recipe is None or recipe.value_names_of is None:
        return {}
    words = dataset_defaults(recipe.value_names_of)["text_value_names"]
    there = {name for of_side in columns.values() for name in of_side}
    return {name: of_name for name, of_name in words.items() if name in there}
