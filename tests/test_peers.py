"""The peers: RecBole's contract, what they read of the texts, and their known answers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.compare.plan import make_plan
from recbole_gacllm.config import PEERS, peer_file, shipped_path
from recbole_gacllm.peers import texts as peers_texts
from tests.random_texts import random_texts
from tests.recommender import Recommender

ALL = pytest.mark.parametrize("name", PEERS)


def texts_by_source(options: Any, data: Any) -> TextLayers:
    """Random texts of two layers; of ``raw`` the first alone, of ``shuffled`` on other nodes."""
    made = random_texts(options, data)
    if options.text_source == "raw":
        made.tables = made.tables[:1]
    if options.text_source == "shuffled":
        n_users = len(data.graph.user_tokens) + 1
        for side in (made.row_of_node[1:n_users], made.row_of_node[n_users + 1 :]):
            side.copy_(side.flip(0))
    is_mean = options.text_users == "item_mean"
    return made.with_users_as_item_means(data.graph) if is_mean else made


@pytest.fixture
def make(settings, monkeypatch):
    """Makes a model on these texts."""
    monkeypatch.setattr(peers_texts, "prepare", texts_by_source)
    return lambda name, **keys: Recommender(name, settings, **keys)


def scores(made: Recommender) -> torch.Tensor:
    made.model.eval()
    users = torch.arange(1, made.model.n_users)
    with torch.no_grad():
        return made.model.full_sort_predict({"user_id": users}).view(len(users), -1)


def trained(made: Recommender) -> torch.Tensor:
    made.fit(saved=False)
    return scores(made)


@ALL
def test_it_trains_and_both_predictions_agree(make, name):
    made = make(name)
    before = scores(made)
    result = made.fit(saved=False)
    after = scores(made)
    assert 0 <= result["recall@10"] <= 1
    assert torch.isfinite(after).all()
    assert name == "CEASE" or not torch.equal(before, after)
    batch = {"user_id": torch.tensor([3, 1, 3, 7]), "item_id": torch.tensor([2, 9, 4, 2])}
    with torch.no_grad():
        pairs = made.model.predict(batch)
    assert torch.allclose(pairs, after[batch["user_id"] - 1, batch["item_id"]], atol=1e-6)


@ALL
def test_a_layer_of_generated_texts_is_read_as_that_layer_alone(make, name):
    """Layer 0 of generated texts is the raw one; the last layer, the default, is another."""
    keys = {"align_weight": 1.0} if name.startswith("RLMRec") else {}
    raw = trained(make(name, text_source="raw", **keys))
    assert torch.equal(trained(make(name, text_layers=0, **keys)), raw)
    last = trained(make(name, **keys))
    assert torch.equal(trained(make(name, text_layers=1, **keys)), last)
    assert not torch.allclose(last, raw)
    assert not torch.allclose(trained(make(name, text_source="shuffled", **keys)), last)
    with pytest.raises(ValueError, match=r"text_layers: 2 is not .* layers 0 to 1"):
        make(name, text_layers=2)


@ALL
def test_the_state_holds_no_text_and_a_checkpoint_gives_its_scores_back(make, name):
    made = make(name)
    before, state = scores(made), copy.deepcopy(made.model.state_dict())
    assert not [key for key, value in state.items() if 54 in value.shape or 56 in value.shape]
    made.fit(saved=False)
    scores(made)
    made.model.load_state_dict(state)
    assert torch.equal(scores(made), before)
    assert copy.deepcopy(make(name).model).texts.tables[0].data_ptr()  # RecBole's FLOPs copy it


@ALL
def test_a_key_of_gacllms_recommender_is_refused(make, name):
    with pytest.raises(ValueError, match="unknown key 'linear_weight'.*" + peer_file(name).name):
        make(name, linear_weight=0.5)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("RLMRecCon", "align_weight", -1.0),
        ("RLMRecGen", "mask_ratio", 1.0),
        ("AlphaRec", "ssm_temperature", 0.0),
        ("CEASE", "reg_weight", 0),
        ("CEASE", "text_users", "none"),
    ],
)
def test_a_bad_value_is_refused_before_any_stage(make, monkeypatch, name, key, value):
    monkeypatch.setattr(peers_texts, "prepare", None)
    with pytest.raises(ValueError, match=f"{key}: {value}|{key}: '{value}'"):
        make(name, **{key: value})


@ALL
def test_its_space_holds_keys_that_it_reads(make, name):
    space = shipped_path("properties", "spaces", f"{name}.hyper").read_text()
    names = {line.split()[0] for line in space.splitlines()}
    assert names <= set(make(name).config.final_config_dict)


def test_a_leaderboard_gives_each_row_the_keys_that_it_reads(settings):
    """Flags hold for all rows: those of GaCLLM's recommender for GaCLLM alone."""
    keys = {**settings, "linear_weight": 0.5, "text_source": "raw", "ssm_temperature": 0.3}
    rows = ["GaCLLM", "AlphaRec", "BPR", "BPR:text_init=True"]
    runs = make_plan(rows, ["tiny"], 1, config_dict=keys).runs
    given = {run.model: set(run.key["config"]) & {*keys} - {*settings} for run in runs}
    assert given == {
        "GaCLLM": {"linear_weight", "text_source", "ssm_temperature"},
        "AlphaRec": {"text_source", "ssm_temperature"},
        "BPR": set(),
        "BPR:text_init=True": {"text_source"},
    }


