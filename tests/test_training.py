"""What a RecBole user configures does what it does for RecBole's own models."""

from __future__ import annotations

import contextlib
import functools
import math
import socket
import sys

import numpy as np
import pytest
import recbole.trainer.trainer
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.utils import init_seed

from recbole_gacllm import model as model_module
from recbole_gacllm.run_config import build_config
from tests.conftest import fresh_process, tiny_settings, write_dataset
from tests.ddp_process import work
from tests.random_texts import random_texts
from tests.recommender import Recommender, without

BEST = {"preset": "best", "ssm_n_negatives": 16, "align_n_nodes": 8, "linear_text_weight": 1.0}


Training = functools.partial(Recommender, "GaCLLM")


@pytest.fixture(autouse=True)
def _texts(monkeypatch):
    monkeypatch.setattr(model_module, "prepare", random_texts)


# Evaluation


@pytest.mark.parametrize("preset", ["paper", "best"])
def test_validation_comes_every_eval_step_and_the_callback_after_each(settings, preset):
    one = Training(settings, preset=preset, epochs=5, eval_step=2, ssm_n_negatives=16)
    best = one.fit()
    assert [epoch for epoch, _ in one.called] == [1, 3]
    assert max(score for _, score in one.called) == best[one.config["valid_metric"].lower()]
    assert len(one.losses) == 5
    assert all(map(math.isfinite, one.losses))


def test_training_stops_early_and_keeps_the_best_epoch(settings):
    one = Training(settings, epochs=20, stopping_step=3)
    scores = iter([0.1, 0.3, 0.2, 0.2, 0.1, 0.2, 0.9])
    one.trainer._valid_epoch = lambda *_, **__: (next(scores), {"recall@10": 0.0})
    one.fit()
    assert len(one.losses) == 2 + 3 + 1  # RecBole stops when the limit is passed
    checkpoint = torch.load(one.trainer.saved_model_file, weights_only=False)
    assert checkpoint["epoch"] == 1


def test_a_metric_of_which_less_is_better_keeps_the_lowest_epoch(settings):
    keys = {"metrics": ["AveragePopularity"], "valid_metric": "AveragePopularity@5", "topk": 5}
    one = Training(settings, **keys, epochs=6, learning_rate=0.05)
    best = one.fit()
    scores = [score for _, score in one.called]
    assert best["averagepopularity@5"] == min(scores) < max(scores)


RANKING = ["Recall", "MRR", "NDCG", "Hit", "MAP", "Precision"]
COUNTING = ["ItemCoverage", "AveragePopularity", "ShannonEntropy", "GiniIndex", "TailPercentage"]


@pytest.mark.parametrize("fast_paths", [True, False])
def test_all_metrics_of_ranking_are_given_at_every_k(settings, fast_paths):
    metrics = [*RANKING, *COUNTING, "GAUC"]
    keys = {"metrics": metrics, "topk": [1, 4], "valid_metric": "MAP@4", "fast_paths": fast_paths}
    one = Training(settings, **keys, epochs=1)
    one.fit()
    result = one.trainer.evaluate(one.test)
    at_k = {f"{name.lower()}@{k}" for name in metrics[:-1] for k in (1, 4)}
    assert set(result) == at_k | {"gauc"}
    assert all(map(math.isfinite, result.values()))


def seen(loader) -> tuple[np.ndarray, np.ndarray]:
    """Users and timestamps of a part of the data."""
    inter = loader._dataset.inter_feat
    return inter["user_id"].numpy(), inter["timestamp"].numpy()


@pytest.mark.parametrize(
    "args",
    [
        {"mode": "full"},
        {"mode": "uni5"},
        {"mode": "pop5"},
        {"mode": {"valid": "uni5", "test": "full"}},
        {"mode": "full", "split": {"LS": "valid_and_test"}},
        {"mode": "full", "order": "TO"},
        {"mode": "full", "order": "TO", "group_by": "none"},
    ],
    ids=str,
)
def test_every_way_to_split_and_to_evaluate_works(settings, args):
    one = Training(settings, eval_args=args, topk=[3], valid_metric="Recall@3", epochs=2)
    one.fit()
    assert 0 < one.trainer.evaluate(one.test)["recall@3"] <= 1
    modes = args["mode"] if isinstance(args["mode"], dict) else {"valid": args["mode"]}
    assert isinstance(one.valid, FullSortEvalDataLoader) is (modes["valid"] == "full")
    (users, times), (later_users, later_times) = seen(one.train), seen(one.test)
    if "split" in args:
        assert np.bincount(later_users)[1:].tolist() == [1] * (one.model.n_users - 1)
    if args.get("group_by") == "none":
        assert times.max() <= later_times.min()
    elif args.get("order") == "TO":
        last = {user: times[users == user].max() for user in set(users)}
        pairs = zip(later_users, later_times, strict=True)
        assert all(time >= last[user] for user, time in pairs)


