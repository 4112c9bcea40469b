"""The runner: RecBole's numbers, and what RecBole demands of each model."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from recbole_gacllm.artifacts import disk
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.run import run
from recbole_gacllm.run_config import build_config
from tests.recommender import without


@pytest.mark.parametrize(
    ("model", "keys", "distribution"),
    [
        ("SASRec", {}, "none"),  # under cross-entropy
        ("SASRec", {"loss_type": "BPR"}, "uniform"),
        *((model, {}, "none") for model in ("MultiVAE", "ENMF", "RecVAE")),  # as RecBole documents
        (
            "MultiVAE",
            {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 2}},
            "uniform",
        ),
        *((model, {}, "uniform") for model in ("BPR", "LightGCN", "SimpleX")),
    ],
)
def test_negatives_are_sampled_as_the_model_demands_unless_the_user_says_how(
    settings, model, keys, distribution
):
    others = without(settings, "loss_type")
    config = build_config(model, "tiny", config_dict={**others, **keys})
    assert config["train_neg_sample_args"]["distribution"] == distribution


def test_feature_models_keep_recboles_columns(settings):
    columns = without(settings, "load_col", "data_path")
    config = build_config("FM", "ml-100k", config_dict=columns)
    assert set(config["load_col"]) == {"inter", "user", "item"}
    assert set(build_config("BPR", "ml-100k", config_dict=columns)["load_col"]) == {"inter"}


@pytest.mark.parametrize(
    ("model", "epochs", "eval_step", "n_validated"),
    [("EASE", 300, 2, 1), ("BPR", 1, 2, 1), ("BPR", 3, 2, 1), ("GaCLLM", 2, 5, 1)],
)
def test_a_run_is_validated_once_at_least(settings, model, epochs, eval_step, n_validated):
    keys = dict(settings, epochs=epochs, eval_step=eval_step, use_text=False)
    record = run(model, "tiny", config_dict=keys).record
    assert len(record["history"]) == n_validated
    assert record["valid"] == record["history"][0]["valid"]
    assert record["test"]["ndcg@10"] > 0


def test_metrics_are_told_where_the_record_cannot_be_written(settings, monkeypatch):
    def full(path, data):
        if path.name == "run.json":
            raise GaCLLMError(f"cannot write {path}: No space left on device.")

    monkeypatch.setattr(disk, "write_atomic", full)
    match = r"cannot write \S+/run.json: .*gave: {\"valid\": {.*\"test\": {\"recall@10\": \d"
    with pytest.raises(GaCLLMError, match=match):
        run("Pop", "tiny", config_dict=dict(settings))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 20"),
    ],
)
def test_a_full_disk_at_the_checkpoint_is_one_clear_error(settings, monkeypatch, error, tmp_path):
    def full(*_args, **_keys):
        raise error

    monkeypatch.setattr(torch, "save", full)
    match = r"cannot write \S+/saved/Pop-\S+\.pth: .*Free space or rights there.*checkpoint_dir"
    with pytest.raises(GaCLLMError, match=match):
        run("Pop", "tiny", config_dict=dict(settings))
    assert not list(tmp_path.glob("saved/runs/tiny-*"))


@pytest.mark.parametrize("folder", ["log", "log_tensorboard", "saved"])
def test_a_folder_that_cannot_be_written_is_named_before_training(settings, tmp_path, folder):
    (tmp_path / folder).touch()
    with pytest.raises(ValueError, match=rf"{folder}\S* cannot be written \("):
        run("Pop", "tiny", config_dict=dict(settings))


@pytest.mark.parametrize("model", ["BPR", "SASRec", "EASE"])
def test_a_run_gives_the_numbers_of_recboles_run_recbole(settings, model):
    from recbole.quick_start import run_recbole  # after the repairs

    keys = without(settings, "loss_type") | {"epochs": 1}
    done = run(model, "tiny", config_dict=dict(keys))
    config = build_config(model, "tiny", config_dict=dict(keys))
    if config["train_neg_sample_args"]["distribution"] == "none":
        keys["train_neg_sample_args"] = None
    theirs = run_recbole(model, "tiny", config_dict=keys)
    assert done.result["test_result"] == theirs["test_result"]
    assert done.result["best_valid_result"] == theirs["best_valid_result"]
    assert done.record["checkpoint"].endswith(".pth")


def test_a_run_records_what_it_chose(settings):
    keys = dict(settings, epochs=1, use_text=False, linear_weight=1.0)
    chosen = run("GaCLLM", "tiny", config_dict=dict(keys))
    assert chosen.record["choices"]["linear"]["ndcg"]
    written = json.loads(chosen.run_file.read_text())["choices"]["linear"]
    assert written["reg_weight"] == chosen.record["choices"]["linear"]["reg_weight"]
    given = run("GaCLLM", "tiny", config_dict=dict(keys, linear_reg_weight=3.0))
    linear = {"layers": (), "reg_weight": 3.0, "text_weight": 0.0, "ndcg": {}}
    assert given.record["choices"] == {"linear": linear, "keys": {}}
