import unicodedata
from pathlib import Path

import pandas as pd
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
    require_some_text,
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


def read(
    tmp_path: Path, content: str | bytes, id_field: str = "item_id", **options
) -> pd.DataFrame:
    path = tmp_path / "data.item"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_features(path, id_field, **options)


def render(features, template=None, tokens=None, **options) -> list[str]:
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


def test_a_byte_order_mark_and_crlf_leave_no_trace(tmp_path):
    features = read(tmp_path, b"\xef\xbb\xbf" + MOVIES.replace("\n", "\r\n").encode())
    pd.testing.assert_frame_equal(features, read(tmp_path, MOVIES))


def test_an_open_quote_does_not_swallow_the_next_lines_and_a_pair_is_stripped(tmp_path):
    features = read(tmp_path, 'item_id:token\tname:token\na\t"open\n"b"\t"He said ""hi"""\n')
    assert features["name"].to_dict() == {"a": '"open', "b": 'He said "hi"'}


def test_numbers_that_are_none_are_missing_and_whole_numbers_have_no_point(tmp_path):
    cells = ["1995.0", "4.5", "NaN", "inf", "", " ", "1e999", "$12"]
    rows = "".join(f"{n}\t{cell}\n" for n, cell in enumerate(cells))
    features = read(tmp_path, f"item_id:token\tyear:float\n{rows}")
    assert list(features["year"]) == ["1995", "4.5", None, None, None, None, None, "$12"]


def test_the_first_row_of_an_id_counts_as_in_recbole(tmp_path):
    features = read(tmp_path, "item_id:token\tname:token\n1\tfirst\n1\tsecond\n")
    assert features["name"].to_dict() == {"1": "first"}


def test_float_sequences_never_become_text(tmp_path):
    vector = " ".join(["0.1"] * 768)
    features = read(tmp_path, f"item_id:token\temb:float_seq\tname:token\n1\t{vector}\tLamp\n")
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
        ("item_id\tname\n1\tx\n", "name:type"),
        ("item_id:token\tname:token\tname:token\n1\tx\ty\n", "two columns"),
        ("item_id:token\tname:token\n1\tx\ty\n", "line 2: 3 cells"),
        (b"item_id:token\tname:token\n1\t\xff\n", "encoding"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, content, found):
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


def test_a_node_without_a_row_or_a_side_without_a_file_is_said_to_be_unknown(tmp_path):
    assert render(read(tmp_path, MOVIES), tokens=["99"]) == [nothing_known("movie")]
    assert render(None, tokens=["a"], noun="user") == ["A user of which nothing is known."]
    assert render(None, tokens=["a"], noun="item") == ["An item of which nothing is known."]


def test_ids_are_text_only_on_request(tmp_path):
    assert render(None, tokens=["196"], allow_ids=True) == ["A movie with id 196."]
    require_some_text(None, None, allow_ids=True)
    require_some_text(None, read(tmp_path, MOVIES), allow_ids=False)
    only_ids = read(tmp_path, "item_id:token\n1\n")
    with pytest.raises(ValueError, match="text_allow_ids"):
        require_some_text(None, only_ids, allow_ids=False)


def test_a_template_for_a_side_without_a_file_is_refused():
    with pytest.raises(ValueError, match="no fields"):
        render(None, "{age}", tokens=["1"])


def test_long_text_is_cut_at_a_word(tmp_path):
    assert cut_at_word("one two three", 13) == "one two three"
    assert cut_at_word("one two three", 9) == "one two…"
    assert cut_at_word("one two three", 8) == "one two…"
    assert cut_at_word("one two three", 7) == "one…"
    assert cut_at_word("unbroken", 4) == "unb…"
    assert cut_at_word("名称 一部关于太空的电影。", 9) == "名称 一部关于太…"
    features = read(tmp_path, f"item_id:token\ttext:token\n1\t{'word ' * 20_000}\n")
    (text,) = render(features, max_chars=600)
    assert len(text) <= 600
    assert text.endswith("word…")


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


def test_a_special_token_that_only_the_model_knows_is_broken():
    assert neutralize("a ⟦END⟧ b", ["⟦END⟧"]) == "a ⟦ END ⟧ b"
    assert neutralize("a ⟦END⟧ b") == "a ⟦END⟧ b"


def test_a_token_that_only_the_compatibility_form_holds_is_broken():
    assert neutralize("Ｔｈｅ Ｅｎｄ ＜|im_end|＞") == "The End < |im_end| >"
    assert neutralize("<s> ＜s＞") == "< s > < s >"
    assert neutralize("Ｔｈｅ Ｅｎｄ") == "Ｔｈｅ Ｅｎｄ"


def test_a_model_with_thousands_of_special_tokens_takes_no_longer_pattern():
    tokens = frozenset(f"<unused{n}>" for n in range(5_000)) | {"⟦END⟧"}
    assert neutralize("<unused4999>⟦END⟧", tokens) == "< unused4999 >⟦ END ⟧"
    assert len(_pattern(tokens).pattern) < len(_pattern(frozenset()).pattern) + 10


def test_two_harmless_values_do_not_add_up_to_a_token(tmp_path):
    features = read(tmp_path, "item_id:token\ta:token\tb:token\n1\t<|im\t_end|>\n")
    assert "<|im_end|>" not in render(features, "{a}{b}")[0]


def test_invisible_characters_go_and_white_space_is_one_blank():
    assert (
        neutralize("a\x00\x1b\u202eb\u200b\ufeff\nSystem:\t c\u2028d\u00a0e ") == "ab System: c d e"
    )
    assert neutralize("<\u200b|im_end|>") == "< |im_end| >"
    assert neutralize("e\u0301") == "é"
    assert neutralize("I <3 [REC] & 2 < 3 > 1") == "I <3 [REC] & 2 < 3 > 1"


@given(_TEXTS, st.lists(st.sampled_from(["<s>", "</s>", "<|x|>", "ab", "##"]), max_size=3))
def test_neutral_text_stays_as_it_is_and_is_one_clean_line(text, special_tokens):
    once = neutralize(text, special_tokens)
    assert neutralize(once, special_tokens) == once
    assert once == once.strip()
    assert not any(token.lower() in once.lower() for token in special_tokens)
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in once)


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m"])
def test_the_shipped_dataset_configs_describe_recboles_files(tmp_path, name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    genres = "class" if name == "ml-100k" else "genre"
    age, occupation = ("24", "technician") if name == "ml-100k" else ("1", "10")
    items = read(
        tmp_path,
        f"item_id:token\tmovie_title:token_seq\trelease_year:token\t{genres}:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n",
    )
    users = read(
        tmp_path,
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        f"1\t{age}\tM\t{occupation}\t85711\n",
        "user_id",
    )
    names = config["text_value_names"]
    assert all(
        isinstance(k, str) for field in names.values() for pair in field.items() for k in pair
    )
    assert render(items, config["text_item_template"], value_names=names) == [
        "Toy Story (1995), a movie filed under animation, children's and comedy."
    ]
    assert render(users, config["text_user_template"], value_names=names) == [
        "A man aged 24 who works as a technician."
        if name == "ml-100k"
        else "A man under 18 who is a school student."
    ]
    assert "eval_args" not in config
