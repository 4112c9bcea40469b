"""Loss terms against RecBole's, hand-computed numbers and plain loops."""

import math

import pytest
import torch
from recbole.model.loss import BPRLoss, EmbLoss

from recbole_gacllm.objective import losses


def test_bpr_equals_recboles():
    positive, negative = torch.randn(7), torch.randn(7)
    assert torch.allclose(losses.bpr(positive, negative), BPRLoss()(positive, negative))
    far = torch.tensor([-300.0])  # its sigmoid is 0 in float32
    assert losses.bpr(far, -far).item() == pytest.approx(-math.log(1e-10))


@pytest.mark.parametrize("squared", [True, False])
def test_l2_equals_recboles(squared):
    blocks = [torch.randn(5, 3) for _ in range(3)]
    expected = EmbLoss()(*blocks, require_pow=squared)
    squares = [block.square().sum(1) for block in blocks]
    assert torch.allclose(losses.embedding_l2(*squares, squared=squared), expected.squeeze())


def test_sampled_softmax_of_one_user_by_hand():
    user, row = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    positive = torch.tensor([[3.0, 0.0]])  # cosine 1
    expected = -math.log(math.exp(2) / (math.exp(2) + 1))
    negatives = torch.tensor([[0.0, 5.0], [1.0, 0.0]])  # cosine 0; the second is the item itself
    is_negative = torch.tensor([True])
    loss = losses.sampled_softmax(user, row, positive, negatives, is_negative, temperature=0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss = losses.sampled_softmax(user, row, positive, negatives[:1], ~is_negative, temperature=0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_sampled_softmax_equals_cross_entropy_over_all_items():
    users, items = torch.randn(3, 4), torch.randn(6, 4)
    rows, positive = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([5, 0, 3, 3, 1])
    cosine = torch.nn.functional.cosine_similarity(users[:, None], items[None], dim=2) / 0.2
    expected = torch.nn.functional.cross_entropy(cosine[rows], positive)
    is_negative = torch.ones(5, dtype=torch.bool)
    loss = losses.sampled_softmax(users, rows, items[positive], items, is_negative, 0.2)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_exponential_sums_pass_gradcheck_and_equal_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    rows, columns = losses.exponential_sums(x, y, 0.7)
    kernel = torch.exp((x @ y.T - 1) / 0.7)
    assert torch.allclose(rows, kernel.sum(1))
    assert torch.allclose(columns, kernel.sum(0))
    for pick in (slice(0, 1), slice(1, 2)):  # rows alone, columns alone
        assert torch.autograd.gradcheck(
            lambda a, b, pick=pick: losses.exponential_sums(a, b, 0.7)[pick], (x, y)
        )

    def both(a, b):  # gradcheck looks at one output at a time
        rows, columns = losses.exponential_sums(a, b, 0.7)
        return rows.square().sum() + columns.sum()

    assert torch.autograd.gradcheck(both, (x, y))


def test_alignment_equals_two_cross_entropies():
    ids, texts = torch.randn(6, 3), torch.randn(6, 3)
    cosine = torch.nn.functional.cosine_similarity(ids[:, None], texts[None], dim=2) / 0.2
    target = torch.arange(6)
    expected = torch.nn.functional.cross_entropy(cosine, target)
    expected = (expected + torch.nn.functional.cross_entropy(cosine.T, target)) / 2
    assert losses.alignment(ids, texts, 0.2).item() == pytest.approx(expected.item(), abs=1e-5)


def test_under_autocast_the_losses_are_close_and_their_gradients_float32():
    ids, texts = torch.randn(40, 16, requires_grad=True), torch.randn(40, 16)
    full = losses.alignment(ids, texts, 0.2)
    with torch.autocast("cpu"):
        half = losses.alignment(ids, texts, 0.2)
    half.backward()
    assert half.item() == pytest.approx(full.item(), abs=0.05)
    assert half.item() != full.item()
    assert ids.grad.dtype == torch.float32
