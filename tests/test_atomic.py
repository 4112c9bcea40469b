"""Atomic files as people write them: read right or refused in one line, by RecBole likewise."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.data import create_dataset, data_preparation

from recbole_gacllm.data import atomic, checks
from recbole_gacllm.data import numbers as data_numbers
from recbole_gacllm.data.atomic import MISSING, read_atomic
from recbole_gacllm.data.numbers import numbers, times
from recbole_gacllm.run_config import build_config

HEADER = "item_id:token\ttitle:token\tdescription:token\tprice:float\n"


def read(folder: Path, content: str | bytes, name: str = "shop.item", **keys):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_atomic(file, **keys)


def rows(file) -> list[list[str | None]]:
    return [[None if cell != cell else cell for cell in row] for row in file.cells.to_numpy()]


@given(
    st.lists(
        st.tuples(
            *[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"))] * 2
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from("\t,;|"),
)
def test_what_pandas_writes_is_read_back_to_the_letter(tmp_path_factory, cells, separator):
    frame = pd.DataFrame(cells, columns=["title:token", "description:token"])
    frame.insert(0, "item_id:token", [f"i{n}" for n in range(len(frame))])
    frame["price:float"] = 9.5
    path = tmp_path_factory.mktemp("pandas") / "shop.item"
    frame.to_csv(path, sep=separator, index=False)
    file = read_atomic(path, separator, id_field="item_id", ids=set(frame["item_id:token"]))
    expected = [
        [None if cell in MISSING else cell for cell in row] for row in frame.astype(str).values
    ]
    assert rows(file) == expected
    assert not file.dropped


def test_a_cell_of_several_lines_is_one_cell_and_a_lone_quote_swallows_no_row(tmp_path):
    content = (
        f'{HEADER}i0\tRed Kettle\t"A sturdy ""kettle"".\n\nMade in 1990.\nEasy to clean."\t9.5\n'
        'i1\t12" Pipe\tround\t3\ni2\t"Lone\tquote\t4\ni3\tOther "end"\t"closed"\t5\n'
        'i4\t"begins\tone\t6\ni5\tplain\tends" here\t7\n'
    )
    file = read(tmp_path, content, id_field="item_id", ids={f"i{n}" for n in range(6)})
    assert [row[0] for row in rows(file)] == ["i0", "i1", "i2", "i3", "i4", "i5"]
    assert rows(file)[0][2] == 'A sturdy "kettle".\n\nMade in 1990.\nEasy to clean.'
    titles = [row[1] for row in rows(file)[1:]]
    assert titles == ['12" Pipe', '"Lone', 'Other "end"', '"begins', "plain"]
    assert file.n_spanning == 1
    assert [file.line(row) for row in range(3)] == [2, 6, 7]


def test_quoted_separators_do_not_shift_columns_and_all_cells_may_be_quoted(tmp_path):
    content = 'item_id:token,title:token,year:float\ni1,"Blue Lamp, The",1991\ni2,"a ""b"", c",\n'
    file = read(tmp_path, content, separator=",")
    assert rows(file) == [["i1", "Blue Lamp, The", "1991"], ["i2", 'a "b", c', None]]
    file = read(tmp_path, '"item_id:token"\t"title:token"\n"i1"\t"Lamp"\n')
    assert (file.names, rows(file)) == (["item_id", "title"], [["i1", "Lamp"]])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends_leave_no_trace(tmp_path, encoding, end):
    content = f"{HEADER}i1\tCafé 象\tx\t1\n".replace("\n", end).encode(encoding)
    file = read(tmp_path, content)
    assert file.names[0] == "item_id"
    assert rows(file) == [["i1", "Café 象", "x", "1"]]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\r\n"])
@pytest.mark.parametrize("title", ["Heat\rpart 2", 'Heat "1"\rpart 2'])
def test_a_carriage_return_within_a_line_begins_no_row(tmp_path, end, title):
    file = read(tmp_path, f"{HEADER}i1\t{title}\tx\t1\ni2\tb\tc\t2".replace("\n", end) + end[:-1])
    assert rows(file) == [["i1", title, "x", "1"], ["i2", "b", "c", "2"]]


def test_rows_that_fit_no_reading_are_named_and_left_out_but_never_interactions(tmp_path, caplog):
    good = "".join(f"i{n}\ta\tb\t1\n" for n in range(40))
    with caplog.at_level(logging.WARNING):
        file = read(tmp_path, f"{HEADER}{good}i99\ta\tb\t1\tmore\n")
    assert len(file.cells) == 40
    assert "line 42: 5 cells for 4 columns" in caplog.text
    with pytest.raises(ValueError, match="line 3: 3 cells for 2 columns"):
        read(tmp_path, "user_id:token\titem_id:token\nu\ti\nu\ti\tmore\n", "shop.inter")
    with pytest.raises(ValueError, match="double quotes"):
        read(tmp_path, f"{HEADER}i1\ta\tb\t1\tmore\ni2\ta\tb\t1\n")


@pytest.mark.parametrize(
    ("content", "keys", "found"),
    [
        ("item_id,title\ni1,Lamp\n", {}, "field_separator to ','"),
        ("item_id:token;title:token\ni1;Lamp\n", {}, "field_separator to ';'"),
        ("item_id:token title:token\ni1 Lamp\n", {}, "field_separator to ' '"),
        ("item_id:token\ttitle:token\ni1\tx\n", {"separator": ","}, r"field_separator to '\\t'"),
        ("item_id\ttitle\ni1\tLamp\n", {}, r"write 'item_id:token\\ttitle:token'"),
        ("item_id:token\ttitle:str\ni1\tLamp\n", {}, "column 'title:str' must be name:type"),
        ("item_id:token\t:token\ni1\tLamp\n", {}, "a type and no name"),
        ("item_id:token\titem_id:token\ni1\tLamp\n", {}, "two columns are called 'item_id'"),
        (b"item_id:token\ttitle:token\ni1\tCaf\xe9\n", {}, "line 2: not utf-8.*latin-1"),
        ("item_id:token\ttitle:token\ni1\tx\n", {"encoding": "utf9"}, "encoding: 'utf9'"),
        ("i\ta\n".encode("utf-16-le"), {}, "zero byte"),
        (b"\titem_id:token\n0\ti1\n", {}, "index=False"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_next_step(tmp_path, content, keys, found):
    with pytest.raises(ValueError, match=found) as error:
        read(tmp_path, content, **keys)
    assert "\n" not in str(error.value)


def test_a_word_among_numbers_is_named_by_line_and_column(tmp_path):
    file = read(tmp_path, f"{HEADER}i1\ta\tb\t1\n\ni2\ta\tb\tcheap\n")
    with pytest.raises(ValueError, match="line 4, column 'price': 'cheap' is no number"):
        numbers(file, "price")


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["2020-09-14 18:14:24", "2020-09-14T18:14:25Z"], [1600107264, 1600107265]),
        (["2020-09-14", "2020-09-15"], [1600041600, 1600128000]),
        (["14/09/2020", "15/09/2020"], [1600041600, 1600128000]),
        (["09 14, 2020", "09 1, 2020"], [1600041600, 1598918400]),
        (["Sep 14, 2020", ""], [1600041600, np.nan]),
        (["2020-09-14 18:14:24 UTC", "2020-09-14 20:14:25+02:00"], [1600107264, 1600107265]),
        (["Mon, 14 Sep 2020 18:14:24 GMT"], [1600107264]),
        (["Mon, 14 Sep 2020 20:14:25 +0200"], [1600107265]),
        (["1600107264", "1.5e9"], [1600107264, 1.5e9]),
        # In two ways, or none
        (["03/04/2020", "05/06/2020"], None),
        (["2020-09-14", "soon"], None),
        (["x", "y"], None),
    ],
)
def test_times_are_numbers_or_dates_that_can_be_read_in_one_way(tmp_path, cells, expected):
    lines = "".join(f"u\ti{n}\t{cell}\n" for n, cell in enumerate(cells))
    file = read(tmp_path, f"user_id:token\titem_id:token\ttimestamp:token\n{lines}", "a.inter")
    if expected is None:
        with pytest.raises(ValueError, match="TIME_FIELD"):
            times(file, "timestamp")
    else:
        assert np.array_equal(times(file, "timestamp"), expected, equal_nan=True)


# Through RecBole


def shop(folder: Path, name: str, times_: list[object], kind: str = "float") -> None:
    """Six clicks of each user within seconds, in random order; the last one is on ``last``."""
    rng = np.random.default_rng(5)
    lines = [
        f"u{user}\t{'last' if click == 5 else f'i{click}'}\t{times_[user * 6 + click]}\n"
        for user, click in rng.permutation([(u, c) for u in range(40) for c in range(6)])
    ]
    lines += [f"other\tother{n}\t{times_[n]}\n" for n in range(3)]
    (folder / name).mkdir()
    header = f"user_id:token\titem_id:token\ttimestamp:{kind}\n"
    (folder / name / f"{name}.inter").write_text(header + "".join(lines), encoding="utf-8")


SECONDS = [1_700_000_000 + 7 * n for n in range(240)]
DATES = [str(pd.Timestamp(second, unit="s")) for second in SECONDS]


@pytest.mark.parametrize(
    ("model", "values", "kind"),
    [
        ("BPR", SECONDS, "float"),
        ("SASRec", SECONDS, "float"),
        ("GaCLLM", SECONDS, "float"),
        ("BPR", DATES, "float"),
        ("BPR", DATES, "token"),
        ("SASRec", DATES, "token"),
        ("BPR", SECONDS, "token"),
    ],
)
def test_the_last_click_is_the_test_item_though_clicks_are_seconds_apart(
    tmp_path, monkeypatch, model, values, kind
):
    shop(tmp_path, "clicks", values, kind)
    parses = []
    monkeypatch.setattr(checks, "times", lambda *of: parses.append(of) or times(*of))
    monkeypatch.setattr(data_numbers, "times", None)  # nobody reads them again
    keys = {
        "data_path": str(tmp_path),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"order": "TO", "split": {"LS": "valid_and_test"}, "mode": "full"},
        "checkpoint_dir": str(tmp_path),
        "topk": [5],
        "valid_metric": "MRR@5",
        **({"train_neg_sample_args": None} if model == "SASRec" else {}),
        **({"use_text": False} if model == "GaCLLM" else {}),
    }
    config = build_config(model, "clicks", (), keys)
    parts = data_preparation(config, create_dataset(config))
    assert len(parses) == 1
    tested = parts[2]._dataset
    items = tested.id2token("item_id", tested.inter_feat["item_id"])
    assert sorted(items.tolist()) == ["last"] * 40 + ["other2"]
    if model == "SASRec":
        history = tested.id2token("item_id", tested.inter_feat["item_id_list"])[:, :5]
        assert (history[items == "last"] == ["i0", "i1", "i2", "i3", "i4"]).all()
    if model == "GaCLLM":
        stamps = parts[0]._dataset.inter_feat["timestamp"]
        assert stamps.dtype == torch.float64
        assert set(stamps.long().tolist()) <= set(SECONDS)


def test_a_random_split_is_the_one_of_recbole(tmp_path, monkeypatch):
    """The rows of a random split keep the order of the file, which RecBole shuffles."""
    shop(tmp_path, "clicks", SECONDS)
    keys = {"data_path": str(tmp_path), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    dataset = create_dataset(build_config("BPR", "clicks", (), keys))
    before = dataset.inter_feat["timestamp"].to_numpy()
    dataset._change_feat_format()
    assert np.array_equal(dataset.inter_feat["timestamp"].numpy(), before.astype(np.float32))


def test_recbole_reads_a_file_with_a_lone_quote_and_a_mark_as_the_texts_do(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "shop.inter").write_bytes(
        b"\xef\xbb\xbfuser_id:token,item_id:token\r\n"
        + b"".join(b"u%d,i%d\r\n" % (n, n % 3) for n in range(9))
    )
    (folder / "shop.item").write_text(
        'item_id:token,title:token\ni0,"Lamp, The"\ni1,"Lone\ni2,"two\nlines"\n', encoding="utf-8"
    )
    keys = {
        "data_path": str(tmp_path),
        "field_separator": ",",
        "load_col": {"inter": ["user_id", "item_id"], "item": ["item_id", "title"]},
    }
    dataset = create_dataset(build_config("BPR", "shop", (), keys))
    titles = dataset.id2token("title", dataset.item_feat["title"].to_numpy(int)[1:])
    assert dict(zip(dataset.field2id_token["item_id"][1:], titles, strict=True)) == {
        "i0": "Lamp, The",
        "i1": '"Lone',
        "i2": "two\nlines",
    }
    assert atomic.read_atomic(folder / "shop.item", ",").n_spanning == 1
