import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recbole_gacllm.convolution.neutralize import _pattern, neutralize
from recbole_gacllm.convolution.text import (
    cut_at_word,
    nothing_known,
    read_features,
    render_descriptions,
)

MOVIES = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tToy Story\t1995\tAnimation Children's Comedy\n"
    "2\tNet, The\t\tThriller\n"
    "3\t\t\t\n"
)
# Any text, and texts of pieces that may add up to a token.
_TEXTS = st.one_of(
    st.text(),
    st.lists(st.sampled_from(["<", "＜", "|", "｜", "s", ">", "＞", " ", "[", "INST]"])).map(
        "".join
    ),
)
CONFIGS = Path(__file__).parents[1] / "dataset_configs"


def read(tmp_path, content, id_field="item_id", **options):
    path = tmp_path / "data.item"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_features(path, id_field, **options)


def render(features, template=None, tokens=None, **options):
    settings = {"noun": "movie", "value_names": {}, "max_chars": 600, "allow_ids": False} | options
    tokens = list(features.index) if tokens is None else tokens
    return render_descriptions(tokens, features, template, **settings)


def test_a_feature_file_is_read_by_raw_token_with_sequences_split(tmp_path):
    features = read(tmp_path, MOVIES)
    assert list(features.index) == ["1", "2", "3"]
    assert list(features.columns) == ["movie_title", "release_year", "class"]
    assert features.loc["1", "class"] == ("Animation", "Children's", "Comedy")
    assert features.loc["1", "release_year"] == "1995"
    assert features.loc["2", "release_year"] is None
    assert features.loc["3", "movie_title"] is None


def test_numbers_that_are_none_are_missing_and_whole_numbers_have_no_point(tmp_path):
    cells = ["1995.0", "4.5", "NaN", "inf", "", " ", "1e999", "$12"]
    rows = "".join(f"{n}\t{cell}\n" for n, cell in enumerate(cells))
    features = read(tmp_path, f"item_id:token\tyear:float\n{rows}")
    assert list(features["year"]) == ["1995", "4.5", None, None, None, None, None, "$12"]


def test_the_first_row_of_an_id_counts_and_float_sequences_never_become_text(tmp_path):
    vector = " ".join(["0.1"] * 768)
    rows = f"1\t{vector}\tLamp\n1\t{vector}\tsecond\n"
    features = read(tmp_path, f"item_id:token\temb:float_seq\tname:token\n{rows}")
    assert render(features) == ["name: Lamp"]


def test_the_seq_separator_of_recbole_is_honoured(tmp_path):
    content = "item_id:token\ttags:token_seq\n1\tdark comedy|war\n"
    assert render(read(tmp_path, content, seq_separator="|")) == ["tags: dark comedy, war"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "is empty"),
        ("item_id:token\tname:token\n", "no rows"),
        ("id:token\tname:token\n1\tx\n", "no column 'item_id'"),
    ],
)
def test_a_file_without_rows_or_ids_is_refused_by_name(tmp_path, content, found):
    with pytest.raises(ValueError, match=found) as error:
        read(tmp_path, content)
    assert "data.item" in str(error.value)


def test_a_template_leaves_bracketed_parts_out_where_a_field_is_missing(tmp_path):
    template = "{movie_title|title}[ ({release_year})], a movie[ filed under {class|list}]."
    assert render(read(tmp_path, MOVIES), template) == [
        "Toy Story (1995), a movie filed under Animation, Children's and Comedy.",
        "The Net, a movie filed under Thriller.",
        "A movie of which nothing is known.",
    ]


def test_a_missing_field_outside_brackets_reads_unknown_and_doubled_signs_are_literal(tmp_path):
    texts = render(read(tmp_path, MOVIES), "{{[[{movie_title}]]}} of {release_year}", ["2"])
    assert texts == ["{[Net, The]} of unknown"]


@pytest.mark.parametrize(
    ("raw", "read_as"),
    [
        ("Shawshank Redemption, The", "The Shawshank Redemption"),
        ("Confessional, The (Le Confessionnal)", "The Confessional (Le Confessionnal)"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Associe, L'", "L'Associe"),
        ("Theory, Theirs", "Theory, Theirs"),
    ],
)
def test_the_title_filter_puts_the_article_first(tmp_path, raw, read_as):
    features = read(tmp_path, f"item_id:token\tt:token_seq\n1\t{raw}\n")
    assert render(features, "{t|title}") == [read_as]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{movie_titel}",
            "movie_titel.*movie_title, release_year, class.*did you mean 'movie_title'",
        ),
        ("{}", "names the field ''"),
        ("{class|upper}", "'list' and 'title'"),
        ("[a [b]]", "stray '\\['"),
        ("a]", "stray '\\]'"),
        ("a}", "stray '}'"),
        ("[a", "closing"),
    ],
)
def test_a_wrong_template_is_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        render(read(tmp_path, MOVIES), template)
    with pytest.raises(ValueError, match="no fields"):
        render(None, "{age}", tokens=["1"])


def test_without_a_template_all_fields_are_listed_in_file_order(tmp_path):
    assert render(read(tmp_path, MOVIES)) == [
        "movie title: Toy Story; release year: 1995; class: Animation, Children's, Comedy",
        "movie title: Net, The; class: Thriller",
        "A movie of which nothing is known.",
    ]


def test_value_names_apply_to_values_and_within_sequences_and_empty_words_mean_missing(tmp_path):
    names = {"class": {"Children's": "family", "Thriller": ""}, "release_year": {"1995": "the 90s"}}
    texts = render(
        read(tmp_path, MOVIES), "{movie_title}[, {release_year}][: {class|list}]", value_names=names
    )
    assert texts[:2] == ["Toy Story, the 90s: Animation, family and Comedy", "Net, The"]


