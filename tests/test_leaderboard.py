"""Leaderboards: each run once, equal splits, per-user metrics, kill and continue."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from recbole_gacllm import run as runner
from recbole_gacllm.cli.main import main
from recbole_gacllm.compare import leaderboard
from recbole_gacllm.compare.job import Recorder
from recbole_gacllm.compare.leaderboard import run_leaderboard
from recbole_gacllm.compare.plan import baseline_files, make_plan
from recbole_gacllm.compare.results import Board
from recbole_gacllm.compare.rows import split_models, split_seeds, split_variant
from recbole_gacllm.compare.tables import write_latex
from recbole_gacllm.config import shipped_path
from recbole_gacllm.errors import GaCLLMError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def keys(settings):
    return {**settings, "use_text": False, "epochs": 1}


def observed(model, settings, protocol, **more):
    recorder = Recorder()
    files = [shipped_path("properties", "protocols", f"{protocol}.yaml")]
    done = runner.run(model, "tiny", files, {**settings, "epochs": 1, **more}, observer=recorder)
    return done.record, recorder


def stored(content, tmp_path):
    file = tmp_path / "per_user.npz"
    file.write_bytes(content)
    with np.load(file) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    ("model", "protocol"), [("BPR", "general"), ("EASE", "general"), ("SASRec", "sequential")]
)
def test_per_user_metrics_average_to_recboles_numbers(settings, tmp_path, model, protocol):
    record, recorder = observed(model, settings, protocol, topk=[5, 10])
    arrays = stored(recorder.per_user(record["test"], 4), tmp_path)
    users = arrays.pop("users")
    assert set(arrays) == set(record["test"])
    assert "ndcg@5" in arrays
    assert len(set(users)) == 24
    assert all(user.startswith("u") for user in users)
    for name, values in arrays.items():
        assert round(values.mean(), 4) == record["test"][name]


def test_per_user_metrics_that_do_not_average_to_the_result_are_refused(settings):
    record, recorder = observed("Pop", settings, "general")
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


def test_a_sequential_model_is_refused_on_a_random_split(keys):
    with pytest.raises(ValueError, match=r"SASRec is sequential.*--protocol=sequential"):
        make_plan(["BPR", "SASRec"], ["tiny"], 1, "general", config_dict=keys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (["BPR"], ["tiny"], 1, "other"),
            "protocol: 'other' is not one of cold, general, sequential",
        ),
        ((["BPR"], ["tiny"], 0), "seeds: 0"),
        ((["BPR"], ["tiny"], 1, "general", (), {}, 0), "nproc: 0"),
        ((["BPR", "BPR"], ["tiny"], 1), "models: 'BPR,BPR'"),
        ((["BRP"], ["tiny"], 1), "model: 'BRP' is neither GaCLLM"),
    ],
)
def test_a_bad_plan_is_refused_before_any_run(keys, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(*arguments, **({} if len(arguments) > 5 else {"config_dict": keys}))


def names(keys, **more):
    return [job.name for job in make_plan(["BPR"], ["tiny"], 1, config_dict={**keys, **more}).runs]


def test_a_run_is_addressed_by_what_determines_it_and_by_nothing_else(keys, dataset_root):
    before = names(keys)
    assert names(keys, checkpoint_dir="elsewhere", show_progress=True, worker=1) == before
    assert names(keys, learning_rate=0.1) != before
    assert names(keys, seed=2021) != before
    with (dataset_root / "tiny" / "tiny.inter").open("a") as file:
        file.write("u0\ti29\t5\t1\n")
    assert names(keys) != before


def test_a_variant_is_a_row_of_its_own_with_its_keys_over_the_users(keys):
    rows = split_models("GaCLLM,GaCLLM:n_layers=1:topk_=[5,10],EASE:reg_weight=7")
    assert rows == ["GaCLLM", "GaCLLM:n_layers=1:topk_=[5,10]", "EASE:reg_weight=7"]
    rows[1] = "GaCLLM:n_layers=1:reg_weight=0.1"
    plan = make_plan(rows, ["tiny"], 1, config_dict={**keys, "n_layers": 3, "reg_weight": 2})
    configs = {job.model: job.key["config"] for job in plan.runs}
    assert [configs[row]["n_layers"] for row in rows[:2]] == [3, 1]
    assert [configs[row]["reg_weight"] for row in rows] == [2, 0.1, 7]
    assert plan.summary["models"] == rows
    folders = {job.name for job in plan.runs}
    assert len(folders) == 3
    assert all("/" not in name and ":" not in name for name in folders)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("GaCLLM:x=[[1,2],[3,4]],EASE", ["GaCLLM:x=[[1,2],[3,4]]", "EASE"]),
        ("MultiVAE:mlp_hidden_size=[600],Pop", ["MultiVAE:mlp_hidden_size=[600]", "Pop"]),
        ("A:x=({1,2},[(3,4)]),B", ["A:x=({1,2},[(3,4)])", "B"]),
        ("A:x={'a':[1,2],'b':{'c':3,'d':4}}:y=2,B", ["A:x={'a':[1,2],'b':{'c':3,'d':4}}:y=2", "B"]),
        ("A:x='1,2',B:y=\"a,'b\",C", ["A:x='1,2'", 'B:y="a,\'b"', "C"]),
        ("A:x=['],',2],B", ["A:x=['],',2]", "B"]),
        (r"A:x='it\'s, so',B", [r"A:x='it\'s, so'", "B"]),
        ("A:x=children's,B:y=girls'", ["A:x=children's", "B:y=girls'"]),
    ],
)
def test_a_comma_within_brackets_or_quotes_does_not_end_a_row(text, rows):
    assert split_models(text) == rows


def test_a_value_may_be_a_mapping():
    row = "GaCLLM:text_value_names={'gender':{'M':'man'}}:n_layers=1:seeds=2"
    label, n_seeds = split_seeds(row, 3)
    assert n_seeds == 2
    assert split_variant(label) == (
        "GaCLLM",
        {"text_value_names": "{'gender':{'M':'man'}}", "n_layers": "1"},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A:x=[1,2,B", "has no ']' for what was opened"),
        ("A:x='1,2,B", 'has no "\'" for what was opened'),
        ("A:x=1],B", "has a ']' that nothing opened"),
        ("A:x=[(1],B", "has a ']' that nothing opened"),
    ],
)
def test_brackets_that_do_not_match_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        split_models(text)


def test_a_row_may_have_the_first_seeds_only_and_keeps_its_name_and_runs(keys):
    plan = make_plan(["BPR:learning_rate=0.1:seeds=1", "Pop"], ["tiny"], 2, config_dict=keys)
    assert [(job.model, job.seed) for job in plan.runs] == [
        ("BPR:learning_rate=0.1", 2020),
        ("Pop", 2020),
        ("Pop", 2021),
    ]
    assert plan.summary["models"] == ["BPR:learning_rate=0.1", "Pop"]
    whole = make_plan(["BPR:learning_rate=0.1"], ["tiny"], 2, config_dict=keys)
    assert whole.runs[0].name == plan.runs[0].name


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["BPR:seeds=2"], "'seeds=2' of 'BPR:seeds=2' must be a number from 1 to 1"),
        (["BPR:seeds=0"], "'seeds=0' of 'BPR:seeds=0' must be"),
        (["BPR:seeds=all"], "'seeds=all' of"),
        (["BPR:seeds=1:seeds=1"], "gives seeds twice"),
        (["BPR:epochs=1:epochs=2"], "gives epochs twice"),
        (["BPR", "BPR:seeds=1"], "must name each at least and at most once"),
        (["GaCLLM:use_text"], "'use_text' of 'GaCLLM:use_text' is not key=value"),
        (["BPR", "BPR:topk=5"], "topk of 'BPR:topk=5' must be the same for all"),
        (["BPR", "BPR:learning_rate=1.0e-4"], "'BPR' and 'BPR:learning_rate=1.0e-4' are the same"),
        (["GaCLLM:llm_modle=x"], "unknown key 'llm_modle'"),
    ],
)
def test_a_bad_variant_is_refused(keys, rows, message):
    with pytest.raises(ValueError, match=message):
        make_plan(rows, ["tiny"], 1, config_dict=keys)


def test_the_number_of_processes_is_part_of_a_runs_address(keys):
    def name(nproc):
        return make_plan(["BPR"], ["tiny"], 1, config_dict=keys, nproc=nproc).runs[0].name

    assert name(1) == names(keys)[0]
    assert name(2) != name(1)


def test_committed_hyper_parameters_are_used_and_the_users_win(keys):
    plan = make_plan(["EASE"], ["tiny"], 1, config_dict=keys)
    assert plan.runs[0].key["config"]["reg_weight"] == 1000.0
    plan = make_plan(["EASE"], ["tiny"], 1, config_dict={**keys, "reg_weight": 7.0})
    assert plan.runs[0].key["config"]["reg_weight"] == 7.0


def test_a_page_names_the_values_that_are_used_where_a_file_of_the_user_wins(keys, tmp_path):
    (tmp_path / "mine.yaml").write_text("reg_weight: 7.0\nlinear_weight: 0.75\n")
    keys = {**keys, "preset": "best"}
    files = [tmp_path / "mine.yaml"]
    plan = make_plan(["EASE", "GaCLLM"], ["tiny"], 1, config_files=files, config_dict=keys)
    assert plan.summary["tuned"]["tiny/EASE"]["values"] == {"reg_weight": 7.0}
    assert plan.summary["tuned"]["tiny/GaCLLM"]["values"]["linear_weight"] == 0.75


def test_every_committed_file_of_hyper_parameters_fits_its_model(keys):
    folder = shipped_path("properties", "baselines")
    models = sorted(file.stem for file in folder.glob("*.yaml"))
    plan = make_plan(models, ["tiny"], 1, "sequential", config_dict=keys)
    for job in plan.runs:
        assert baseline_files(job.model, "tiny")
        tuned = plan.summary["tuned"][f"tiny/{job.model}"]
        ((file, note),) = tuned["files"].items()
        assert file == f"properties/baselines/{job.model}.yaml"
        assert note.startswith("Source: ")
        assert "Best of: " in note
        for key, value in tuned["values"].items():
            found = job.key["config"][key]
            assert found == value or value.items() <= found.items()


def test_keys_of_the_split_reach_every_model(keys):
    given = {**keys, "train_share": "0.5"}
    plan = make_plan(["GaCLLM", "BPR", "TextKNN"], ["tiny"], 1, config_dict=given)
    assert [job.key["config"]["train_share"] for job in plan.runs] == [0.5] * 3
    assert [job.config_dict["train_share"] for job in plan.runs] == ["0.5"] * 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A board of GaCLLM, a variant, Pop, and CKE, which fails for want of a knowledge graph."""
    from tests.conftest import write_dataset

    root = tmp_path_factory.mktemp("board")
    keys = {
        "data_path": str(write_dataset(root / "data")),
        "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
        "use_text": False,
        "epochs": 1,
        "embedding_size": 8,
        "use_gpu": False,
    }
    rows = ["GaCLLM", "GaCLLM:n_layers=0", "CKE", "Pop"]
    plan = make_plan(rows, ["tiny"], 1, config_dict=keys)
    with contextlib.chdir(root):
        run_leaderboard(plan, root / "out", show_progress=False)
    return root / "out", plan


