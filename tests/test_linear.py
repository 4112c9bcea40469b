"""The linear item-item model against RecBole's EASE and by its definition."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from recbole_gacllm.objective import linear
from recbole_gacllm.objective.linear import ItemItemModel, recency_weights
from recbole_gacllm.objective.scoring import standardize
from tests.recommender import Recommender

EASE = {"user_power": 0.0, "denoising": 0.0}


def test_it_scores_as_recboles_ease(settings):
    theirs = Recommender("EASE", settings, reg_weight=7.0)
    ease, batch, inter = theirs.model, theirs.batch, theirs.train._dataset.inter_feat
    ours = ItemItemModel(
        inter["user_id"].numpy(), inter["item_id"].numpy(), ease.n_users, ease.n_items, 7.0, **EASE
    )
    expected = torch.as_tensor(ease.full_sort_predict(batch)).view(len(batch), ease.n_items)
    assert torch.allclose(ours.scores(batch["user_id"]), expected.float(), atol=1e-5)


@pytest.mark.parametrize("with_texts", [False, True])
def test_the_weights_minimise_the_ridge_loss_without_a_diagonal(with_texts):
    """Texts are further rows that they reconstruct."""
    rng = np.random.default_rng(2)
    matrix = (rng.random((30, 6)) < 0.4).astype(np.float64)
    matrix[:, 0] = 1  # no user without items
    degrees = matrix.sum(1)
    counts = np.sqrt(degrees.mean() / degrees)[:, None]  # how often a user counts
    weighted = counts * matrix**2
    # L2, and what denoising adds
    ridge, rows, keys = 3.0 + 0.5 * weighted.sum(0)[:, None], np.zeros((6, 4)), {}
    if with_texts:
        texts = rng.standard_normal((6, 4))
        keys = {"texts": torch.from_numpy(texts), "text_weight": 0.4}
        rows = texts - texts.mean(0)
        # A share of what an average item's interactions weigh.
        rows *= np.sqrt(0.4 * weighted.sum(0).mean() / (rows**2).sum(1).mean())
    model = ItemItemModel(*np.nonzero(matrix), 30, 6, reg_weight=3.0, **keys)
    weights = model._weights.numpy().astype(np.float64)
    assert np.count_nonzero(np.diag(weights)) == 0
    residuals = weights - np.eye(6)
    gradient = matrix.T @ (counts * (matrix @ residuals)) + rows @ (rows.T @ residuals)
    gradient += ridge * weights
    np.fill_diagonal(gradient, 0)  # the constraint's multipliers stand there
    assert np.abs(gradient).max() < 1e-4


def test_denoising_is_the_mean_over_dropped_interactions():
    """Dropping a third of the inputs, scaled up again, adds half of the diagonal on average."""
    rng = np.random.default_rng(3)
    matrix = (rng.random((12, 5)) < 0.5).astype(np.float64)
    inputs = (rng.random((20_000, 12, 5)) < 2 / 3) * matrix * 1.5
    gram = np.einsum("nui,nuj->ij", inputs, inputs) / len(inputs)
    expected = matrix.T @ matrix + 0.5 * np.diag(matrix.sum(0))
    assert np.abs(gram - expected).max() < 0.05 * expected.max()
    plain, denoised = (
        ItemItemModel(*np.nonzero(matrix), 12, 5, 1.0, **{**EASE, "denoising": share})
        for share in (0.0, 0.5)
    )
    inverse = np.linalg.inv(expected + np.eye(5))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    assert np.allclose(denoised._weights.numpy(), weights, atol=1e-5)
    assert not np.allclose(plain._weights.numpy(), weights, atol=1e-2)


def test_copies_share_the_model():
    model = ItemItemModel(np.array([0]), np.array([0]), 1, 2, 1.0)
    assert copy.deepcopy([model])[0] is model


def test_an_item_without_interactions_is_scored_by_its_text():
    users, items = np.array([1, 1, 2, 2]), np.array([1, 2, 3, 4])
    texts = torch.zeros(6, 3)  # row 0 is padding
    texts[1:] = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 1, 0.1], [1, 0, 0.1]])
    liked = torch.tensor([1, 2])
    scores = ItemItemModel(users, items, 3, 6, 0.5, texts, 1.0).scores(liked)
    assert scores[0, 5] > 0.1 > scores[1, 5]  # item 5 reads like those of user 1
    assert scores[:, 0].tolist() == [0, 0]  # no text, no interactions: no score
    without = ItemItemModel(users, items, 3, 6, 0.5).scores(liked)
    assert without[:, 5].tolist() == [0, 0]


def test_products_of_standardized_embeddings_have_mean_zero_and_deviation_one():
    generator = torch.Generator().manual_seed(1)
    users, items = (torch.randn(n, 4, generator=generator) * 7 + 2 for n in (3, 50))
    users[2] = 0.0
    for among in (slice(None), torch.arange(3, 40)):
        z_users, z_items = standardize(users, items, among)
        scores, expected = (z_users @ z_items.T)[:, among], (users @ items.T)[:2, among]
        expected = (expected - expected.mean(1, keepdim=True)) / expected.std(1, keepdim=True)
        assert torch.allclose(scores[:2], expected, atol=1e-5)
        assert not scores[2].any()


def test_scores_of_few_users_and_items_are_made_once(monkeypatch):
    rng = np.random.default_rng(8)
    edges, users = np.nonzero(rng.random((20, 7)) < 0.4), torch.arange(20)
    kept = ItemItemModel(*edges, 20, 7, 3.0)
    monkeypatch.setattr(linear, "KEPT", 20 * 7 - 1)
    made = ItemItemModel(*edges, 20, 7, 3.0)
    assert made._kept is None
    for one in (kept, made):  # some before, beside others
        one.standardized(users[3:9], slice(None))
    first, again = (made.standardized(users, slice(None)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    scores, mean = kept.standardized(users, slice(None))
    scores.mul_(7.0)  # a caller may write into them
    monkeypatch.setattr(ItemItemModel, "_products", None)
    scores, same_mean = kept.standardized(users.flip(0), slice(None))
    assert torch.allclose(scores.flip(0), first[0], atol=1e-6)
    assert torch.equal(mean, same_mean.flip(0))
    with pytest.raises(TypeError):  # products are made anew
        made.standardized(users, slice(None))


def test_the_last_interactions_of_a_user_count_most_and_equal_times_alike():
    users = np.array([0, 0, 0, 0, 1, 1, 2])
    times = np.array([5.0, 9.0, 5.0, 1.0, 3.0, 4.0, 0.0])
    ranks = np.array([2.5, 1, 2.5, 4, 2, 1, 1])
    assert np.allclose(recency_weights(users, times, 1.0), 1 / ranks)
    assert np.allclose(recency_weights(users, times, 0.5), ranks**-0.5)


def test_recency_weighs_a_users_items_in_the_scores_and_nowhere_else(monkeypatch):
    rng = np.random.default_rng(6)
    edges = np.nonzero(rng.random((20, 6)) < 0.5)
    weights = rng.random(len(edges[0]))
    histories = np.zeros((20, 6), dtype=np.float32)
    histories[edges] = weights
    plain = ItemItemModel(*edges, 20, 6, 3.0)
    model = ItemItemModel(*edges, 20, 6, 3.0, recency=weights)
    assert torch.equal(model._weights, plain._weights)
    expected = torch.from_numpy(histories) @ plain._weights
    assert torch.allclose(model.scores(torch.arange(20)), expected, atol=1e-6)
    monkeypatch.setattr(linear, "MAX_ITEMS", 5)
    model = ItemItemModel(*edges, 20, 6, 3.0, recency=weights)
    assert torch.allclose(model.scores(torch.arange(20)), expected, atol=1e-5)


@pytest.mark.parametrize("order", ["TO", "RO"])
def test_a_model_weighs_by_recency_where_the_split_is_by_time(settings, order):
    split = {"split": {"LS": "valid_and_test"}, "group_by": "user", "mode": "full"}
    keys = {"use_text": False, "linear_weight": 1.0, "eval_args": {**split, "order": order}}
    one = Recommender("GaCLLM", settings, **keys)
    plain, inter = one.model, one.train._dataset.inter_feat
    recent = Recommender("GaCLLM", settings, linear_recency=1.0, **keys).model
    user, item, time = (inter[f].numpy() for f in ("user_id", "item_id", "timestamp"))
    last = {u: item[user == u][time[user == u].argmax()] for u in np.unique(user)}
    rows = recent.linear._histories.toarray()
    assert all(rows[u].argmax() == i and rows[u].max() == 1 for u, i in last.items()) == (
        order == "TO"
    )
    assert torch.equal(plain.linear._weights, recent.linear._weights)
    same = torch.equal(*(m.linear.scores(torch.arange(plain.n_users)) for m in (plain, recent)))
    assert same == (order == "RO")


def test_short_histories_give_the_scores_of_the_dense_product_without_dense_rows(monkeypatch):
    rng = np.random.default_rng(11)
    users, items = np.arange(400) // 4, rng.integers(0, 300, 400)  # user 100 has none
    texts = torch.from_numpy(rng.standard_normal((300, 8)))
    counts = rng.random(400)
    model = ItemItemModel(users, items, 101, 300, 2.0, texts, 0.5, recency=counts)
    batch = torch.tensor([3, 100, 0, 3, 57])
    monkeypatch.setattr(linear, "SPARSE", 0.0)
    dense = model.scores(batch)
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "index_put_", None)
    assert torch.allclose(model.scores(batch), dense, atol=1e-6)
    assert dense[0].abs().max() > 0
    assert not dense[1].any()
