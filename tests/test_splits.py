"""Sparse and cold: what models see of the data, and how cold items are ranked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recbole.data import create_dataset, data_preparation
from recbole.utils import init_seed

from recbole_gacllm import model as model_module
from recbole_gacllm import text_knn
from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.compare.job import split_hashes
from recbole_gacllm.data.checks import targets
from recbole_gacllm.inputs import TrainingData
from recbole_gacllm.plugin.splits import cold_nodes, kept_rows, ranks_among
from recbole_gacllm.run_config import build_config
from tests.conftest import add_rows, write_dataset
from tests.recommender import Recommender

MODELS = ["GaCLLM", "BPR", "EASE", "Pop", "Random"]


def loaders(model, settings, **keys):
    """Training, validation and test, as RecBole makes them."""
    config = build_config(model, "tiny", config_dict={**settings, **keys})
    init_seed(config["seed"], True)
    return data_preparation(config, create_dataset(config))


def hashes(model, settings, **keys):
    return split_hashes(*(part._dataset for part in loaders(model, settings, **keys)))


def pairs(loader):
    return set(targets(loader._dataset))


@pytest.fixture
def taste_texts(monkeypatch):
    """Text embeddings that tell an item's taste (see conftest) beside noise."""

    def prepare(options, data):
        n_users = len(data.graph.user_tokens)
        items = [int(token[1:]) for token in data.graph.item_tokens]
        table = np.random.default_rng(0).standard_normal((n_users + len(items), 12)) / 4
        table[np.arange(n_users, len(table)), [item % 4 for item in items]] += 1
        rows = torch.tensor([-1, *range(n_users), -1, *range(n_users, len(table))])
        return TextLayers([torch.tensor(table, dtype=torch.float16)] * 2, rows, {})

    monkeypatch.setattr(model_module, "prepare", prepare)
    monkeypatch.setattr(text_knn, "prepare", prepare)


# Sparse


def test_each_user_keeps_an_interaction_and_a_smaller_share_is_part_of_a_larger():
    users = np.random.default_rng(0).permutation(np.repeat(np.arange(300), np.arange(300) % 7 + 1))
    tenth, half = (kept_rows(users, share, 2020) for share in (0.1, 0.5))
    assert set(users[tenth]) == set(users)
    assert set(tenth) < set(half)
    many = np.repeat(np.arange(10), 1000)
    assert len(kept_rows(many, 0.1, 2020)) == pytest.approx(1000, abs=120)
    assert not np.array_equal(kept_rows(many, 0.1, 2021), kept_rows(many, 0.1, 2020))


def test_every_model_is_trained_on_the_same_share_and_tested_as_before(settings):
    splits = [hashes(model, settings, train_share=0.3) for model in MODELS]
    assert all(split == splits[0] for split in splits)
    whole = hashes("BPR", settings)
    assert hashes("GaCLLM", settings, train_share=1.0) == whole
    assert splits[0]["n_train"] < 0.6 * whole["n_train"]
    for part in ("valid", "test"):
        assert splits[0][part] == whole[part]


def test_graph_and_samplers_hold_the_kept_interactions_only(settings):
    train, valid, test = loaders("GaCLLM", settings, train_share=0.3)
    graph = TrainingData.from_recbole(train.config, train._dataset).graph
    tokens = zip(graph.user_tokens[graph.users], graph.item_tokens[graph.items], strict=True)
    assert set(tokens) == pairs(train)
    dataset = test._dataset
    used = {
        (dataset.id2token("user_id", user), dataset.id2token("item_id", item))
        for user, items in enumerate(test._sampler.used_ids)
        for item in items
    }
    assert used == pairs(train) | pairs(valid) | pairs(test)


# One point in time


TEMPORAL = {
    "eval_args": {
        "split": {"RS": [0.8, 0.1, 0.1]},
        "order": "TO",
        "group_by": "none",
        "mode": "full",
    },
}


def test_nothing_of_training_is_later_than_the_cut_and_all_models_have_one_split(
    dataset_root, settings
):
    late = [f"new\ti{n}\t3\t{9_000_000 + n}" for n in range(4)]  # of somebody who has just come
    add_rows(dataset_root, *late)
    settings |= TEMPORAL
    whole = loaders("BPR", settings)
    n_rows = sum(len(part._dataset.inter_feat) for part in whole)
    train, valid, test = (part._dataset.inter_feat["timestamp"].numpy() for part in whole)
    assert train.max() <= valid.min()
    assert valid.max() <= test.min()
    assert len(test) == len(valid) == n_rows // 10
    assert {user for user, _ in pairs(whole[2])} - {user for user, _ in pairs(whole[0])} == {"new"}
    known = [hashes(model, settings, known_users_only=True) for model in MODELS]
    assert all(split == known[0] for split in known)
    assert known[0]["train"] == hashes("BPR", settings)["train"]
    assert known[0]["n_test"] == len(test) - len(late)