def test_a_failed_run_is_recorded_and_the_others_go_on(finished):
    folder, _ = finished
    board = Board.read(folder)
    rows = ["GaCLLM", "GaCLLM:n_layers=0", "Pop"]
    assert [run.record["model"] for run in board.runs] == rows
    assert [failure["model"] for failure in board.failures] == ["CKE"]
    assert "[tiny.kg] not found" in board.failures[0]["error"]
    assert any("Error" in line for line in board.failures[0]["log_tail"])


def test_the_numbers_are_those_of_a_run_alone(finished, tmp_path):
    folder, plan = finished
    job = next(job for job in plan.runs if job.model == "GaCLLM")
    alone = runner.run(
        "GaCLLM", "tiny", job.config_files, {**job.config_dict, "checkpoint_dir": str(tmp_path)}
    )
    run = next(run for run in Board.read(folder).runs if run.name == job.name)
    assert run.record["test"] == alone.record["test"]
    assert run.record["valid"] == alone.record["valid"]


def test_a_variant_is_tested_against_the_baseline_like_any_row(finished, tmp_path):
    import shutil

    from recbole_gacllm.compare.tables import export

    shutil.copytree(finished[0], tmp_path / "out")
    export(tmp_path / "out", baseline="GaCLLM:n_layers=0")
    table = json.loads((tmp_path / "out" / "results.json").read_text())["datasets"]["tiny"]
    assert table["baseline"] == "GaCLLM:n_layers=0"
    assert table["models"]["GaCLLM"]["metrics"]["ndcg@10"]["test"]["n_users"] == 24
    page = (tmp_path / "out" / "results" / "tiny.md").read_text()
    cells = " ".join(page.split())
    assert "sft_n_heldout=32<br/>" in cells  # what the preset sets
    assert "n_layers=0 | properties/presets/quick.yaml<br/>the command line |" in cells
    assert "- `properties/presets/quick.yaml`: Minutes on a 2-core laptop, every stage" in page
    run = next((tmp_path / "out" / "runs").glob("*Pop*/run.json"))
    commit = json.loads(run.read_text())["code"]["commit"] or "not in git"
    assert f"| **GaCLLM:n_layers=0** | 1 | {commit} | cpu | python " in cells
    assert "| baselines | 1 | | cpu | python " in cells


