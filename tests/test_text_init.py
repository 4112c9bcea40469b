"""``text_init``: RecBole's own models begin as texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_gacllm.artifacts.locate import RunFiles
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.inputs import TrainingData
from recbole_gacllm.inspection.opened import open_run, trainer_of
from recbole_gacllm.peers import texts as peers_texts
from recbole_gacllm.peers.text_init import MappedTexts, find_tables
from recbole_gacllm.run import run
from tests.crash_lab import save_tiny_encoder
from tests.random_texts import random_texts
from tests.recommender import Recommender, without

SEQUENTIAL = {"eval_args": {"order": "TO", "split": {"LS": "valid_and_test"}, "group_by": "user"}}


@pytest.fixture
def settings(settings):
    return without(settings, "loss_type")  # GaCLLM's


@pytest.fixture
def make(settings, monkeypatch):
    """Makes a model on random texts of width 12, in two layers."""
    monkeypatch.setattr(peers_texts, "prepare", random_texts)
    settings = {**settings, "embedding_size": 8, "hidden_size": 8}

    def making(name, **keys):
        by_time = SEQUENTIAL if name in ("SASRec", "GRU4Rec", "BERT4Rec", "FPMC") else {}
        return Recommender(name, settings, **{"text_init": True, **by_time, **keys})

    return making


def components(rows, whitened=False):
    """Principal components by numpy, each at unit spread if whitened; signs are free."""
    centred = rows - rows.mean(0)
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    return centred @ axes.T / (spread if whitened else 1)


def rows_of(made, side, layer=1):
    model, n_users = made.model, made.train._dataset.user_num
    first, n = (0, n_users) if side == "user" else (n_users, made.train._dataset.item_num)
    return model.texts.rows((layer,), torch.arange(first + 1, first + n)).double().numpy()


TABLES = {
    "BPR": {"user_embedding": "user", "item_embedding": "item"},
    "LightGCN": {"user_embedding": "user", "item_embedding": "item"},
    "SimpleX": {"user_emb": "user", "item_emb": "item"},
    "SASRec": {"item_embedding": "item"},
    "GRU4Rec": {"item_embedding": "item"},
    "BERT4Rec": {"item_embedding": "item"},
    "FPMC": {"UI_emb": "user", "IU_emb": "item", "LI_emb": "item", "IL_emb": "item"},
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_nodes_begin_as_texts_and_all_else_as_ever(make, name):
    plain = make(name, text_init=False)
    state = torch.get_rng_state()
    made = make(name)
    assert torch.equal(torch.get_rng_state(), state)  # training draws the same numbers
    n_users, n_items = made.train._dataset.user_num, made.train._dataset.item_num
    tables = find_tables(plain.model, n_users, n_items)
    assert tables == TABLES[name]
    before = plain.model.state_dict()
    for key, value in made.model.state_dict().items():
        table = key.removesuffix(".weight")
        if table not in tables:
            assert torch.equal(value, before[key]), key
            continue
        nodes = slice(1, n_users if tables[table] == "user" else n_items)
        assert torch.equal(value[0], before[key][0])  # padding
        assert torch.equal(value[n_items:], before[key][n_items:])  # BERT4Rec's mask token
        assert value[nodes].std() == pytest.approx(before[key][nodes].std().item(), rel=1e-4)
        expected = components(rows_of(made, "item"))[:, :8]
        if tables[table] == "item":
            ratio = value[nodes].abs().numpy() / np.abs(expected)
            assert np.allclose(ratio, ratio[0, 0], rtol=1e-2)
    assert made.fit(saved=False)["recall@10"] >= 0


def test_users_are_turned_by_the_axes_of_the_items(make):
    """A user whose text is an item's lies, up to scale and centre, where that item lies."""
    made = make("BPR")
    users, items = rows_of(made, "user"), rows_of(made, "item")
    axes = np.linalg.lstsq(items - items.mean(0), components(items)[:, :8], rcond=None)[0]
    expected = (users - users.mean(0)) @ axes
    table = made.model.user_embedding.weight[1:].detach().double().numpy()
    ratio = np.abs(table) / np.abs(expected)
    assert np.allclose(ratio, np.median(ratio), rtol=2e-2)


def test_whitened_columns_have_one_spread_and_pca_falls(make):
    pca, whitened = (
        make("BPR", text_init_reduction=way).model.item_embedding.weight[1:].std(0)
        for way in ("pca", "whitened")
    )
    assert torch.allclose(whitened, whitened.mean(), rtol=1e-3)
    assert (pca.diff() < 0).all()