@pytest.mark.parametrize("model", ["GaCLLM", "EASE", "BPR", "LightGCN"])
def test_users_and_items_that_come_after_the_cut_stand_no_run_in_the_way(
    dataset_root, settings, model
):
    add_rows(dataset_root, *(f"{user}\tlater\t3\t9000000" for user in ("new", "u1")))
    add_rows(dataset_root, "later\tThe Last Film\tHorror", ending="item")
    keys = {"known_users_only": True, "epochs": 1}
    keys |= {"use_text": False} if model == "GaCLLM" else {}
    config = build_config(model, "tiny", config_dict={**settings, **keys, **TEMPORAL})
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    data_preparation(config, dataset)
    report = dataset.data_report
    assert ("known_users_only", 242, 241) in report.filters
    one = Recommender(model, {**settings, **keys, **TEMPORAL})
    one.fit()
    assert 0 <= one.trainer.evaluate(one.test)["ndcg@10"] <= 1
    one.trainer.tensorboard.close()


def test_sequential_models_are_cut_elsewhere_and_refused(settings):
    keys = {**settings, **TEMPORAL, "known_users_only": True, "train_neg_sample_args": None}
    with pytest.raises(ValueError, match=r"known_users_only: True .*sequential model SASRec"):
        build_config("SASRec", "tiny", config_dict=keys)


# Cold


@pytest.mark.parametrize(
    ("place", "key", "n_nodes"),  # round(.3 x 24) = 7 of users, round(.3 x 30) = 9 of items
    [(0, "cold_user_share", (17, 3, 4)), (1, "cold_item_share", (21, 4, 5))],
)
def test_a_cold_node_has_all_its_interactions_in_validation_or_in_the_test(
    settings, place, key, n_nodes
):
    everything = set().union(*map(pairs, loaders("BPR", settings)))
    for model in MODELS:
        parts = [pairs(part) for part in loaders(model, settings, **{key: 0.3})]
        nodes = [{pair[place] for pair in part} for part in parts]
        assert tuple(map(len, nodes)) == n_nodes
        assert len(set().union(*nodes)) == sum(n_nodes)
        assert set().union(*parts) == everything


def test_cold_items_are_the_same_for_every_model_and_others_for_another_seed(settings):
    splits = [hashes(model, settings, cold_item_share=0.3, seed=2020) for model in MODELS]
    assert len({split["test"] for split in splits}) == 1
    assert hashes("BPR", settings, cold_item_share=0.3, seed=2021)["test"] != splits[0]["test"]


def test_too_few_cold_items_are_refused():
    with pytest.raises(ValueError, match=r"cold_item_share: 0.1 of 12 items is 1; .*larger share"):
        cold_nodes(np.arange(12), 0.1, 2020)


def test_candidates_keep_their_order_and_come_before_all_else():
    scores = torch.tensor([[9.0, 3.0, 8.0, -5.0, 7.0], [0.0, 1.0, 0.0, 2.0, 3.0]])
    ranked = ranks_among(scores, torch.tensor([1, 3, 4]), torch.Generator().manual_seed(1))
    assert ranked.isneginf().tolist() == [[True, False, True, False, False]] * 2
    assert ranked[:, [1, 3, 4]].argsort(dim=1).tolist() == [[1, 0, 2], [0, 1, 2]]


def test_ties_are_broken_at_random_for_each_user():
    generator = torch.Generator().manual_seed(1)
    ranked = ranks_among(torch.zeros(4000, 6), torch.tensor([1, 2, 4, 5]), generator)
    first = ranked[:, [1, 2, 4, 5]].argmax(dim=1).bincount() / 4000
    assert first.tolist() == pytest.approx([0.25] * 4, abs=0.03)


def recommended(model, settings, **keys):
    """Test metrics, the items that were among a user's best, and those of the test."""
    one = Recommender(model, settings, **{"cold_item_share": 0.4, **keys})
    one.fit()
    best, collect = set(), one.trainer.eval_collector.eval_batch_collect

    def collecting(scores, *others):
        best.update(one.dataset.id2token("item_id", scores.topk(3).indices.unique()))
        collect(scores, *others)

    one.trainer.eval_collector.eval_batch_collect = collecting
    result = one.trainer.evaluate(one.test)
    one.trainer.tensorboard.close()
    return result, best, {item for _, item in pairs(one.test)}


@pytest.mark.parametrize("model", ["EASE", "BPR"])
@pytest.mark.parametrize("fast_paths", [False, True])
def test_only_cold_items_of_the_part_are_ranked(settings, model, fast_paths):
    _, best, cold = recommended(model, settings, fast_paths=fast_paths)
    assert best == cold


