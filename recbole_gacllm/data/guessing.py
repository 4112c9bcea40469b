"""What the columns of an unknown table are: by their names, then by what stands in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_gacllm.data.atomic import MISSING
from recbole_gacllm.data.tables import Table, is_number

#: What a column of interactions can be, in the order in which RecBole's files have them.
ROLES = ("user", "item", "rating", "time")
# Names without signs and in lower case; earlier ones win.
_NAMES: dict[str, tuple[str, ...]] = {
    "user": (
        *("userid", "user", "useridx", "uid", "reviewerid", "customerid", "customer", "memberid"),
        *("visitorid", "accountid", "profileid", "personid", "clientid", "readerid", "playerid"),
        *("listenerid", "buyerid", "viewerid", "studentid", "username", "reviewer", "author"),
        *("sessionid", "session", "profilename"),
    ),
    "item": (
        *("itemid", "item", "itemidx", "iid", "parentasin", "asin", "productid", "movieid"),
        *("bookid", "isbn", "gameid", "appid", "animeid", "artistid", "trackid", "songid"),
        *("albumid", "businessid", "newsid", "articleid", "venueid", "locationid", "poiid"),
        *("recipeid", "courseid", "jobid", "videoid", "showid", "beerid", "wineid", "restaurantid"),
        *("hotelid", "goodsid", "contentid", "podcastid", "eventid", "sku", "stockcode", "product"),
        *("movie", "book", "game", "track", "song", "business", "article", "venue", "streamid"),
    ),
    "rating": (
        *("rating", "stars", "overall", "score", "bookrating", "userrating", "ratings", "star"),
        *("reviewrating", "starrating", "reviewscore", "reviewoverall", "grade", "label"),
        *("weight", "playcount", "plays"),
    ),
    "time": (
        *("timestamp", "unixreviewtime", "time", "datetime", "unixtime", "ts", "date"),
        *("reviewtime", "reviewdate", "eventtime", "createdat", "dateadded", "ratingtimestamp"),
        *("interactiontime", "purchasedate", "invoicedate", "orderdate", "submitted", "created"),
        *("datesubmitted", "utctime", "reviewtimestamp", "when"),
    ),
}
#: The parts of a sentence about an item, and what such a column is called.
TEXT_NAMES: dict[str, tuple[str, ...]] = {
    "title": (
        *("title", "name", "itemname", "productname", "producttitle", "movietitle", "booktitle"),
        *("originaltitle", "appname", "headline", "trackname", "songname", "artistname"),
        *("itemtitle", "coursename", "recipename", "description"),
    ),
    "year": ("year", "releaseyear", "publicationyear", "yearofpublication"),
    "by": ("brand", "store", "bookauthor", "author", "authors", "artist", "publisher", "developer"),
    "about": ("categories", "genres", "category", "genre", "maincategory", "tags", "class"),
    "text": ("description", "abstract", "overview", "summary", "synopsis", "plot", "features"),
}
_USERS, _ITEMS = (
    re.compile(r"user|customer|member|reviewer|person"),
    re.compile(
        r"item|product|movie|book|game|artist|track|song|news|business|venue|meta|article|anime|poi|"
        r"catalog"
    ),
)
_MAX_RATINGS = 101  # different values
_MOST = 0.8
_LONGEST_ID = 80


def plain_name(name: str) -> str:
    """A column's name without signs, in lower case, and without RecBole's ``:type``."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r":\w+$", "", name).lower())


def guess_interactions(table: Table) -> dict[str, str]:
    """Role -> column of a table of interactions, as far as there is one.

    Ids are taken by name; the rest by name and content, or by content alone.
    """
    sample = table.sample
    roles = {role: by_name(role, table.names) for role in ROLES}
    fits = {"rating": is_rating, "time": is_time}
    for role, is_one in fits.items():
        named = _ranked(role, table.names)
        names = [name for name in named if is_one(sample[name])]
        if role == "time" and not names:  # numbers that are an order, no dates
            names = [name for name in named if _are_numbers(sample[name])]
        if role == "time" and not names:  # H&M calls its days t_dat
            ids = (roles["user"], roles["item"])
            free = [name for name in table.names if name not in ids and table.has_header]
            names = [n for n in free if is_time(sample[n]) and not _are_numbers(sample[n])]
        roles[role] = next(iter(names), None)
    n_missing = [roles["user"], roles["item"]].count(None)
    for role in ("time", "rating") if n_missing else ():
        free = [name for name in table.names if name not in roles.values()]
        if role == "rating":
            free = free[n_missing:]  # the first ones are left for the ids
        if roles[role] is None:
            roles[role] = next((name for name in free if fits[role](sample[name])), None)
    for role in ("user", "item"):
        if roles[role] is None:
            free = [name for name in table.names if name not in roles.values()]
            roles[role] = next((name for name in free if _is_id(sample[name])), None)
    return {role: name for role, name in roles.items() if name is not None}


def by_name(role: str, names: Sequence[str]) -> str | None:
    """The column whose name says that it is the user, item, rating or time."""
    return next(iter(_ranked(role, names)), None)