def test_labelled_evaluation_scores_pairs(settings):
    keys = {"eval_args": {"mode": "labeled"}, "threshold": {"rating": 3}, "valid_metric": "AUC"}
    one = Training(settings, **keys, metrics=["AUC", "MAE", "RMSE", "LogLoss"], epochs=2)
    one.fit()
    result = one.trainer.evaluate(one.test)
    assert set(result) == {"auc", "mae", "rmse", "logloss"}
    assert 0 < result["auc"] < 1


# Training


def test_gradients_are_clipped_to_the_norm_that_is_configured(settings):
    def norm(**keys: object) -> float:
        one = Training(settings, epochs=1, **keys)
        one.fit()
        gradients = [p.grad.flatten() for p in one.model.parameters() if p.grad is not None]
        return float(torch.cat(gradients).norm())

    assert norm(clip_grad_norm={"max_norm": 0.001}) == pytest.approx(0.001, rel=1e-3)
    assert norm() > 0.01


@pytest.mark.parametrize("learner", ["adam", "adamw", "sgd", "adagrad", "rmsprop"])
def test_every_learner_with_weight_decay_lowers_the_loss(settings, learner):
    keys = {"reg_weight": 0.0, "weight_decay": 1e-4, "learning_rate": 0.01, "epochs": 4}
    one = Training(settings, learner=learner, **keys)
    one.fit()
    assert one.trainer.optimizer.param_groups[0]["weight_decay"] == 1e-4
    assert one.losses[-1] < one.losses[0]


def test_tensorboard_has_the_losses_and_the_scores(settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = Training(settings, epochs=3)
    one.fit()
    one.trainer.tensorboard.close()
    events = EventAccumulator(str(one.trainer.tensorboard.log_dir)).Reload()
    losses = events.Scalars("Loss/Train")
    assert [event.value for event in losses] == pytest.approx(one.losses, rel=1e-6)
    scores = [(event.step, event.value) for event in events.Scalars("Vaild_score")]
    assert scores == [(epoch, pytest.approx(score)) for epoch, score in one.called]


def test_a_resumed_run_ends_with_the_parameters_of_an_uninterrupted_one(settings):
    """RecBole's checkpoint holds all but the states of the random generators; they are set here."""

    def train(epochs: int, resume: str | None = None) -> Training:
        one = Training(settings, **BEST, epochs=epochs, eval_step=0)
        train_epoch = one.trainer._train_epoch

        def seeded(data, epoch, *args, **keys):
            init_seed(epoch, True)
            data.generator.manual_seed(epoch)
            return train_epoch(data, epoch, *args, **keys)

        one.trainer._train_epoch = seeded
        if resume:
            one.trainer.resume_checkpoint(resume)
        one.trainer.fit(one.train, None, verbose=False)
        return one

    whole, begun = train(4), train(2)
    rest = train(4, begun.trainer.saved_model_file)
    assert list(rest.trainer.train_loss_dict) == [2, 3]
    assert rest.losses == whole.losses[2:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], value), name
        assert not torch.equal(begun.model.state_dict()[name], value), name


# Half precision


@pytest.mark.parametrize("keys", [{}, BEST, {"loss_type": "BPR"}], ids=["plain", "best", "BPR"])
def test_amp_trains_in_bfloat16_close_to_float32(settings, keys):
    runs = []
    for amp in (True, False):
        one = Training(settings, **keys, epochs=4, learning_rate=0.01, enable_amp=amp)
        dtypes = set()
        if one.config["text_weight"] > 0:
            one.model.projections[0].register_forward_hook(
                lambda *at, seen=dtypes: seen.add(at[2].dtype)
            )
        best = one.fit()
        runs.append((one.losses, best))
        assert all(p.dtype == torch.float32 for p in one.model.parameters())
        if dtypes:
            assert (torch.bfloat16 in dtypes) is amp
    (losses, metrics), (expected, expected_metrics) = runs
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.02)
    assert metrics == pytest.approx(expected_metrics, abs=0.1)  # of 24 users


