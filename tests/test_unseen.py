"""Nodes without training interactions: ridge regression of embeddings and scores on texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_gacllm.objective.linear import ItemItemModel
from recbole_gacllm.objective.unseen import Unseen
from tests.recommender import Recommender

N_ITEMS, WIDTH, REG_WEIGHT = 12, 4, 10.0
SEEN = torch.tensor([1, 2, 4, 5, 6, 8, 9, 10])
UNSEEN = torch.tensor([3, 7, 11])
NO_TEXT = [6, 11]


@pytest.fixture
def texts():
    table = torch.tensor(np.random.default_rng(1).standard_normal((N_ITEMS, WIDTH))).float()
    table[[0, *NO_TEXT]] = 0.0
    return table


def dense(texts, scores, seen=SEEN, reg_weight=REG_WEIGHT):
    """Each user's normal equations on their own, in float64: scores of all items."""
    has_text = texts.any(1)
    fitted = [at for at, item in enumerate(seen.tolist()) if has_text[item]]
    x = texts[seen[fitted]].double().numpy()
    mean = x.mean(axis=0)
    x = x - mean
    reg = reg_weight * (x**2).sum(axis=1).mean()
    expected = np.zeros((len(scores), len(texts)))
    for user, row in enumerate(scores.double().numpy()):
        y = row[fitted]
        slope = np.linalg.solve(x.T @ x + reg * np.eye(x.shape[1]), x.T @ (y - y.mean()))
        expected[user] = y.mean() + (texts.double().numpy() - mean) @ slope
        expected[user, ~has_text.numpy()] = y.mean()
        expected[user, seen] = row
    return expected


@pytest.mark.parametrize("block", [3, 100])
def test_predicted_embeddings_score_as_the_ridge_regression_of_each_users_scores(texts, block):
    rng = np.random.default_rng(2)
    users, items = (torch.tensor(rng.standard_normal((n, 5))).float() for n in (3, len(SEEN)))
    unseen = Unseen(SEEN, UNSEEN, N_ITEMS, lambda ids: texts[ids], block, REG_WEIGHT)
    expected = dense(texts, users @ items.T)[:, UNSEEN]
    assert np.allclose(users @ unseen.predict(items).T, expected, atol=1e-5)


@pytest.mark.parametrize("all_texts", [None, lambda ids: torch.zeros(len(ids), WIDTH)])
def test_without_any_text_an_unseen_node_stands_at_the_mean(all_texts):
    table = torch.rand(len(SEEN), 3)
    predicted = Unseen(SEEN, UNSEEN, N_ITEMS, all_texts, 5).predict(table)
    mean = table.mean(0) if all_texts is None else torch.zeros(3)
    assert torch.allclose(predicted, mean.expand(3, 3), atol=1e-6)


def test_which_nodes_have_no_interactions():
    keys = None, 1, 1.0, "cpu"
    found = Unseen.find(np.array([4, 1, 4]), 6, *keys)
    assert (found.seen.tolist(), found.unseen.tolist()) == ([1, 4], [0, 2, 3, 5])
    assert Unseen.find(np.array([2, 1]), 3, *keys) is None


@pytest.mark.parametrize("covered", [20_000, 6])
def test_the_linear_models_columns_are_predicted(texts, monkeypatch, covered):
    monkeypatch.setattr("recbole_gacllm.objective.linear.MAX_ITEMS", covered)
    rng = np.random.default_rng(3)
    users, at = np.nonzero(rng.random((9, len(SEEN))) < 0.5)
    model = ItemItemModel(users, SEEN.numpy()[at], 9, N_ITEMS, 2.0)
    everyone = torch.arange(9)
    before = model.scores(everyone)
    model.complete_items(Unseen(SEEN, UNSEEN, N_ITEMS, lambda ids: texts[ids], 5, REG_WEIGHT))
    expected = dense(texts, before[:, SEEN])
    expected[:, 0] = 0  # padding is none of the three
    assert np.allclose(model.scores(everyone), expected, atol=1e-5)


@pytest.fixture
def lonely(settings, in_process):
    """A model, and one whose first three users have lost all training interactions."""
    keys = {"text_source": "raw", "linear_weight": 0.5, "linear_reg_weight": 3.0}
    one = Recommender("GaCLLM", settings, **keys)
    inter = one.train._dataset.inter_feat
    one.train._dataset.inter_feat = inter[inter["user_id"] > 3]
    return one, type(one.model)(one.config, one.train._dataset).eval()


def test_a_user_without_interactions_has_what_the_text_predicts_of_the_scores_of_others(lonely):
    _, model = lonely
    users = torch.arange(1, model.n_users)
    scores = model.scoring.scores(*model.scored_embeddings(), users)
    texts = model.texts.rows((0,), torch.arange(model.n_users))
    ridge = model.choices["unseen user"].reg_weight
    expected = dense(texts, scores[3:].T, torch.arange(4, model.n_users), ridge).T[1:]
    assert np.allclose(scores, expected, atol=1e-4)
    with torch.no_grad():
        model.user_embedding.weight[1:4] += 5.0  # untrained
    model.restored = None
    assert torch.allclose(
        model.scoring.scores(*model.scored_embeddings(), users), scores, atol=1e-5
    )
