"""Text embeddings stay files in half precision, whoever reads them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recbole_gacllm import inputs as data_module
from recbole_gacllm.alignment import embeddings
from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.layers import Layer

N_USERS, N_ITEMS, WIDTH = 3000, 2000, 64


TOKENS = {
    "user": [f"u{i}" for i in range(N_USERS)],
    "item": [f"i{i}" for i in range(N_ITEMS)],
}
GRAPH = SimpleNamespace(tokens=lambda side: np.array(TOKENS[side]))


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Embeddings of 5,000 nodes, of two layers, as finished stages leave them."""
    made = {name: tmp_path / name for name in ("inputs", "embeddings")}
    for folder in made.values():
        folder.mkdir()
    Layer.raw(TOKENS, TOKENS).write(made["inputs"] / "layer_0.parquet")
    for layer in range(2):
        table = np.random.default_rng(layer).standard_normal((N_USERS + N_ITEMS, WIDTH))
        np.save(made["embeddings"] / f"layer_{layer}.npy", table.astype(np.float16))
    return made


@pytest.fixture
def texts(folders) -> TextLayers:
    """The first layer, loaded for the CPU."""
    return TextLayers.load(folders, 1, "generated", GRAPH, 1).to("cpu")


def kibibytes(file: Path) -> dict[str, int]:
    """What the mapping of a file takes in this process, as Linux counts it."""
    sizes: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # the head of a mapping: addresses, ..., file
            inside = line.endswith(str(file))
        elif inside and rest[-1] == "kB":
            sizes[name[:-1]] = sizes.get(name[:-1], 0) + int(rest[0])
    return sizes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_embeddings_are_pages_of_the_file_that_processes_share(texts, tmp_path):
    file = tmp_path / "embeddings" / "layer_0.npy"
    nodes = torch.arange(N_USERS + N_ITEMS + 2)
    mean = texts.rows((0,), nodes).mean()
    assert mean != 0
    mine = kibibytes(file)
    assert mine["Rss"] * 1024 >= file.stat().st_size * 0.9  # all of it was read
    assert mine["Anonymous"] == 0  # none of it was copied
    child = os.fork()
    if child == 0:
        texts.tables[0].numpy().max()
        other = kibibytes(file)
        os._exit(not 0 < other["Pss"] <= 0.6 * other["Rss"])
    assert os.waitpid(child, 0)[1] == 0  # each page is there once for both


def test_rows_are_float32_of_the_file_in_the_order_of_the_nodes(texts):
    table = texts.tables[0]
    assert table.dtype == torch.float16
    nodes = torch.tensor([N_USERS + 2, 1, 0, 3])  # first item, first user, padding, third user
    expected = table[[N_USERS, 0, 0, 2]].float()
    expected[2] = 0
    assert torch.equal(texts.rows((0,), nodes), expected)


def test_no_projection_sees_more_than_some_rows_in_float32(texts, monkeypatch):
    monkeypatch.setattr(embeddings, "MAX_ROWS", 700)
    seen: list[torch.Tensor] = []
    projection = torch.nn.Linear(WIDTH, 4)
    projection.register_forward_hook(lambda _module, found, _result: seen.append(found[0]))
    nodes = torch.randperm(N_USERS + N_ITEMS + 2)
    result = texts.projected((0,), nodes, projection)
    assert max(map(len, seen)) == 700
    assert torch.allclose(result, projection(texts.rows((0,), nodes)), atol=1e-6)


@pytest.fixture
def load(folders):
    """Loads both layers, as one source of texts or another."""
    return lambda text_source, seed=1: TextLayers.load(folders, 2, text_source, GRAPH, seed)


def test_each_layer_is_read_from_its_own_file(load, folders):
    made = load("generated")
    for layer in range(2):
        table = np.load(folders["embeddings"] / f"layer_{layer}.npy").astype(np.float32)
        rows = made.rows((layer,), torch.arange(1, N_USERS + 1)).numpy()
        assert np.array_equal(rows, table[:N_USERS])


def test_shuffled_gives_the_nodes_of_both_sides_texts_of_others_of_their_side(load):
    plain = load("generated").row_of_node
    shuffled = load("shuffled").row_of_node
    assert not torch.equal(shuffled, load("shuffled", seed=2).row_of_node)
    assert torch.equal(shuffled, load("shuffled").row_of_node)
    for nodes in (slice(1, N_USERS + 1), slice(N_USERS + 2, None)):
        assert torch.equal(shuffled[nodes].sort().values, plain[nodes])
        assert (shuffled[nodes] == plain[nodes]).float().mean() < 0.01
    assert shuffled[[0, N_USERS + 1]].tolist() == [-1, -1]


