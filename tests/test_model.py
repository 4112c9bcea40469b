"""The model: RecBole's contract, equality with LightGCN, losses and scores."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from recbole_gacllm import model as model_module
from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.alignment.propagation import PeriodicPropagation
from recbole_gacllm.objective.linear import ItemItemModel, standardize
from recbole_gacllm.run_config import build_config


@pytest.fixture
def fake_texts(monkeypatch):
    """Random text embeddings of two layers in place of the stages."""

    def prepare(options, data):
        n = len(data.graph.user_tokens) + len(data.graph.item_tokens)
        rng = np.random.default_rng(3)
        tables = [torch.tensor(rng.standard_normal((n, 12)), dtype=torch.float16) for _ in range(2)]
        n_users = len(data.graph.user_tokens)
        rows = [-1, *range(n_users), -1, *range(n_users, n)]
        return TextLayers(tables, torch.tensor(rows), {"inputs": Path("unused")})

    monkeypatch.setattr(model_module, "prepare", prepare)


def build(name, settings, **keys):
    """A model on ``tiny`` with its training data, as RecBole builds it."""
    config = build_config(name, "tiny", config_dict={**settings, **keys})
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    train, valid, _ = data_preparation(config, dataset)
    init_seed(config["seed"], True)
    return get_model(name)(config, train._dataset), train, valid, dataset


def test_without_text_and_with_bpr_it_is_recboles_lightgcn(settings):
    keys = {"use_text": False, "loss_type": "BPR", "n_layers": 2, "reg_weight": 1e-3}
    ours, train, _, _ = build("GaCLLM", settings, **keys)
    theirs, _, _, _ = build("LightGCN", settings, **keys)
    batch = next(iter(train))
    assert torch.equal(ours.user_embedding.weight, theirs.user_embedding.weight)
    loss, expected = ours.calculate_loss(batch), theirs.calculate_loss(batch)
    assert torch.allclose(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.allclose(ours.item_embedding.weight.grad, theirs.item_embedding.weight.grad)
    assert torch.allclose(ours.full_sort_predict(batch), theirs.full_sort_predict(batch), atol=1e-6)


@pytest.mark.parametrize("propagate_every", [1, 4])
def test_the_stages_run_before_anything_of_the_model_takes_memory_of_the_device(
    settings, fake_texts, monkeypatch, propagate_every
):
    """They start an engine that needs the card for itself."""
    prepare, from_edges, order = model_module.prepare, model_module.Adjacency.from_edges, []

    def preparing(options, data):
        order.append("stages")
        return prepare(options, data)

    def building(*args):
        order.append("graph")
        return from_edges(*args)

    monkeypatch.setattr(model_module, "prepare", preparing)
    monkeypatch.setattr(model_module.Adjacency, "from_edges", building)
    build("GaCLLM", settings, propagate_every=propagate_every)
    assert order == ["stages", "graph"]


@pytest.mark.parametrize("loss_type", ["BPR", "SSM"])
def test_predict_and_full_sort_predict_agree(settings, fake_texts, loss_type):
    model, train, _, _ = build("GaCLLM", settings, loss_type=loss_type)
    model.eval()
    batch = next(iter(train))
    scores = model.full_sort_predict(batch).view(len(batch), model.n_items)
    picked = scores.gather(1, batch["item_id"][:, None]).squeeze(1)
    assert torch.allclose(model.predict(batch), picked, atol=1e-6)


def test_full_sort_predict_returns_a_tensor_that_the_trainer_may_overwrite(settings, fake_texts):
    model, train, _, _ = build("GaCLLM", settings)
    batch = next(iter(train))
    first = model.full_sort_predict(batch)
    kept = first.clone()
    first.fill_(-torch.inf)
    assert torch.equal(model.full_sort_predict(batch), kept)


def test_scores_change_after_a_training_step_and_after_a_checkpoint_is_loaded(settings, fake_texts):
    model, train, _, _ = build("GaCLLM", settings)
    model.eval()
    batch = next(iter(train))
    before, state = model.full_sort_predict(batch), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model.calculate_loss(batch).backward()
    optimizer.step()
    assert not torch.allclose(model.full_sort_predict(batch), before)
    model.load_state_dict(state)
    assert torch.equal(model.full_sort_predict(batch), before)


def test_scores_made_under_dropout_are_forgotten_in_evaluation(settings, fake_texts):
    model, train, _, _ = build("GaCLLM", settings)
    batch = next(iter(train))
    model.eval()
    expected = model.full_sort_predict(batch)
    model.train()
    assert not torch.equal(model.full_sort_predict(batch), expected)
    model.eval()
    assert torch.equal(model.full_sort_predict(batch), expected)


def test_training_reaches_every_parameter(settings, fake_texts):
    for loss_type in ("BPR", "SSM"):
        model, train, _, _ = build("GaCLLM", settings, loss_type=loss_type)
        model.calculate_loss(next(iter(train))).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_text_and_its_weight_change_the_scores(settings, fake_texts):
    scores = []
    for keys in ({"use_text": False}, {"text_weight": 1.0}, {"text_weight": 3.0}):
        model, train, _, _ = build("GaCLLM", settings, **keys)
        model.eval()
        scores.append(model.full_sort_predict(next(iter(train))))
    assert not torch.allclose(scores[0], scores[1])
    assert not torch.allclose(scores[1], scores[2])


@pytest.mark.parametrize("loss_type", ["BPR", "SSM"])
@pytest.mark.parametrize("key", ["align_weight", "reg_weight"])
def test_the_loss_grows_linearly_with_the_weight_of_a_term(settings, fake_texts, loss_type, key):
    losses = []
    for weight in (0.0, 0.5, 2.0):
        model, train, _, _ = build("GaCLLM", settings, loss_type=loss_type, **{key: weight})
        model.eval()  # without dropout
        torch.manual_seed(0)
        losses.append(model.calculate_loss(next(iter(train))))
    assert losses[1] > losses[0] + 0.01
    assert torch.allclose(losses[2] - losses[0], 4 * (losses[1] - losses[0]), rtol=1e-3)


def test_the_l2_term_is_of_the_pairs_and_with_bpr_of_negatives(settings, fake_texts):
    for loss_type, n_blocks in (("BPR", 3), ("SSM", 2)):
        found = []
        for weight in (0.0, 1.0):
            keys = {"loss_type": loss_type, "reg_weight": weight, "require_pow": True}
            model, train, _, _ = build("GaCLLM", settings, **keys)
            model.eval()
            torch.manual_seed(0)
            batch = next(iter(train))
            found.append(model.calculate_loss(batch))
        users, items = model.user_embedding.weight, model.item_embedding.weight
        nodes = [users[batch["user_id"]], items[batch["item_id"]]]
        if loss_type == "BPR":
            nodes.append(items[batch["neg_item_id"]])
        assert len(nodes) == n_blocks
        expected = sum(block.square().sum() for block in nodes) / 2 / len(batch)
        assert torch.allclose(found[1] - found[0], expected, rtol=1e-3)


def test_the_alignment_is_of_both_sides_and_all_hops_at_its_own_temperature(settings, fake_texts):
    keys = {"align_temperature": 0.3, "ssm_temperature": 0.1, "align_n_nodes": None}
    model, _, _, _ = build("GaCLLM", settings, **keys)
    nodes = torch.tensor([1, 2, 5, model.n_users + 3, model.n_users + 4])
    hops, texts = (list(torch.randn(2, 5, 8).unbind()) for _ in range(2))
    terms = [
        model_module.losses.alignment(hop[side], text[side], 0.3)
        for hop, text in zip(hops, texts, strict=True)
        for side in (slice(0, 3), slice(3, 5))
    ]
    found = model._alignment(nodes, hops, texts)
    assert found.item() == pytest.approx(sum(terms).item() / 4, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["BPR", "SSM"])
def test_the_weight_of_texts_is_in_the_loss(settings, fake_texts, loss_type):
    losses = []
    for weight in (0.0, 1.0, 3.0):
        keys = {"loss_type": loss_type, "align_weight": 0.0, "text_weight": weight}
        model, train, _, _ = build("GaCLLM", settings, **keys)
        model.eval()
        torch.manual_seed(0)
        losses.append(model.calculate_loss(next(iter(train))).item())
    assert len({round(loss, 4) for loss in losses}) == 3


def test_each_layer_of_texts_has_a_projection_of_its_own(settings, fake_texts):
    model, _, _, _ = build("GaCLLM", settings)
    model.eval()
    nodes = torch.arange(1, 6)
    for layer, projected in enumerate(model.project(nodes)):
        alone = model.projections[layer](model.texts.rows(layer, nodes))
        assert torch.allclose(projected, alone, atol=1e-6)


def test_padding_has_no_text(settings, fake_texts):
    model, _, _, _ = build("GaCLLM", settings)
    pads = torch.tensor([0, model.n_users])
    assert model.texts.rows(0, pads).count_nonzero() == 0
    assert model.texts.rows(0, pads + 1).count_nonzero() > 0


def test_the_state_dict_holds_neither_graph_nor_texts(settings, fake_texts):
    model, _, _, _ = build("GaCLLM", settings)
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"user_embedding", "item_embedding", "projections"}


def test_copying_the_model_as_get_flops_does_shares_graph_and_texts(settings, fake_texts):
    model, _, _, _ = build("GaCLLM", settings)
    clone = copy.deepcopy(model)
    assert clone.adjacency is model.adjacency
    assert clone.texts is model.texts


def test_only_training_edges_are_in_the_graph(settings):
    model, train, valid, _ = build("GaCLLM", settings, use_text=False)
    dense = model.adjacency.matrix.to_dense()[: model.n_users, model.n_users :] > 0
    expected = torch.zeros_like(dense)
    inter = train._dataset.inter_feat
    expected[inter["user_id"], inter["item_id"]] = True
    assert torch.equal(dense, expected)
    held_out = valid._dataset.inter_feat
    assert not dense[held_out["user_id"], held_out["item_id"]].any()


def test_few_items_are_all_negatives_and_many_are_sampled(settings):
    model, _, _, _ = build("GaCLLM", settings, use_text=False, ssm_n_negatives=1000)
    assert model._draw_negatives().tolist() == list(range(1, model.n_items))
    model, _, _, _ = build("GaCLLM", settings, use_text=False, ssm_n_negatives=5)
    drawn = torch.cat([model._draw_negatives() for _ in range(200)])
    assert len(model._draw_negatives().unique()) == 5
    assert set(drawn.tolist()) == set(range(1, model.n_items))


@pytest.mark.parametrize("linear_weight", [0.0, 0.5])
def test_where_all_items_have_interactions_scores_and_draws_are_the_plain_ones(
    settings, fake_texts, linear_weight
):
    keys = {"linear_weight": linear_weight, "ssm_n_negatives": 5}
    model, train, _, _ = build("GaCLLM", settings, **keys)
    assert model.unseen is None
    model.eval()
    user = next(iter(train))["user_id"]
    users, items = model._restore()
    expected = users[user] @ items.T
    if linear_weight:
        linear = standardize(model.linear.scores(user))
        expected = standardize(expected) + linear_weight * linear
    assert torch.equal(model._scores(user), expected)
    init_seed(7, True)
    drawn = model._draw_negatives()
    init_seed(7, True)
    assert torch.equal(drawn, 1 + torch.randperm(model.n_items - 1)[:5])
    negative = {model.NEG_ITEM_ID: torch.tensor([3, 4])}
    assert model._negatives(negative) is negative[model.NEG_ITEM_ID]


def test_text_dropout_drops_its_share_and_keeps_the_mean(settings, fake_texts):
    model, _, _, _ = build("GaCLLM", settings, text_dropout=0.3)
    dropout = model.projections[0][0]
    x = torch.ones(1001, 333)
    kept = dropout(x)
    assert (kept == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7], rel=1e-4)
    neighbours = (kept[:, 1:] == 0) & (kept[:, :-1] == 0)  # independent, not in runs
    assert neighbours.float().mean().item() == pytest.approx(0.09, abs=0.005)
    assert not torch.equal(dropout(x), kept)
    assert torch.equal(dropout.eval()(x), x)


def test_a_limit_on_aligned_nodes_draws_that_many_of_each_side(settings, fake_texts, monkeypatch):
    seen = []
    alignment = model_module.losses.alignment
    monkeypatch.setattr(
        model_module.losses,
        "alignment",
        lambda ids, texts, tau: seen.append(len(ids)) or alignment(ids, texts, tau),
    )
    model, train, _, _ = build("GaCLLM", settings, align_n_nodes=7)
    model.calculate_loss(next(iter(train)))
    assert seen == [7, 7, 7, 7]
    assert len(set(model._draw_aligned(20).tolist())) == 7
    assert model._draw_aligned(5).tolist() == [0, 1, 2, 3, 4]


def test_without_fused_text_only_the_aligned_nodes_are_projected(settings, fake_texts, monkeypatch):
    model, train, _, _ = build("GaCLLM", settings, text_weight=0.0, align_n_nodes=7)
    seen, project = [], model.project
    monkeypatch.setattr(model, "project", lambda nodes: seen.append(len(nodes)) or project(nodes))
    model.calculate_loss(next(iter(train))).backward()
    assert seen == [14]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    model.full_sort_predict(next(iter(train)))
    assert seen == [14]


def test_raw_texts_reach_the_linear_scores(settings, fake_texts):
    plain, train, _, _ = build("GaCLLM", settings, linear_weight=1e6)
    with_texts, _, _, _ = build("GaCLLM", settings, linear_weight=1e6, linear_text_weight=50.0)
    batch = next(iter(train))
    scores = with_texts.full_sort_predict(batch).view(len(batch), -1)
    assert not torch.allclose(plain.full_sort_predict(batch).view(len(batch), -1), scores)
    inter = train._dataset.inter_feat
    nodes = torch.arange(plain.n_users, plain.n_users + plain.n_items)
    expected = ItemItemModel(
        inter["user_id"].numpy(),
        inter["item_id"].numpy(),
        plain.n_users,
        plain.n_items,
        plain.options.linear_reg_weight,
        plain.texts.rows(0, nodes),
        50.0,
    )
    assert torch.allclose(scores / 1e6, standardize(expected.scores(batch["user_id"])), atol=1e-3)


def test_the_softmax_loss_of_a_batch_is_the_cross_entropy_over_all_items(settings, fake_texts):
    keys = {"ssm_n_negatives": 1000, "reg_weight": 0.0, "align_weight": 0.0, "text_dropout": 0.0}
    model, train, _, _ = build("GaCLLM", settings, **keys)
    batch = next(iter(train))
    users, items = model.forward()
    cosine = torch.nn.functional.cosine_similarity(
        users[batch["user_id"]][:, None], items[None, 1:], dim=2
    )
    expected = torch.nn.functional.cross_entropy(
        cosine / model.options.ssm_temperature, batch["item_id"] - 1
    )
    assert torch.allclose(model.calculate_loss(batch), expected, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["BPR", "SSM"])
@pytest.mark.parametrize("use_text", [True, False])
def test_propagating_every_one_batch_is_the_exact_loss(settings, fake_texts, loss_type, use_text):
    keys = {"loss_type": loss_type, "use_text": use_text, "text_dropout": 0.0, "reg_weight": 1e-2}
    model, train, _, _ = build("GaCLLM", settings, **keys)
    assert model.periodic is None
    batch, results = next(iter(train)), []
    for periodic in (None, PeriodicPropagation(model.adjacency, model.options.n_layers, 1)):
        model.periodic = periodic
        model.zero_grad()
        torch.manual_seed(3)  # negatives
        loss = model.calculate_loss(batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for exact, periodic in zip(*results, strict=True):
        assert torch.allclose(exact, periodic, atol=1e-6)


def test_between_propagations_scores_are_those_of_the_current_weights(settings, fake_texts):
    model, train, _, _ = build("GaCLLM", settings, propagate_every=3)
    batch = next(iter(train))
    model.calculate_loss(batch).backward()
    hops = model.periodic.hops
    with torch.no_grad():
        model.item_embedding.weight.normal_()
    model.calculate_loss(batch)
    assert model.periodic.hops is hops
    clone, _, _, _ = build("GaCLLM", settings)
    assert model.state_dict().keys() == clone.state_dict().keys(), "hops are not in checkpoints"
    clone.load_state_dict(model.state_dict())
    model.eval(), clone.eval()
    assert torch.equal(model.full_sort_predict(batch), clone.full_sort_predict(batch))
    model.load_state_dict(clone.state_dict())
    assert model.periodic.n_batches == 0, "a checkpoint begins a new cycle"


def test_training_goes_on_from_a_checkpoint_between_propagations(settings, fake_texts):
    keys = {"propagate_every": 5, "train_batch_size": 16, "stopping_step": 9}
    model, train, valid, _ = build("GaCLLM", settings, **keys, epochs=2)
    assert len(train) % 5 != 0
    trainer = get_trainer(train.config["MODEL_TYPE"], "GaCLLM")(train.config, model)
    trainer.fit(train, valid, saved=True, show_progress=False)
    assert model.periodic.n_batches == 2 * len(train)
    again, train, valid, _ = build("GaCLLM", settings, **keys, epochs=4)
    trainer_again = get_trainer(train.config["MODEL_TYPE"], "GaCLLM")(train.config, again)
    trainer_again.resume_checkpoint(trainer.saved_model_file)
    score, _ = trainer_again.fit(train, valid, saved=False, show_progress=False)
    assert again.periodic.n_batches > 0
    assert np.isfinite(score)
