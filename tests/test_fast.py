"""The fast paths against RecBole's own methods: the same draws, batches, ranks, losses, metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from recbole.sampler import RepeatableSampler, Sampler
from recbole.utils import init_seed

from recbole_gacllm.plugin import fast, fast_graph
from recbole_gacllm.plugin.fast_graph import ConstantMatrix
from tests.recommender import Recommender

# GAUC needs all ranks. Of the rest, RecBole 1.2.1's collector fails on all that need counts.
RANKING = ["Recall", "MRR", "NDCG", "Hit", "MAP", "Precision", "GAUC"]


def both(model: str, settings: dict, **keys: object) -> tuple[Recommender, Recommender]:
    """With the fast paths and without, other things equal."""
    return tuple(Recommender(model, settings, **keys, fast_paths=on) for on in (True, False))


def same(one: object, other: object) -> bool:
    """Equality of what a loader yields: interactions, tensors, tuples of them, None."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if one is None:
        return other is None
    return list(one.columns) == list(other.columns) and all(same(one[k], other[k]) for k in one)


# Sampling


def sampler(used: list[set[int]], n_items: int, distribution: str, fast_paths: bool) -> Sampler:
    made = Sampler.__new__(Sampler)
    made.used_ids = np.array([*used, None])[:-1]
    made.item_num, made.user_num, made.alpha = n_items, len(used), 0.7
    items = [item for of_user in used for item in of_user] or [1]
    made._get_candidates_list = lambda: np.array([*items, n_items - 1])
    made.set_distribution(distribution)
    made.fast_paths = fast_paths
    return made


@pytest.mark.parametrize("max_table", [2**25, 0], ids=["table", "search"])
@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
@hypothesis_settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_negatives_are_recboles_own_for_the_same_seed(distribution, max_table, data, seed):
    n_items = data.draw(st.integers(3, 12))
    # Item n - 1 stays free for everyone, so that there is something to draw.
    used = data.draw(
        st.lists(st.sets(st.integers(1, n_items - 2), max_size=8), min_size=1, max_size=6)
    )
    users = data.draw(st.lists(st.integers(0, len(used) - 1), min_size=1, max_size=20))
    num = data.draw(st.integers(1, 3))
    negatives, states = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "MAX_TABLE", max_table)
        for on in (True, False):
            made = sampler(used, n_items, distribution, on)
            np.random.seed(seed)
            negatives.append(made.sample_by_user_ids(np.array(users), None, num))
            states.append(np.random.randint(2**31))
            assert ("_membership" in vars(made)) is on
    assert same(*negatives)
    assert states[0] == states[1]  # as many numbers were taken


def test_a_user_that_is_not_there_is_refused_as_ever():
    with pytest.raises(ValueError, match=r"user_id \[7\] not exist"):
        sampler([{1}, {2}], 5, "uniform", True).sample_by_user_ids(np.array([0, 7]), None, 1)


# Data loaders

UNIFORM = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False}
NEGATIVES = [
    {},
    {"sample_num": 3},
    {"distribution": "popularity", "sample_num": 2, "alpha": 0.5},
    {"dynamic": True, "candidate_num": 3},
]


@pytest.mark.parametrize("model", ["LightGCN", "NeuMF"], ids=["pairwise", "pointwise"])
@pytest.mark.parametrize("negatives", NEGATIVES, ids=str)
def test_training_batches_with_features_are_the_same_epoch_after_epoch(settings, model, negatives):
    columns = {"inter": ["user_id", "item_id"], "user": ["user_id", "age"]}
    keys = {"train_batch_size": 64, "load_col": columns}
    ours, theirs = both(model, settings, **keys, train_neg_sample_args=UNIFORM | negatives)
    for _ in range(2):
        epochs = []
        for one in (ours, theirs):
            one.train.get_model(one.model)
            init_seed(1, True)
            epochs.append(list(one.train))
        assert len(epochs[0]) == len(ours.train) > 1
        assert "age" in epochs[0][0].columns
        assert same(*epochs)
    assert torch.equal(ours.train.generator.get_state(), theirs.train.generator.get_state())


def test_full_sort_batches_hold_the_same_items_for_the_same_users(settings):
    ours, theirs = both("LightGCN", settings, eval_batch_size=1)
    (batch,) = ours.valid  # all users at once
    assert len(theirs.valid) == len(ours.valid.uid_list) > 1
    users = np.array([2, 0, 5, 1])
    assert same(ours.valid.collate_fn(users), theirs.valid.collate_fn(users))
    assert same(batch, theirs.valid.collate_fn(np.arange(len(theirs.valid.uid_list))))


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=6), st.data())
def test_item_lists_of_different_lengths_are_gathered_as_one_by_one(lists, data):
    items = np.empty(len(lists), dtype=object)
    items[:] = [torch.tensor(of_user, dtype=torch.int64) for of_user in lists]
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=6))
    place, gathered = fast.ItemLists(items).of(torch.tensor(rows))
    assert place.tolist() == [i for i, row in enumerate(rows) for _ in lists[row]]
    assert gathered.tolist() == [item for row in rows for item in lists[row]]


