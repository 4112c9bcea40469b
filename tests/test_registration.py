"""GaCLLM is a RecBole model in every way RecBole has of using one."""

from __future__ import annotations

import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import argument_list, get_model, get_trainer, init_seed

from recbole_gacllm.artifacts.launchers import free_port
from recbole_gacllm.config import model_defaults
from recbole_gacllm.model import GaCLLM
from recbole_gacllm.plugin import registration
from tests.conftest import run_python, write_dataset

SETTINGS: dict[str, Any] = {
    "data_path": ".",
    "use_text": False,
    "epochs": 2,
    "gpu_id": "",
    "show_progress": False,
    "state": "ERROR",
    "train_batch_size": 64,
    "embedding_size": 8,
}


@pytest.fixture(autouse=True)
def _data_set(tmp_path: Path) -> None:
    """A data set `tiny` in the current folder."""
    write_dataset(tmp_path)


def config(model: Any = "GaCLLM", dataset: str = "tiny", **extra: Any) -> Any:
    return Config(model=model, dataset=dataset, config_dict={**SETTINGS, **extra})


def train(**extra: Any) -> tuple[Any, Any, Any]:
    """What RecBole's run_recbole does: the trainer, the test result, all scores of all users."""
    made = config(**extra)
    init_seed(made["seed"], made["reproducibility"])
    train_data, valid_data, test_data = data_preparation(made, create_dataset(made))
    init_seed(made["seed"], made["reproducibility"])
    model = get_model(made["model"])(made, train_data._dataset)
    trainer = get_trainer(made["MODEL_TYPE"], made["model"])(made, model)
    trainer.fit(train_data, valid_data)
    result = trainer.evaluate(test_data)
    users = Interaction({"user_id": torch.arange(1, 21)})
    return trainer, result, model.full_sort_predict(users)


def test_recbole_finds_the_model_and_its_general_trainer_by_name() -> None:
    assert get_model("GaCLLM") is GaCLLM
    assert get_trainer(GaCLLM.type, "GaCLLM") is Trainer
    assert config(GaCLLM)["text_source"] == config()["text_source"]


def test_layers_of_defaults_stand_in_the_stated_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer sets the key of every layer above it, so that the last one must win."""
    defaults = {**model_defaults(), "epochs": 11, "field_separator": "m", "seq_separator": "m"}
    monkeypatch.setattr(registration, "model_defaults", lambda preset: defaults)
    made = config()
    assert made["seq_separator"] == " "  # sample.yaml over GaCLLM.yaml
    monkeypatch.setattr(
        registration, "dataset_defaults", lambda name, _: {"seq_separator": name, "epochs": 12}
    )
    without_epochs = {key: value for key, value in SETTINGS.items() if key != "epochs"}
    monkeypatch.setitem(globals(), "SETTINGS", without_epochs)
    made = config()
    assert (made["seq_separator"], made["epochs"]) == ("tiny", 12)  # our data set config over both
    monkeypatch.setattr(registration, "dataset_defaults", lambda *_: {})
    assert config()["epochs"] == 11  # GaCLLM.yaml over overall.yaml
    assert config(epochs=13)["epochs"] == 13  # the user over all


def test_a_preset_stands_between_the_model_defaults_and_the_user() -> None:
    for preset in ("paper", "best"):
        expected = model_defaults(preset)
        made = config(preset=preset, n_neighbors=3)
        ours = {key: made[key] for key in expected if key not in {*SETTINGS, "n_neighbors"}}
        assert ours == {key: expected[key] for key in ours}
        assert made["n_neighbors"] == 3


def test_files_and_command_line_count_as_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.yaml").write_text("{data_path: ., n_neighbors: 2, llm_n_layers: 1}\n")
    monkeypatch.setattr(sys, "argv", ["run.py", "--preset=paper", "--n_neighbors=4"])
    made = Config(model="GaCLLM", dataset="tiny", config_file_list=["mine.yaml"])
    assert (made["preset"], made["n_neighbors"], made["llm_n_layers"]) == ("paper", 4, 1)
    assert made["loss_type"] == model_defaults("paper")["loss_type"]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"llm_layers": 2}, "llm_n_layers"),
        ({"loss_type": "CE"}, "loss_type"),
        ({"preset": "fast"}, "preset"),
        ({"loss_type": "BPR", "train_neg_sample_args": None}, "train_neg_sample_args"),
    ],
)
def test_bad_input_is_refused_before_the_data_set_is_looked_for(
    bad: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        config(dataset="there_is_none", **bad)


def test_the_model_draws_the_negatives_of_ssm_and_recbole_those_of_bpr() -> None:
    assert config(loss_type="SSM")["train_neg_sample_args"]["distribution"] == "none"
    assert config(loss_type="BPR")["train_neg_sample_args"]["distribution"] == "uniform"
    own = {"distribution": "popularity", "sample_num": 1}
    made = config(loss_type="SSM", train_neg_sample_args=own)
    assert made["train_neg_sample_args"]["distribution"] == "popularity"


def test_other_models_get_recboles_configuration_alone() -> None:
    made = config("BPR", loss_type="SSM")
    assert made["text_source"] is None
    assert made["train_neg_sample_args"]["distribution"] == "uniform"
    assert "text_source" not in made


def test_keys_of_our_data_set_config_decide_whether_a_saved_data_set_is_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = list(argument_list.dataset_arguments)
    ours = {"numerical_features": ["age"], "text_user_noun": "viewer"}
    monkeypatch.setattr(registration, "dataset_defaults", lambda *_: ours)
    try:
        config(), config()
        assert argument_list.dataset_arguments == [*before, "numerical_features"]
    finally:
        argument_list.dataset_arguments[:] = before


def test_a_config_can_be_pickled() -> None:
    made = config()
    assert pickle.loads(pickle.dumps(made)).final_config_dict == made.final_config_dict


def test_a_checkpoint_gives_identical_scores_in_a_fresh_process() -> None:
    files = []
    for loss_type in ("BPR", "SSM"):
        trainer, _, scores = train(loss_type=loss_type, checkpoint_dir=loss_type)
        torch.save(scores, f"{loss_type}/scores.pt")
        files.append(trainer.saved_model_file)
    code = """
