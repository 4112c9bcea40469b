"""import-data: tables of strangers become a data set, losing nothing without saying so."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from recbole_gacllm.cli.main import main
from recbole_gacllm.data.atomic import read_atomic
from recbole_gacllm.data.importing import Request, import_files
from recbole_gacllm.data.recipes import RECIPES

MINUTE = 60


def write(name: str, content: str | bytes) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def json_lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def imported(*files: Path, name: str = "shop", **more) -> list[str]:
    return import_files(Request(files, name, **more))


def columns(kind: str = "inter", name: str = "shop") -> dict[str, list]:
    """The columns of an atomic file, under their names and types, as our reader gives them."""
    path = Path("dataset", name, f"{name}.{kind}")
    file = read_atomic(path)
    cells = file.cells.astype(object).where(file.cells.notna(), None)
    # What RecBole reads: pandas, with its quoting.
    theirs = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    assert theirs.to_numpy().tolist() == cells.fillna("").to_numpy().tolist()
    return {
        f"{name}:{kind}": cells[name].tolist()
        for name, kind in zip(file.names, file.types, strict=True)
    }


def keys(name: str = "shop") -> dict:
    return yaml.safe_load(Path("dataset", name, f"{name}.yaml").read_text("utf-8"))


RATINGS = "user_id,item_id,rating,timestamp\n007,B0,5,1600000000\n08,A1,3,1600000060\n"


@pytest.mark.parametrize(
    "content",
    [
        RATINGS,
        RATINGS.replace("\n", "\r\n"),
        b"\xef\xbb\xbf" + RATINGS.encode(),
        RATINGS.encode("utf-16"),
        RATINGS.replace(",", "\t"),
        RATINGS.replace(",", ";"),
        RATINGS.replace(",", "::"),
        RATINGS.replace("user_id", "Customer ID").replace("item_id", "sku"),
        RATINGS.partition("\n")[2],  # no header
        RATINGS.replace("1600000000", "1600000000000").replace("1600000060", "1600000060000"),
        RATINGS.replace("1600000000", "2020-09-13T12:26:40Z").replace(
            "1600000060", "2020-09-13T12:27:40Z"
        ),
        RATINGS.replace("1600000000", '"Sep 13, 2020"').replace("1600000060", '"Sep 14, 2020"'),
        RATINGS.replace("007", '"007"'),
        RATINGS.replace("timestamp", "t_dat")
        .replace("1600000000", "2020-09-13 12:26:40")
        .replace("1600000060", "2020-09-13 12:27:40"),
    ],
    ids=[
        *("csv", "crlf", "bom", "utf16", "tsv", "semicolon", "colons", "names", "headless", "ms"),
        *("iso", "words", "quotes", "t_dat"),
    ],
)
def test_interactions_are_read_in_any_dress_and_ids_keep_their_zeros(tmp_path, content):
    imported(write("log.csv", content))
    read = columns()
    assert read["user_id:token"] == ["007", "08"]
    assert read["item_id:token"] == ["B0", "A1"]
    assert read["rating:float"] == ["5", "3"]
    first, second = map(int, read["timestamp:float"])
    assert (first, second - first) in [(1600000000, MINUTE), (1599955200, 24 * 60 * MINUTE)]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_json_and_parquet_are_read_like_text(tmp_path, suffix):
    records = [
        {"user": "007", "item": 12, "score": 5.0, "time": 1600000000},
        {"user": "08", "item": 13, "score": None, "time": 1600000060},
    ]
    path = Path(f"log.{suffix}")
    if suffix == "parquet":
        pd.DataFrame(records).to_parquet(path)
    else:
        write(path.name, json.dumps(records) if suffix == "json" else json_lines(*records))
    imported(path)
    read = columns()
    assert read["user_id:token"] == ["007", "08"]
    assert read["item_id:token"] == ["12", "13"]
    assert read["rating:float"] == ["5", None]


def test_what_is_dropped_is_counted(tmp_path):
    rows = [
        "u9,i9,5,200000000,more",  # pandas would read a first row so
        "u1,i1,5,200000000,",
        "u1,i1,5,200000000",  # twice
        "u1,i1,5,200000001",  # again, later
        ",i1,5,200000000",  # no user
        "u2,NA,5,200000000",  # no item: RecBole reads NA as missing
        "u2,i2,1,200000000",
        "u2,i2,5,yesterday",
        "u2,i2,5,200000000,more",
        "u3,i1,4,200000000",
        "u3,i2,4,200000002",
    ]
    path = write("log.csv", "\n".join(["user,item,rating,time", *rows]))
    said = "\n".join(imported(path, min_rating=2))
    for line in (
        "log.csv: dropped 2 rows of another width than the header",
        "dropped 2 interactions: without a user or an item",
        "dropped 1 interactions: without a time that can be read",
        "dropped 1 interactions: rated below 2",
        "dropped 1 interactions: of the same user, item and time as an earlier one",
        "2 users, 2 items, 4 interactions",
        "1 interactions repeat a user and an item",
    ):
        assert line in said
    assert columns()["user_id:token"] == ["u1", "u1", "u3", "u3"]
    assert keys()["rm_dup_inter"] == "first"
    # u1 has one item, however often; without u1, i1 has one user; and so on to nothing.
    with pytest.raises(ValueError, match=r"no interaction is left .*k-core.*--k-core"):
        imported(path, min_rating=2, k_core=2, overwrite=True)


TEXTS = [
    'Screen, 22" wide',
    '"Lone quote at the start',
    "A\ttab and a\nline break",
    "<p>Fine &amp; <b>bold</b></p>",
    "Müller’s café",
]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_texts_survive(tmp_path, form):
    log = "user,item\n" + "".join(f"u{n % 2},{n:02}\n" for n in range(len(TEXTS)))
    frame = pd.DataFrame({"item": [f"{n:02}" for n in range(len(TEXTS))], "title": TEXTS})
    path = Path(f"items.{form}")
    if form == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="," if form == "csv" else "\t")
    imported(path, write("log.csv", log))  # in any order
    assert columns("item")["title:token"] == [
        'Screen, 22" wide',
        '"Lone quote at the start',
        "A tab and a line break",
        "Fine & bold",
        "Müller’s café",
    ]


def test_another_encoding_is_said_aloud(tmp_path):
    items = write("items.csv", "item,title\n1,Café\n2,Thé\n".encode("cp1252"))
    said = imported(write("log.csv", "user,item\na,1\nb,2\na,2\n"), items)
    assert "items.csv: not UTF-8; it is read as cp1252" in said
    assert columns("item")["title:token"] == ["Café", "Thé"]


def test_lists_and_dictionaries_become_what_a_sentence_can_tell(tmp_path):
    log = write("log.csv", "user,item\na,1\nb,2\na,2\n")
    items = json_lines(
        {"item": 1, "tags": ["Home & Kitchen", "Tea"], "more": {"size": [3, "big"]}, "d": ["A."]},
        {"item": 2, "tags": None, "more": None, "d": ["One paragraph. " * 20, "Two."]},
    )
    imported(log, write("items.jsonl", items))
    read = columns("item")
    assert read["tags:token_seq"] == ["Home & Kitchen|Tea", None]
    assert json.loads(read["more:token"][0]) == {"size": [3, "big"]}
    assert read["d:token"][1].endswith("One paragraph. Two.")
    assert keys()["seq_separator"] == "|"


def test_ids_that_were_made_numbers_meet_again(tmp_path):
    log = write("log.csv", "user,item\na,007\nb,008\na,008\n")
    said = imported(log, write("items.csv", "item,title\n7.0,Seven\n8.0,Eight\n9.0,Nine\n"))
    assert "ids of 'item' meet those of the interactions without zeros in front" in said
    assert "items.csv: dropped 1 rows of nodes without interactions" in said
    assert columns("item")["item_id:token"] == ["007", "008"]


def test_columns_of_an_item_among_the_interactions_describe_it(tmp_path):
    rows = [f"u{n % 5},i{n % 4},Thing {n % 4},{n % 3 + 1},{1600000000 + n}" for n in range(40)]
    imported(write("log.csv", "\n".join(["user,item,title,rating,time", *rows])))
    assert columns("item")["title:token"] == [f"Thing {n}" for n in range(4)]
    assert keys()["text_item_template"] == "{title|title}."


def test_a_person_may_say_what_is_what(tmp_path):
    path = write("log.csv", "user,who,item,what,rating\nx,a,1,p,3\nx,b,2,q,4\nx,a,3,q,4\n")
    imported(path, columns={"user": "who", "item": "what", "rating": "none"})
    assert columns() == {"user_id:token": ["a", "b", "a"], "item_id:token": ["p", "q", "q"]}
    with pytest.raises(ValueError, match=r"--item: 'wht' is not a column of any file.*what"):
        imported(path, columns={"item": "wht"}, overwrite=True)


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("", {}, "empty"),
        (RATINGS, {"name": "a/b"}, "--name: 'a/b'"),
        (RATINGS, {"name": "ml-100k"}, "own package"),
        (RATINGS, {"recipe": "other"}, "--recipe: 'other' is not one of amazon-2023"),
        (RATINGS, {"recipe": "yelp"}, "no file has the interactions of this recipe"),
        (RATINGS, {"k_core": 0}, "--k-core: 0 is not allowed"),
        ("user,item\na,1\nb,2\na,2\n", {"min_rating": 3}, "--min-rating: 3, but no column"),
        ("title,price\nGood morning,1.5\n", {}, "no column can be told to be of the items"),
        ("user,item,time\na,1,03/04/2020\nb,2,04/03/2020\na,2,04/04/2020\n", {}, "two ways"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, content, more, message):
    with pytest.raises(ValueError, match=message):
        imported(write("log.csv", content), **more)
    assert not any(Path().glob("dataset/*/*"))


def test_nothing_is_overwritten_unless_asked(tmp_path):
    path = write("log.csv", RATINGS)
    imported(path)
    Path("dataset/shop/shop.useremb").write_text("kept")
    Path("dataset/shop/shop.item").write_text("of before")
    with pytest.raises(ValueError, match=r"shop\.inter is there already.*--overwrite"):
        imported(path)
    imported(path, overwrite=True)
    left = sorted(file.name for file in Path("dataset/shop").iterdir())
    assert left == ["shop.inter", "shop.useremb", "shop.yaml"]


def test_files_called_train_valid_and_test_become_a_ready_split(tmp_path):
    files = [write(f"{part}.csv", RATINGS.replace("B0", part)) for part in ("test", "train", "val")]
    imported(*files)
    assert keys()["benchmark_filename"] == ["train", "valid", "test"]
    for part in ("train", "test"):
        assert columns(f"{part}.inter")["item_id:token"] == [part, "A1"]
    assert columns("valid.inter")["item_id:token"] == ["val", "A1"]
    with pytest.raises(ValueError, match="ready split"):
        imported(*files, k_core=2, overwrite=True)


def test_blocks_of_a_file_are_joined_without_a_seam(tmp_path, monkeypatch):
    """Rows over several lines and plain ones, in blocks much smaller than the file."""
    monkeypatch.setattr("recbole_gacllm.data.tables._ROW", 0)
    monkeypatch.setattr("recbole_gacllm.data.tables.MAX_LINES", 5)
    n = 40
    titles = [f'The "{i}"\nof\nmany, lines' if i % 3 else f"Plain {i}" for i in range(n)]
    pd.DataFrame({"item": range(n), "title": titles}).to_csv("items.csv", index=False)
    imported(
        write("log.csv", "user,item\n" + "".join(f"u{i % 7},{i}\n" for i in range(n))),
        Path("items.csv"),
    )
    assert columns("item")["title:token"] == [" ".join(title.split()) for title in titles]


# Public data sets, in the form of their files


REVIEW = "Great,\tnice.\nAgain."
PUBLIC: dict[str, tuple[dict[str, str | bytes], dict[str, dict[str, list]]]] = {
    "amazon-2023": (
        {
            "All_Beauty.jsonl.gz": json_lines(
                *(
                    {
                        **{"rating": 5.0, "title": "Ok", "text": REVIEW, "images": []},
                        **{"asin": "B00", "parent_asin": f"B0{n}", "user_id": f"AG{n}"},
                        **{"timestamp": 1588687728923 + n, "helpful_vote": 0},
                    }
                    for n in range(3)
                )
            ),
            "meta_All_Beauty.jsonl.gz": json_lines(
                {
                    **{"main_category": "All Beauty", "title": "Soap", "average_rating": 4.8},
                    **{"rating_number": 10, "features": [], "description": ["One.", "Two."]},
                    **{"price": None, "images": [{"thumb": "x"}], "videos": [], "store": "Howard"},
                    **{"categories": ["Skin", "Soap"], "details": {"Size": "1"}},
                    **{"parent_asin": "B01", "bought_together": None},
                }
            ),
        },
        {
            "inter": {"timestamp:float": ["1588687728.923", "1588687728.924", "1588687728.925"]},
            "item": {"title:token": ["Soap"], "description:token": ["One. Two."]},
        },
    ),
    "amazon-2018": (
        {
            "Gift_Cards_5.json.gz": json_lines(
                *(
                    {
                        **{"overall": 4.0, "verified": True, "reviewTime": "03 19, 2014"},
                        **{"reviewerID": f"A{n}", "asin": "0001", "reviewText": REVIEW},
                        **{"summary": "Ok", "unixReviewTime": 1395187200 + n},
                    }
                    for n in range(2)
                )
            ),
            "meta_Gift_Cards.json.gz": json_lines(
                {
                    **{"category": ["Gift Cards", "All &amp; more"], "tech1": "", "asin": "0001"},
                    **{"description": ["A <b>card</b>."], "title": "Card", "brand": "Acme"},
                    **{"feature": ["Small"], "price": "$5", "also_buy": [], "rank": "1"},
                }
            ),
        },
        {
            "inter": {"item_id:token": ["0001", "0001"]},
            "item": {"category:token_seq": ["Gift Cards|All & more"], "brand:token": ["Acme"]},
        },
    ),
    "amazon-2018-ratings": (
        {
            "All_Beauty.csv": "0143026860,A1V6B6TNIC10QE,1.0,1424304000\n"
            "B00006L9LC,A2F5GHSXFQ0W6J,4.0,1418860800\n"
        },
        {"inter": {"user_id:token": ["A1V6B6TNIC10QE", "A2F5GHSXFQ0W6J"]}},
    ),
    "yelp": (
        {
            "yelp_academic_dataset_review.json": json_lines(
                {
                    **{"review_id": "r", "user_id": "u_-1", "business_id": "b1", "stars": 4.0},
                    **{"useful": 0, "text": REVIEW, "date": "2018-07-07 22:09:11"},
                }
            ),
            "yelp_academic_dataset_business.json": json_lines(
                {
                    **{"business_id": "b1", "name": "St Honore", "city": "Philadelphia"},
                    **{"state": "PA", "stars": 4.0, "attributes": {"WiFi": "u'free'"}},
                    **{"categories": "Food, Coffee & Tea", "hours": None},
                }
            ),
            "yelp_academic_dataset_user.json": json_lines(
                {"user_id": "u_-1", "name": "W", "yelping_since": "2007-01-25 16:47:26"}
            ),
        },
        {
            "inter": {"timestamp:float": ["1531001351"]},
            "item": {"categories:token_seq": ["Food|Coffee & Tea"], "name:token": ["St Honore"]},
        },
    ),
    "steam": (
        {
            "steam_reviews.json.gz": "{u'username': u'Chaos', u'hours': 0.1, u'products': 41, "
            "u'product_id': u'725280', u'page_order': 0, u'date': u'2017-12-17', u'text': u'', "
            "u'early_access': False, u'page': 1}\n",
            "steam_games.json.gz": "{u'publisher': u'Kotoshiro', u'genres': [u'Action', u'Indie'], "
            "u'app_name': u'Lost \"Soul\"', u'title': u'Lost', u'tags': [u'Strategy'], "
            "u'id': u'725280', u'developer': u'Kotoshiro', u'price': 4.99}\n",
        },
        {
            "inter": {"user_id:token": ["Chaos"], "timestamp:float": ["1513468800"]},
            "item": {"title:token": ['Lost "Soul"'], "genres:token_seq": ["Action|Indie"]},
        },
    ),
    "goodreads": (
        {
            "goodreads_interactions_poetry.json.gz": json_lines(
                {
                    **{"user_id": "8842281e1d1347389f2ab93d60773d4d", "book_id": "1384"},
                    **{"review_id": "r", "is_read": True, "rating": 4},
                    **{"review_text_incomplete": "", "read_at": "", "started_at": ""},
                    **{"date_added": "Wed May 09 09:33:44 -0700 2007", "date_updated": ""},
                }
            ),
            "goodreads_books_poetry.json.gz": json_lines(
                {
                    **{"isbn": "", "text_reviews_count": "2", "book_id": "1384", "title": "Odes"},
                    **{"description": "Poems.", "publisher": "Acme", "publication_year": "2007"},
                    **{"authors": [{"author_id": "1", "role": ""}], "average_rating": "4.0"},
                    **{"popular_shelves": [{"count": "2", "name": "to-read"}], "format": ""},
                }
            ),
        },
        {
            "inter": {"timestamp:float": ["1178728424"]},
            "item": {"title:token": ["Odes"], "publication_year:token": ["2007"]},
        },
    ),
    "goodreads-csv": (
        {
            "goodreads_interactions.csv": "user_id,book_id,is_read,rating,is_reviewed\n"
            "0,948,1,5,0\n0,947,0,0,0\n"
        },
        {"inter": {"user_id:token": ["0", "0"], "rating:float": ["5", None]}},
    ),
    "movielens-100k": (
        {
            "u.data": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
            "u.item": (
                "242|Kolya, Le (1996)|24-Jan-1997||http://us.imdb.com/|0|0|0|0|0|1|0|0|1|0|0|0|0|0|"
                "0|0|0|0|0\n302|Café (1996)|||http://x|1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
            ).encode("latin-1"),
            "u.user": "196|49|M|writer|55105\n186|39|F|executive|00000\n",
        },
        {
            "inter": {"user_id:token": ["196", "186"]},
            "item": {
                "title:token": ["Kolya, Le (1996)", "Café (1996)"],
                "genres:token_seq": ["Comedy|Drama", None],
            },
            "user": {"gender:token": ["M", "F"], "occupation:token": ["writer", "executive"]},
        },
    ),
    "movielens-1m": (
        {
            "ratings.dat": "1::1193::5::978300760\n2::661::3::978302109\n",
            "movies.dat": "1193::Cuckoo's Nest, The (1975)::Drama\n661::Misérables, Les (1995)"
            "::Animation|Children's\n".encode("latin-1"),
            "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
        },
        {
            "inter": {"item_id:token": ["1193", "661"]},
            "item": {"title:token": ["Cuckoo's Nest, The (1975)", "Misérables, Les (1995)"]},
            "user": {"age:token": ["1", "56"]},
        },
    ),
    "movielens": (
        {
            "ratings.csv": "userId,movieId,rating,timestamp\n"
            "1,17,4.0,944249077\n1,25,1.5,944250228\n",
            "movies.csv": 'movieId,title,genres\n17,"Net, The (1995)",Action|Crime\n'
            "25,Other (1995),(no genres listed)\n",
            "tags.csv": "userId,movieId,tag,timestamp\n1,17,fun,944249077\n",
        },
        {
            "inter": {"rating:float": ["4", "1.5"]},
            "item": {
                "title:token": ["Net, The (1995)", "Other (1995)"],
                "genres:token_seq": ["Action|Crime", None],
            },
        },
    ),
    "lastfm": (
        {
            "user_artists.dat": "userID\tartistID\tweight\r\n2\t51\t13883\r\n2\t52\t11690\r\n",
            "artists.dat": 'id\tname\turl\tpictureURL\r\n51\tDuran "Duran"\thttp://x\thttp://y\r\n',
        },
        {"inter": {"rating:float": ["13883", "11690"]}, "item": {"name:token": ['Duran "Duran"']}},
    ),
    "netflix": (
        {
            "combined_data_1.txt": "1:\n1488844,3,2005-09-06\n822109,5,2005-05-13\n2:\n"
            "885013,4,2005-10-19\n",
            "combined_data_2.txt": "30:\n1488844,2,2004-01-01\n",
            "movie_titles.csv": "1,2003,Dinosaur Planet\n30,NULL,Crouching, Hidden: \xc9\n".encode(
                "latin-1"
            ),
        },
        {
            "inter": {"item_id:token": ["1", "1", "2", "30"]},
            "item": {
                "title:token": ["Dinosaur Planet", "Crouching, Hidden: É"],
                "year:token": ["2003", None],
            },
        },
    ),
    "mind": (
        {
            "behaviors.tsv": "1\tU13\t11/11/2019 9:05:58 AM\tN5 N6\tN1-0 N2-1\n"
            "2\tU14\t11/12/2019 6:11:30 PM\t\tN3-1 N1-1\n",
            "news.tsv": 'N1\tnews\tus\t"Lone quote\tAn abstract\thttps://x\t[]\t[]\n'
            "N2\tsports\tnfl\tWon\t\thttps://x\t[]\t[]\nN3\tfood\ttea\tTea\tHot\thttps://x\t[]\t[]\n",
        },
        {
            "inter": {
                "item_id:token": ["N2", "N3", "N1"],
                "timestamp:float": ["1573463158", "1573582290", "1573582290"],
            },
            "item": {"title:token": ['"Lone quote', "Won", "Tea"]},
        },
    ),
    "book-crossing": (
        {
            "BX-Book-Ratings.csv": '"User-ID";"ISBN";"Book-Rating"\n"276725";"034545104X";"0"\n'
            '"276726";"0155061224";"5"\n',
            "BX-Books.csv": (
                '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";"Image-URL-S"\n'
                + '"000";"Other";"A";"1999";"P";"http"\n' * 250
                + '"034545104X";"Flesh; \\"Tones\\" &amp; more";"Rose";"2002";"B\xfccher";"http"\n'
            ).encode("latin-1"),
            "BX-Users.csv": '"User-ID";"Location";"Age"\n"276725";"tyler, texas, usa";NULL\n'
            '"276726";"seattle, washington, usa";"18"\n',
        },
        {
            "inter": {"item_id:token": ["034545104X", "0155061224"]},
            "item": {"title:token": ['Flesh; "Tones" & more'], "publisher:token": ["Bücher"]},
            "user": {"age:token": [None, "18"]},
        },
    ),
    "foursquare": (
        {
            "dataset_TSMC2014_NYC.txt": "470\t49bb\t4bf5\tArts & Crafts Store\t40.7\t-74.0\t-240\t"
            "Tue Apr 03 18:00:09 +0000 2012\n979\t4a43\t4bf5\tBridge\t40.6\t-74.04\t-240\t"
            "Tue Apr 03 18:00:25 +0000 2012\n"
        },
        {
            "inter": {"timestamp:float": ["1333476009", "1333476025"]},
            "item": {"category:token": ["Arts & Crafts Store", "Bridge"]},
        },
    ),
    "foursquare-global": (
        {
            "dataset_TIST2015_Checkins.txt": "50756\t4f5e\tTue Apr 03 18:00:06 +0000 2012\t240\n"
            "190571\t4b4b\tTue Apr 03 18:00:07 +0000 2012\t180\n",
            "dataset_TIST2015_POIs.txt": "4f5e\t40.73\t-73.99\tCafé\tUS\n",
        },
        {"inter": {"user_id:token": ["50756", "190571"]}, "item": {"category:token": ["Café"]}},
    ),
    "gowalla": (
        {
            "loc-gowalla_totalCheckins.txt.gz": "0\t2010-10-19T23:55:27Z\t30.23\t-97.79\t22847\n"
            "0\t2010-10-18T22:17:43Z\t30.26\t-97.76\t420315\n"
        },
        {
            "inter": {
                "item_id:token": ["22847", "420315"],
                "timestamp:float": ["1287532527", "1287440263"],
            }
        },
    ),
}


def test_every_recipe_is_tried_here():
    assert PUBLIC.keys() == RECIPES.keys()


@pytest.mark.parametrize("recipe", PUBLIC)
def test_a_public_data_set_is_recognised_and_read(tmp_path, recipe):
    files, expected = PUBLIC[recipe]
    said = imported(*(write(name, content) for name, content in files.items()))
    assert said[0] == f"recipe: {recipe}"
    for kind, cells in expected.items():
        read = columns(kind)
        assert {name: read.get(name) for name in cells} == cells
        if kind != "inter":
            template = keys().get(f"text_{kind}_template")
            assert bool(template) == bool(getattr(RECIPES[recipe], f"{kind}_template"))
    left_out = {"yelp": "yelp_academic_dataset_user.json", "movielens": "tags.csv"}.get(recipe)
    if left_out:
        assert f"{left_out}: left out, it is no file of this recipe" in said


# The whole path


def shop(n_users: int = 20, n_items: int = 25) -> list[Path]:
    rng = np.random.default_rng(1)
    rows = [
        f"{user:03},{item:03},{rng.integers(1, 6)},{1600000000 + int(rng.integers(10**7))}"
        for user in range(n_users)
        for item in rng.permutation(n_items)[:8]
    ]
    log = write("purchases.csv", "\n".join(["customer_id,product_id,rating,date", *rows]) + "\n")
    items = [f'{item:03},"Cup, {item}"" wide",Tea|Home' for item in range(n_items)]
    return [log, write("products.csv", "\n".join(["product_id,name,category", *items]) + "\n")]


def test_from_a_csv_to_a_run_that_is_told_in_the_end(tmp_path, in_process, capsys):
    main(["import-data", *map(str, shop()), "--name=my-shop", "--data_path=data", "--k-core=2"])
    command = capsys.readouterr().out.strip().split("\n")[-1]
    assert command == (
        "python -m recbole_gacllm --dataset=my-shop --data_path=data --text_source=raw"
    )
    fast = ["--epochs=1", "--use_gpu=False", "--show_progress=False", "--linear_weight=0"]
    main([*command.split()[3:], *fast, "--quiet"])
    run = capsys.readouterr().out
    assert "GaCLLM on my-shop" in run
    assert "warning" not in run
    record = json.loads(next(Path("saved").rglob("run.json")).read_text("utf-8"))
    assert record["config"]["text_item_noun"] == "product"
    assert record["data"]["covered"] == {"item": 1.0}


def test_a_ready_split_is_the_split_of_a_run(tmp_path, capsys):
    log, items = shop()
    head, *rows = log.read_text().split()
    parts = {"train": rows[:120], "valid": rows[120:140], "test": rows[140:]}
    files = [write(f"{part}.csv", "\n".join([head, *of])) for part, of in parts.items()]
    imported(*files, items, name="my-shop", data_path=Path("data"))
    main(["check", "--dataset=my-shop", "--data_path=data", "--model=BPR"])
    assert "160 interactions (training, validation, test: 120, 20, 20)" in capsys.readouterr().out


def test_a_broken_yaml_of_a_data_set_is_named(tmp_path):
    imported(*shop(), name="my-shop", data_path=Path("data"))
    Path("data/my-shop/my-shop.yaml").write_text("- a list")
    for model in ("GaCLLM", "BPR"):
        with pytest.raises(SystemExit, match="2"):
            main(["check", "--dataset=my-shop", "--data_path=data", f"--model={model}"])