# Known answers


@pytest.mark.parametrize("name", ["RLMRecCon", "RLMRecGen"])
@pytest.mark.parametrize("source", ["generated", "shuffled"])
def test_rlmrec_without_weight_of_text_is_lightgcn_to_the_digit(make, name, source):
    ours = trained(make(name, align_weight=0.0, text_source=source, fast_paths=False))
    assert torch.equal(ours, trained(make("LightGCN")))
    assert not torch.allclose(ours, trained(make(name, align_weight=1.0, fast_paths=False)))


def test_rlmrec_contrasts_users_with_all_users_and_items_with_their_block(make):
    made = make("RLMRecCon", align_weight=1.0, align_temperature=0.5)
    model, batch = made.model.train(), made.batch
    with_text = model.calculate_loss(batch).item()
    model.weight = 0.0
    plain = model.calculate_loss(batch).item()

    def log_share(vector, texts, own):
        texts = [x / np.linalg.norm(x) for x in texts]
        vector = vector / np.linalg.norm(vector)
        exponentials = np.exp([vector @ x / 0.5 for x in texts])
        return np.log(exponentials[own] / exponentials.sum())

    with torch.no_grad():
        tables = [x.double().numpy() for x in model.forward()]
        nodes = torch.arange(model.n_users + model.n_items)
        texts = model.map(model.rows(nodes)).double().numpy()
    user, item, negative = (batch[name].tolist() for name in ("user_id", "item_id", "neg_item_id"))
    of_users = [log_share(tables[0][u], texts[1 : model.n_users], u - 1) for u in user]
    of_blocks = [
        log_share(tables[1][i], [texts[model.n_users + j] for j in block], place)
        for block in (item, negative)
        for place, i in enumerate(block)
    ]
    expected = plain - (sum(of_users) + sum(of_blocks)) / len(user)
    assert with_text == pytest.approx(expected, rel=1e-5)


def test_rlmrec_masks_nodes_only_while_it_trains_and_never_padding(make):
    made = make("RLMRecGen", mask_ratio=0.5)
    model = made.model.train()
    plain = model.get_ego_embeddings()
    model.masked = model.nodes
    with torch.no_grad():
        model.mask_token.fill_(7.0)
    is_token = (model.get_ego_embeddings() == 7.0).all(1)
    assert is_token.sum() == 24 + 30
    assert not is_token[[0, model.n_users]].any()
    model.masked = None
    seen = []
    model.text_loss = lambda users, items, _: seen.append(model.masked) or users.sum()
    model.calculate_loss(made.batch).backward()
    assert len(seen[0]) == 27
    assert model.masked is None
    assert torch.equal(model.get_ego_embeddings(), plain)
    assert model.mask_token.grad.abs().sum() > 0


def rotated(made: Recommender, rotation: torch.Tensor) -> None:
    """Turn all text embeddings, and the first layer of the map back."""
    texts, first = made.model.texts, made.model.projection[1]
    texts.tables = [(table.double() @ rotation.T).float() for table in texts.tables]
    with torch.no_grad():
        first.weight.copy_((first.weight.double() @ rotation.T).float())


