"""The linear model of large catalogues against the exact one, and by its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from recbole_gacllm.objective import choice, linear, local
from recbole_gacllm.objective.linear import Gram, ItemItemModel, centred, item_weights, matrix_of
from recbole_gacllm.run_config import training_data
from tests.random_texts import random_texts
from tests.recommender import Recommender

N_USERS, N_ITEMS = 200, 40


@pytest.fixture
def data():
    """Edges of a popularity, and texts; the last item has no user."""
    rng = np.random.default_rng(7)
    edges = np.nonzero(rng.random((N_USERS, N_ITEMS)) < np.linspace(0.4, 0, N_ITEMS)[None])
    return edges, torch.from_numpy(rng.standard_normal((N_ITEMS, 5)))


def large(edges, texts, monkeypatch, **keys):
    monkeypatch.setattr(linear, "MAX_ITEMS", N_ITEMS - 1)
    return ItemItemModel(*edges, N_USERS, N_ITEMS, 3.0, texts, 0.5, **keys)


@pytest.mark.parametrize("has_text", [True, False])
def test_with_all_items_as_neighbors_it_is_the_exact_model(data, monkeypatch, has_text):
    edges, texts = data[0], data[1] if has_text else None
    recency = np.random.default_rng(1).random(len(edges[0]))
    exact = ItemItemModel(*edges, N_USERS, N_ITEMS, 3.0, texts, 0.5, recency=recency)
    model = large(edges, texts, monkeypatch, recency=recency)
    users = torch.tensor([3, 0, 150])
    assert exact.scores(users).abs().max() > 0.1
    assert torch.allclose(model.scores(users), exact.scores(users), atol=1e-5)
    ours, theirs = (one.standardized(users, slice(None)) for one in (model, exact))
    assert all(torch.allclose(*both, atol=1e-4) for both in zip(ours, theirs, strict=True))


def test_a_column_is_the_best_on_its_neighbors_and_has_a_zero_diagonal(data, monkeypatch):
    monkeypatch.setattr(local, "N_NEIGHBORS", 6)
    monkeypatch.setattr(local, "RANK", 3)
    monkeypatch.setattr(local, "BLOCK", 16)
    edges, texts = data
    kept = large(edges, texts, monkeypatch)._weights
    weights = kept.left @ kept.right.numpy().T + kept.weights.toarray()
    assert np.abs(np.diag(weights)).max() < 1e-6
    matrix = Gram.of(matrix_of(*edges, N_USERS, N_ITEMS)).with_texts(centred(texts.numpy()), 0.5)
    matrix[np.diag_indices(N_ITEMS)] += 3.0
    gradient = matrix @ (np.eye(N_ITEMS) - weights)
    is_neighbor = kept.weights.toarray() != 0
    np.fill_diagonal(is_neighbor, False)
    assert (is_neighbor.sum(0) == 6).all()
    assert np.abs(gradient[is_neighbor]).max() < 1e-3 < np.abs(gradient).max()


def test_the_factors_stand_for_a_matrix_with_the_diagonal_of_the_exact_one(data, monkeypatch):
    """What is left out of a diagonal would be L2 weight that is not there."""
    monkeypatch.setattr(local, "RANK", 3)
    edges, texts = data
    kept = large(edges, texts, monkeypatch)._weights
    left, right = (part.astype(np.float64) for part in (kept.left, kept.right.numpy()))
    diagonal = (left * right).sum(1) / (right**2).sum(1) + (left**2).sum(1)  # 1 / Psi
    matrix = Gram.of(matrix_of(*edges, N_USERS, N_ITEMS)).with_texts(centred(texts.numpy()), 0.5)
    expected = matrix.diagonal() + 3.0
    implied = np.linalg.inv(np.diag(diagonal) - left @ left.T).diagonal()
    assert np.allclose(implied, expected, rtol=1e-3)


def test_products_are_those_of_the_same_matrix_made_dense(data, monkeypatch):
    monkeypatch.setattr(local, "N_NEIGHBORS", 6)
    model = large(*data, monkeypatch)
    kept = model._weights
    weights = kept.left @ kept.right.numpy().T + kept.weights.toarray()
    histories = matrix_of(*data[0], N_USERS, N_ITEMS)
    expected = torch.from_numpy(histories @ weights)
    for rows in (histories, histories.toarray()):
        assert torch.allclose(kept.products(rows), expected, atol=1e-5)
    assert torch.allclose(model.scores_of(histories), expected, atol=1e-5)
    scores, mean = model.standardized(torch.arange(N_USERS), slice(None))
    deviation, of_expected = torch.std_mean(expected, dim=1)
    has_history = deviation > 1e-6
    scores, mean, deviation = scores[has_history], mean[has_history], deviation[has_history]
    assert torch.allclose(scores * deviation[:, None], expected[has_history], atol=1e-4)
    assert torch.allclose(mean * deviation, of_expected[has_history], atol=1e-4)


@pytest.fixture(scope="module")
def ml_100k(tmp_path_factory):
    """Histories and what is held out of them, of real interactions."""
    _, data = training_data("ml-100k", (), {"use_gpu": False})
    users, items = data.graph.users, data.graph.items
    n_users, n_items = len(data.graph.user_tokens), len(data.graph.item_tokens)
    is_held_out = np.random.default_rng(0).random(len(users)) < 0.1
    parts = [matrix_of(users[p], items[p], n_users, n_items) for p in (~is_held_out, is_held_out)]
    return *parts, np.random.default_rng(1).standard_normal((n_items, 16))


@pytest.mark.slow
@pytest.mark.parametrize("reg_weight", [100.0, 1600.0])
def test_it_ranks_real_data_as_well_as_the_exact_model(ml_100k, reg_weight):
    histories, held_out, texts = ml_100k
    texts = centred(texts)
    users = np.flatnonzero(np.diff(held_out.indptr))
    exact = item_weights(Gram.of(histories).with_texts(texts, 0.25), reg_weight)
    counts = np.sqrt(linear.user_counts(histories, 0.5))
    weighted = histories.multiply(counts[:, None]).tocsr()
    nearly = local.LocalWeights.of(weighted, 0.5, reg_weight, texts, 0.25)
    dense = nearly.products(sparse.eye_array(len(texts), dtype=np.float32, format="csr"))
    one, other = (
        choice._mean_ndcg(choice._linear_blocks(histories, held_out, users, weights))
        for weights in (exact, dense)
    )
    assert other > 0.995 * one > 0.1


def test_a_run_with_items_without_interactions(settings, monkeypatch):
    """Choice and predicted items go on, with the exact model's scores."""
    monkeypatch.setattr("recbole_gacllm.model.prepare", random_texts)
    keys = {"text_source": "raw", "linear_weight": 1.0, "cold_item_share": 0.3}
    exact = Recommender("GaCLLM", settings, **keys)
    monkeypatch.setattr(linear, "MAX_ITEMS", 4)
    one = Recommender("GaCLLM", settings, **keys)
    assert isinstance(one.model.linear._weights, local.LocalWeights)
    users = torch.arange(1, one.model.n_users)
    ours, theirs = (r.model.linear.scores(users) for r in (one, exact))
    assert theirs[:, one.model.unseen_items.unseen[1:]].any()
    assert torch.allclose(ours, theirs, atol=1e-4)
