"""Which of several tables holds interactions, and which columns are what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from recbole_gacllm.data import guessing
from recbole_gacllm.data.recipes import RECIPES, Part, Recipe, recognise
from recbole_gacllm.data.tables import Table, open_table

#: Role -> the column of the atomic files.
FIELDS = {"user": "user_id", "item": "item_id", "rating": "rating", "time": "timestamp"}
SIDES = ("user", "item")
_PARTS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid"}
_PARTS["test"] = "test"
# Nodes with several rows, and rows beyond the first of each, that show what a column is of.
_FEWEST, _FEWEST_ROWS = 3, 20


@dataclass
class Source:
    """A table, what it is, and its columns.

    Attributes:
        table: The file.
        kind: ``interactions``, ``item``, ``user``; ``features`` until ids tell of which side; or
            why the file is left out.
        columns: What the import calls a column -> what the file calls it. Features of users among
            interactions begin with ``user.``.
        part: Of a recipe.
    """

    table: Table
    kind: str
    columns: dict[str, str] = field(default_factory=dict)
    part: Part | None = None

    def chunks(self) -> Iterator[pd.DataFrame]:
        """Its rows, under the names of the import."""
        wanted = list(self.columns.values())
        if self.part is not None and self.part.change is not None:
            chunks = self.part.change(self.table.chunks(self.table.names))
        else:
            chunks = self.table.chunks(list(dict.fromkeys(wanted)))
        for chunk in chunks:
            yield chunk[wanted].set_axis(list(self.columns), axis=1)

    def lines(self) -> list[str]:
        """What the file was taken for, and what of it was left out."""
        name = self.table.path.name
        if not self.columns:
            return [f"{name}: left out, {self.kind}"]
        what = {"interactions": "interactions", "item": "items", "user": "users"}[self.kind]
        pairs = [f"{of!r} is {FIELDS[role]}" for role, of in self.columns.items() if role in FIELDS]
        others = [name.removeprefix("user.") for name in self.columns if name not in FIELDS]
        header = "" if self.table.has_header or self.part else " without a header"
        lines = [f"{name}: {what}{header}; {', '.join([*pairs, *others])}"]
        rest = [of for of in self.table.names if of not in self.columns.values()]
        if rest and not (self.part and self.part.change):
            lines.append(f"{name}: columns left out: {', '.join(rest)}")
        dropped = self.table.dropped.items()
        return lines + [f"{name}: dropped {n:,} {reason}" for reason, n in dropped if n]


def open_sources(
    paths: Sequence[Path], recipe: str | None, given: Mapping[str, str]
) -> tuple[str | None, list[Source]]:
    """Open files and tell what they are.

    Args:
        paths: The files.
        recipe: Name of a recipe; None recognises it.
        given: Role -> column, of a person who knows; ``none`` leaves a role out.

    Returns:
        The recipe's name, if there is one, and the files in their order.

    Raises:
        ValueError: If a file is no table, or nothing tells which column is what.
    """
    tables = [open_table(path) for path in paths]
    for role, column in given.items():
        if column != "none" and not any(column in table.names for table in tables):
            raise ValueError(
                f"--{role}: {column!r} is not a column of any file. There are: {_listed(tables)}."
            )
    if recipe is None and not given:
        recipe = next(filter(None, map(recognise, tables)), None)
    if recipe is None:
        return None, _guess(tables, given)
    return recipe, _with_recipe(RECIPES[recipe], tables, given)


def _with_recipe(recipe: Recipe, tables: Sequence[Table], given: Mapping[str, str]) -> list[Source]:
    sources = []
    for table in tables:
        kind, part = recipe.part_of(table)
        if part is None:
            sources.append(Source(table, "it is no file of this recipe"))
            continue
        notes = table.notes
        table = open_table(
            table.path, replace(part.form, encoding=part.form.encoding or table.form.encoding)
        )
        table.notes = [] if part.form.encoding else notes
        made = part.change is not None
        columns = {n: of for n, of in part.columns.items() if made or of in table.names}
        if kind == "interactions":
            columns |= {role: of for role, of in given.items() if of in table.names}
            columns = {name: of for name, of in columns.items() if given.get(name) != "none"}
        sources.append(Source(table, kind, columns, part))
    if not any(source.kind == "interactions" for source in sources):
        raise ValueError(
            "--recipe: no file has the interactions of this recipe, whose columns are "
            f"{', '.join(recipe.interactions.columns.values())}. There are: {_listed(tables)}."
        )
    return sources


def _listed(tables: Sequence[Table]) -> str:
    return "; ".join(f"{table.path.name} with {', '.join(table.names[:30])}" for table in tables)


def _guess(tables: Sequence[Table], given: Mapping[str, str]) -> list[Source]:
    wanted = {given[role] for role in SIDES if given.get(role, "none") != "none"}
    if wanted:
        main = [table for table in tables if wanted <= set(table.names)]
    else:
        main = [table for table in tables if guessing.has_both_ids(table)]
        if len(main) > 1:  # a table of items may name users, too
            main = [table for table in main if _repeats_items(table)] or main
    if not main:
        main = [table for table in tables if not table.has_header] or list(tables[:1])
    sources = []
    for table in tables:
        if table not in main:
            sources.append(Source(table, "features"))
            continue
        roles = guessing.guess_interactions(table)
        for role, column in given.items():
            roles = {name: of for name, of in roles.items() if name != role and of != column}
            if column in table.names:
                roles[role] = column
        if missing := [role for role in SIDES if role not in roles]:
            raise ValueError(
                f"{table.path}: no column can be told to be of the {missing[0]}s. Name it by "
                f"--{missing[0]}=…; there are: {', '.join(table.names)}."
            )
        columns = {role: roles[role] for role in FIELDS if role in roles}
        columns |= _columns_of_nodes(table, columns)
        sources.append(Source(table, "interactions", columns))
    return sources


def _repeats_items(table: Table) -> bool:
    item = guessing.by_name("item", table.names)
    return item is not None and not guessing.texts(table.sample[item]).dropna().is_unique


def _columns_of_nodes(table: Table, roles: Mapping[str, str]) -> dict[str, str]:
    """Other columns of interactions that say the same in each row of an item, or of a user."""
    ids = {side: guessing.texts(table.sample[roles[side]]) for side in SIDES}
    columns: dict[str, str] = {}
    for name in table.names:
        if name in roles.values():
            continue
        values = table.sample[name].astype(str)
        for side in ("item", "user"):
            several = ids[side].duplicated(keep=False)
            n_values = values[several].groupby(ids[side][several]).nunique()
            n_more = int(several.sum()) - len(n_values)
            is_shown = len(n_values) >= _FEWEST and n_more >= _FEWEST_ROWS
            if is_shown and (n_values == 1).all() and values.nunique() > 1:
                columns[f"user.{name}" if side == "user" else name] = name
                break
    return columns


def parts_of(main: Sequence[Source]) -> list[str]:
    """``train``, ``valid`` and ``test`` in the order of the files, where their names say so."""
    parts = []
    for source in main:
        words = re.split(r"[^a-z]+", source.table.path.name.lower())
        parts += [next((_PARTS[word] for word in reversed(words) if word in _PARTS), "")]
    return parts if sorted(parts) == ["test", "train", "valid"] else []