def _ranked(role: str, names: Sequence[str]) -> list[str]:
    plain = {name: plain_name(name) for name in names}
    known = _NAMES[role]
    exact = sorted((n for n in names if plain[n] in known), key=lambda n: known.index(plain[n]))
    if exact or role == "rating":
        return exact
    if role == "time":
        return [name for name in names if re.search(r"time|date", plain[name])]
    ends = ("id", "key", "hash", "code", "idx", "index", "no", "number")
    pattern = _USERS if role == "user" else _ITEMS
    return [n for n in names if pattern.search(plain[n]) and plain[n].endswith(ends)]


def has_both_ids(table: Table) -> bool:
    """Whether names of columns say who, and with what."""
    return all(by_name(role, table.names) for role in ("user", "item"))


def side_of(table: Table, ids: Mapping[str, Iterable[str]]) -> tuple[str, str] | None:
    """Side and id column of a table of features: by its name, else by the ids that it holds.

    Args:
        table: What is asked about.
        ids: Side -> its ids in the interactions.
    """
    named = {side: by_name(side, table.names) for side in ids}
    if len(sides := [side for side in ids if named[side]]) == 1:
        return sides[0], str(named[sides[0]])
    stem = Path(table.path.name.lower()).name
    called = {"user": _USERS.search(stem), "item": _ITEMS.search(stem)}
    n_met: dict[tuple[str, str], float] = {}
    for side, tokens in ids.items():
        known = set(tokens)
        for place, name in enumerate(table.names):
            values = texts(table.sample[name]).dropna()
            share = values.isin(known).mean() if len(values) else 0.0
            if share > 0 and values.is_unique:
                bonus = 2 * (called[side] is not None) + (plain_name(name).endswith("id"))
                n_met[side, name] = share + bonus - place / 100
    return max(n_met, key=lambda key: n_met[key], default=None)


def _are_numbers(column: pd.Series) -> bool:
    values = texts(column).dropna()
    return bool(len(values) and values.map(is_number).mean() >= _MOST)


def is_rating(column: pd.Series) -> bool:
    """Few different numbers, none of them large."""
    if not _are_numbers(column):
        return False
    numbers = pd.to_numeric(texts(column).dropna(), errors="coerce")
    return bool(numbers.nunique() <= _MAX_RATINGS and numbers.abs().max() < 1e6)


def is_time(column: pd.Series) -> bool:
    """Numbers as large as seconds since 1970, or dates."""
    values = texts(column).dropna()
    if not len(values):
        return False
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.notna().mean() >= _MOST:
        return bool((numbers.median() > 1e8) and numbers.nunique() > 1) or len(values) == 1
    if values.str.contains(r"\d").mean() < _MOST or values.str.len().max() > 40:
        return False
    dates = pd.to_datetime(values[:50], errors="coerce", format="mixed", utc=True)
    return bool(dates.notna().mean() >= _MOST)


def _is_id(column: pd.Series) -> bool:
    if column.map(type).isin([list, dict, bool, np.ndarray]).any():
        return False
    values = texts(column).dropna()
    return len(values) > 0 and int(values.str.len().max()) <= _LONGEST_ID


def texts(column: pd.Series) -> pd.Series:
    """Cells as texts without blanks around them, None where missing; whole numbers without ``.0``.

    Ids that are text stay as they are, zeros in front and all.
    """
    if column.dtype.kind == "f":
        whole = column.dropna()
        if (whole % 1 == 0).all():
            column = column.astype("Int64")
    if column.dtype != object:
        column = pd.Series([None if pd.isna(cell) else cell for cell in column], column.index)
    cells = column.map(_text)
    return cells.mask(cells.isin(MISSING), None)


def _text(cell: object) -> str | None:
    if isinstance(cell, str):
        return cell.strip()
    if cell is None or cell is pd.NA or cell is pd.NaT:
        return None
    if isinstance(cell, float):
        return None if cell != cell else str(int(cell)) if cell.is_integer() else repr(cell)
    if isinstance(cell, pd.Timestamp):
        return cell.isoformat()
    return str(cell)


def noun_of(column: str, path: Path) -> str:
    """What the items are called: ``movieId`` is of movies; else ``item``."""
    words = "movie book game artist track song business article venue anime recipe course product"
    plain = plain_name(column)
    known = {"asin": "product", "parentasin": "product", "isbn": "book", "newsid": "news article"}
    for word in words.split():
        if word in plain or word in path.name.lower():
            return word
    return known.get(plain, "item")


def item_template(columns: Sequence[str], noun: str) -> str | None:
    """A sentence of the columns whose names are known; None where none is a title."""
    plain = {plain_name(name): name for name in reversed(columns)}
    part = {
        part: next((plain[name] for name in names if name in plain), None)
        for part, names in TEXT_NAMES.items()
    }
    if part["title"] is None:
        return None
    if part["text"] == part["title"]:
        part["text"] = None
    a_noun = f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"
    return (
        f"{{{part['title']}|title}}"
        + (f"[ ({{{part['year']}}})]" if part["year"] else "")
        + (f"[ by {{{part['by']}|list}}]" if part["by"] else "")
        + ("" if noun == "item" else f", {a_noun}")
        + (f"[ filed under {{{part['about']}|list}}]" if part["about"] else "")
        + (f".[ {{{part['text']}|list}}]" if part["text"] else ".")
    )
