"""Foreign text in tables: Markdown, LaTeX, CSV, and RecBole's files of embeddings."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.data import create_dataset

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.artifacts.csv_cells import as_before, no_formula
from recbole_gacllm.compare import markdown
from recbole_gacllm.compare.results import Board, summarize
from recbole_gacllm.compare.tables import export, to_latex, to_markdown
from recbole_gacllm.convolution.imported import ImportedTexts
from recbole_gacllm.convolution.layers import Layer
from recbole_gacllm.inspection.embeddings import export_embeddings
from recbole_gacllm.run_config import build_config
from tests.test_export import board, embeddings  # noqa: F401

ORDINARY = [
    *("GaCLLM", "GaCLLM:text_source=raw:linear_recency=0", "NCL", "ml-100k", "a_b", "C++", "x-y"),
    *("val_interval: {'rating': '[3,inf)'}", "train_batch_size=2048", "hidden=[64, 64]", "Ü & 喜"),
    *("Best of (every trial: results/tuning.csv): .01 .05; 3 > 2, a = b.", "recbole 1.2.1, torch"),
]
HOSTILE = "=a|b*c`d`<i>_x_\\e^f~g&h%i$j#k{l}](javascript:m)\nnew"


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_written_as_ever(text):
    assert markdown.markdown(text) == text
    assert markdown.markdown_code(text) == f"`{text}`"
    assert no_formula(text) == text
    old = "".join(f"\\{char}" if char in "&%$#_{}" else char for char in text)
    assert markdown.latex(text) == old.replace(">", "\\textgreater{}")


@pytest.mark.parametrize("sign", ["_", "~", "~~", "$", "*", "`"])
def test_signs_around_a_name_are_no_markdown(sign):
    escaped = "".join(f"\\{char}" for char in sign)
    assert markdown.markdown(f"a {sign}b c_d{sign}") == f"a {escaped}b c_d{escaped}"


def test_entities_stay_as_they_are_written():
    assert markdown.markdown("&lt;b&#62; & c;") == "\\&lt;b\\&#62; & c;"


def spoil(folder):
    """The board with a hostile name in the place of a model's, and hostile errors and keys."""
    name = json.dumps(HOSTILE)
    for file in (folder / "leaderboard.json", *folder.glob("runs/*/run.json")):
        text = file.read_text().replace('"EASE"', name).replace("tiny/EASE", f"tiny/{name[1:-1]}")
        file.write_text(text)
    plan = json.loads((folder / "leaderboard.json").read_text())
    tuned = plan["tuned"][f"tiny/{HOSTILE}"]
    tuned["files"], tuned["given"] = {f"{HOSTILE}.yaml": HOSTILE}, {"key": HOSTILE}
    (folder / "leaderboard.json").write_text(json.dumps(plan))
    failed = next(folder.glob("runs/*/failed.json"))
    failed.write_text(json.dumps({**json.loads(failed.read_text()), "error": HOSTILE}))
    return folder


def columns(line):
    """Cells of a line of a table, as GitHub splits it: at bars that no backslash precedes."""
    return len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) - 1


def test_a_name_in_a_page_breaks_no_table_and_is_no_markup(board):  # noqa: F811
    read = Board.read(spoil(board))
    page = to_markdown(summarize(read), read, "tiny")
    tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert len(tables) >= 7
    for table in tables:
        assert len({columns(line) for line in table.splitlines()}) == 1, table
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", page.replace("\\`", ""))
    assert not re.search(r"(?<!\\)<(?!br/|/?u>)", outside)
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert "\nnew" not in page
    assert page.count("=a\\|b\\*c\\`d\\`\\<i>\\_x\\_\\\\e^f\\~g") >= 7


def test_latex_shows_every_sign(board):  # noqa: F811
    read = Board.read(spoil(board))
    shown = (
        "=a\\textbar{}b*c`d`\\textless{}i\\textgreater{}\\_x\\_\\textbackslash{}e"
        "\\textasciicircum{}f\\textasciitilde{}g\\&h\\%i\\$j\\#k\\{l\\}](javascript:m) new"
    )
    text = to_latex(summarize(read), "tiny")
    assert f"\n{shown} & " in text
    assert markdown.latex("[x]") == "{[}x]"
    assert markdown.latex("*x") == "{*}x"


@pytest.mark.parametrize("text", ["=1+1", "+1-555", "-a", "@SUM(A1)", "\tx", "\rx", "=", "'=x"])
def test_a_spreadsheet_calculates_no_cell(text):
    assert no_formula(text) == f"'{text}"
    written = io.StringIO(markdown.csv_text([{"a": text, "b": "x"}]), newline="")
    assert list(csv.reader(written)) == [["a", "b"], [f"'{text}", "x"]]


@pytest.mark.parametrize("number", [-0.5, -3, "-0.5", "+1e-5", "-inf", "12", None, 0.25])
def test_numbers_stay_numbers(number):
    assert no_formula(number) == number


@given(st.text(st.sampled_from("'=+-@\t\ra1. ")) | st.text())
def test_what_export_adds_import_takes_away(text):
    assert as_before(no_formula(text)) == text


def test_tables_hold_no_formula_and_the_same_numbers(board):  # noqa: F811
    export(spoil(board))
    for name in ("results.csv", "runs.csv"):
        with (board / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["model"] for row in rows} == {"GaCLLM", "Pop_2", f"'{HOSTILE}"}
        numbers = [row.get("difference") or row.get("seconds_total") or "0" for row in rows]
        assert any(float(number) < 0 for number in numbers) == (name == "results.csv")


def test_exported_descriptions_come_back_as_they_were(tmp_path):
    rows = [
        {"token": "=1", "text": "-a text", "side": "user", "layer": 0},
        {"token": "'@x", "text": "t", "side": "item", "layer": 0},
    ]
    (tmp_path / "texts.csv").write_text(markdown.csv_text(rows))
    assert "'=1,'-a text" in (tmp_path / "texts.csv").read_text()
    texts = ImportedTexts.read(tmp_path / "texts.csv").layers[0]
    assert texts == {"user": {"=1": "-a text"}, "item": {"'@x": "t"}}


def test_recbole_reads_exported_embeddings_of_any_id(embeddings, settings, dataset_root):  # noqa: F811
    tiny = dataset_root / "tiny"
    text = (tiny / "tiny.inter").read_text()
    for place, written in enumerate(['"""quoted"" id"', 'mid"dle', "'single'", '""""', "#x=1"]):
        text = text.replace(f"\ti{place}\t", f"\t{written}\t")
    (tiny / "tiny.inter").write_text(text)
    ids = ['"quoted" id', 'mid"dle', "'single'", '"', "#x=1"]
    inputs = embeddings.parent / "inputs-1" / "layer_0.parquet"
    layer = Layer.read(inputs)
    tokens = {**layer.tokens, "item": [*ids, *layer.tokens["item"][len(ids) :]]}
    Layer.raw(tokens, layer.texts).write(inputs)
    manifests.write_manifest(embeddings, {"stage": "embeddings"})
    export_embeddings(embeddings, 0, tiny)
    columns = {"useremb": ["uid", "user_emb"], "itememb": ["iid", "item_emb"]}
    settings["load_col"] = {**settings["load_col"], **columns}
    dataset = create_dataset(build_config("BPR", "tiny", [tiny / "tiny-emb.yaml"], settings))
    vectors = np.load(embeddings / "layer_0.npy").astype(np.float32)
    items = dataset.get_preload_weight("iid")
    for place, name in enumerate(ids):
        row = items[dataset.token2id("item_id", name)]
        np.testing.assert_allclose(row, vectors[24 + place], rtol=1e-5)