def test_a_gradient_scaler_steps_the_fused_optimiser_as_if_it_were_not_there(settings, monkeypatch):
    """RecBole uses one on CUDA only; PyTorch has one for the CPU, too."""
    states = []
    for scaled in (True, False):
        one = Training(settings, epochs=2, enable_amp=True, enable_scaler=True)
        assert not one.trainer.enable_scaler  # without CUDA
        one.trainer.enable_scaler = scaled
        scaler = functools.partial(torch.amp.GradScaler, "cpu")
        monkeypatch.setattr(recbole.trainer.trainer.amp, "GradScaler", scaler)
        one.fit()
        states.append((one.losses, one.model.user_embedding.weight.detach()))
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-3)
    assert torch.allclose(states[0][1], states[1][1], atol=2e-3)


# Several processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    """What one process and each of two ended with, on the same global batches."""
    root = tmp_path_factory.mktemp("processes")
    settings = tiny_settings(write_dataset(root / "data"), root)
    settings |= {"epochs": 3, "train_batch_size": 64, "learning_rate": 0.01, "state": "ERROR"}
    settings |= {"metric_decimal_place": 7, "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}}}
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(3)]
        ports = [probe.getsockname()[1] for probe in probes]
    with contextlib.chdir(root):
        for size in (1, 2):
            ranks = [fresh_process(work, rank, size, ports, settings) for rank in range(size)]
            for process in ranks:
                process.join()
            assert [process.exitcode for process in ranks] == [0] * size
    return [torch.load(root / f"rank_{name}.pt") for name in ("0_of_1", "0_of_2", "1_of_2")]


@pytest.mark.parametrize("case", ["bpr", "ssm", "text"])
def test_two_processes_give_the_result_of_one_with_the_same_global_batch(processes, case):
    one, first, second = (results[case] for results in processes)
    halves = zip(first["losses"], second["losses"], strict=True)
    assert [sum(pair) / 2 for pair in halves] == pytest.approx(one["losses"], rel=1e-5)
    assert first["losses"] != second["losses"]  # each has its half
    for name, value in one["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        assert torch.allclose(first["state"][name], value, rtol=1e-3, atol=1e-5), name
    for phase in ("valid", "test"):
        assert first[phase] == second[phase] == pytest.approx(one[phase], abs=1e-5)
    assert one["test"]["recall@10"] > 0


# Loops


def steps_of(work) -> int:
    """Lines of Python that are run, and calls; a generator's resumption is a call."""
    n_steps = 0

    def trace(_frame, event, _argument):
        nonlocal n_steps
        n_steps += event in ("line", "call")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return n_steps


@pytest.mark.parametrize(
    "keys", [BEST, {"use_text": False, "loss_type": "BPR"}], ids=["best", "BPR"]
)
def test_an_epoch_has_no_loop_over_users_items_or_edges(tmp_path, keys):
    """40 times the data in as many batches takes as many steps of Python."""
    steps = []
    # The first run also imports what is imported late.
    for name, scale in (("first", 1), ("small", 1), ("large", 40)):
        n_users, n_items = 24 * scale, 30 + 10 * scale
        root = write_dataset(tmp_path / name, name, n_users=n_users, n_items=n_items)
        settings = tiny_settings(root, tmp_path) | {"train_batch_size": 64 * scale, "epochs": 1}
        one = Training(settings, name, **keys)
        steps.append(steps_of(one.fit))
        assert len(one.train) == 3
        assert len(one.valid) == 1
    assert steps[1] > 500
    assert steps[2] - steps[1] < n_users / 2  # a rejected negative is drawn once more, by chance


BY_TIME = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}


@pytest.mark.parametrize("name", ["GaCLLM", "EASE", "SASRec"])
def test_times_are_loaded_for_a_split_by_time_if_the_user_names_no_columns(settings, name):
    keys = without(settings, "load_col")
    config = build_config(name, "tiny", config_dict={**keys, "eval_args": BY_TIME})
    assert config["load_col"] == {"inter": ["user_id", "item_id", "timestamp"]}
    if name != "SASRec":  # RecBole gives it times anyway
        config = build_config(name, "tiny", config_dict=keys)
        assert config["load_col"] == {"inter": ["user_id", "item_id"]}
