"""The graph convolution against hand-computed numbers and dense references."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from recbole_gacllm.alignment.propagation import (
    Adjacency,
    PeriodicPropagation,
    constant_product,
    csr_tensor,
    fuse,
    propagate,
    propagate_mean,
)

# A 2 x 3 graph: user 0 - items 0, 1; user 1 - items 1, 2.
USERS, ITEMS = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2])


def small():
    """The adjacency of that graph."""
    return Adjacency.from_edges(USERS, ITEMS, 2, 3)


def test_adjacency_of_a_2x3_graph_is_normalised_by_both_degrees():
    dense = small().matrix.to_dense()
    user_item = torch.tensor([[2**-0.5, 0.5, 0.0], [0.0, 0.5, 2**-0.5]])
    assert torch.allclose(dense[:2, 2:], user_item, atol=1e-6)
    assert torch.equal(dense, dense.T)
    assert dense[:2, :2].count_nonzero() == 0
    assert dense[2:, 2:].count_nonzero() == 0


def test_a_repeated_edge_counts_once():
    twice = Adjacency.from_edges(np.tile(USERS, 2), np.tile(ITEMS, 2), 2, 3)
    assert torch.equal(small().matrix.to_dense(), twice.matrix.to_dense())


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 6))
def test_propagation_equals_a_dense_reference(seed, n_users, n_items):
    rng = np.random.default_rng(seed)
    matrix = rng.random((n_users, n_items)) < 0.4
    full = np.zeros((n_users + n_items,) * 2)
    full[:n_users, n_users:], full[n_users:, :n_users] = matrix, matrix.T
    scale = np.where(full.sum(1) > 0, np.maximum(full.sum(1), 1) ** -0.5, 0)
    dense = torch.tensor(scale[:, None] * full * scale[None, :], dtype=torch.float32)
    x = torch.tensor(rng.standard_normal((len(full), 4)), dtype=torch.float32)
    hops = propagate(Adjacency.from_edges(*np.nonzero(matrix), n_users, n_items), x, 2)
    assert torch.allclose(hops[2], dense @ dense @ x, atol=1e-5)


def test_fusion_adds_each_hops_text_before_the_mean():
    hops = [torch.full((1, 2), value) for value in (1.0, 2.0, 3.0)]
    texts = [torch.full((1, 2), 6.0), torch.full((1, 2), 12.0)]
    assert torch.equal(fuse(hops, texts, 0.5), torch.full((1, 2), (1 + 3 + 2 + 6 + 3) / 3))
    assert torch.equal(fuse(hops, [], 0.5), torch.full((1, 2), 2.0))


def test_under_autocast_hops_stay_in_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hops = propagate(small(), torch.randn(5, 2), 2)
    assert {hop.dtype for hop in hops} == {torch.float32}


@given(st.integers(0, 2**31), st.integers(0, 3))
def test_the_mean_of_hops_equals_fusing_them_and_so_does_its_gradient(seed, n_layers):
    generator = torch.Generator().manual_seed(seed)
    x, pull = torch.randn(2, 5, 4, generator=generator)
    results = []
    for mean in (
        lambda y: propagate_mean(small(), y, n_layers),
        lambda y: fuse(propagate(small(), y, n_layers), [], 1.0),
    ):
        y = x.clone().requires_grad_()
        value = mean(y)
        value.backward(pull)
        results.append(torch.cat([value, y.grad]))
    assert torch.allclose(*results, atol=1e-6)


def test_hops_of_some_nodes_are_those_rows_and_pass_gradcheck():
    adjacency = Adjacency(small().matrix.double())
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    nodes = torch.tensor([0, 2, 4])
    for row, every in zip(
        propagate(adjacency, x, 2, nodes), propagate(adjacency, x, 2), strict=True
    ):
        assert torch.equal(row, every[nodes])
    for of_nodes in (nodes, None):
        assert torch.autograd.gradcheck(lambda y, n=of_nodes: propagate(adjacency, y, 2, n), (x,))


def test_gradient_of_a_product_with_a_rectangular_matrix_passes_gradcheck():
    dense = torch.tensor([[1.0, 0, 2], [0, 3, 0]], dtype=torch.float64)
    matrix, transposed = (csr_tensor(csr_array(m.numpy())).double() for m in (dense, dense.T))
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(constant_product(matrix, transposed, x), dense @ x)
    assert torch.autograd.gradcheck(lambda y: constant_product(matrix, transposed, y), (x,))


def test_a_cycle_of_two_batches_on_the_2x3_graph():
    propagation = PeriodicPropagation(small(), 1, every=2)

    def periodic(x, nodes):
        return propagation(x[:2], x[2:], nodes)

    first = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], requires_grad=True)
    hops = periodic(first, torch.tensor([0, 3]))  # user 0 and item 1
    assert torch.equal(hops[0], torch.tensor([[1.0], [4.0]]))
    assert torch.allclose(hops[1], torch.tensor([[3 * 2**-0.5 + 2], [0.5 + 1]]))
    (hops[0].sum() + hops[1].sum()).backward()
    assert torch.equal(first.grad, torch.tensor([[1.0], [0], [0], [1], [0]]))

    second = torch.full((5, 1), 10.0, requires_grad=True)
    hops = periodic(second, torch.tensor([0]))
    assert torch.equal(hops[0], torch.tensor([[10.0]])), "hop 0 is of this batch"
    assert torch.allclose(hops[1], torch.tensor([[3 * 2**-0.5 + 2]])), "hop 1 of the first"
    (hops[0] + hops[1]).sum().backward()
    # Hop 1 of user 0 was asked for twice, that of item 1 once.
    expected = [[1 + 0.5], [0.5], [2 * 2**-0.5], [2 * 0.5], [0]]
    assert torch.allclose(second.grad, torch.tensor(expected))

    third = torch.full((5, 1), 10.0, requires_grad=True)
    for _ in range(2):
        hops = periodic(third, torch.tensor([0]))
        assert torch.allclose(hops[1], torch.tensor([[10 * 2**-0.5 + 5]])), "a new cycle"
        hops[1].sum().backward()
    expected = [[0.0], [0], [2 * 2**-0.5], [2 * 0.5], [0]]
    assert torch.allclose(third.grad, torch.tensor(expected)), "nothing of the cycle before"


@given(st.integers(0, 2**31), st.integers(0, 3), st.integers(1, 5))
def test_over_a_cycle_no_gradient_is_lost_and_a_cycle_of_one_is_exact(seed, n_layers, every):
    generator = torch.Generator().manual_seed(seed)
    adjacency = small()
    periodic = PeriodicPropagation(adjacency, n_layers, every)
    x = torch.randn(5, 4, generator=generator)
    totals = [torch.zeros_like(x), torch.zeros_like(x)]
    for _ in range(every):
        nodes = torch.randperm(5, generator=generator)[:3].sort().values
        pull = torch.randn(n_layers + 1, 3, 4, generator=generator)
        y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
        late, exact = periodic(y[:2], y[2:], nodes), propagate(adjacency, z, n_layers, nodes)
        assert all(torch.equal(one, other) for one, other in zip(late, exact, strict=True))
        for total, leaf, hops in zip(totals, (y, z), (late, exact), strict=True):
            torch.autograd.backward(hops, list(pull))
            total += leaf.grad
    assert torch.allclose(*totals, atol=1e-5)
    assert every > 1 or torch.equal(*totals)


def test_a_cycle_that_is_forgotten_begins_anew_and_stays_in_float32_under_autocast():
    periodic = PeriodicPropagation(small(), 2, every=100)
    nodes = torch.arange(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ones = periodic(torch.ones(2, 2), torch.ones(3, 2), nodes)
        assert {hop.dtype for hop in ones} == {torch.float32}
        zeros = torch.zeros(2, 2), torch.zeros(3, 2)
        assert torch.equal(periodic(*zeros, nodes)[1], ones[1])
    periodic.forget()
    assert torch.equal(periodic(*zeros, nodes)[1], torch.zeros(5, 2))
