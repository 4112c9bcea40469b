"""Texts from elsewhere: what a file must hold, what it fills, and a run that uses it."""

import re
from pathlib import Path

import pandas as pd
import pytest

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.cli.main import main
from recbole_gacllm.convolution.imported import ImportedTexts
from recbole_gacllm.convolution.layers import SIDES, Layer
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.run import run

TOKENS = {"user": ["u1", "u2"], "item": ["1", "2", "3"]}
ROWS = [
    ("user", "u1", 1, "Likes  rain\nand fog."),
    ("item", "1", 1, "A wet film."),
    ("item", "2", 1, "A dry film."),
    ("item", "99", 1, "A film nobody has seen."),
    ("item", "1", 0, "Rain, a film."),
]


def write(file, rows=ROWS, columns=("side", "token", "layer", "text")):
    frame = pd.DataFrame(rows, columns=list(columns))
    if file.suffix == ".parquet":
        frame.to_parquet(file, index=False)
    else:
        frame.to_csv(file, index=False)
    return file


def below():
    return Layer.raw(TOKENS, {"user": ["A nurse.", "A cook."], "item": ["Rain.", "Sun.", "Fog."]})


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_layer_takes_the_texts_of_the_file_and_carries_the_others(tmp_path, suffix):
    imported = ImportedTexts.read(write(tmp_path / f"texts.{suffix}"))
    layer = imported.fill(1, below())
    assert layer.texts == {
        "user": ["Likes rain and fog.", "A cook."],
        "item": ["A wet film.", "A dry film.", "Fog."],
    }
    assert layer.statuses["user"] == ["imported", "missing"]
    assert layer.statuses["item"] == ["imported", "imported", "missing"]
    assert layer.reasons["item"] == ["", "", "not in text_import_file"]
    layer = imported.fill(0, below())
    assert layer.texts["item"] == ["Rain, a film.", "Sun.", "Fog."]
    assert layer.statuses["item"] == ["imported", "raw", "raw"]


def test_unknown_tokens_and_missing_nodes_are_counted_and_named(tmp_path):
    imported = ImportedTexts.read(write(tmp_path / "texts.csv"))
    [zero, one] = imported.check(TOKENS, 1)
    assert (one.n_imported, one.n_missing, one.n_unknown) == (3, 2, 1)
    assert (one.missing, one.unknown) == (["user u2", "item 3"], ["item 99"])
    assert (zero.n_imported, zero.n_missing, zero.n_unknown) == (1, 4, 0)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
@pytest.mark.parametrize(
    ("token", "text", "expected"),
    [
        (2, "A dry film.", "A dry film."),
        ("NA", "None", "None"),
        ("1", "A\x00 \u202ewet\u202c\x1b film.", "A wet film."),
    ],
)
def test_tokens_and_texts_are_kept_whole_whatever_they_look_like(
    tmp_path, name, token, text, expected
):
    file = write(tmp_path / name, [("item", token, 1, text)])
    assert ImportedTexts.read(file).layers == {1: {"user": {}, "item": {str(token): expected}}}


def test_the_digest_follows_the_texts_and_not_their_order(tmp_path):
    first = ImportedTexts.read(write(tmp_path / "a.csv")).digest()
    assert ImportedTexts.read(write(tmp_path / "b.parquet", ROWS[::-1])).digest() == first
    changed = [*ROWS[:-1], ("item", "1", 0, "Rain, a movie.")]
    assert ImportedTexts.read(write(tmp_path / "c.csv", changed)).digest() != first