def test_worker_processes_load_the_same_batches(settings):
    keys = {"use_text": False, "loss_type": "SSM", "train_batch_size": 64}
    with_workers = Recommender("GaCLLM", settings, **keys, worker=1)
    assert same(list(with_workers.train), list(Recommender("GaCLLM", settings, **keys).train))


# Sequential models

BY_TIME = {
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "loss_type": "CE",
    "train_neg_sample_args": None,
    "MAX_ITEM_LIST_LENGTH": 4,  # of ten interactions a user
    "train_batch_size": 64,
    "metrics": RANKING[:6],
    "metric_decimal_place": 12,
    "topk": [1, 3],
    "valid_metric": "MRR@3",
}
FEATURES = {
    "load_col": {
        "inter": ["user_id", "item_id", "rating", "timestamp"],
        "item": ["item_id", "class"],
    },
    "selected_features": ["class"],
}
SMALL = {"hidden_size": 8, "inner_size": 8, "n_layers": 1}
SEQUENTIAL = [
    ("SASRec", SMALL),
    ("SASRec", SMALL | {"loss_type": "BPR", "train_neg_sample_args": UNIFORM}),
    ("SASRec", SMALL | {"loss_type": "BPR", "train_neg_sample_args": UNIFORM | NEGATIVES[2]}),
    ("GRU4Rec", {"hidden_size": 8}),
    ("GRU4RecF", FEATURES | {"hidden_size": 8, "pooling_mode": "sum"}),
    ("FDSA", FEATURES | SMALL | {"pooling_mode": "mean"}),
    ("NARM", {"numerical_features": ["rating"], "hidden_size": 8}),
]


@pytest.mark.filterwarnings("ignore:using .* in Series.agg:FutureWarning")  # RecBole's, token_seq
@pytest.mark.parametrize(("model", "keys"), SEQUENTIAL, ids=str)
def test_sequential_models_get_the_same_batches_losses_and_metrics_to_the_last_digit(
    settings, model, keys
):
    """With SGD: RecBole's Adam and the fused one round otherwise."""
    pair = ours, theirs = both(model, settings, **BY_TIME | {"learner": "sgd"} | keys)
    assert same(ours.dataset.inter_feat, theirs.dataset.inter_feat)
    epochs, losses, results = [], [], []
    for one in pair:
        one.seed()
        epochs.append([*one.train, *one.valid, *one.test])
        losses.append(recorded_losses(one.model))
        one.seed()
        valid = one.fit()
        results.append((valid, dict(one.trainer.evaluate(one.test))))
    assert same(*epochs)
    assert len(ours.train) > 1
    assert max(epochs[0][0]["item_length"]) == BY_TIME["MAX_ITEM_LIST_LENGTH"]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2 * len(ours.train)
    assert results[0] == results[1]


@hypothesis_settings(max_examples=30)
@given(data=st.data(), seed=st.integers(0, 2**31), num=st.integers(1, 3))
def test_negatives_of_sequential_models_are_recboles_own(data, seed, num):
    positives = np.array(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=20)))
    drawn = []
    for on in (True, False):
        made = RepeatableSampler.__new__(RepeatableSampler)
        made.item_num, made.distribution, made.fast_paths = 4, "uniform", on
        np.random.seed(seed)
        negatives = made.sample_by_user_ids(positives, positives, num)
        drawn.append((negatives, torch.tensor(np.random.randint(2**31))))
    assert same(*drawn)


# Evaluation


@hypothesis_settings(max_examples=30)
@given(seed=st.integers(0, 2**31), levels=st.integers(2, 1000))
def test_collected_ranks_are_recboles_bit_for_bit_ties_included(seed, levels):
    from recbole.evaluator import Collector

    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.integers(0, levels, (7, 20)), dtype=torch.float32)
    scores[rng.random((7, 20)) < 0.2] = -np.inf
    rows = torch.tensor(np.concatenate([np.arange(7), rng.integers(0, 7, 20)]))  # with repeats
    items = torch.tensor(rng.integers(1, 20, len(rows)))
    structs = []
    for on in (True, False):
        config = {"eval_args": {"mode": "full"}, "topk": [3, 5], "device": "cpu"}
        collector = Collector(config | {"metrics": ["Recall", "ItemCoverage"], "fast_paths": on})
        for part in (slice(0, 4), slice(4, 7)):
            inside = (rows >= part.start) & (rows < part.stop)
            positive = rows[inside] - part.start, items[inside]
            collector.eval_batch_collect(scores[part], None, *positive)
        structs.append(collector.get_data_struct())
    for name in ("rec.topk", "rec.items"):
        assert same(structs[0][name], structs[1][name])