def test_recboles_latex_tables_hold_validation_and_test_metrics(finished, tmp_path):
    for part in ("valid", "test"):
        write_latex(Board.read(finished[0]), "tiny", part, tmp_path / "latex" / f"{part}.tex")
        text = (tmp_path / "latex" / f"{part}.tex").read_text()
        board = Board.read(finished[0])
        values = [run.record[part]["ndcg@10"] for run in board.runs]
        assert f"\\bfseries {max(values):.4f}" in text
        assert all(f"{value:.4f}" in text for value in values)
        assert "GaCLLM:n\\_layers=0 &" in text


@pytest.mark.slow
def test_runs_in_two_processes_have_exact_metrics_of_every_user(keys, tmp_path):
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
        leaderboard.children, "run_child", lambda name, *_, **__: started.append(name)
    )
    before = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/run.json")}
    failed = {file: file.read_bytes() for file in folder.glob("runs/*/failed.json")}
    run_leaderboard(plan, folder, show_progress=False)
    for file, content in failed.items():
        file.write_bytes(content)
    assert {name.split("-")[1] for name in started} == {"CKE"}
    assert {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/run.json")} == before


def test_different_splits_are_an_error_that_names_the_runs(finished, tmp_path):
    import shutil

    folder, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = next(copy.glob("runs/tiny-Pop-2020-*/run.json"))
    record = json.loads(file.read_text())
    record["split"]["test"] = "0" * 64
    file.write_text(json.dumps(record))
    with pytest.raises(GaCLLMError, match=r"splits of tiny-GaCLLM-2020-\w+ and tiny-Pop-2020-\w+"):
        Board.read(copy)


def test_a_run_with_another_split_than_its_neighbours_stops_before_training(settings):
    recorder = Recorder({"run": "tiny-EASE-2020", "split": {"test": "0"}})
    files = [shipped_path("properties", "protocols", "general.yaml")]
    with pytest.raises(GaCLLMError, match="this run's split differs from that of tiny-EASE-2020"):
        runner.run("Pop", "tiny", files, settings, observer=recorder)


def test_a_run_that_another_process_holds_is_left_to_it(keys, tmp_path, monkeypatch):
    plan = make_plan(["Pop"], ["tiny"], 2, config_dict=keys)
    held, free = (tmp_path / "out" / "runs" / job.name for job in plan.runs)
    held.mkdir(parents=True)
    lock = FileLock(held / ".lock", is_singleton=False)
    lock.acquire()
    started = []

    def child(name, folder, **_):
        started.append(name)
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
    plan = make_plan(["Pop"], ["tiny"], 1, config_dict=keys)
    with pytest.raises(ValueError, match=r"--output: '\S+/file' cannot be written \(.*Not a dir"):
        run_leaderboard(plan, tmp_path / "file", show_progress=False)


def test_another_command_on_the_folder_does_not_change_what_is_shown(keys, tmp_path, monkeypatch):
    mine = make_plan(["Pop"], ["tiny"], 1, config_dict=keys)
    other = make_plan(["BPR"], ["tiny"], 1, config_dict=keys)

    def with_another(*_):
        (tmp_path / leaderboard.PLAN_FILE).write_text(json.dumps(other.summary))
        return leaderboard.Outcome.DONE

    monkeypatch.setattr(leaderboard, "attempt", with_another)
    run_leaderboard(mine, tmp_path, show_progress=False)
    assert json.loads((tmp_path / leaderboard.PLAN_FILE).read_text())["models"] == ["Pop"]


@pytest.mark.slow
def test_a_killed_leaderboard_goes_on_where_it_was(settings, tmp_path):
    """SIGKILL within the first run, then after it: what was finished stands, the rest is made."""
    command = [
        *(sys.executable, str(ROOT / "run_recbole_gacllm.py"), "leaderboard"),
        *("--models=Pop", "--datasets=tiny", "--seeds=2", "--epochs=2", "--use_gpu=False"),
        *(f"--data_path={settings['data_path']}", f"--output={tmp_path / 'out'}"),
        f"--config_files={tmp_path / 'columns.yaml'}",
    ]
    columns = "load_col: {inter: [user_id, item_id, rating, timestamp]}\n"
    (tmp_path / "columns.yaml").write_text(columns)
    times = {}
    for sign in ("log.txt", "run.json"):
        board = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list(tmp_path.glob(f"out/runs/*/{sign}")):
            assert board.poll() is None, "ended before it was killed"
            time.sleep(0.02)
        board.send_signal(signal.SIGKILL)
        board.wait()
        done = tmp_path.glob("out/runs/*/run.json")
        times |= {file: file.stat().st_mtime_ns for file in done}
    assert len(times) == 1
    last = subprocess.run(command, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    runs = Board.read(tmp_path / "out").runs
    assert [run.record["seed"] for run in runs] == [2020, 2021]
    assert all(file.stat().st_mtime_ns == made for file, made in times.items())
    assert "| **Pop**" in last.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_list=BRP", "--datasets=ml-100k"], "model: 'BRP'"),
        (["-m", "BRP:learning_rate=0.1", "-d", "ml-100k"], "model: 'BRP'"),
        (["-m=BPR", "--baseline=EASE", "--dataset=ml-100k"], "baseline: 'EASE' is not one of"),
        (["-m=BPR", "-d=ml-100k,ml-1m", "--test_latex=a.tex"], "take one data set"),
        (["-m=BPR", "-d=ml-100k", "--epochs"], "'--epochs' is not of the form"),
    ],
)
def test_recboles_flags_work_and_mistakes_end_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["leaderboard", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_keys_of_gacllm_change_nothing_for_other_models(settings):
    ours = {"preset": "best", "use_text": "False", "epochs": "1", "n_layers": "4"}
    models = ["EASE", "LightGCN", "GaCLLM"]

    def plan(given):
        made = make_plan(models, ["tiny"], 1, config_dict={**settings, **given})
        return {job.model: job.name for job in made.runs}, made.summary["tuned"]

    names, tuned = plan(ours)
    plain, _ = plan({"epochs": "1"})
    assert names["EASE"] == plain["EASE"]
    assert names["LightGCN"] != plain["LightGCN"]  # n_layers is a key of RecBole's, too
    assert names["GaCLLM"] != plain["GaCLLM"]
    assert not {"preset", "use_text", "n_layers"} & set(tuned["tiny/EASE"]["given"])
    assert tuned["tiny/GaCLLM"]["given"].items() >= ours.items()