import sys
import recbole_gacllm, torch
from recbole.data.interaction import Interaction
from recbole.quick_start import load_data_and_model
files, sys.argv[1:] = sys.argv[1:], []
for file in files:
    config, model, *_ = load_data_and_model(file)
    model.eval()
    scores = model.full_sort_predict(Interaction({"user_id": torch.arange(1, 21)}))
    assert torch.equal(scores, torch.load(f"{config['loss_type']}/scores.pt"))
"""
    run_python("-c", code, *files)


def test_saved_data_set_and_data_loaders_give_the_result_of_a_run_without_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = train(checkpoint_dir="plain")
    train(save_dataset=True, save_dataloaders=True, checkpoint_dir="saving")
    with caplog.at_level(logging.INFO):
        again = train(checkpoint_dir="saving")
    assert "Load filtered dataset from" in caplog.text
    assert "Load split dataloaders from" in caplog.text
    assert again[1] == plain[1]
    assert again[2].equal(plain[2])


def test_run_recbole_prints_flops_and_writes_tensorboard(caplog: pytest.LogCaptureFixture) -> None:
    from recbole.quick_start import run_recbole  # after the repairs

    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with caplog.at_level(logging.INFO):
            result = run_recbole("GaCLLM", "tiny", config_dict={**SETTINGS, "state": "INFO"})
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
    logged = "".join(path.read_text() for path in Path("log").rglob("*.log"))
    assert "FLOPs" in logged + caplog.text
    assert list(Path("log_tensorboard").rglob("events.out.*"))
    metrics = ("recall", "mrr", "ndcg", "hit", "precision")
    assert set(result["test_result"]) == {f"{metric}@10" for metric in metrics}


def test_two_processes_train_gacllm_on_cpu() -> None:
    """RecBole's own way: ``run`` spawns interpreters that know only what they unpickle."""
    from recbole.quick_start import run  # after the repairs

    result = run("GaCLLM", "tiny", config_dict=SETTINGS, nproc=2, port=str(free_port()))
    assert "recall@10" in result["test_result"]
    assert len(list(Path("saved").glob("GaCLLM-*.pth"))) == 1