@given(data=st.data(), k=st.integers(1, 6))
def test_ranking_metrics_are_recboles_bit_for_bit(data, k):
    from recbole.evaluator import metrics

    rows = st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=1, max_size=8)
    hits = np.array(data.draw(rows))
    n_more = data.draw(st.lists(st.integers(0, 7), min_size=len(hits), max_size=len(hits)))
    for name in ("MRR", "MAP", "NDCG"):
        ours, theirs = (
            getattr(metrics, name)({"topk": [k], "metric_decimal_place": 4, "fast_paths": on})
            for on in (True, False)
        )
        args = (hits,) if name == "MRR" else (hits, hits.sum(1) + n_more)
        assert np.array_equal(ours.metric_info(*args), theirs.metric_info(*args)), name


@pytest.mark.parametrize(
    ("mode", "metrics"),
    [
        *(("full", RANKING[:6]), ("full", RANKING), ("uni5", RANKING), ("pop5", RANKING[:6])),
        ("labeled", ["AUC", "LogLoss", "MAE", "RMSE"]),
    ],
)
def test_every_mode_of_evaluation_gives_recboles_metrics(settings, mode, metrics):
    keys = {
        "eval_args": {"mode": mode, "split": {"RS": [0.6, 0.2, 0.2]}, "order": "RO"},
        "metrics": metrics,
        "valid_metric": metrics[0] if mode == "labeled" else f"{metrics[0]}@3",
        "topk": [1, 3],
        "metric_decimal_place": 12,
        "eval_batch_size": 64,
    }
    if mode == "labeled":
        keys |= {"threshold": {"rating": 3}, "train_neg_sample_args": None}
    results = []
    for one in both("NeuMF" if mode == "labeled" else "LightGCN", settings, **keys):
        one.seed()
        results.append(dict(one.trainer.evaluate(one.valid, load_best_model=False)))
    assert results[0] == results[1]


# Training


def assert_trained_alike(ours: Recommender, theirs: Recommender, rel: float = 1e-5) -> None:
    """The same loss of each epoch, and the same test metrics."""
    tests = []
    for one in (ours, theirs):
        one.seed()
        one.fit()
        tests.append(dict(one.trainer.evaluate(one.test)))
    assert ours.losses == pytest.approx(theirs.losses, rel=rel)
    assert tests[0] == pytest.approx(tests[1], abs=1e-6)


@pytest.mark.parametrize("keys", [{}, {"clip_grad_norm": {"max_norm": 0.1}}, {"learner": "sgd"}])
def test_gacllm_trains_to_the_same_metrics_with_and_without_fast_paths(settings, keys):
    keys = {"use_text": False, "loss_type": "BPR", "epochs": 3, "learning_rate": 0.01, **keys}
    assert_trained_alike(*both("GaCLLM", settings, **keys))


def has_products(model: torch.nn.Module) -> bool:
    return any(isinstance(value, ConstantMatrix) for value in vars(model).values())


GRAPH_MODELS = [
    ("LightGCN", {}),
    ("NGCF", {"hidden_size_list": [8, 8], "node_dropout": 0.0}),
    ("NGCF", {"hidden_size_list": [8, 8], "node_dropout": 0.2}),
    *(("SGL", {"type": kind}) for kind in ("ED", "ND", "RW")),
    ("DGCF", {"n_factors": 2, "train_batch_size": 64}),
]


@pytest.mark.parametrize(("model", "keys"), GRAPH_MODELS, ids=str)
def test_recboles_graph_models_train_to_the_same_losses_and_metrics(settings, model, keys):
    ours, theirs = both(model, settings, epochs=3, learning_rate=0.01, **keys)
    assert has_products(ours.model) is (keys.get("node_dropout", 0) == 0)
    assert not has_products(theirs.model)
    everyone = ours.valid.collate_fn(np.arange(5))[0]
    scores = [one.model.eval().full_sort_predict(everyone) for one in (ours, theirs)]
    assert torch.allclose(*scores, rtol=1e-4, atol=1e-6)
    assert scores[0].abs().max() > 0.02  # so that this says something
    assert_trained_alike(ours, theirs, rel=1e-4)


def test_ncl_has_the_same_loss_and_gradient(settings):
    """Without its trainer, whose clustering needs faiss."""
    results = []
    for one in both("NCL", settings, n_layers=2, num_clusters=2):
        model = one.model
        generator = torch.Generator().manual_seed(1)
        model.user_centroids = model.item_centroids = torch.randn(2, 8, generator=generator)
        clusters = torch.randint(0, 2, (model.n_users + model.n_items,), generator=generator)
        model.user_2cluster = model.item_2cluster = clusters
        one.seed()
        losses = model.calculate_loss(one.batch)
        sum(losses).backward()
        losses = [loss.detach() for loss in losses]
        results.append([*losses, model.user_embedding.weight.grad, model.diag])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*results, strict=True))