@pytest.mark.parametrize(
    ("suffix", "row", "message"),
    [
        ("csv", ("film", "1", 1, "x"), "row 2: side is 'film'; allowed are user and item"),
        ("csv", ("item", "", 1, "x"), "row 2: token is empty"),
        ("csv", ("item", "2", -1, "x"), "row 2: layer is '-1'"),
        ("csv", ("item", "2", "one", "x"), "row 2: layer is 'one'"),
        ("csv", ("item", "2", 1, "  "), "row 2: the text of item 2 is empty"),
        ("csv", ("item", "1", 1, "x"), "row 2: item 1 has two texts of layer 1"),
        ("parquet", ("item", None, 1, "x"), "row 2: token is empty"),
        ("parquet", ("item", "2", None, "x"), "row 2: layer is"),
        ("parquet", ("item", "2", 1, None), "row 2: the text of item 2 is no text"),
        ("parquet", (None, "2", 1, "x"), "row 2: side is None"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, suffix, row, message):
    file = write(tmp_path / f"texts.{suffix}", [ROWS[1], row])
    with pytest.raises(ValueError, match=message):
        ImportedTexts.read(file)


HEADER = b"side,token,layer,text\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"side,token,layer\nitem,1,1\n", "each once; it has side, token, layer"),
        ("a.csv", b"side,token,layer,text,text\nitem,1,1,a,b\n", "each once; it has side, token"),
        ("a.csv", b"side;token;layer;text\nitem;1;1;a\n", "it has side;token;layer;text"),
        ("a.csv", b"", "it has none"),
        ("a.csv", HEADER, "holds no row"),
        ("a.csv", HEADER + b"item,1,1,a, b\n", "line 2 has 5 fields, the header 4; put texts"),
        ("a.csv", HEADER + b"item,1,1\n", "line 2 has 3 fields"),
        ("a.csv", HEADER + b'item,1,1,"a\nitem,2,1,b\n', "unexpected end of data"),
        ("a.csv", HEADER + b"item,1,1,caf\xe9\n", "is not UTF-8 text .* save it as UTF-8"),
        ("a.csv", HEADER + b"item,1,1,\x00\x1b\n", "row 1: the text of item 1 is empty"),
        ("a.txt", HEADER, r"must end in \.parquet or \.csv"),
        ("a.parquet", b"PAR1 no more", r"a\.parquet cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        ImportedTexts.read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    with pytest.raises(ValueError, match=r"none\.csv cannot be read"):
        ImportedTexts.read(tmp_path / "none.csv")


def test_a_csv_as_spreadsheets_write_it_is_read(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(
        b'\xef\xbb\xbfside,token,layer,text\r\nitem,007,1,"Rain, a ""wet"" one\n  of 1995"\r\n\r\n'
    )
    assert ImportedTexts.read(file).layers[1]["item"] == {"007": 'Rain, a "wet" one of 1995'}


def test_a_file_of_another_data_set_or_of_more_layers_is_refused(tmp_path):
    imported = ImportedTexts.read(write(tmp_path / "a.csv", [("item", "tt1", 1, "A film.")]))
    with pytest.raises(ValueError, match=r"no token of layer 1 .*item tt1, the data set.*item 1\."):
        imported.check(TOKENS, 1)
    imported = ImportedTexts.read(write(tmp_path / "b.csv", [("item", "1", 3, "A film.")]))
    with pytest.raises(ValueError, match=r"texts of layer 3, the run has layers 0 to 2"):
        imported.check(TOKENS, 2)


def full_import(file, n_layers=1):
    nodes = [("user", f"u{n}") for n in range(24)] + [("item", f"i{n}") for n in range(30)]
    rows = [
        (side, token, layer, f"Curated text {layer} of {token}.")
        for layer in range(1, n_layers + 1)
        for side, token in nodes
        if token != "i3"
    ]
    return write(file, rows)


def test_a_run_on_imported_texts_needs_no_llm_and_says_so(
    settings, in_process, tmp_path, monkeypatch
):
    file = full_import(tmp_path / "texts.csv")
    keys = {**settings, "text_import_file": str(file), "llm_model": "/no/such/model"}
    done = run("GaCLLM", "tiny", config_dict=keys)
    assert set(done.record["stages"]) == {"inputs", "descriptions", "embeddings"}
    [report] = done.record["stages"]["descriptions"]["layers"]
    assert report["imported"]
    assert (report["n_imported"], report["n_missing"], report["missing"]) == (53, 1, ["item i3"])
    layer = Layer.read(Path(done.record["artifacts"]["descriptions"]) / "layer_1.parquet")
    for side in SIDES:
        for token, text, status in zip(
            layer.tokens[side], layer.texts[side], layer.statuses[side], strict=True
        ):
            assert status == ("missing" if token == "i3" else "imported")
            assert (text == f"Curated text 1 of {token}.") == (token != "i3")

    def other_stage(stage, folder):
        raise GaCLLMError(f"{stage} is run again")

    monkeypatch.setattr("recbole_gacllm.artifacts.children.run_child", other_stage)
    file.write_text(file.read_text().replace("text 1 of u7", "words about u7"))
    with pytest.raises(GaCLLMError, match="descriptions is run again"):
        run("GaCLLM", "tiny", config_dict=keys)


def test_imported_texts_of_layer_0_are_audited_for_leaks(
    settings, in_process, dataset_root, tmp_path
):
    people = dataset_root / "tiny" / "tiny.user"
    header, *rows = people.read_text().splitlines()
    rows = [f"{row}\tAnna Person{at}" for at, row in enumerate(rows)]
    people.write_text("\n".join([f"{header}\tname:token", *rows]))
    lines = (dataset_root / "tiny" / "tiny.inter").read_text().splitlines()[1:]
    pairs = [line.split("\t")[:2] for line in lines]  # held-out ones, too
    texts = [
        ("user", user, 0, " ".join(f"The Great Film {i[1:]}." for u, i in pairs if u == user))
        for user in {user for user, _ in pairs}
    ] + [
        ("item", item, 0, " ".join(f"Anna Person{u[1:]}." for u, i in pairs if i == item))
        for item in {item for _, item in pairs}
    ]
    for side, kind in (("user", "item_names"), ("item", "user_names")):
        file = write(tmp_path / f"{side}.csv", [row for row in texts if row[0] == side])
        keys = {"text_source": "raw", "text_import_file": str(file), "epochs": 1}
        record = run("GaCLLM", "tiny", config_dict={**settings, **keys}).record
        audit = record["leakage_audit"]
        assert "descriptions" not in record["artifacts"]
        assert audit["kinds"][kind]["heldout_mentions"] == audit["n_pairs"] > 40
        assert audit["p_value"] < 1e-6
        assert audit["not_checked"][f"{'item' if side == 'user' else 'user'}_texts"] > 40


def test_a_layer_that_is_not_imported_is_generated_from_the_imported_one(
    settings, in_process, tiny_model, tmp_path
):
    from .test_pipeline import TINY

    file = full_import(tmp_path / "texts.parquet")
    keys = {**settings, **TINY, "llm_n_layers": 2, "sft": False, "text_import_file": str(file)}
    keys["llm_model"] = str(tiny_model)
    done = run("GaCLLM", "tiny", config_dict=keys)
    imported, generated = done.record["stages"]["descriptions"]["layers"]
    assert imported["imported"]
    assert generated["n_generated"] == 54


def test_the_command_fills_the_layers_that_a_run_then_finds(settings, in_process, tmp_path, capsys):
    file = full_import(tmp_path / "texts.csv")
    with file.open("a") as rows:
        rows.write("user,u99,1,Nobody.\n")
    keys = [f"--{name}={settings[name]}" for name in ("data_path", "artifact_dir")]
    with_blanks = [part for key in keys for part in key.split("=")]
    main(["import-descriptions", str(file), "--dataset", "tiny", *with_blanks])
    out = capsys.readouterr().out
    assert "layer 1: 53 nodes have an imported text" in out
    assert "1 are not in the file and keep the text of the layer below (item i3)" in out
    assert "1 rows are about nodes that the training graph lacks (user u99)" in out
    assert f"--text_import_file={file} --llm_n_layers=1" in out
    folder = Path(re.search("^written to (.*)$", out, re.MULTILINE)[1])
    manifest = manifests.read_manifest(folder)
    assert manifest["layers"][0]["imported"]
    assert (manifest["layers"][0]["n_imported"], manifest["layers"][0]["n_unknown"]) == (53, 1)

    del settings["load_col"]  # the times of interactions are part of the graph
    done = run("GaCLLM", "tiny", config_dict={**settings, "text_import_file": str(file)})
    assert done.record["artifacts"]["descriptions"] == str(folder)
    assert done.record["stages"]["descriptions"]["reused"]


def test_the_command_leaves_layers_that_the_file_lacks_to_the_run(settings, tmp_path, capsys):
    file = write(tmp_path / "texts.csv", [("item", "i1", 0, "A film."), ("item", "i1", 2, "Wet.")])
    keys = [f"--{name}={settings[name]}" for name in ("data_path", "artifact_dir")]
    main(["import-descriptions", str(file), "--dataset=tiny", *keys])
    out = capsys.readouterr().out
    assert "left to the LLM of the run: layer 1\n" in out
    assert "written to" not in out
    assert "--llm_n_layers=2" in out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("item", "i1", 3, "Wet."), "llm_n_layers: 3 is above n_layers: 2"),
        (("film", "1", 1, "x"), "side is 'film'"),
    ],
)
def test_the_command_refuses_a_bad_file_and_layers_that_no_run_can_have(
    settings, tmp_path, fails, row, message
):
    file = write(tmp_path / "texts.csv", [row])
    where = f"--data_path={settings['data_path']}"
    assert message in fails("import-descriptions", file, "--dataset=tiny", where)