@pytest.mark.parametrize("loss_type", ["SSM", "BPR"])
def test_texts_tell_who_likes_a_cold_item(settings, taste_texts, loss_type):
    keys = {"topk": [2], "metrics": ["NDCG"], "valid_metric": "NDCG@2", "loss_type": loss_type}
    ours, _, _ = recommended("GaCLLM", settings, epochs=20, learning_rate=0.01, **keys)
    neighbors, _, _ = recommended("TextKNN", settings, **keys)
    popular, _, _ = recommended("Pop", settings, **keys)
    assert ours["ndcg@2"] > popular["ndcg@2"] + 0.1
    assert neighbors["ndcg@2"] > popular["ndcg@2"] + 0.2


def test_untrained_embeddings_of_cold_items_do_not_speak(settings, taste_texts):
    one = Recommender("GaCLLM", settings, cold_item_share=0.3, linear_weight=0.5)
    model, batch = one.model.eval(), one.batch
    before = model.full_sort_predict(batch).view(len(batch), -1)
    with torch.no_grad():
        model.item_embedding.weight[~model.unseen_items.is_seen] += 3.0
    model.restored = None
    assert torch.equal(model.full_sort_predict(batch).view(len(batch), -1), before)
    pair = model.predict(batch)
    assert torch.equal(pair, before[torch.arange(len(batch)), batch["item_id"]])


@pytest.mark.parametrize("loss_type", ["SSM", "BPR"])
def test_negatives_of_training_are_items_with_interactions(settings, taste_texts, loss_type):
    one = Recommender("GaCLLM", settings, cold_item_share=0.3, loss_type=loss_type)
    model, is_bpr, negatives = one.model, loss_type == "BPR", set()
    for batch in one.train:
        negatives |= set((model._negatives(batch) if is_bpr else model._draw_negatives()).tolist())
        model.zero_grad()
        model.calculate_loss(batch).backward()
        assert not model.item_embedding.weight.grad[~model.unseen_items.is_seen].any()
    assert negatives == set(one.train._dataset.inter_feat["item_id"].tolist())


@pytest.mark.parametrize("fast_paths", [False, True])
def test_all_items_are_ranked_for_cold_users_and_ties_tell_nothing(settings, fast_paths):
    keys = {"cold_item_share": 0.0, "cold_user_share": 0.4, "fast_paths": fast_paths}
    _, best, _ = recommended("EASE", settings, **keys)  # it knows nothing of them
    assert len(best) > 6  # three for all, by their ids, if ties were not broken


@pytest.mark.parametrize("loss_type", ["SSM", "BPR"])
def test_users_without_training_interactions_stand_no_model_in_the_way(
    settings, taste_texts, loss_type
):
    keys = {"cold_item_share": 0.0, "cold_user_share": 0.4, "epochs": 2, "loss_type": loss_type}
    for model in ("GaCLLM", "TextKNN"):
        result, _, _ = recommended(model, settings, linear_weight=0.5, **keys)
        assert 0 < result["ndcg@10"] <= 1


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        (
            "BPR",
            {"train_share": 0.0},
            "train_share: 0.0 is not allowed; it should be greater than 0",
        ),
        ("GaCLLM", {"train_share": 1.5}, "train_share: 1.5 is not allowed"),
        ("BPR", {"cold_item_share": 0.5}, "cold_item_share: 0.5 is not allowed"),
        (
            "EASE",
            {"cold_item_share": "some"},
            "cold_item_share: 'some' is not allowed; it should be a valid number",
        ),
        ("SASRec", {"train_share": 0.5}, "sequential model SASRec"),
        (
            "BPR",
            {"cold_item_share": 0.3, "eval_args": {"mode": "uni100"}},
            "cold items are ranked among themselves. Set mode: full",
        ),
        (
            "BPR",
            {"cold_user_share": 0.3, "eval_args": {"mode": "uni100"}},
            "cold_user_share: 0.3 does not go with .* all items are ranked. Set mode: full",
        ),
        (
            "BPR",
            {"cold_user_share": 0.3, "cold_item_share": 0.2},
            "each says what validation and test are. Set one of them to 0",
        ),
    ],
)
def test_a_share_that_cannot_be_is_refused_for_every_model(settings, model, keys, message):
    with pytest.raises(ValueError, match=message):
        build_config(model, "tiny", config_dict={**settings, **keys})


def test_saved_data_loaders_of_another_share_are_not_reused(settings, tmp_path):
    saved = {"save_dataloaders": True, "dataloaders_save_path": str(tmp_path / "loaders.pth")}
    whole = pairs(loaders("BPR", settings, **saved)[0])
    assert pairs(loaders("BPR", settings, **saved, train_share=0.3)[0]) < whole


def test_a_user_without_training_interactions_stands_no_run_in_the_way(tmp_path, settings):
    root = write_dataset(tmp_path / "few", n_users=5)
    add_rows(root, "lonely\ti0\t3\t7")
    for seed in range(2020, 2030):  # in some, i0 is cold
        keys = {"data_path": str(root), "cold_item_share": 0.4, "seed": seed, "epochs": 1}
        result, _, _ = recommended("EASE", {**settings, **keys})
        assert 0 <= result["ndcg@10"] <= 1
