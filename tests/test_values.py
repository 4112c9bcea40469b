"""Cells as RecBole's data sets and shops hold them: prose, lists, and what says nothing."""

import logging

import pytest

from recbole_gacllm.convolution.values import column_values, plain

from .test_text import read, render

ROWS = 5


def listed(tmp_path, header, rows, **keys):
    content = f"item_id:token\t{header}\n" + "".join(f"i{n}\t{row}\n" for n, row in enumerate(rows))
    return render(read(tmp_path, content), **keys)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("Cr&eacute;a&#8230; &amp;amp; &quot;x&quot;", 'Créa… & "x"'),
        ("AT&T; R&D", "AT&T; R&D"),
        ("<p>Fast <b>and</b> light.</p><br/>", " Fast  and  light.  "),
        ("a <script>alert('x')</script>b<!-- c -->", "a  b "),
        ("I <3 you, 2 < 3 > 1, M*A*S*H", "I <3 you, 2 < 3 > 1, M*A*S*H"),
        ("see https://shop.example/a?b=1 now", "see   now"),
        ("&lt;div class='a'&gt;text", " text"),
    ],
)
def test_entities_are_resolved_tags_and_addresses_go_and_the_rest_stays(raw, expected):
    assert plain(raw) == expected


@pytest.mark.parametrize(
    ("name", "kind", "cells", "expected"),
    [
        # RecBole's steam: quoted words between commas in a column split at blanks
        ("cats", "token_seq", ["'Toys & Games', 'Pretend Play'"], ("Toys & Games", "Pretend Play")),
        ("category", "token", ["[['Toys & Games', 'Puzzles']]"], ("Toys & Games", "Puzzles")),
        ("category", "token", ['["A", "B"]'], ("A", "B")),
        ("kinds", "token", ["{'Hue': 'Red', 'Sizes': ['S', 'M']}"], ("Hue: Red", "Sizes: S, M")),
        ("genres", "token", ["Action|Comedy"], ("Action", "Comedy")),
        ("genres", "token_seq", ["Action, Indie Game, RPG"] * 3, ("Action", "Indie Game", "RPG")),
        ("class", "token_seq", ["Animation Children's"], ("Animation", "Children's")),
        # MIND's abstracts: prose in a column of words
        ("lead", "token_seq", ["Shop the notebooks, and the pens of the queen."] * 3, None),
        ("title", "token_seq", ["Net, The", "Heat, and Dust", "Ran, a film"], None),
        ("title", "token", ["[REC]"], None),
        ("title", "token", ["'Salem's Lot"], None),
    ],
)  # fmt: skip
def test_lists_are_lists_and_prose_is_prose(name, kind, cells, expected):
    assert column_values(name, kind, cells, " ")[0] == (cells[0] if expected is None else expected)


def test_empty_lists_and_markup_alone_are_missing():
    cells = ["[]", "<br>", "https://a.example", None, "{}"]
    assert column_values("category", "token", cells, " ") == [None] * 5


def test_a_sentence_of_all_fields_begins_with_the_name_and_ends_with_long_prose(tmp_path):
    prose = "A sturdy kettle of the best steel. " * 10
    header = "description:token\tprice:float\ttitle:token\tcategory:token"
    (text, *_) = listed(
        tmp_path, header, [f"{prose}\t9.5\tRed Kettle\tKitchen"] * ROWS, max_chars=120
    )
    assert text.startswith(
        "title: Red Kettle; price: 9.5; category: Kitchen; description: A sturdy"
    )
    assert text.endswith("…")


def test_fields_that_say_nothing_are_left_out_and_named(tmp_path, caplog):
    header = (
        "asin:token\timageURL:token\tsku_code:token\tunixReviewTime:float\ttitle:token\tyear:float"
    )
    rows = [
        f"B00{n}XYZ12\thttp://a.example/{n}.jpg\tA1B2C3D{n}\t{1_600_000_000 + n}\tLamp {n}\t199{n}"
        for n in range(ROWS)
    ]
    with caplog.at_level(logging.INFO):
        assert listed(tmp_path, header, rows)[0] == "title: Lamp 0; year: 1990"
    for name in ("asin", "imageURL", "sku_code", "unixReviewTime (raw times)"):
        assert name in caplog.text


def test_names_that_only_end_like_an_id_or_a_place_are_told(tmp_path, caplog):
    header = (
        "is_paid:token\tprofile:token\tandroid:token\tmovieid:token\tlatitude:float\tvenueId:token"
    )
    with caplog.at_level(logging.INFO):
        (text, *_) = listed(tmp_path, header, ["yes\tteacher\tno\tm1\t48.1\tv1"] * ROWS)
    assert text == "is paid: yes; profile: teacher; android: no"
    for name in ("movieid", "latitude", "venueId"):
        assert name in caplog.text


def test_lists_of_numbers_alone_and_named_entities_are_left_out(tmp_path):
    header = "title:token\tsimilar_books:token_seq\ttitle_entities:token"
    header += "\thistory:token_seq\tauthors:token_seq"
    history = "N86843 N28392\t7192 4283"
    rows = [
        f'Book {n}\t19997, 828466\t[{{"Label": "X", "WikidataId": "Q1"}}]\t{history}'
        for n in range(ROWS)
    ]
    assert listed(tmp_path, header, rows)[0] == "title: Book 0"


def test_lists_of_words_with_numbers_are_told(tmp_path):
    rows = ["U2 blink 182\tWindows 95 98"] * ROWS
    (text, *_) = listed(tmp_path, "bands:token_seq\tsystem:token", rows)
    assert text == "bands: U2, blink, 182; system: Windows 95 98"


@pytest.mark.parametrize("name", ["book_author", "publisher", "address"])
def test_names_of_people_and_places_keep_their_words_together(name):
    assert column_values(name, "token_seq", ["Mark P. O. Morford"], " ") == ["Mark P. O. Morford"]


def test_a_template_may_name_what_a_plain_sentence_leaves_out(tmp_path):
    assert listed(tmp_path, "brand_id:token", ["acme"], template="made by {brand_id}") == [
        "made by acme"
    ]


def test_cuts_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        listed(tmp_path, "title:token", ["word " * 30, "short"], max_chars=50)
    assert "1 of 2 movie texts are cut at text_max_chars: 50" in caplog.text
