"""Interactions of other people's files, held as numbers: coded, in seconds, filtered, counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from recbole_gacllm.data.atomic import AtomicFile
from recbole_gacllm.data.guessing import texts
from recbole_gacllm.data.numbers import times

# A number of seconds is below the first, of milliseconds below the second, then micro, then nano.
_UNITS = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (np.inf, 1e9))
_MANY_DATES = 1_000_000  # that are held as text
_FEW_TIMES = 0.5  # of the rows have one: the column is left out


class Codes:
    """Texts as numbers, in the order in which they come; -1 is missing."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def add(self, column: pd.Series) -> npt.NDArray[np.int32]:
        """The numbers of a column's cells. Shapes: ``[n]`` to ``[n]``."""
        try:
            codes, values = pd.factorize(column)
        except TypeError:
            raise ValueError(
                f"column {column.name!r} holds lists, so it is no column of ids. Name the one "
                "that is: --user=…, --item=…."
            ) from None
        tokens = texts(pd.Series(values))
        numbers = [
            -1 if token is None else self.of.setdefault(token, len(self.of)) for token in tokens
        ]
        return np.array([*numbers, -1], dtype=np.int32)[codes]

    @property
    def tokens(self) -> list[str]:
        """The texts by number."""
        return list(self.of)


@dataclass
class Interactions:
    """Rows of a user, an item and, where there are any, a rating and a time.

    Attributes:
        users, items: Raw tokens by number.
        user, item: Numbers of each row. Shapes: ``[n]``.
        rating: NaN where missing; None without ratings. Shape: ``[n]``.
        time: In seconds, or as it was where it is no date; None without times. Shape: ``[n]``.
        part: Number of the file of a ready split; None without one. Shape: ``[n]``.
        counts: What was dropped -> rows, in the order in which it was.
        notes: What a person should know.
    """

    users: list[str]
    items: list[str]
    user: npt.NDArray[np.int32]
    item: npt.NDArray[np.int32]
    rating: npt.NDArray[np.float64] | None
    time: npt.NDArray[np.float64] | None
    part: npt.NDArray[np.int8] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def keep(self, rows: npt.NDArray[np.bool_], reason: str) -> None:
        """Drop all other rows, and count them."""
        n_dropped = int((~rows).sum())
        if n_dropped == 0:
            return
        self.counts[reason] = self.counts.get(reason, 0) + n_dropped
        for name in ("user", "item", "rating", "time", "part"):
            values = getattr(self, name)
            setattr(self, name, None if values is None else values[rows])

    def frame(self) -> pd.DataFrame:
        """Numbers of users and items, and times: what tells rows apart."""
        columns = {"user": self.user, "item": self.item, "time": self.time, "part": self.part}
        return pd.DataFrame({name: col for name, col in columns.items() if col is not None})


def collect(
    chunks: Iterator[tuple[int, pd.DataFrame]], roles: Sequence[str], path: Path, in_parts: bool
) -> Interactions:
    """Read interactions as numbers.

    Args:
        chunks: Number of the file, and rows with the columns ``roles``.
        roles: ``user``, ``item`` and perhaps ``rating`` and ``time``.
        path: What errors name.
        in_parts: Whether the files are the parts of a ready split.

    Raises:
        ValueError: If there are no rows, or times that cannot be read.
    """
    codes = {role: Codes() for role in ("user", "item", "time")}
    columns: dict[str, list[npt.NDArray[np.generic]]] = {role: [] for role in (*roles, "part")}
    moments: list[npt.NDArray[np.float64]] = []
    for number, chunk in chunks:
        for role in ("user", "item"):
            columns[role].append(codes[role].add(chunk[role]))
        if "rating" in roles:
            rating = pd.to_numeric(chunk["rating"], errors="coerce")
            columns["rating"].append(rating.to_numpy(np.float64, na_value=np.nan))
        if "time" in roles:
            numbers = _numbers(chunk["time"])
            if not columns["time"] and numbers.notna().mean() > 0.5:
                moments.append(numbers.to_numpy(np.float64))
            else:  # dates, of which many stand more than once
                columns["time"].append(codes["time"].add(chunk["time"]))
            if len(codes["time"].of) > _MANY_DATES:
                moments.append(_as_numbers(codes["time"], columns["time"], path))
                codes["time"], columns["time"] = Codes(), []
        columns["part"].append(np.full(len(chunk), number, dtype=np.int8))
    if not columns["user"]:
        raise ValueError(f"{path} holds no rows of interactions.")
    if "time" in roles and columns["time"]:
        moments.append(_as_numbers(codes["time"], columns["time"], path))
    made = Interactions(
        codes["user"].tokens,
        codes["item"].tokens,
        np.concatenate(columns["user"]),
        np.concatenate(columns["item"]),
        np.concatenate(columns["rating"]) if "rating" in roles else None,
        np.concatenate(moments) if moments else None,
        np.concatenate(columns["part"]) if in_parts else None,
    )
    made.keep((made.user >= 0) & (made.item >= 0), "without a user or an item")
    _to_seconds(made)
    return made