def test_alpharec_is_invariant_to_a_rotation_of_the_texts_with_the_map_rotated_back(make):
    """At the start, and after any number of steps of plain gradient descent."""
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    both = []
    for turned in (False, True):
        made = make("AlphaRec", learner="sgd", learning_rate=1.0)
        before = scores(made)
        if turned:
            rotated(made, rotation)
        made.model.restored = None
        start = scores(made)
        assert torch.allclose(start, before, atol=1e-5)
        made.fit(saved=False)
        both.append((start, scores(made)))
    assert torch.allclose(both[0][1], both[1][1], atol=1e-4)
    assert (both[0][1] - both[0][0]).abs().max() > 1e-2
    unturned = make("AlphaRec")
    before = scores(unturned)
    tables = unturned.model.texts.tables
    unturned.model.texts.tables = [table.float() @ rotation.float() for table in tables]
    unturned.model.restored = None
    assert not torch.allclose(scores(unturned), before, atol=1e-2)


def test_alpharec_knows_users_by_their_items_alone(make):
    made = make("AlphaRec", text_source="raw")
    texts, data = made.model.texts, made.train._dataset
    user = 5
    items = data.inter_feat["item_id"][data.inter_feat["user_id"] == user]
    mean = texts.rows((0,), made.model.n_users + items).mean(0)
    expected = mean / mean.norm()
    assert torch.allclose(texts.rows((0,), torch.tensor([user]))[0], expected, atol=2e-3)


def test_alpharec_draws_no_item_that_the_user_has_met(make):
    made = make("AlphaRec", text_source="raw")
    model, data = made.model, made.train._dataset.inter_feat
    batch = data[torch.arange(20)]
    with torch.no_grad():
        loss = model.calculate_loss(batch)
        users, items = model.forward()
        expected = []
        for user, item in zip(batch["user_id"], batch["item_id"], strict=True):
            met = set(data["item_id"][data["user_id"] == user].tolist())
            others = [other for other in model.seen if other not in met]
            exponents = (items[[int(item), *others]] @ users[user]) / model.temperature
            expected.append(-exponents.log_softmax(0)[0])
    assert model.n_negatives >= len(model.seen)  # so that all of them are drawn
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-5)


def test_cease_without_weight_of_text_is_ease(make):
    ours = scores(make("CEASE", text_weight=0, reg_weight=20.0))
    theirs = scores(make("EASE", reg_weight=20.0))
    assert torch.allclose(ours[:, 1:], theirs[:, 1:].float(), atol=1e-5)
    assert not torch.allclose(ours, scores(make("CEASE", reg_weight=20.0)), atol=1e-3)


def test_cease_solves_what_it_says(make):
    """Interactions and texts stacked, each item from the others, by least squares."""
    made = make("CEASE", reg_weight=3.0, text_weight=0.5)
    model = made.model
    inter = made.train._dataset.inter_feat
    rows = np.zeros((model.n_users, model.n_items))
    rows[inter["user_id"], inter["item_id"]] = 1
    x = model.texts.rows((1,), torch.arange(model.n_items) + model.n_users).double().numpy()
    x[1:] -= x[1:].mean(0)
    x[1:] /= np.sqrt((x[1:] ** 2).sum(1).mean())
    x[0] = 0
    g = (rows**2).sum(0).mean()
    stacked = np.vstack([rows, np.sqrt(0.5 * g) * x.T])
    for item in (1, 7, 30):
        others = np.delete(np.arange(model.n_items), item)
        a = stacked[:, others]
        weights = np.linalg.solve(a.T @ a + 3.0 * np.eye(len(others)), a.T @ stacked[:, item])
        expected = rows[1:][:, others] @ weights
        assert np.allclose(scores(made)[:, item], expected, atol=1e-4)


def test_users_who_all_have_one_text_get_the_means_of_their_items(make, monkeypatch, caplog):
    def alike(options, data):
        made = random_texts(options, data)
        for table in made.tables:
            table[: len(data.graph.user_tokens)] = table[0].clone()
        return made

    monkeypatch.setattr(peers_texts, "prepare", alike)
    texts = make("RLMRecCon").model.texts
    assert "text_users: own, but all users have the same text in layer 1" in caplog.text
    rows = texts.rows((1,), torch.arange(1, 25))
    assert len(rows.unique(dim=0)) > 1