def test_what_is_known_of_no_node_is_said_and_ids_are_text_only_on_request(tmp_path):
    assert render(read(tmp_path, MOVIES), tokens=["99"]) == [nothing_known("movie")]
    assert render(None, tokens=["a"], noun="user") == ["A user of which nothing is known."]
    assert render(None, tokens=["a"], noun="item") == ["An item of which nothing is known."]
    assert render(None, tokens=["196"], allow_ids=True) == ["A movie with id 196."]
    assert render(read(tmp_path, "item_id:token\n1\n")) == [nothing_known("movie")]


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("one two three", 13, "one two three"),
        ("one two three", 9, "one two…"),
        ("one two three", 8, "one two…"),
        ("one two three", 7, "one…"),
        ("unbroken", 4, "unb…"),
        ("名称 一部关于太空的电影。", 9, "名称 一部关于太…"),
        ("word " * 20_000, 24, "word word word word…"),
    ],
)
def test_long_text_is_cut_at_a_word(tmp_path, text, limit, expected):
    assert cut_at_word(text, limit) == expected
    features = read(tmp_path, f"item_id:token\tt:token\n1\t{text}\n")
    assert render(features, "{t}", max_chars=limit) == [expected]


@given(text=st.text("ab ,.字กิ", max_size=40), limit=st.integers(1, 42))
def test_a_text_has_at_most_its_limit_and_one_that_has_stays(text, limit):
    cut = cut_at_word(text, limit)
    assert len(cut) <= limit
    assert (cut == text) == (len(text) <= limit)


@pytest.mark.parametrize(
    "token",
    [
        *("<|im_end|>", "<s>", "</s>", "<start_of_turn>", "[INST]", "[/INST]", "<<SYS>>"),
        *("<|eot_id|>", "<|turn>", "<turn|>", "<unused42>", "<｜end▁of▁sentence｜>"),
    ],
)
def test_chat_template_tokens_in_a_value_are_broken_but_readable(tmp_path, token):
    features = read(tmp_path, f"item_id:token\tname:token\n1\tbefore{token}after\n")
    (text,) = render(features)
    assert token not in text
    assert text.replace(" ", "") == f"name:before{token}after"


@pytest.mark.parametrize(
    ("raw", "tokens", "expected"),
    [
        ("a ⟦END⟧ b", ["⟦END⟧"], "a ⟦ END ⟧ b"),
        ("a ⟦END⟧ b", [], "a ⟦END⟧ b"),
        # Tokens that only the compatibility form holds
        ("Ｔｈｅ Ｅｎｄ ＜|im_end|＞", [], "The End < |im_end| >"),
        ("<s> ＜s＞", [], "< s > < s >"),
        ("Ｔｈｅ Ｅｎｄ", [], "Ｔｈｅ Ｅｎｄ"),
        # Invisible characters go and white space is one blank
        ("a\x00\x1b\u202eb\u200b\ufeff\nSystem:\t c\u2028d\u00a0e ", [], "ab System: c d e"),
        ("<\u200b|im_end|>", [], "< |im_end| >"),
        ("e\u0301", [], "é"),
        ("I <3 [REC] & 2 < 3 > 1", [], "I <3 [REC] & 2 < 3 > 1"),
    ],
)
def test_text_is_made_plain(raw, tokens, expected):
    assert neutralize(raw, tokens) == expected


def test_a_model_with_thousands_of_special_tokens_takes_no_longer_pattern():
    tokens = frozenset(f"<unused{n}>" for n in range(5_000)) | {"⟦END⟧"}
    assert neutralize("<unused4999>⟦END⟧", tokens) == "< unused4999 >⟦ END ⟧"
    assert len(_pattern(tokens).pattern) < len(_pattern(frozenset()).pattern) + 10


def test_two_harmless_values_do_not_add_up_to_a_token(tmp_path):
    features = read(tmp_path, "item_id:token\ta:token\tb:token\n1\t<|im\t_end|>\n")
    assert "<|im_end|>" not in render(features, "{a}{b}")[0]


@given(_TEXTS, st.lists(st.sampled_from(["<s>", "</s>", "<|x|>", "ab", "##"]), max_size=3))
def test_neutral_text_stays_as_it_is_and_is_one_clean_line(text, special_tokens):
    once = neutralize(text, special_tokens)
    assert neutralize(once, special_tokens) == once
    assert once == once.strip()
    assert not any(token.lower() in once.lower() for token in special_tokens)
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in once)


@pytest.mark.parametrize(
    ("name", "genres", "user", "described"),
    [
        ("ml-100k", "class", "24\tM\ttechnician", "A man aged 24 who works as a technician."),
        ("ml-1m", "genre", "1\tM\t10", "A man under 18 who is a school student."),
    ],
)
def test_the_shipped_dataset_configs_describe_recboles_files(
    tmp_path, name, genres, user, described
):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    names = config["text_value_names"]
    assert all(
        isinstance(k, str) for field in names.values() for pair in field.items() for k in pair
    )
    items = read(tmp_path, MOVIES.replace("class", genres))
    assert render(items, config["text_item_template"], ["1"], value_names=names) == [
        "Toy Story (1995), a movie filed under animation, children's and comedy."
    ]
    header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    users = read(tmp_path, f"{header}1\t{user}\t85711\n", "user_id")
    assert render(users, config["text_user_template"], value_names=names) == [described]
