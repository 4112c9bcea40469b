"""Leaderboards: each run once, equal splits, per-user metrics, kill and continue."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import re
import shutil
import time

import numpy as np
import pytest
from filelock import FileLock

from recbole_gacllm import run as runner
from recbole_gacllm.cli.main import main
from recbole_gacllm.compare import job, leaderboard
from recbole_gacllm.compare.job import Recorder
from recbole_gacllm.compare.leaderboard import run_leaderboard
from recbole_gacllm.compare.plan import (
    baseline_files,
    make_plan,
    split_models,
    split_seeds,
    split_variant,
)
from recbole_gacllm.compare.results import Board
from recbole_gacllm.compare.tables import export
from recbole_gacllm.config import shipped_path
from recbole_gacllm.errors import GaCLLMError
from tests.conftest import add_rows, write_dataset


@pytest.fixture
def keys(settings):
    return {**settings, "use_text": False, "epochs": 1}


def planned(keys, *rows, n_seeds=1, protocol="general", **more):
    return make_plan(rows, ["tiny"], n_seeds, protocol, config_dict={**keys, **more})


def name(keys, row="BPR", **more):
    return planned(keys, row, **more).runs[0].name


# Of one run


def observed(model, settings, protocol, recorder=None, **more):
    recorder = recorder or Recorder()
    files = [shipped_path("properties", "protocols", f"{protocol}.yaml")]
    keys = {**settings, "epochs": 1, **({"loss_type": "CE"} if model == "SASRec" else {}), **more}
    done = runner.run(model, "tiny", files, keys, observer=recorder)
    return done.record, recorder


def test_the_protocol_of_cold_users_records_its_users_and_their_degrees(settings):
    record, recorder = observed("EASE", settings, "cold-users", cold_user_share=0.3)
    with np.load(io.BytesIO(recorder.per_user(record["test"], 4))) as stored:
        assert len(set(stored["users"])) == 4
    with np.load(io.BytesIO(recorder.by_degree())) as stored:
        assert stored["user_degree"].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("model", "protocol"), [("BPR", "general"), ("EASE", "general"), ("SASRec", "sequential")]
)
def test_per_user_metrics_average_to_recboles_numbers(settings, model, protocol):
    record, recorder = observed(model, settings, protocol, topk=[5, 10])
    with np.load(io.BytesIO(recorder.per_user(record["test"], 4))) as stored:
        arrays = dict(stored)
    users = arrays.pop("users")
    assert set(arrays) == set(record["test"])
    assert "ndcg@5" in arrays
    assert len(set(users)) == 24
    assert all(user.startswith("u") for user in users)
    for metric, values in arrays.items():
        assert round(values.mean(), 4) == record["test"][metric]
    recorder.values["ndcg@10"][0] += 1
    with pytest.raises(GaCLLMError, match=r"ndcg@10: .* do not give RecBole's"):
        recorder.per_user(record["test"], 4)


def test_general_and_sequential_models_have_one_split_in_the_sequential_protocol(settings):
    splits = [observed(model, settings, "sequential")[1].split for model in ("BPR", "SASRec")]
    assert splits[0] == splits[1]
    assert splits[0]["n_test"] == splits[0]["n_valid"] == 24
    assert splits[0]["n_train"] == 24 * 8


def test_another_seed_is_another_random_split(settings):
    splits = [observed("Pop", settings, "general", seed=seed)[1].split for seed in (1, 2)]
    assert splits[0]["test"] != splits[1]["test"]


def test_a_run_with_another_split_than_its_neighbours_stops_before_training(settings):
    recorder = Recorder({"run": "tiny-EASE-2020", "split": {"test": "0"}})
    with pytest.raises(GaCLLMError, match="this run's split differs from that of tiny-EASE-2020"):
        observed("Pop", settings, "general", recorder)


# Rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("GaCLLM:x=[[1,2],[3,4]],EASE", ["GaCLLM:x=[[1,2],[3,4]]", "EASE"]),
        (
            "GaCLLM,GaCLLM:n_layers=1:t=[5,10],E:r=7",
            ["GaCLLM", "GaCLLM:n_layers=1:t=[5,10]", "E:r=7"],
        ),
        ("A:x=({1,2},[(3,4)]),B", ["A:x=({1,2},[(3,4)])", "B"]),
        ("A:x={'a':[1,2],'b':{'c':3,'d':4}}:y=2,B", ["A:x={'a':[1,2],'b':{'c':3,'d':4}}:y=2", "B"]),
        ("A:x='1,2',B:y=\"a,'b\",C", ["A:x='1,2'", 'B:y="a,\'b"', "C"]),
        ("A:x=['],',2],B", ["A:x=['],',2]", "B"]),
        (r"A:x='it\'s, so',B", [r"A:x='it\'s, so'", "B"]),
        ("A:x=children's,B:y=girls'", ["A:x=children's", "B:y=girls'"]),
        ("A:x=[1,2,B", "has no ']' for what was opened"),
        ("A:x='1,2,B", 'has no "\'" for what was opened'),
        ("A:x=1],B", "has a ']' that nothing opened"),
        ("A:x=[(1],B", "has a ']' that nothing opened"),
    ],
)
def test_a_comma_within_brackets_or_quotes_does_not_end_a_row(text, rows):
    if isinstance(rows, list):
        assert split_models(text) == rows
        return
    with pytest.raises(ValueError, match=re.escape(rows)):
        split_models(text)


def test_a_value_may_be_a_mapping():
    row = "GaCLLM:text_value_names={'gender':{'M':'man'}}:n_layers=1:seeds=2"
    label, n_seeds = split_seeds(row, 3)
    assert n_seeds == 2
    values = {"text_value_names": "{'gender':{'M':'man'}}", "n_layers": "1"}
    assert split_variant(label) == ("GaCLLM", values)


def test_a_variant_is_a_row_of_its_own_with_its_keys_over_the_users(keys):
    rows = ["GaCLLM", "GaCLLM:n_layers=1:reg_weight=0.1", "EASE:reg_weight=7"]
    plan = planned(keys, *rows, n_layers=3, reg_weight=2)
    configs = {run.model: run.key["config"] for run in plan.runs}
    assert [configs[row]["n_layers"] for row in rows[:2]] == [3, 1]
    assert [configs[row]["reg_weight"] for row in rows] == [2, 0.1, 7]
    assert plan.summary["models"] == rows
    folders = {run.name for run in plan.runs}
    assert len(folders) == 3
    assert all("/" not in folder and ":" not in folder for folder in folders)


def test_a_row_may_have_the_first_seeds_only_and_keeps_its_name_and_runs(keys):
    row = "BPR:learning_rate=0.1"
    plan = planned(keys, f"{row}:seeds=1", "Pop", n_seeds=2)
    seeds = [(run.model, run.seed) for run in plan.runs]
    assert seeds == [(row, 2020), ("Pop", 2020), ("Pop", 2021)]
    assert plan.summary["models"] == [row, "Pop"]
    assert name(keys, row) == plan.runs[0].name


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ("BPR:seeds=2", {}, "'seeds=2' of 'BPR:seeds=2' must be a number from 1 to 1"),
        ("BPR:seeds=0", {}, "'seeds=0' of 'BPR:seeds=0' must be"),
        ("BPR:seeds=all", {}, "'seeds=all' of"),
        ("BPR:seeds=1:seeds=1", {}, "gives seeds twice"),
        ("BPR:epochs=1:epochs=2", {}, "gives epochs twice"),
        ("BPR BPR:seeds=1", {}, "models: 'BPR,BPR' must name each at least and at most once"),
        ("GaCLLM:use_text", {}, "'use_text' of 'GaCLLM:use_text' is not key=value"),
        ("BPR BPR:topk=5", {}, "topk of 'BPR:topk=5' must be the same for all"),
        ("BPR BPR:learning_rate=1.0e-4", {}, "'BPR' and 'BPR:learning_rate=1.0e-4' are the same"),
        ("GaCLLM:llm_modle=x", {}, "unknown key 'llm_modle'"),
        ("BRP", {}, "model: 'BRP' is neither GaCLLM"),
        ("BPR SASRec", {}, "SASRec is sequential.*--protocol=sequential"),
        ("SASRec", {"protocol": "temporal"}, "known_users_only: True .* sequential model SASRec"),
        (
            "BPR",
            {"protocol": "other"},
            "protocol: 'other' is not one of cold, cold-users, general, sequential, temporal",
        ),
        ("BPR", {"n_seeds": 0}, "seeds: 0"),
        ("BPR", {"nproc": 0}, "nproc: 0"),
    ],
)
def test_a_bad_plan_is_refused_before_any_run(keys, rows, more, message):
    with pytest.raises(ValueError, match=message):
        make_plan(rows.split(), ["tiny"], config_dict=keys, **{"n_seeds": 1, **more})


# Plans


def test_a_run_is_addressed_by_what_determines_it_and_by_nothing_else(keys, dataset_root):
    before = name(keys)
    assert name(keys, checkpoint_dir="elsewhere", show_progress=True, worker=1) == before
    changed = [name(keys, learning_rate=0.1), name(keys, seed=2021)]
    add_rows(dataset_root, "u0\ti29\t5\t1")
    one, two = (make_plan(["BPR"], ["tiny"], 1, "general", (), keys, n).runs[0] for n in (1, 2))
    assert len({before, *changed, one.name, two.name}) == 5
    assert one.name == name(keys)


def test_committed_hyper_parameters_are_used_and_the_users_win(keys, tmp_path):
    assert planned(keys, "EASE").runs[0].key["config"]["reg_weight"] == 1000.0
    (tmp_path / "mine.yaml").write_text("reg_weight: 7.0\nlinear_weight: 0.75\n")
    files, keys = [tmp_path / "mine.yaml"], {**keys, "preset": "best"}
    plan = make_plan(["EASE", "GaCLLM"], ["tiny"], 1, config_files=files, config_dict=keys)
    assert plan.summary["tuned"]["tiny/EASE"]["values"] == {"reg_weight": 7.0}
    assert plan.summary["tuned"]["tiny/GaCLLM"]["values"]["linear_weight"] == 0.75


def test_every_committed_file_of_hyper_parameters_fits_its_model(keys):
    folder = shipped_path("properties", "baselines")
    plan = planned(
        keys, *sorted(file.stem for file in folder.glob("*.yaml")), protocol="sequential"
    )
    for run in plan.runs:
        assert baseline_files(run.model, "tiny")
        tuned = plan.summary["tuned"][f"tiny/{run.model}"]
        ((file, note),) = tuned["files"].items()
        assert file == f"properties/baselines/{run.model}.yaml"
        assert note.startswith("Source: ")
        assert "Best of: " in note
        for key, value in tuned["values"].items():
            resolved = run.key["config"][key]
            assert resolved == value or value.items() <= resolved.items()


def test_keys_of_the_split_reach_every_model(keys):
    plan = planned(keys, "GaCLLM", "BPR", "TextKNN", train_share="0.5")
    assert [run.key["config"]["train_share"] for run in plan.runs] == [0.5] * 3
    assert [run.config_dict["train_share"] for run in plan.runs] == ["0.5"] * 3


def test_keys_of_gacllm_change_nothing_for_other_models(settings):
    ours = {"preset": "best", "use_text": "False", "epochs": "1", "n_layers": "4"}
    plans = [
        planned(settings, "EASE", "LightGCN", "GaCLLM", **more) for more in (ours, {"epochs": "1"})
    ]
    ease, light_gcn, gacllm = zip(*([run.name for run in plan.runs] for plan in plans), strict=True)
    assert ease[0] == ease[1]
    assert light_gcn[0] != light_gcn[1]  # n_layers is a key of RecBole's, too
    assert gacllm[0] != gacllm[1]
    tuned = plans[0].summary["tuned"]
    assert not {"preset", "use_text", "n_layers"} & set(tuned["tiny/EASE"]["given"])
    assert tuned["tiny/GaCLLM"]["given"].items() >= ours.items()


# Boards


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A board of GaCLLM, a variant, Pop, and CKE, which fails for want of a knowledge graph."""
    root = tmp_path_factory.mktemp("board")
    keys = {
        "data_path": str(write_dataset(root / "data")),
        "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
        "use_text": False,
        "epochs": 1,
        "embedding_size": 8,
        "use_gpu": False,
    }
    plan = planned(keys, "GaCLLM", "GaCLLM:n_layers=0", "CKE", "Pop")
    start = leaderboard.children.run_child

    def run(name, folder, **how):
        """In this process; the one that fails in its own."""
        start(name, folder, **how) if "-CKE-" in name else job._work(folder)

    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaderboard.children, "run_child", run)
        run_leaderboard(plan, root / "out", show_progress=False)
    return root / "out", plan


