"""Hyper-parameter search: RecBole's HyperTuning over runs that are made once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from recbole_gacllm.compare import leaderboard
from recbole_gacllm.compare.plan import baseline_files, make_plan
from recbole_gacllm.compare.tuning import Search, read_space, tune
from recbole_gacllm.config import MODELS, shipped_path
from recbole_gacllm.errors import GaCLLMError


@pytest.fixture
def keys(settings):
    return {**settings, "use_text": False, "epochs": 1}


@pytest.fixture
def made(monkeypatch):
    """Instead of a run: a score that is best at reg_weight 10, and which runs were made."""
    counts: Counter[float] = Counter()

    def child(name, folder, **_):
        job = json.loads((folder / "job.json").read_text())
        value = float(job["config_dict"]["reg_weight"])
        counts[value] += 1
        if value == 666:
            raise GaCLLMError("this one fails")
        score = 1 / (1 + abs(value - 10))
        record = {
            "valid": {"ndcg@10": score, "recall@10": 0.5},
            "test": {"ndcg@10": value},  # a larger value would be better on the test part
            "seconds": {"total": 1.0},
            "config": job["key"]["config"] | {"seed": job["seed"]},
            "split": {},
        }
        (folder / "run.json").write_text(json.dumps(record))

    monkeypatch.setattr(leaderboard.children, "run_child", child)
    return counts


def search(keys, tmp_path, values, kind="choice"):
    return Search("EASE", "tiny", {kind: {"reg_weight": values}}, tmp_path / "out", keys=keys)


def test_a_search_that_is_started_again_repeats_no_trial(keys, tmp_path, made, monkeypatch):
    values = [1.0, 5.0, 10.0, 20.0, 100.0]
    stopping = leaderboard.children.run_child

    def stops_at_the_third(name, folder, **more):
        if made.total() == 2:
            raise KeyboardInterrupt
        stopping(name, folder, **more)

    monkeypatch.setattr(leaderboard.children, "run_child", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        tune(search(keys, tmp_path, values), show_progress=False)
    rows = (tmp_path / "out" / "trials.csv").read_text().splitlines()
    assert len(rows) == 3
    monkeypatch.setattr(leaderboard.children, "run_child", stopping)
    tune(search(keys, tmp_path, values), show_progress=False)
    assert made == dict.fromkeys(values, 1)
    assert (tmp_path / "out" / "trials.csv").read_text().splitlines()[:3] == rows


@pytest.mark.parametrize("algo", ["random", "bayes"])
def test_random_and_bayes_propose_the_same_parameters_again(keys, tmp_path, made, algo):
    first = search(keys, tmp_path, [0.0, 5.0], "loguniform")
    tune(first, algo, 4, show_progress=False)
    again = search(keys, tmp_path, [0.0, 5.0], "loguniform")
    tune(again, algo, 4, show_progress=False)
    assert [trial.parameters for trial in again.trials] == [
        trial.parameters for trial in first.trials
    ]
    assert set(made.values()) == {1}
    assert made.total() == 4


def test_the_best_by_validation_is_a_baseline_file_and_a_failed_trial_stops_no_other(
    keys, tmp_path, made
):
    space = search(keys, tmp_path, [666.0, 10.0, 1.0])
    file = tune(space, show_progress=False)
    assert file.name == "EASE.yaml"
    assert yaml.safe_load(file.read_text()) == {"reg_weight": 10.0}
    assert "# Source: tune of recbole_gacllm" in file.read_text()
    plan = make_plan(["EASE"], ["tiny"], 1, config_files=[file], config_dict=keys)
    assert plan.runs[0].key["config"]["reg_weight"] == 10.0
    assert made == {1.0: 1, 10.0: 1, 666.0: 1}
    assert [trial.score is None for trial in space.trials].count(True) == 1
    assert "666.0,failed" in (tmp_path / "out" / "trials.csv").read_text()
    assert list((tmp_path / "out").glob("trials/*/failed.json"))
    with pytest.raises(GaCLLMError, match="none of 1 trials"):
        tune(search(keys, tmp_path, [666.0]), show_progress=False)


def test_whole_numbers_of_quniform_are_integers(keys, tmp_path):
    space = Search("GaCLLM", "tiny", {"quniform": {"n_layers": [1, 3, 1]}}, tmp_path, keys=keys)
    values = space.plain({"n_layers": 2.0})
    assert type(values["n_layers"]) is int
    assert space.run_of(values).key["config"]["n_layers"] == 2


def test_recboles_format_is_read(tmp_path):
    file = tmp_path / "a.hyper"
    file.write_text(
        "learning_rate loguniform -8,0\n\nn_layers choice [1, 2] # ours\nk quniform 1,9,2\n"
    )
    assert read_space(file) == {
        "loguniform": {"learning_rate": [-8, 0]},
        "choice": {"n_layers": [1, 2]},
        "quniform": {"k": [1, 9, 2]},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layers choice", "line 1: 'n_layers choice' is not 'name kind values'"),
        ("n_layers choise [1]", "'choise' is not one of choice, uniform"),
        ("n_layers uniform 1", r"uniform takes 2 numbers, not \[1\]"),
        ("n_layers choice [a", "is not a list of values"),
        ("n_layers choice [open('made', 'w')]", "is not a list of values"),
        ("n_layers choice " + "[" * 9999, "is not a list of values"),
        ("n_layers uniform 'a','b'", "uniform takes 2 numbers, not .'a', 'b'."),
        ("# nothing", "names no parameter"),
        ("name choice ['é']", "is not UTF-8 text"),
    ],
)
def test_a_bad_space_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "a.hyper").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=message):
        read_space(tmp_path / "a.hyper")


def test_a_parameter_that_the_model_does_not_read_is_refused(keys, tmp_path):
    space = Search(
        "NARM", "tiny", {"choice": {"num_layers": [1]}}, tmp_path, "sequential", keys=keys
    )
    with pytest.raises(ValueError, match=r"'num_layers' is no key .* NARM .* n_layers"):
        tune(space, show_progress=False)


def test_exhaustive_search_wants_lists(keys, tmp_path):
    with pytest.raises(ValueError, match="exhaustive tries every value, and uniform has no list"):
        tune(search(keys, tmp_path, [1, 2], "uniform"), show_progress=False)


@pytest.mark.parametrize(
    "file", sorted(shipped_path("properties", "spaces").iterdir()), ids=lambda file: file.stem
)
def test_every_shipped_space_is_read_by_recbole_and_holds_keys_of_its_model(keys, tmp_path, file):
    from recbole.trainer import HyperTuning

    ours = read_space(file)
    theirs = HyperTuning(lambda *_: None, params_file=str(file)).space
    space = Search(file.stem, "tiny", ours, Path(tmp_path), "sequential", keys=keys)
    assert sorted(space.names()) == sorted(theirs)
    config = space.run_of({name: values[0] for name, values in ours["choice"].items()}).key[
        "config"
    ]
    assert set(space.names()) <= set(config)
    tuned = [
        key
        for path in baseline_files(file.stem, "tiny")
        for key in yaml.safe_load(path.read_text())
    ]
    assert file.stem in MODELS or set(space.names()) <= set(tuned)
