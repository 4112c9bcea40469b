"""Items without training interactions: ridge regression of scores on texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_gacllm.objective.unseen import REG_WEIGHT, UnseenItems

N_ITEMS, WIDTH = 12, 4
SEEN = torch.tensor([1, 2, 4, 5, 6, 8, 9, 10])
NO_TEXT = [6, 11]


@pytest.fixture
def texts():
    table = torch.tensor(np.random.default_rng(1).standard_normal((N_ITEMS, WIDTH))).float()
    table[[0, *NO_TEXT]] = 0.0
    return table


@pytest.fixture
def scores():
    return torch.tensor(np.random.default_rng(2).standard_normal((3, len(SEEN)))).float()


def dense(texts, scores):
    """Each user's normal equations on their own, in float64."""
    fitted = [at for at, item in enumerate(SEEN.tolist()) if item not in NO_TEXT]
    x = texts[SEEN[fitted]].double().numpy()
    mean = x.mean(axis=0)
    x = x - mean
    reg = REG_WEIGHT * (x**2).sum(axis=1).mean()
    expected = np.zeros((len(scores), N_ITEMS))
    for user, row in enumerate(scores.double().numpy()):
        y = row[fitted]
        slope = np.linalg.solve(x.T @ x + reg * np.eye(WIDTH), x.T @ (y - y.mean()))
        expected[user] = y.mean() + (texts.double().numpy() - mean) @ slope
        expected[user, [0, *NO_TEXT]] = y.mean()
        expected[user, SEEN] = row
    return expected


@pytest.mark.parametrize("block", [3, 100])
def test_scores_of_unseen_items_are_the_ridge_regression_of_each_user(texts, scores, block):
    unseen = UnseenItems(SEEN, N_ITEMS, lambda items: texts[items], block)
    assert np.allclose(unseen.complete(scores), dense(texts, scores), atol=1e-5)


def test_scores_of_seen_items_stay_bit_for_bit(texts, scores):
    unseen = UnseenItems(SEEN, N_ITEMS, lambda items: texts[items], 5)
    assert torch.equal(unseen.complete(scores)[:, SEEN], scores)


def test_without_any_text_an_unseen_item_stands_at_a_finite_score(scores):
    unseen = UnseenItems(SEEN, N_ITEMS, lambda items: torch.zeros(len(items), WIDTH), 5)
    assert unseen.complete(scores).isfinite().all()
