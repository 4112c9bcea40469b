"""Anybody's files become a data set of RecBole: atomic files, and a yaml that describes them.

tables.py        reads a file in chunks
sources.py       tells what each file is: by recipes.py (public data sets) or guessing.py
interactions.py  ids, ratings and times as numbers: filtered and counted
features.py      texts of items and users; writes atomic files
describing.py    the yaml
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_gacllm.data import describing, features, guessing, interactions
from recbole_gacllm.data.interactions import Interactions
from recbole_gacllm.data.recipes import RECIPES
from recbole_gacllm.data.sources import FIELDS, SIDES, Source, open_sources, parts_of

_WRITTEN = ("inter", "train.inter", "valid.inter", "test.inter", "item", "user", "yaml")
_NAME = re.compile(r"\w[\w.-]*")
_MANY = 50  # chunks whose features wait to be made one


@dataclass(frozen=True)
class Request:
    """What is imported.

    Attributes:
        files: Tables of interactions, items and users, in any order.
        name: Of the data set.
        data_path: The folder above that of the data set.
        columns: Role -> column that a person names; ``none`` leaves a role out.
        min_rating: Lowest rating that is kept.
        k_core: Fewest items of each user and users of each item.
        recipe: Name of a public data set; None recognises it.
        overwrite: Whether files of that name may be replaced.
    """

    files: Sequence[Path]
    name: str
    data_path: Path = Path("dataset")
    columns: Mapping[str, str] = field(default_factory=dict)
    min_rating: float | None = None
    k_core: int = 1
    recipe: str | None = None
    overwrite: bool = False


def import_files(request: Request) -> list[str]:
    """Write ``data_path/NAME/NAME.inter``, ``.item``, ``.user`` and ``.yaml``.

    Files called train, valid and test become a ready split.

    Returns:
        Lines that tell what each file was taken for, what was dropped, and what there is now.

    Raises:
        ValueError: Names the file, column or flag, what is allowed and the next step.
    """
    folder = request.data_path / request.name
    _check(request, folder)
    name, sources = open_sources(request.files, request.recipe, request.columns)
    main = [source for source in sources if source.kind == "interactions"]
    parts = parts_of(main)
    if parts and (request.min_rating is not None or request.k_core > 1):
        raise ValueError(
            "--min-rating, --k-core: the files are a ready split, which they would change. Leave "
            "them out, or join the files."
        )
    made, own = _read_interactions(main, bool(parts))
    interactions.clean(made, request.min_rating, request.k_core)
    known = interactions.present(made)
    sides = {side: _read_features(sources, side, known, own) for side in SIDES}
    said = [f"recipe: {name}"] if name else []
    for source in sources:
        said += [*source.lines(), *source.table.notes]
    said += [f"dropped {n:,} interactions: {reason}" for reason, n in made.counts.items()]
    said += made.notes
    with _replacing(folder, request.name) as new:
        _write_interactions(made, new, request.name, parts)
        texts: dict[str, dict[str, str]] = {}
        for side, rows in sides.items():
            if rows.shape[1]:
                file = new / f"{request.name}.{side}"
                texts[side], empty = features.write_features(file, FIELDS[side], rows)
                said += [f"the {side}s' column {column!r} is empty" for column in empty]
        recipe = RECIPES.get(name or "")
        lines = describing.lines(made, main[0], recipe, texts, parts)
        head = (
            f"# Made by {_command(request, name)}; read by every run with --dataset={request.name}."
        )
        (new / f"{request.name}.yaml").write_text("\n".join([head, *lines, ""]), "utf-8")
    return said + _summary(made, known, sides, request)


def _check(request: Request, folder: Path) -> None:
    if not _NAME.fullmatch(request.name):
        raise ValueError(
            f"--name: {request.name!r} must be of letters, digits, '-', '_' and '.', such as "
            "my-shop."
        )
    if request.name == "ml-100k":
        raise ValueError("--name: RecBole reads 'ml-100k' out of its own package. Give another.")
    if request.k_core < 1:
        raise ValueError(f"--k-core: {request.k_core} is not allowed; give at least 1.")
    if request.recipe is not None and request.recipe not in RECIPES:
        raise ValueError(f"--recipe: {request.recipe!r} is not one of {', '.join(RECIPES)}.")
    there = [folder / f"{request.name}.{suffix}" for suffix in _WRITTEN]
    there = [file for file in there if file.exists()]
    if there and not request.overwrite:
        raise ValueError(f"{there[0]} is there already. Give another --name, or --overwrite.")
    if own := {file.resolve() for file in there} & {file.resolve() for file in request.files}:
        raise ValueError(
            f"{min(own)} would be replaced by what is read from it. Give another --name."
        )


def _read_interactions(
    main: Sequence[Source], in_parts: bool
) -> tuple[Interactions, dict[str, pd.DataFrame]]:
    """Interactions, and the features of nodes that stand among them."""
    roles = [role for role in FIELDS if all(role in source.columns for source in main)]
    own: dict[str, list[pd.DataFrame]] = {}

    def chunks() -> Iterator[tuple[int, pd.DataFrame]]:
        for number, source in enumerate(main):
            for chunk in source.chunks():
                for side in SIDES:
                    of_user = [name for name in chunk if str(name).startswith("user.")]
                    of_item = [name for name in chunk if name not in (*of_user, *FIELDS)]
                    if names := of_user if side == "user" else of_item:
                        frames = own.setdefault(side, [])
                        frames.append(chunk[[side, *names]].drop_duplicates(side))
                        if len(frames) > _MANY:
                            frames[:] = [pd.concat(frames).drop_duplicates(side)]
                yield number, chunk[roles]

    made = interactions.collect(chunks(), roles, main[0].table.path, in_parts)
    if made.rating is not None and (part := main[0].part) and part.zero_is_unrated:
        made.rating[made.rating == 0] = np.nan
    frames = {side: pd.concat(frames).drop_duplicates(side) for side, frames in own.items()}
    return made, {
        side: frame.rename(columns=lambda name: name.removeprefix("user."))
        for side, frame in frames.items()
    }


def _read_features(
    sources: Sequence[Source],
    side: str,
    known: Mapping[str, Mapping[str, int]],
    own: Mapping[str, pd.DataFrame],
) -> pd.DataFrame:
    """The features of a side: those of its files, then those among the interactions."""
    frames = []
    for source in sources:
        if source.kind == "features":
            where = guessing.side_of(source.table, known)
            if where is None:
                source.kind = "no column holds ids of the interactions"
                continue
            source.kind, id_column = where
            rest = [name for name in source.table.names if name != id_column]
            source.columns = {source.kind: id_column, **{name: name for name in rest}}
        if source.kind == side:
            table = source.table
            rows = features.collect(source.chunks(), side, known[side], table.dropped, table.notes)
            frames.append(rows)
    if side in own:
        frames.append(features.collect(iter([own[side]]), side, known[side], Counter(), []))
    joined = frames[0] if frames else pd.DataFrame()
    for frame in frames[1:]:
        joined = joined.combine_first(frame)[list(dict.fromkeys([*joined, *frame]))]
    return joined


@contextmanager
def _replacing(folder: Path, name: str) -> Iterator[Path]:
    """A folder for new files, which take the place of the old ones once all are written."""
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".import-", dir=folder))
    try:
        yield new
        for suffix in _WRITTEN:
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
        for file in new.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(new)
        if not any(folder.iterdir()):
            folder.rmdir()


def _write_interactions(made: Interactions, folder: Path, name: str, parts: Sequence[str]) -> None:
    numbers = {"rating": made.rating, "timestamp": made.time}
    for number, part in enumerate(parts or [""]):
        rows = np.ones(len(made.user), bool) if made.part is None else made.part == number
        features.write_interactions(
            folder / ".".join(filter(None, (name, part, "inter"))),
            {"user_id": (made.user[rows], made.users), "item_id": (made.item[rows], made.items)},
            {field: values[rows] for field, values in numbers.items() if values is not None},
        )


def _command(request: Request, recipe: str | None) -> str:
    flags = {f"--{role}": column for role, column in request.columns.items()}
    if request.min_rating is not None:
        flags["--min-rating"] = f"{request.min_rating:g}"
    if request.k_core > 1:
        flags["--k-core"] = str(request.k_core)
    if recipe:
        flags["--recipe"] = recipe
    names = [file.name for file in request.files]
    return " ".join(["import-data", *names, *(f"{flag}={value}" for flag, value in flags.items())])


def _summary(
    made: Interactions,
    known: Mapping[str, Mapping[str, int]],
    sides: Mapping[str, pd.DataFrame],
    request: Request,
) -> list[str]:
    n_users, n_items = len(known["user"]), len(known["item"])
    lines = [f"{n_users:,} users, {n_items:,} items, {len(made.user):,} interactions"]
    if made.time is not None and 1e8 < np.median(made.time) < 1e11:
        ends = (pd.Timestamp(end, unit="s").date() for end in (made.time.min(), made.time.max()))
        lines.append("times from {} to {}".format(*ends))
    for side, rows in sides.items():
        if rows.shape[1]:
            share = len(rows) / len(known[side])
            lines.append(f"{share:.0%} of the {side}s have a row in the .{side} file")
    if n := interactions.n_repeats(made):
        lines.append(
            f"{n:,} interactions repeat a user and an item at another time: a run takes the first "
            "(rm_dup_inter in the yaml)"
        )
    if made.rating is not None and request.min_rating is None:
        low, high = np.nanmin(made.rating), np.nanmax(made.rating)
        if low < high:
            lines.append(
                f"ratings from {low:g} to {high:g}: every row counts as liked; --min-rating keeps "
                "those from a number on"
            )
    return lines