def _numbers(column: pd.Series) -> pd.Series:
    """Cells that are numbers, NaN elsewhere."""
    if column.dtype.kind in "mM":
        return pd.Series(np.nan, index=column.index)
    return pd.to_numeric(column, errors="coerce").astype(np.float64)


def _as_numbers(
    codes: Codes, columns: list[npt.NDArray[np.generic]], path: Path
) -> npt.NDArray[np.float64]:
    """Times as numbers, NaN where there is none; those that cannot be read count as missing."""
    written = pd.Series(codes.tokens, dtype=object)
    values = pd.to_numeric(written, errors="coerce").to_numpy(np.float64)
    if np.isnan(values).mean() > 0.5:
        values = _dates(written, path)
    of_rows: npt.NDArray[np.float64] = np.append(values, np.nan)[np.concatenate(columns)]
    return of_rows


def _dates(written: pd.Series, path: Path) -> npt.NDArray[np.float64]:
    for rows in (written.notna(), None):
        if rows is None:  # which of them are dates at all
            rows = pd.to_datetime(written, errors="coerce", format="mixed", utc=True).notna()
        values = np.full(len(written), np.nan)
        if not rows.any():
            return values
        cells = pd.DataFrame({"time": written[rows].to_list()}, dtype=object)
        try:
            values[rows.to_numpy()] = times(AtomicFile(path, ["time"], ["float"], cells), "time")
        except ValueError:
            continue
        return values
    raise ValueError(
        f"{path}: the times can be read in two ways, such as {cells['time'][0]!r}. Write them as "
        "2024-03-31 or as numbers, or leave them out: --time=none."
    )


def _to_seconds(made: Interactions) -> None:
    if made.time is None:
        return
    missing = np.isnan(made.time)
    if missing.mean() > _FEW_TIMES:
        made.time = None
        made.notes.append(f"times are left out: {missing.mean():.0%} of the rows have none")
        return
    made.keep(~missing, "without a time that can be read")
    unit = next(unit for most, unit in _UNITS if np.median(np.abs(made.time)) < most)
    if unit > 1:
        made.time = made.time / unit
        made.notes.append(f"times were in 1/{unit:,.0f} s; they are in seconds now")


def clean(made: Interactions, min_rating: float | None, k_core: int) -> None:
    """Drop low ratings, repeated rows, and users and items with fewer than k interactions.

    Raises:
        ValueError: If there are no ratings, a ready split would be filtered, or nothing is left.
    """
    if min_rating is not None:
        if made.rating is None:
            raise ValueError(
                f"--min-rating: {min_rating:g}, but no column holds ratings; name it by --rating=…."
            )
        made.keep(
            np.nan_to_num(made.rating, nan=-np.inf) >= min_rating, f"rated below {min_rating:g}"
        )
    rows = made.frame()
    what = "of the same user, item and time" if made.time is not None else "of the same pair"
    made.keep(~rows.duplicated().to_numpy(), f"{what} as an earlier one")
    if k_core > 1:
        made.keep(_core(made, k_core), f"of users or items with fewer than {k_core} (k-core)")
    if len(made.user) == 0:
        dropped = "; ".join(f"{n} {reason}" for reason, n in made.counts.items())
        raise ValueError(f"no interaction is left ({dropped}). Loosen --min-rating or --k-core.")


def _core(made: Interactions, k: int) -> npt.NDArray[np.bool_]:
    """The largest set of rows of which each user and item has ``k``. Repeats count once."""
    pairs = made.frame()[["user", "item"]]
    first = ~pairs.duplicated().to_numpy()
    keep = np.ones(len(pairs), dtype=bool)
    while True:
        counted = keep & first
        n_user = np.bincount(made.user[counted], minlength=len(made.users))
        n_item = np.bincount(made.item[counted], minlength=len(made.items))
        smaller = keep & (n_user[made.user] >= k) & (n_item[made.item] >= k)
        if smaller.sum() == keep.sum():
            return keep
        keep = smaller


def n_repeats(made: Interactions) -> int:
    """Rows whose user and item stand in an earlier one, at another time."""
    return int(made.frame()[["user", "item"]].duplicated().sum())


def present(made: Interactions) -> Mapping[str, dict[str, int]]:
    """Side -> the tokens that have interactions, with their numbers."""
    return {
        "user": {made.users[n]: int(n) for n in np.unique(made.user)},
        "item": {made.items[n]: int(n) for n in np.unique(made.item)},
    }