def test_training_data_has_the_files_and_settings_that_recbole_reads_them_with(tmp_path):
    config = {"data_path": str(tmp_path), "dataset": "books", "field_separator": ";"}
    config |= {"seq_separator": "|", "encoding": "latin-1", "seed": 5, "show_progress": True}
    (tmp_path / "books.user").touch()
    dataset = SimpleNamespace(
        uid_field="reader",
        iid_field="book",
        time_field="when",
        field2id_token={"reader": ["[PAD]", "a", "b"], "book": ["[PAD]", "x"]},
        inter_feat={
            "reader": torch.tensor([1, 2]),
            "book": torch.tensor([1, 1]),
            "when": torch.tensor([7.0, 3.0]),
        },
    )
    data = data_module.TrainingData.from_recbole(config, dataset)
    assert data.feature_files == {"user": tmp_path / "books.user", "item": None}
    assert data.id_fields == {"user": "reader", "item": "book"}
    read_with = (data.field_separator, data.seq_separator, data.encoding)
    assert read_with == (";", "|", "latin-1")
    assert (data.seed, data.show_progress) == (5, True)
    assert data.graph.timestamps.tolist() == [7.0, 3.0]
    assert data.graph.item_tokens.tolist() == ["x"]
    del dataset.inter_feat["when"]
    config["encoding"] = None
    data = data_module.TrainingData.from_recbole(config, dataset)
    assert data.graph.timestamps is None
    assert data.encoding is None  # the mark of the file, else UTF-8


def test_raw_texts_and_names_are_read_with_these_settings(tmp_path):
    (tmp_path / "books.user").write_text(
        "reader:token;né:token;name:token\na;1;Zoë\nb;2;Ann\n", "latin-1"
    )
    (tmp_path / "books.item").write_text("book:token;title:token_seq\nx;Dune|Two\n", "latin-1")
    config = {"data_path": str(tmp_path), "dataset": "books", "field_separator": ";"}
    config |= {"seq_separator": "|", "encoding": "latin-1", "USER_ID_FIELD": "reader"}
    assert data_module.user_names(config) == {"a": "Zoë", "b": "Ann"}
    data = data_module.TrainingData(
        dataset="books",
        graph=TrainGraph(np.array(["a", "b"]), np.array(["x", "y"]), [0], [0]),
        feature_files={side: tmp_path / f"books.{side}" for side in ("user", "item")},
        id_fields={"user": "reader", "item": "book"},
        field_separator=";",
        seq_separator="|",
        encoding="latin-1",
        seed=1,
        show_progress=False,
    )
    options = SimpleNamespace(
        text_user_template="A {né} reader",
        text_item_template=None,
        text_user_noun="reader",
        text_item_noun="book",
        text_value_names={"né": {1: "young", "2": "old"}},
        text_max_chars=50,
        text_allow_ids=False,
        text_item_name_field=None,
    )
    layer, names = data_module.raw_descriptions(options, data)
    assert layer.texts["user"] == ["A young reader", "A old reader"]
    assert layer.texts["item"] == ["title: Dune Two", "A book of which nothing is known."]
    assert names == {"x": "Dune Two", "y": "y"}


def test_item_mean_gives_a_user_the_mean_of_the_training_items_and_leaves_items_alone(folders):
    # RecBole's order of tokens is another than the files'; user u7 has items i3 and i5.
    users, items = ["u7", "u0"], ["i5", "i1", "i3"]
    graph = TrainGraph(
        user_tokens=np.array(users),
        item_tokens=np.array(items),
        users=np.array([0, 0, 1]),
        items=np.array([0, 2, 1]),
    )
    made = TextLayers.load(folders, 1, "item_mean", graph, 1)
    table = np.load(folders["embeddings"] / "layer_0.npy").astype(np.float32)
    of_item = table[N_USERS:]
    mean = of_item[5] + of_item[3]
    rows = made.rows((0,), torch.arange(7)).numpy()  # padding, u7, u0, padding, i5, i1, i3
    assert np.allclose(rows[1], mean / np.linalg.norm(mean), atol=1e-3)
    assert np.allclose(rows[2], of_item[1] / np.linalg.norm(of_item[1]), atol=1e-3)
    assert np.array_equal(rows[4:], of_item[[5, 1, 3]])
    assert not rows[[0, 3]].any()
