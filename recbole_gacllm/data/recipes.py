"""Public data sets as they are downloaded: which file is what, and what its columns are.

Columns that sum up all ratings (an item's average, its number of reviews) are left out: they tell
of the test part, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from recbole_gacllm.data import recipe_rows as rows
from recbole_gacllm.data.tables import Form, Table


@dataclass(frozen=True)
class Part:
    """A file of a data set.

    Attributes:
        columns: What the import calls a column (``user``, ``item``, ``rating``, ``time``, or a
            feature) -> what the file calls it. In interactions, features are of the item.
        needs: Columns by which the file is recognised; those of ``columns``, if nothing is given.
        file: Pattern of its name; files without a header are recognised by it alone.
        looks: Column -> pattern of nine tenths of its cells, where the name says nothing.
        form: How it is read.
        change: Makes rows of ``columns`` of the rows that are read.
        zero_is_unrated: A rating of 0 says that there is none.
    """

    columns: Mapping[str, str]
    needs: tuple[str, ...] = ()
    file: str = ""
    looks: Mapping[str, str] = field(default_factory=dict)
    form: Form = field(default_factory=Form)
    change: rows.Change | None = None
    zero_is_unrated: bool = False

    def fits(self, table: Table) -> bool:
        """Whether a file is this one."""
        name = table.path.name
        if self.file and not re.search(self.file, name, re.IGNORECASE):
            return False
        if self.looks:
            if table.has_header or len(table.names) != len(self.form.names or ()):
                return False
            sample = table.sample.set_axis(list(self.form.names or ()), axis=1)
            return all(
                sample[column].astype(str).str.fullmatch(pattern).mean() >= 0.9
                for column, pattern in self.looks.items()
            )
        needs = self.needs or tuple(self.columns.values())
        return bool(self.form.names) or set(needs) <= set(table.names)


@dataclass(frozen=True)
class Recipe:
    """A public data set.

    Attributes:
        interactions, items, users: Its files.
        nouns: What its items and users are called.
        item_template, user_template: Sentences of the columns; None tells all of them.
        value_names_of: A shipped data set whose words for coded values are these, too.
    """

    interactions: Part
    items: Part | None = None
    users: Part | None = None
    nouns: tuple[str, str] = ("item", "user")
    item_template: str | None = None
    user_template: str | None = None
    value_names_of: str | None = None

    def part_of(self, table: Table) -> tuple[str, Part | None]:
        """Which of its files a table is: ``interactions``, ``item``, ``user``, or none."""
        parts = {"interactions": self.interactions, "item": self.items, "user": self.users}
        fitting = ((kind, part) for kind, part in parts.items() if part and part.fits(table))
        return next(fitting, ("", None))


def recognise(table: Table) -> str | None:
    """The one recipe whose interactions a table holds."""
    fitting = [name for name, recipe in RECIPES.items() if recipe.interactions.fits(table)]
    return fitting[0] if len(fitting) == 1 else None


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_ASIN = r"B[0-9A-Z]{9}|\d{9}[\dX]"
_AMAZON_TEMPLATE = (
    "{title|title}[ by {%s}], a product[ filed under {%s|list}]."
    "[ Features: {%s|list}.][ {description}]"
)
_MOVIE_TEMPLATE = "{title|title}, a movie[ filed under {genres|list}]."
_MOVIE_VALUES = "{title|title}[ ({year})], a movie."

RECIPES: dict[str, Recipe] = {
    "amazon-2023": Recipe(
        Part(
            {"user": "user_id", "item": "parent_asin", "rating": "rating", "time": "timestamp"},
        ),
        Part(
            {
                "item": "parent_asin",
                **_same("title", "store", "main_category", "categories", "features"),
                **_same("description", "price"),
            },
            needs=("parent_asin", "title", "store"),
        ),
        nouns=("product", "customer"),
        item_template=_AMAZON_TEMPLATE % ("store", "categories", "features"),
    ),
    "amazon-2018": Recipe(
        Part(
            {"user": "reviewerID", "item": "asin", "rating": "overall", "time": "unixReviewTime"},
        ),
        Part(
            {
                "item": "asin",
                **_same("title", "brand", "category", "feature", "description", "price"),
            },
            needs=("asin", "title"),
        ),
        nouns=("product", "customer"),
        item_template=_AMAZON_TEMPLATE % ("brand", "category", "feature"),
    ),
    "amazon-2018-ratings": Recipe(
        Part(
            _same("item", "user", "rating", "time"),
            form=Form(names=("item", "user", "rating", "time")),
            looks={"item": _ASIN, "user": r"A[0-9A-Z]{8,}", "rating": r"[1-5](\.0)?"},
        ),
        Part(
            {"item": "asin", **_same("title", "brand", "category", "feature", "description")},
            needs=("asin", "title"),
        ),
        nouns=("product", "customer"),
        item_template=_AMAZON_TEMPLATE % ("brand", "category", "feature"),
    ),
    "yelp": Recipe(
        Part(
            {"user": "user_id", "item": "business_id", "rating": "stars", "time": "date"},
            needs=("review_id", "user_id", "business_id", "stars", "date"),
        ),
        Part(
            {"item": "business_id", **_same("name", "city", "state", "categories")},
            needs=("business_id", "name", "categories"),
            change=rows.comma_categories,
        ),
        nouns=("business", "user"),
        item_template="{name}[, a business in {city}][, {state}][, filed under {categories|list}].",
    ),
    "steam": Recipe(
        Part(
            {"user": "username", "item": "product_id", "time": "date"},
            needs=("username", "product_id", "date", "hours"),
        ),
        Part(
            {
                **{"item": "id", "title": "app_name"},
                **_same("genres", "tags", "developer", "publisher", "specs", "release_date"),
            },
            needs=("id", "app_name"),
        ),
        nouns=("game", "player"),
        item_template="{title}[ by {developer}], a game[ filed under {genres|list}]"
        "[; tags: {tags|list}].",
    ),
    "goodreads": Recipe(
        Part(
            {"user": "user_id", "item": "book_id", "rating": "rating", "time": "date_added"},
            zero_is_unrated=True,
        ),
        Part(
            {
                "item": "book_id",
                **_same("title", "publisher", "publication_year", "format", "description"),
            },
            needs=("book_id", "title", "publisher"),
        ),
        nouns=("book", "reader"),
        item_template="{title|title}[ ({publication_year})], a book[ published by {publisher}]."
        "[ {description}]",
    ),
    "goodreads-csv": Recipe(
        Part(
            {"user": "user_id", "item": "book_id", "rating": "rating"},
            needs=("user_id", "book_id", "is_read", "rating", "is_reviewed"),
            zero_is_unrated=True,
        ),
        nouns=("book", "reader"),
    ),
    "movielens-100k": Recipe(
        Part(
            _same("user", "item", "rating", "time"),
            file=r"^u\.data$",
            form=Form("\t", names=("user", "item", "rating", "time")),
        ),
        Part(
            _same("item", "title", "genres"),
            file=r"^u\.item$",
            form=Form("|", "latin-1", ("item", "title", "date", "video", "url", *rows.GENRES)),
            change=rows.flags_to_genres,
        ),
        Part(
            _same("user", "age", "gender", "occupation"),
            file=r"^u\.user$",
            form=Form("|", names=("user", "age", "gender", "occupation", "zip_code")),
        ),
        nouns=("movie", "person"),
        item_template=_MOVIE_TEMPLATE,
        user_template="A {gender} aged {age}[ who {occupation}].",
        value_names_of="ml-100k",
    ),
    "movielens-1m": Recipe(
        Part(
            _same("user", "item", "rating", "time"),
            file=r"^ratings\.dat$",
            form=Form("::", names=("user", "item", "rating", "time")),
        ),
        Part(
            _same("item", "title", "genres"),
            file=r"^movies\.dat$",
            form=Form("::", names=("item", "title", "genres")),
            change=rows.piped_genres,
        ),
        Part(
            _same("user", "gender", "age", "occupation"),
            file=r"^users\.dat$",
            form=Form("::", names=("user", "gender", "age", "occupation", "zip_code")),
        ),
        nouns=("movie", "person"),
        item_template=_MOVIE_TEMPLATE,
        user_template="A {gender} {age}[ who {occupation}].",
        value_names_of="ml-1m",
    ),
    "movielens": Recipe(  # 20m, 25m, 32m, latest
        Part(
            {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"},
        ),
        Part(
            {"item": "movieId", **_same("title", "genres")},
            change=rows.piped_genres,
        ),
        nouns=("movie", "person"),
        item_template=_MOVIE_TEMPLATE,
    ),
    "lastfm": Recipe(  # hetrec 2011; the rating is a number of plays
        Part({"user": "userID", "item": "artistID", "rating": "weight"}),
        Part(
            {"item": "id", "name": "name"},
            needs=("id", "name", "pictureURL"),
        ),
        nouns=("artist", "listener"),
        item_template="{name}, an artist.",
    ),
    "netflix": Recipe(
        Part(
            {"user": "user", "item": "movie", "rating": "rating", "time": "time"},
            file=r"^(combined_data_\d+|mv_\d+)\.txt",
            form=Form(",", names=("user", "rating", "time")),
            change=rows.movie_lines,
        ),
        Part(
            _same("item", "title", "year"),
            file=r"^movie_titles\.(csv|txt)$",
            form=Form(",", "latin-1", ("item", "year", "title"), rest_in_last=True),
        ),
        nouns=("movie", "viewer"),
        item_template=_MOVIE_VALUES,
    ),
    "mind": Recipe(  # clicks among what was shown; `history`, which has no times, is left out
        Part(
            {"user": "user", "item": "news", "time": "time"},
            file=r"^behaviors\.tsv",
            form=Form("\t", names=("impression", "user", "time", "history", "impressions")),
            change=rows.clicks,
        ),
        Part(
            _same("item", "category", "subcategory", "title", "abstract"),
            file=r"^news\.tsv",
            form=Form(
                "\t",
                names=(
                    *("item", "category", "subcategory", "title", "abstract", "url"),
                    *("title_entities", "abstract_entities"),
                ),
            ),
        ),
        nouns=("news article", "reader"),
        item_template="{title}, a news article[ about {category}][ ({subcategory})].[ {abstract}]",
    ),
    "book-crossing": Recipe(
        Part(
            {"user": "User-ID", "item": "ISBN", "rating": "Book-Rating"},
        ),
        Part(
            {
                **{"item": "ISBN", "title": "Book-Title", "author": "Book-Author"},
                **{"year": "Year-Of-Publication", "publisher": "Publisher"},
            },
            needs=("ISBN", "Book-Title"),
            form=Form(escaped=True),
        ),
        Part(
            {"user": "User-ID", "location": "Location", "age": "Age"},
            form=Form(escaped=True),
        ),
        nouns=("book", "reader"),
        item_template="{title|title}[ ({year})], a book[ by {author}][, published by {publisher}].",
        user_template="A reader[ aged {age}][ from {location}].",
    ),
    "foursquare": Recipe(  # New York and Tokyo
        Part(
            {"user": "user", "item": "venue", "time": "time", "category": "category"},
            file=r"TSMC2014",
            form=Form(
                "\t",
                names=(
                    *("user", "venue", "category_id", "category", "latitude", "longitude"),
                    *("offset", "time"),
                ),
            ),
        ),
        nouns=("venue", "person"),
        item_template="A venue: {category}.",
    ),
    "foursquare-global": Recipe(
        Part(
            {"user": "user", "item": "venue", "time": "time"},
            file=r"TIST2015_Checkins",
            form=Form("\t", names=("user", "venue", "time", "offset")),
        ),
        Part(
            {"item": "venue", **_same("category", "country")},
            file=r"TIST2015_POIs",
            form=Form("\t", names=("venue", "latitude", "longitude", "category", "country")),
        ),
        nouns=("venue", "person"),
        item_template="A venue: {category}[, in {country}].",
    ),
    "gowalla": Recipe(  # and Brightkite, of the same form
        Part(
            {"user": "user", "item": "location", "time": "time"},
            file=r"(gowalla|brightkite)_totalCheckins",
            form=Form("\t", names=("user", "time", "latitude", "longitude", "location")),
        ),
        nouns=("place", "person"),
    ),
}
