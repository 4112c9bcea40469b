"""The model: RecBole's contract, equality with LightGCN, losses and scores."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recbole_gacllm import model as model_module
from recbole_gacllm.alignment.propagation import PeriodicPropagation
from recbole_gacllm.objective.linear import ItemItemModel
from tests.random_texts import random_texts
from tests.recommender import Recommender


@pytest.fixture(autouse=True)
def _texts(monkeypatch):
    monkeypatch.setattr(model_module, "prepare", random_texts)


@pytest.fixture
def made(settings):
    """Makes GaCLLM, with random texts of two layers, and the first batch of its training data."""

    def make(**keys):
        one = Recommender("GaCLLM", settings, **keys)
        return one.model, one.batch

    return make


BOTH_LOSSES = pytest.mark.parametrize("loss_type", ["BPR", "SSM"])


def all_scores(model, batch):
    return model.full_sort_predict(batch).view(len(batch), model.n_items)


def loss_of(model, batch):
    """Without dropout, with the same negatives each time."""
    model.eval()
    torch.manual_seed(0)
    return model.calculate_loss(batch)


# RecBole's contract


def test_without_text_and_with_bpr_it_is_recboles_lightgcn(settings):
    keys = {"use_text": False, "loss_type": "BPR", "n_layers": 2, "reg_weight": 1e-3}
    ours = Recommender("GaCLLM", settings, **keys)
    model, theirs, batch = ours.model, Recommender("LightGCN", settings, **keys).model, ours.batch
    assert torch.equal(model.user_embedding.weight, theirs.user_embedding.weight)
    loss, expected = model.calculate_loss(batch), theirs.calculate_loss(batch)
    assert torch.allclose(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.allclose(model.item_embedding.weight.grad, theirs.item_embedding.weight.grad)
    scores = [one.full_sort_predict(batch) for one in (model, theirs)]
    assert torch.allclose(*scores, atol=1e-6)


@pytest.mark.parametrize("propagate_every", [1, 4])
def test_the_stages_run_before_anything_of_the_model_takes_memory_of_the_device(
    made, monkeypatch, propagate_every
):
    """They start an engine that needs the card for itself."""
    from_edges, order = model_module.Adjacency.from_edges, []

    def preparing(*args):
        order.append("stages")
        return random_texts(*args)

    def building(*args):
        order.append("graph")
        return from_edges(*args)

    monkeypatch.setattr(model_module, "prepare", preparing)
    monkeypatch.setattr(model_module.Adjacency, "from_edges", building)
    made(propagate_every=propagate_every)
    assert order == ["stages", "graph"]


@BOTH_LOSSES
def test_both_predictions_agree_and_the_trainer_may_overwrite_the_scores(made, loss_type):
    model, batch = made(loss_type=loss_type)
    model.eval()
    scores = all_scores(model, batch)
    picked = scores.gather(1, batch["item_id"][:, None]).squeeze(1)
    assert torch.allclose(model.predict(batch), picked, atol=1e-6)
    before = scores.clone()
    scores.fill_(-torch.inf)
    assert torch.equal(all_scores(model, batch), before)


def test_scores_change_after_a_training_step_and_after_a_checkpoint_is_loaded(made):
    model, batch = made()
    model.eval()
    before, state = model.full_sort_predict(batch), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model.calculate_loss(batch).backward()
    optimizer.step()
    assert not torch.allclose(model.full_sort_predict(batch), before)
    model.load_state_dict(state)
    assert torch.equal(model.full_sort_predict(batch), before)


def test_scores_made_under_dropout_are_forgotten_in_evaluation(made):
    model, batch = made()
    expected = model.eval().full_sort_predict(batch)
    assert not torch.equal(model.train().full_sort_predict(batch), expected)
    assert torch.equal(model.eval().full_sort_predict(batch), expected)


def test_the_state_holds_neither_graph_nor_texts_and_copies_share_them(made):
    model, _ = made()
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"user_embedding", "item_embedding", "projections"}
    clone = copy.deepcopy(model)  # as get_flops does
    assert clone.adjacency is model.adjacency
    assert clone.texts is model.texts


def test_only_training_edges_are_in_the_graph(settings):
    one = Recommender("GaCLLM", settings, use_text=False)
    n_users = one.model.n_users
    dense = one.model.adjacency.matrix.to_dense()[:n_users, n_users:] > 0
    inter, held_out = one.train._dataset.inter_feat, one.valid._dataset.inter_feat
    expected = torch.zeros_like(dense)
    expected[inter["user_id"], inter["item_id"]] = True
    assert torch.equal(dense, expected)
    assert not dense[held_out["user_id"], held_out["item_id"]].any()


# Texts


def test_texts_and_their_weight_change_the_scores(made):
    scores = []
    for keys in ({"use_text": False}, {"text_weight": 1.0}, {"text_weight": 3.0}):
        model, batch = made(**keys)
        scores.append(model.eval().full_sort_predict(batch))
    assert not torch.allclose(scores[0], scores[1])
    assert not torch.allclose(scores[1], scores[2])


def test_each_layer_of_texts_has_a_projection_of_its_own(made):
    model, _ = made()
    nodes = torch.arange(1, 6)
    for layer, projected in enumerate(model.eval().project(nodes)):
        alone = model.projections[layer](model.texts.rows((layer,), nodes))
        assert torch.allclose(projected, alone, atol=1e-6)


@pytest.mark.parametrize("text_layers", ["hops", "auto"])
def test_early_fusion_carries_texts_through_the_graph_before_they_are_projected(made, text_layers):
    keys = {"text_layers": text_layers, "text_weight": 0.5, "n_layers": 3, "linear_weight": 0.5}
    model, _ = made(text_fusion="early", text_dropout=0.0, linear_reg_weight=50.0, **keys)
    adjacency, nodes = model.adjacency.matrix.to_dense(), torch.arange(model.n_users, 50)
    ids, expected = model.node_embeddings(), []

    def carried(x):
        return x + adjacency @ (x + adjacency @ (x + adjacency @ x))

    for layers, projection in zip(model.text_layers, model.projections, strict=True):
        rows = model.texts.rows(layers, torch.arange(len(ids)))
        expected.append(projection(carried(rows).half().float()))
    assert len(expected) == (2 if text_layers == "hops" else 1)
    for text, all_nodes, some in zip(expected, model.project(), model.project(nodes), strict=True):
        torch.testing.assert_close(all_nodes, text, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(some, text[nodes], atol=1e-4, rtol=1e-3)
    fused = (carried(ids) + 0.5 * sum(expected)) / 4
    torch.testing.assert_close(torch.cat(model.forward()), fused, atol=1e-4, rtol=1e-3)


def test_padding_has_no_text(made):
    model, _ = made()
    padding = torch.tensor([0, model.n_users])
    assert model.texts.rows((0,), padding).count_nonzero() == 0
    assert model.texts.rows((0,), padding + 1).count_nonzero() > 0


def test_text_dropout_drops_its_share_and_keeps_the_mean(made):
    model, _ = made(text_dropout=0.3)
    dropout, x = model.projections[0][0], torch.ones(1001, 333)
    result = dropout(x)
    assert (result == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert result.unique().tolist() == pytest.approx([0, 1 / 0.7], rel=1e-4)
    neighbors = (result[:, 1:] == 0) & (result[:, :-1] == 0)  # independent, not in runs
    assert neighbors.float().mean().item() == pytest.approx(0.09, abs=0.005)
    assert not torch.equal(dropout(x), result)
    assert torch.equal(dropout.eval()(x), x)


def standardized(scores):
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)


def test_raw_texts_reach_the_linear_scores(settings):
    plain, with_texts = (
        Recommender("GaCLLM", settings, linear_weight=1e6, linear_text_weight=weight)
        for weight in (0.0, 50.0)
    )
    model, batch = plain.model, plain.batch
    scores = all_scores(with_texts.model, batch)
    assert not torch.allclose(all_scores(model, batch), scores)
    inter = plain.train._dataset.inter_feat
    nodes = torch.arange(model.n_users, model.n_users + model.n_items)
    expected = ItemItemModel(
        *(inter["user_id"].numpy(), inter["item_id"].numpy(), model.n_users, model.n_items),
        *(with_texts.model.choices["linear"].reg_weight, model.texts.rows((0,), nodes), 50.0),
    )
    expected = standardized(expected.scores(batch["user_id"]))
    assert torch.allclose(scores / 1e6, expected, atol=1e-3)


# The loss


@BOTH_LOSSES
def test_training_reaches_every_parameter(made, loss_type):
    model, batch = made(loss_type=loss_type)
    model.calculate_loss(batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@BOTH_LOSSES
@pytest.mark.parametrize("key", ["align_weight", "reg_weight"])
def test_the_loss_grows_linearly_with_the_weight_of_a_term(made, loss_type, key):
    losses = [loss_of(*made(loss_type=loss_type, **{key: weight})) for weight in (0.0, 0.5, 2.0)]
    assert losses[1] > losses[0] + 0.01
    assert torch.allclose(losses[2] - losses[0], 4 * (losses[1] - losses[0]), rtol=1e-3)


@BOTH_LOSSES
def test_the_weight_of_texts_is_in_the_loss(made, loss_type):
    keys = {"loss_type": loss_type, "align_weight": 0.0}
    losses = [loss_of(*made(**keys, text_weight=weight)).item() for weight in (0.0, 1.0, 3.0)]
    assert len({round(loss, 4) for loss in losses}) == 3


@BOTH_LOSSES
def test_the_l2_term_is_of_the_pairs_and_with_bpr_of_negatives(made, loss_type):
    losses = []
    for weight in (0.0, 1.0):
        model, batch = made(loss_type=loss_type, reg_weight=weight, require_pow=True)
        losses.append(loss_of(model, batch))
    users, items = model.user_embedding.weight, model.item_embedding.weight
    nodes = [users[batch["user_id"]], items[batch["item_id"]]]
    if loss_type == "BPR":
        nodes.append(items[batch["neg_item_id"]])
    expected = sum(block.square().sum() for block in nodes) / 2 / len(batch)
    assert torch.allclose(losses[1] - losses[0], expected, rtol=1e-3)


def test_the_alignment_is_of_both_sides_and_all_hops_at_its_own_temperature(made):
    model, _ = made(align_temperature=0.3, ssm_temperature=0.1, align_n_nodes=None)
    nodes = torch.tensor([1, 2, 5, model.n_users + 3, model.n_users + 4])
    hops, texts = (list(torch.randn(2, 5, 8).unbind()) for _ in range(2))
    terms = [
        model_module.losses.alignment(hop[side], text[side], 0.3)
        for hop, text in zip(hops, texts, strict=True)
        for side in (slice(0, 3), slice(3, 5))
    ]
    alignment = model._alignment(nodes, hops, texts)
    assert alignment.item() == pytest.approx(sum(terms).item() / 4, rel=1e-5)


def test_a_limit_on_aligned_nodes_draws_that_many_of_each_side(made, monkeypatch):
    sizes, alignment = [], model_module.losses.alignment

    def noting(ids, texts, temperature):
        sizes.append(len(ids))
        return alignment(ids, texts, temperature)

    monkeypatch.setattr(model_module.losses, "alignment", noting)
    model, batch = made(align_n_nodes=7)
    model.calculate_loss(batch)
    assert sizes == [7, 7, 7, 7]
    assert len(set(model._draw_aligned(20).tolist())) == 7
    assert model._draw_aligned(5).tolist() == [0, 1, 2, 3, 4]


def test_without_fused_text_only_the_aligned_nodes_are_projected(made, monkeypatch):
    model, batch = made(text_weight=0.0, align_n_nodes=7)
    sizes, project = [], model.project
    monkeypatch.setattr(model, "project", lambda nodes: sizes.append(len(nodes)) or project(nodes))
    model.calculate_loss(batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval().full_sort_predict(batch)
    assert sizes == [14]


def test_the_softmax_loss_of_a_batch_is_the_cross_entropy_over_all_items(made):
    keys = {"ssm_n_negatives": 1000, "reg_weight": 0.0, "align_weight": 0.0, "text_dropout": 0.0}
    model, batch = made(**keys)
    users, items = model.forward()
    cosine = F.cosine_similarity(users[batch["user_id"]][:, None], items[None, 1:], dim=2)
    scores = cosine / model.options.ssm_temperature
    expected = F.cross_entropy(scores, batch["item_id"] - 1)
    assert torch.allclose(model.calculate_loss(batch), expected, atol=1e-5)


def test_few_items_are_all_negatives_and_many_are_sampled(made):
    model, _ = made(use_text=False, ssm_n_negatives=1000)
    assert model._draw_negatives().tolist() == list(range(1, model.n_items))
    model, _ = made(use_text=False, ssm_n_negatives=5)
    negatives = torch.cat([model._draw_negatives() for _ in range(200)])
    assert len(model._draw_negatives().unique()) == 5
    assert set(negatives.tolist()) == set(range(1, model.n_items))


@pytest.mark.parametrize("linear_weight", [0.0, 0.5])
def test_where_all_items_have_interactions_scores_and_draws_are_the_plain_ones(made, linear_weight):
    model, batch = made(linear_weight=linear_weight, ssm_n_negatives=5)
    assert model.unseen_items is None
    model.eval()
    user = batch["user_id"]
    users, items = (F.normalize(side, dim=1) for side in model.forward())
    expected = users[user] @ items.T
    if linear_weight:
        linear = standardized(model.linear.scores(user))
        expected = standardized(expected) + linear_weight * linear
    for _ in range(2):  # deviations are computed once
        assert torch.allclose(
            model.scoring.scores(*model.scored_embeddings(), user), expected, atol=1e-5
        )
    torch.manual_seed(7)
    negatives = model._draw_negatives()
    torch.manual_seed(7)
    assert torch.equal(negatives, 1 + torch.randperm(model.n_items - 1)[:5])
    given = {model.NEG_ITEM_ID: torch.tensor([3, 4])}
    assert model._negatives(given) is given[model.NEG_ITEM_ID]


# Hops every few batches


@BOTH_LOSSES
@pytest.mark.parametrize("more", [{}, {"text_fusion": "early"}, {"use_text": False}])
def test_propagating_every_one_batch_is_the_exact_loss(made, loss_type, more):
    keys = {"loss_type": loss_type, "text_dropout": 0.0, "reg_weight": 1e-2}
    model, batch = made(**keys, **more)
    assert model.periodic is None
    results = []
    for periodic in (None, PeriodicPropagation(model.adjacency, model.options.n_layers, 1)):
        model.periodic = periodic
        model.zero_grad()
        torch.manual_seed(3)  # negatives
        loss = model.calculate_loss(batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for exact, periodic in zip(*results, strict=True):
        assert torch.allclose(exact, periodic, atol=1e-6)


def test_between_propagations_scores_are_those_of_the_current_weights(made):
    model, batch = made(propagate_every=3)
    model.calculate_loss(batch).backward()
    hops = model.periodic.hops
    with torch.no_grad():
        model.item_embedding.weight.normal_()
    model.calculate_loss(batch)
    assert model.periodic.hops is hops
    clone, _ = made()
    assert model.state_dict().keys() == clone.state_dict().keys(), "hops are not in checkpoints"
    clone.load_state_dict(model.state_dict())
    scores = [one.eval().full_sort_predict(batch) for one in (model, clone)]
    assert torch.equal(*scores)
    model.load_state_dict(clone.state_dict())
    assert model.periodic.n_batches == 0, "a checkpoint begins a new cycle"


def test_training_goes_on_from_a_checkpoint_between_propagations(settings):
    keys = {"propagate_every": 5, "train_batch_size": 16, "stopping_step": 9}
    one = Recommender("GaCLLM", settings, **keys, epochs=2)
    assert len(one.train) % 5 != 0
    one.fit()
    assert one.model.periodic.n_batches == 2 * len(one.train)
    again = Recommender("GaCLLM", settings, **keys, epochs=4)
    again.trainer.resume_checkpoint(one.trainer.saved_model_file)
    again.fit()
    assert again.model.periodic.n_batches > 0
    assert np.isfinite(again.losses).all()