@pytest.mark.parametrize("name", ["LightGCN", "SASRec", "BERT4Rec"])
def test_frozen_texts_begin_as_the_same_table_and_only_their_map_learns(make, name):
    trained, frozen = make(name), make(name, text_init_frozen=True)
    table = frozen.model.item_embedding
    assert isinstance(table, MappedTexts)
    weight = trained.model.item_embedding.weight
    assert torch.allclose(table.weight, weight, atol=1e-5)
    ids = torch.tensor([[0, 3], [5, 1]])
    assert torch.allclose(table(ids), weight[ids], atol=1e-5)
    texts, begin = table.texts.clone(), table.weight.detach().clone()
    n_items = frozen.train._dataset.item_num
    names = {key.rpartition(".")[0] for key in frozen.model.state_dict()}
    assert not [v for v in frozen.model.state_dict().values() if 12 in v.shape and len(v) > 12]
    assert "item_embedding.map" in names
    frozen.fit(saved=False)
    assert torch.equal(table.texts, texts)
    moved = (table.weight - begin).detach()[1:n_items]
    # A linear map of the texts and a constant: no more ranks than texts and a column of ones.
    ones = np.hstack([rows_of(frozen, "item"), np.ones((n_items - 1, 1))])
    rest = moved.numpy() - ones @ np.linalg.lstsq(ones, moved.numpy(), rcond=None)[0]
    assert np.abs(rest).max() < 1e-5 < moved.abs().max()


def test_a_wider_table_keeps_its_further_columns(make):
    plain, made = (make("BPR", text_init=on, embedding_size=20) for on in (False, True))
    before, after = (one.model.item_embedding.weight for one in (plain, made))
    assert torch.equal(before[:, 12:], after[:, 12:])
    assert not (before[1:, :12] == after[1:, :12]).any()
    frozen = make("BPR", embedding_size=20, text_init_frozen=True)
    assert torch.allclose(frozen.model.item_embedding.weight, after, atol=1e-5)


def test_cold_items_have_their_texts_embedding(make):
    made = make("BPR", cold_item_share=0.3, text_layers=0)
    seen = set(made.train._dataset.inter_feat["item_id"].tolist())
    cold = [item for item in range(1, made.model.n_items) if item not in seen]
    expected = np.abs(components(rows_of(made, "item", 0))[:, :8])
    ratio = made.model.item_embedding.weight[1:].detach().abs().numpy() / expected
    assert len(cold) >= 8
    assert np.allclose(ratio[np.array(cold) - 1], np.median(ratio), rtol=2e-2)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("EASE", {}, "text_init: True does not go with EASE, a traditional model"),
        (
            "MultiVAE",
            {},
            "which has no table of embeddings .* of the 30 items or 24 users",
        ),
        ("GaCLLM", {}, "text_init: True is for models that read no texts, and GaCLLM reads them"),
        ("BPR", {"text_init_reduction": "svd"}, "text_init_reduction: 'svd' is not allowed"),
        ("BPR", {"text_init": "yes"}, "text_init: 'yes' is not allowed"),
        ("SASRec", {"text_layers": 2}, "text_layers: 2 is not allowed"),
    ],
)
def test_it_is_refused_where_it_cannot_be(make, monkeypatch, name, keys, message):
    if "text_layers" not in keys:
        monkeypatch.setattr(peers_texts, "prepare", None)  # before any stage
    with pytest.raises(ValueError, match=message):
        make(name, **keys)


def test_a_sequential_split_has_the_training_edges_of_a_general_one(make, settings):
    """Also those that no row has as its target, and with their times."""
    graphs: list[TrainGraph] = []
    for name in ("SASRec", "GaCLLM"):
        keys = {**SEQUENTIAL, "text_init": False, "MAX_ITEM_LIST_LENGTH": 3}
        made = make(name, **keys, **({"use_text": False} if name == "GaCLLM" else {}))
        graphs.append(TrainingData.from_recbole(made.config, made.train._dataset).graph)
    assert graphs[0].n_edges == 24 * 8
    assert graphs[0].fingerprint() == graphs[1].fingerprint()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["SASRec", "LightGCN"])
def test_a_run_reads_raw_texts_by_the_hook_and_is_opened_again(
    settings, in_process, tmp_path, name, frozen
):
    keys = {**settings, **(SEQUENTIAL if name == "SASRec" else {}), "text_source": "raw"}
    keys |= {"encoder_model": str(save_encoder(tmp_path)), "text_init_frozen": frozen}
    made = run(name, "tiny", config_dict={**keys, "text_init": True, "hidden_size": 8})
    assert set(made.record["artifacts"]) == {"inputs", "embeddings", "item_names"}
    opened = open_run(RunFiles.read(made.run_file))
    result = trainer_of(opened).evaluate(opened.test, load_best_model=False, show_progress=False)
    assert dict(result) == made.record["test"]
    assert ("item_embedding.map.weight" in opened.model.state_dict()) == frozen


def save_encoder(folder):
    save_tiny_encoder(folder / "encoder")
    return folder / "encoder"