def recorded_losses(model: torch.nn.Module) -> list[float]:
    """The loss of each batch from now on, filled while the model trains."""
    losses, calculate = [], model.calculate_loss

    def recording(batch):
        loss = calculate(batch)
        parts = loss if isinstance(loss, tuple) else (loss,)
        losses.append(sum(part.item() for part in parts))
        return loss

    model.calculate_loss = recording
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "keys"),
    [
        *(("LightGCN", {}), ("SGL", {}), ("DGCF", {})),
        ("NGCF", {"node_dropout": 0.0, "train_batch_size": 8192}),
        # Its own 1,000 clusters are more than there are users; it trains on them after 20 epochs.
        ("NCL", {"num_clusters": 50, "warm_up_step": 0}),
    ],
)
def test_recboles_graph_models_give_their_losses_and_metrics_on_ml_100k(tmp_path, model, keys):
    """In RecBole's own widths and depths, every batch of an epoch; NCL with its clustering."""
    if model == "NCL":
        pytest.importorskip("faiss", reason="NCL clusters with faiss (pip install faiss-cpu)")
    settings = {"checkpoint_dir": str(tmp_path), "show_progress": False, "use_gpu": False}
    settings |= {"train_batch_size": 16384, "learning_rate": 0.02, "epochs": 1}
    keys = {**settings, "metric_decimal_place": 12, **keys}
    ours, theirs = pair = both(model, keys, dataset="ml-100k")
    assert (has_products(ours.model), has_products(theirs.model)) == (True, False)
    losses, metrics = [], []
    for one in pair:
        one.seed()
        losses.append(recorded_losses(one.model))
        metrics.append(one.fit())
    assert len(losses[0]) == -(-80_000 // keys["train_batch_size"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3)
    assert metrics[0]["recall@10"] > 0.05  # so that this says something


@pytest.mark.parametrize(
    "keys",
    [{}, {"mf_train": False}, {"mlp_train": False}, {"mlp_hidden_size": [6]}],
    ids=str,
)
def test_neumf_scores_all_items_as_pair_by_pair_and_in_blocks(settings, monkeypatch, keys):
    keys = {"mf_embedding_size": 8, "mlp_embedding_size": 4, "mlp_hidden_size": [6, 5], **keys}
    ours, theirs = pair = both("NeuMF", settings, epochs=3, learning_rate=0.05, **keys)
    assert_trained_alike(ours, theirs)
    for one in pair:
        one.seed()
        for parameter in one.model.parameters():
            torch.nn.init.normal_(parameter)
    users = ours.valid.collate_fn(np.arange(5))[0]
    scores = ours.model.eval().full_sort_predict(users)
    pairs = users.repeat_interleave(ours.model.n_items)
    pairs.update(Interaction({"item_id": torch.arange(ours.model.n_items).repeat(5)}))
    assert torch.allclose(scores.ravel(), theirs.model.eval().predict(pairs), rtol=1e-4)
    assert scores.std() > 0.2  # so that this says something
    monkeypatch.setattr(fast_graph, "_HIDDEN_A_BLOCK", 1)  # a user a block
    assert torch.allclose(ours.model.full_sort_predict(users), scores, rtol=1e-5)
    for model in (theirs.model, ours.model.train()):
        with pytest.raises(NotImplementedError):
            model.full_sort_predict(users)


def test_fast_paths_are_off_for_other_models_unless_asked_for(settings):
    theirs = Recommender("LightGCN", settings)
    list(theirs.train)
    assert isinstance(theirs.model.norm_adj_matrix, torch.Tensor)
    assert "_membership" not in vars(theirs.train._sampler)
    assert not theirs.trainer.optimizer.param_groups[0]["fused"]
    assert theirs.valid.step == theirs.config["eval_batch_size"] // theirs.model.n_items
    ours = Recommender("GaCLLM", settings, use_text=False, loss_type="BPR")
    list(ours.train)
    assert "_membership" in vars(ours.train._sampler)


def test_a_run_without_fast_paths_is_resumed_with_them(settings):
    keys = {"use_text": False, "loss_type": "BPR"}
    first = Recommender("GaCLLM", settings, **keys, fast_paths=False, epochs=1)
    first.fit()
    second = Recommender("GaCLLM", settings, **keys, epochs=3)
    second.trainer.resume_checkpoint(first.trainer.saved_model_file)
    weight = second.model.user_embedding.weight
    assert torch.equal(weight, first.model.user_embedding.weight)
    second.fit()
    assert list(second.trainer.train_loss_dict) == [1, 2]
