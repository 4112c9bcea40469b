"""Rows of public data sets that have to be made out of what their files hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

Chunks = Iterator[pd.DataFrame]
Change = Callable[[Chunks], Chunks]

# MovieLens


GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance"),
    *("Sci-Fi", "Thriller", "War", "Western"),
)


def flags_to_genres(chunks: Chunks) -> Chunks:
    """A column of 0 and 1 for each genre becomes one of lists."""
    for chunk in chunks:
        flags = chunk[list(GENRES)].to_numpy() == "1"
        names = np.array(GENRES)
        genres = [[genre for genre in names[row] if genre != "unknown"] for row in flags]
        yield chunk.assign(genres=pd.Series(genres, index=chunk.index, dtype=object))


def piped_genres(chunks: Chunks) -> Chunks:
    """``Action|Comedy`` becomes a list."""
    for chunk in chunks:
        genres = [
            [] if text == "(no genres listed)" else str(text).split("|") for text in chunk["genres"]
        ]
        yield chunk.assign(genres=pd.Series(genres, index=chunk.index, dtype=object))


# Netflix prize


def movie_lines(chunks: Chunks) -> Chunks:
    """``8:`` begins the ratings of movie 8."""
    movie: str | None = None
    for chunk in chunks:
        head = chunk["user"].str.endswith(":", na=False)
        movies = chunk["user"].str.rstrip(": ").where(head).ffill()
        movies = movies.fillna(movie) if movie is not None else movies  # of the last chunk
        movie = movies.iloc[-1]
        yield chunk.assign(movie=movies)[~head]


# MIND


def clicks(chunks: Chunks) -> Chunks:
    """``N1-0 N2-1`` are shown articles, of which N2 was clicked; times are American."""
    for chunk in chunks:
        times = pd.to_datetime(chunk["time"], format="%m/%d/%Y %I:%M:%S %p")
        shown = chunk["impressions"].str.split()
        rows = pd.DataFrame({"user": chunk["user"], "time": times, "news": shown}).explode("news")
        clicked = rows[rows["news"].str.endswith("-1", na=False)]
        yield clicked.assign(news=clicked["news"].str.removesuffix("-1")).reset_index(drop=True)


# Yelp


def comma_categories(chunks: Chunks) -> Chunks:
    """``Food, Coffee & Tea`` becomes a list."""
    for chunk in chunks:
        lists = [
            text.split(", ") if isinstance(text, str) else None for text in chunk["categories"]
        ]
        yield chunk.assign(categories=pd.Series(lists, index=chunk.index, dtype=object))