def test_a_failed_run_is_recorded_and_the_others_go_on_as_alone(finished, tmp_path):
    folder, plan = finished
    board = Board.read(folder)
    rows = ["GaCLLM", "GaCLLM:n_layers=0", "Pop"]
    assert [run.record["model"] for run in board.runs] == rows
    assert [failure["model"] for failure in board.failures] == ["CKE"]
    assert "[tiny.kg] not found" in board.failures[0]["error"]
    assert any("Error" in line for line in board.failures[0]["log_tail"])
    first = plan.runs[0]
    keys = {**first.config_dict, "checkpoint_dir": str(tmp_path)}
    alone = runner.run("GaCLLM", "tiny", first.config_files, keys).record
    assert board.runs[0].name == first.name
    assert [board.runs[0].record[part] for part in ("valid", "test")] == [
        alone["valid"],
        alone["test"],
    ]


def test_a_variant_is_tested_against_the_baseline_like_any_row(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    export(tmp_path / "out", baseline="GaCLLM:n_layers=0")
    table = json.loads((tmp_path / "out" / "results.json").read_text())["datasets"]["tiny"]
    assert table["baseline"] == "GaCLLM:n_layers=0"
    assert table["models"]["GaCLLM"]["metrics"]["ndcg@10"]["test"]["n_users"] == 24
    page = (tmp_path / "out" / "results" / "tiny.md").read_text()
    cells = " ".join(page.split())
    assert "sft_n_heldout=32<br/>" in cells  # what the preset sets
    assert "n_layers=0 | properties/presets/best.yaml<br/>the command line |" in cells
    assert "- `properties/presets/best.yaml`: Our tuned choice: a linear item-item model" in page
    run = next((tmp_path / "out" / "runs").glob("*Pop*/run.json"))
    commit = json.loads(run.read_text())["code"]["commit"] or "not in git"
    assert f"| **GaCLLM:n_layers=0** | 1 | {commit} | cpu | python " in cells
    assert "| baselines | 1 | | cpu | python " in cells


@pytest.mark.slow
def test_runs_in_two_processes_have_exact_metrics_of_every_user(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard.children, "run_child", lambda _, at, **__: job._work(at))
    plan = make_plan(["BPR"], ["tiny"], 1, config_dict=keys, nproc=2)
    run_leaderboard(plan, tmp_path / "out", show_progress=False)
    [run] = Board.read(tmp_path / "out").runs
    values = run.per_user("ndcg@10")
    assert len(values) == 24
    assert round(values.mean(), 4) == run.record["test"]["ndcg@10"]
    assert run.record["config"]["nproc"] == 2


def test_nothing_finished_is_run_twice(finished, monkeypatch):
    folder, plan = finished
    started = []
    monkeypatch.setattr(
        leaderboard.children, "run_child", lambda run, *_, **__: started.append(run)
    )
    before = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/run.json")}
    failed = {file: file.read_bytes() for file in folder.glob("runs/*/failed.json")}
    run_leaderboard(plan, folder, show_progress=False)
    for file, content in failed.items():
        file.write_bytes(content)
    assert {run.split("-")[1] for run in started} == {"CKE"}
    assert {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/run.json")} == before


def test_a_run_that_another_process_holds_is_left_to_it(keys, tmp_path, monkeypatch):
    plan = planned(keys, "Pop", n_seeds=2)
    held, free = (tmp_path / "out" / "runs" / job.name for job in plan.runs)
    held.mkdir(parents=True)
    lock = FileLock(held / ".lock", is_singleton=False)
    lock.acquire()
    started = []

    def child(run, folder, **_):
        started.append(run)
        (folder / "run.json").write_text("{}")

    def other_finishes(_):
        (held / "run.json").write_text('{"split": 0}')
        lock.release()

    monkeypatch.setattr(leaderboard.children, "run_child", child)
    monkeypatch.setattr(leaderboard.time, "sleep", other_finishes)
    run_leaderboard(plan, tmp_path / "out", show_progress=False)
    assert started == [free.name]


def test_a_folder_that_cannot_be_written_is_named_before_any_run(keys, tmp_path):
    (tmp_path / "file").touch()
    plan = planned(keys, "Pop")
    with pytest.raises(ValueError, match=r"--output: '\S+/file' cannot be written \(.*Not a dir"):
        run_leaderboard(plan, tmp_path / "file", show_progress=False)


def test_another_command_on_the_folder_does_not_change_what_is_shown(keys, tmp_path, monkeypatch):
    mine = planned(keys, "Pop")
    other = planned(keys, "BPR")

    def with_another(*_):
        (tmp_path / leaderboard.PLAN_FILE).write_text(json.dumps(other.summary))
        return leaderboard.Outcome.DONE

    monkeypatch.setattr(leaderboard, "attempt", with_another)
    run_leaderboard(mine, tmp_path, show_progress=False)
    assert json.loads((tmp_path / leaderboard.PLAN_FILE).read_text())["models"] == ["Pop"]


@pytest.mark.slow
def test_a_killed_leaderboard_goes_on_where_it_was(settings, tmp_path, capsys):
    """SIGKILL within the second run: the first stands, the second is made again."""
    command = [
        *("leaderboard", "--models=Pop", "--datasets=tiny", "--seeds=2", "--epochs=2"),
        *("--use_gpu=False", f"--data_path={settings['data_path']}", "--output=out"),
        "--config_files=columns.yaml",
    ]
    columns = "load_col: {inter: [user_id, item_id, rating, timestamp]}\n"
    (tmp_path / "columns.yaml").write_text(columns)
    board = multiprocessing.get_context("fork").Process(target=main, args=(command,))
    board.start()
    while len(list(tmp_path.glob("out/runs/*/log.txt"))) < 2:
        assert board.is_alive(), "ended before it was killed"
        time.sleep(0.02)
    board.kill()
    board.join()
    [file] = tmp_path.glob("out/runs/*/run.json")
    made = file.stat().st_mtime_ns
    main(command)
    runs = Board.read(tmp_path / "out").runs
    assert [run.record["seed"] for run in runs] == [2020, 2021]
    assert file.stat().st_mtime_ns == made
    assert "| **Pop**" in capsys.readouterr().out
