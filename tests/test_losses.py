"""Loss terms against RecBole's, hand-computed numbers and plain loops."""

import math

import pytest
import torch
from recbole.model.loss import BPRLoss, EmbLoss

from recbole_gacllm import losses


def test_bpr_equals_recboles():
    positive, negative = torch.randn(7), torch.randn(7)
    assert torch.allclose(losses.bpr(positive, negative), BPRLoss()(positive, negative))


@pytest.mark.parametrize("squared", [True, False])
def test_l2_equals_recboles(squared):
    blocks = [torch.randn(5, 3) for _ in range(3)]
    expected = EmbLoss()(*blocks, require_pow=squared)
    assert torch.allclose(losses.embedding_l2(*blocks, squared=squared), expected.squeeze())


def test_sampled_softmax_of_one_user_by_hand():
    user = torch.tensor([[2.0, 0.0]])
    positive = torch.tensor([[3.0, 0.0]])  # cosine 1
    negatives = torch.tensor([[0.0, 5.0], [1.0, 0.0]])  # cosine 0; the second is the item itself
    hits = torch.tensor([[False, True]])
    loss = losses.sampled_softmax(user, positive, negatives, hits, temperature=0.5)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)), abs=1e-6)


def test_sampled_softmax_does_not_change_with_the_length_of_embeddings():
    users, positives, negatives = torch.randn(4, 3), torch.randn(4, 3), torch.randn(6, 3)
    hits = torch.zeros(4, 6, dtype=torch.bool)
    one = losses.sampled_softmax(users, positives, negatives, hits, 0.2)
    other = losses.sampled_softmax(9 * users, positives / 7, negatives * 3, hits, 0.2)
    assert torch.allclose(one, other, atol=1e-5)


def test_alignment_is_least_when_both_views_agree():
    views = torch.eye(4)
    good = losses.alignment(views, views, 0.2)
    bad = losses.alignment(views, views.roll(1, 0), 0.2)
    expected = -math.log(math.exp(5) / (math.exp(5) + 3))
    assert good.item() == pytest.approx(expected, abs=1e-5)
    assert bad > good + 4
