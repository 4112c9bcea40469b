"""What a run chooses inside its training part."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy import sparse

from recbole_gacllm.config import model_defaults
from recbole_gacllm.objective import choice
from recbole_gacllm.objective.linear import ItemItemModel, centred
from recbole_gacllm.run import run
from tests.recommender import Recommender

N_USERS, N_ITEMS, WIDTH = 300, 60, 8


@pytest.fixture
def tastes():
    """Interactions of users with items of their taste, texts that tell the taste, and noise."""
    rng = np.random.default_rng(5)
    tastes, kinds = rng.standard_normal((N_USERS, WIDTH)), rng.standard_normal((N_ITEMS, WIDTH))
    matrix = tastes @ kinds.T + rng.standard_normal((N_USERS, N_ITEMS)) > 3.5
    matrix[0] = matrix[:, 0] = False  # padding
    return sparse.csr_array(matrix.astype(np.float32)), kinds, rng.standard_normal(kinds.shape)


def test_the_l2_weight_is_the_best_on_held_out_interactions():
    """Little where items explain each other, much where only popularity tells anything."""
    rng = np.random.default_rng(4)
    in_pairs = (rng.random((300, 20)) < 0.2).repeat(2, axis=1)
    by_popularity = rng.random((300, 40)) < np.linspace(0.02, 0.4, 40)
    chosen = []
    for matrix in (in_pairs, by_popularity):
        state = torch.get_rng_state(), np.random.get_state()[1].copy()
        made = choice.choose_linear(sparse.csr_array(matrix.astype(np.float32)), {}, None, 0.0)
        assert torch.equal(torch.get_rng_state(), state[0])  # training is as without
        assert np.array_equal(np.random.get_state()[1], state[1])
        assert list(made.ndcg) == [f"L2 {weight:g}" for weight in choice.REG_WEIGHTS]
        best, taken = max(made.ndcg.values()), made.ndcg[f"L2 {made.reg_weight:g}"]
        assert taken >= 0.995 * best
        smaller = [weight for weight in choice.REG_WEIGHTS if weight < made.reg_weight]
        assert all(made.ndcg[f"L2 {weight:g}"] < 0.995 * best for weight in smaller)
        chosen.append(made.reg_weight)
    assert chosen[0] < 400 < chosen[1]


def test_the_held_out_ndcg_is_its_definition_user_by_user(settings):
    one = Recommender("Pop", settings)
    n_users, n_items = one.dataset.user_num, one.dataset.item_num
    histories, held_out = (
        sparse.csr_array(loader._dataset.inter_matrix("csr").astype(np.float32))
        for loader in (one.train, one.valid)
    )
    weights = torch.rand(n_items, n_items, generator=torch.Generator().manual_seed(5))
    users = np.flatnonzero(np.diff(held_out.indptr))
    ours = choice._mean_ndcg(choice._linear_blocks(histories, held_out, users, weights))
    ranks = []
    for user in range(1, n_users):
        relevant = set(held_out[[user]].indices)
        if relevant:
            scores = (torch.from_numpy(histories[[user]].toarray()) @ weights)[0]
            scores[histories[[user]].indices] = -torch.inf
            top = scores.argsort(descending=True)[:10].tolist()
            gain = sum(1 / np.log2(k + 2) for k, item in enumerate(top) if item in relevant)
            ranks.append(gain / sum(1 / np.log2(k + 2) for k in range(min(10, len(relevant)))))
    assert ours == pytest.approx(np.mean(ranks), abs=1e-6)


def test_the_layer_that_tells_most_speaks_and_of_equals_the_lowest(tastes):
    interactions, telling, noise = tastes
    texts = {(0,): centred(noise), (1,): centred(telling), (2,): centred(telling)}
    made = choice.choose_linear(interactions, texts, 100.0, None)
    assert (made.layers, made.reg_weight) == ((1,), 100.0)
    assert made.ndcg[f"layers 1 x {made.text_weight:g}"] == max(made.ndcg.values())
    assert len(made.ndcg) == 3 * (len(choice.TEXT_WEIGHTS) - 1) + 1  # and no text
    wrong = choice.choose_linear(interactions, {(0,): centred(np.roll(telling, 7, 0))}, 100.0, None)
    assert (wrong.layers, wrong.text_weight) == ((), 0.0)
    assert wrong.ndcg["no text"] == max(wrong.ndcg.values())
    unseen = choice.choose_unseen_items(interactions, texts, 100.0)
    assert unseen.layers == (1,)
    best = max(value for name, value in unseen.ndcg.items() if name.startswith("layers 0"))
    assert max(unseen.ndcg.values()) > 1.5 * best
    tastes_of_users = np.random.default_rng(5).standard_normal((N_USERS, WIDTH))
    right = choice.choose_unseen_users(interactions, tastes_of_users, (0,))
    wrong = choice.choose_unseen_users(interactions, tastes_of_users[::-1].copy(), (0,))
    assert max(right.ndcg.values()) > 1.3 * max(wrong.ndcg.values())


@pytest.mark.parametrize(
    ("text_layers", "names"),
    [("auto", {"0", "1", "0+1"}), ("hops", set()), (1, set())],
)
def test_which_layers_are_candidates(tastes, text_layers, names):
    interactions, telling, noise = tastes
    asked = []

    def rows(side, layers):
        asked.append(layers)
        if side == "user":
            return np.ones((N_USERS, WIDTH))
        return np.concatenate([[noise, telling][layer] for layer in layers], axis=1)

    keys = {"reg_weight": 50.0, "text_weight": 0.25}
    made = choice.choose(interactions, 2, rows, text_layers=text_layers, **keys)["linear"]
    assert {name.split()[1] for name in made.ndcg} == names
    assert made.layers == ((0,) if text_layers == "hops" else (1,))
    assert (0,) in asked or text_layers == 1
    with pytest.raises(ValueError, match="text_layers: 2 is not allowed; these texts have the lay"):
        choice.choose(interactions, 2, rows, text_layers=2, **keys)


@pytest.mark.parametrize(("raw", "chosen"), [(0.1991, "raw"), (0.1989, "written")])
def test_of_near_equals_the_first_is_taken(raw, chosen):
    assert choice._first_near_best({"raw": raw, "written": 0.2, "both": 0.1999}) == chosen


@pytest.mark.parametrize(("gain", "layers", "weight"), [(1.016, (0,), 3.0), (1.04, (1,), 30.0)])
def test_a_written_text_speaks_for_unseen_nodes_where_it_adds_two_percent(gain, layers, weight):
    values = {((0,), 3.0): 0.3, ((1,), 30.0): 0.3 * gain}  # each at a ridge weight of its own
    made = choice._choose_ridge([(0,), (1,)], lambda *one: values.get(one, 0.1))
    assert (made.layers, made.reg_weight) == (layers, weight)


def test_of_many_items_and_users_some_are_used(tastes, monkeypatch):
    interactions, telling, _ = tastes
    monkeypatch.setattr(choice, "MAX_ITEMS", 20)
    monkeypatch.setattr(choice, "MAX_USERS", 50)
    columns = choice.most_interacted(interactions, 20)
    degrees = interactions.sum(axis=0)
    assert degrees[columns].min() >= np.sort(degrees)[-20]
    texts = {(0,): centred(telling)}
    few = {(0,): texts[(0,)][columns]}
    arguments = None, 0.25
    whole = choice.choose_linear(interactions, texts, *arguments)
    assert whole == choice.choose_linear(interactions[:, columns], few, *arguments)
    assert choice._some(np.arange(101)).tolist() == list(range(0, 101, 3))


def test_few_unseen_nodes_get_the_usual_ridge_weight_and_the_layers_that_speak(tastes):
    interactions, telling, noise = tastes
    rows = {"item": {0: noise, 1: telling}, "user": dict.fromkeys((0, 1), np.ones((N_USERS, 2)))}
    keys = {"text_layers": 1, "reg_weight": 50.0, "text_weight": 0.25}
    full = sparse.csr_array(np.maximum(interactions.toarray(), np.eye(N_USERS, N_ITEMS)))
    full = sparse.csr_array(np.where(np.arange(N_USERS)[:, None] == 7, 1.0, full.toarray()))
    full = sparse.csr_array(np.where(np.arange(N_ITEMS) == 9, 1.0, full.toarray()))

    def choose(matrix):
        get = lambda side, layers: rows[side][layers[0]]  # noqa: E731
        return choice.choose(matrix.astype(np.float32), 2, get, **keys)

    assert list(choose(full)) == ["linear"]
    one = full.toarray()
    one[:, 5], one[11] = 0, 0
    made = choose(sparse.csr_array(one))
    assert made["unseen item"] == made["unseen user"] == choice.Choice((1,), 10.0)
    one[:, 20:40] = 0
    assert len(choose(sparse.csr_array(one))["unseen item"].ndcg) == len(choice.RIDGE_WEIGHTS)


def test_where_nothing_can_be_held_out_the_usual_is_taken():
    one = sparse.csr_array(np.array([[0, 0], [0, 1.0]], dtype=np.float32))
    rows = np.ones((2, 3))
    assert choice.choose_linear(one, {(0,): rows}, None, None) == choice.Choice((0,), 400.0, 0.25)
    assert choice.choose_unseen_items(one, {(0,): rows}, 1.0) == choice.Choice((0,), 10.0)
    assert choice.choose_unseen_users(one, rows, (0,)) == choice.Choice((0,), 10.0)


def test_a_model_says_what_it_chose(settings, caplog):
    caplog.set_level("INFO")
    keys = {"use_text": False, "linear_weight": 1.0}
    model = Recommender("GaCLLM", settings, **keys).model
    told = f"linear: no text, L2 {model.choices['linear'].reg_weight:g}, text weight 0 (L2 25 0."
    assert told in caplog.text
    caplog.clear()
    Recommender("GaCLLM", settings, **keys, linear_reg_weight=3.0)
    assert "chosen on held-out" not in caplog.text


def test_the_same_texts_as_a_generated_layer_give_the_scores_that_they_give_as_raw_ones(
    settings, monkeypatch
):
    """Layer 1 is chosen where it tells more, and then it is all that speaks."""
    from recbole_gacllm import model as model_module
    from tests.random_texts import random_texts

    def texts_with(layers):
        def made(options, data):
            texts = random_texts(options, data)
            first, second = texts.tables[0], texts.tables[0].flip(0)
            texts.tables = [{"told": first, "noise": second}[name] for name in layers]
            return texts

        return made

    scores = []
    for layers, chosen in ((["told"], "auto"), (["noise", "told"], 1)):
        monkeypatch.setattr(model_module, "prepare", texts_with(layers))
        keys = {"text_layers": chosen, "linear_weight": 0.5, "linear_text_weight": 1.0}
        one = Recommender("GaCLLM", settings, **keys, cold_item_share=0.3)
        model = one.model.eval()
        assert ItemItemModel is type(model.linear)
        scores.append(model.full_sort_predict(one.batch))
        scores.append(model.calculate_loss(one.batch)[None])
    assert torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("n_interactions", [29, 30])
def test_interactions_are_few_below_thirty_of_a_user_with_any(n_interactions):
    matrix = np.zeros((4, 40), dtype=np.float32)
    matrix[1:3, 1 : n_interactions + 1] = 1
    assert choice.are_few(sparse.csr_array(matrix)) == (n_interactions < 30)


def test_keys_of_few_interactions_apply_but_for_those_given(settings):
    keys = settings | {"use_text": False, "epochs": 2, "preset": "best", "ssm_n_negatives": 16}
    few = {"loss_type": "SSM", "n_layers": 0}
    keys = {key: value for key, value in keys.items() if key not in few}
    ours = run("GaCLLM", "tiny", config_dict=keys)  # eight interactions a user
    assert ours.record["choices"]["keys"] == model_defaults()["few_interactions"]
    given = run("GaCLLM", "tiny", config_dict=keys | {"n_layers": 0})
    assert given.record["choices"]["keys"]["loss_type"] == "BPR"
    assert "n_layers" not in given.record["choices"]["keys"]
    histories = [
        run("GaCLLM", "tiny", config_dict={**keys, **more}).record["history"]
        for more in ({"few_interactions": few}, {**few, "few_interactions": {}})
    ]
    assert histories[0] == histories[1]
    assert ours.record["history"] != given.record["history"] != histories[0]


@pytest.mark.parametrize(
    ("few", "message"),
    [
        ({"n_layers": -1}, "n_layers: -1 is not allowed; it should be greater than or equal to 0"),
        (
            {"embedding_size": 8},
            "few_interactions: {'embedding_size': 8} is not allowed; it should",
        ),
        ({"n_layers": 0}, "llm_n_layers: 1 is above n_layers: 0"),
    ],
)
def test_values_for_few_interactions_are_checked_before_any_stage(settings, few, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run("GaCLLM", "tiny", config_dict=settings | {"few_interactions": few})
