"""Names of runs: no two have one, however many start in a second."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from recbole_gacllm.cli.main import main
from recbole_gacllm.plugin.run_folder import claimed, require_writable
from recbole_gacllm.run import run

from .conftest import fresh_process

SECOND = "Nov-29-2026_10-00-00"


@pytest.fixture
def one_second(monkeypatch):
    """The clock stands still."""
    monkeypatch.setattr(time, "strftime", lambda *_: SECOND)


@pytest.fixture
def runs(tmp_path):
    return require_writable(str(tmp_path))


def names_of(runs, *starts):
    names = []
    for dataset, model in starts:
        with claimed(runs, dataset, model) as folder:
            (folder / "run.json").touch()
            names.append(folder.name)
    return names


def test_runs_of_one_second_are_numbered_as_their_checkpoints_are_named(runs, one_second):
    """By the model, whatever the data set."""
    starts = ("tiny", "BPR"), ("tiny", "BPR"), ("tiny", "EASE"), ("tiny", "BPR"), ("other", "BPR")
    assert names_of(runs, *starts) == [
        f"tiny-BPR-{SECOND}",
        f"tiny-BPR-{SECOND}-2",
        f"tiny-EASE-{SECOND}",
        f"tiny-BPR-{SECOND}-3",
        f"other-BPR-{SECOND}-4",
    ]


def test_a_checkpoint_of_recboles_own_runs_is_not_overwritten(runs, tmp_path, one_second):
    (tmp_path / f"BPR-{SECOND}.pth").touch()
    assert names_of(runs, ("tiny", "BPR")) == [f"tiny-BPR-{SECOND}-2"]


def test_a_run_that_fails_leaves_no_folder(runs):
    with pytest.raises(ValueError, match="bad"), claimed(runs, "tiny", "BPR"):
        raise ValueError("bad")
    assert not list(runs.glob("tiny-*"))


def claim(runs, barrier, names):
    barrier.wait()
    names += names_of(runs, ("tiny", "BPR"))


def test_processes_that_claim_at_once_get_a_name_each(runs, one_second):
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        names, barrier = manager.list(), manager.Barrier(6)
        processes = [context.Process(target=claim, args=(runs, barrier, names)) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert len(names) == len(set(names)) == 6


def start(flags):
    time.strftime = lambda *_: SECOND
    main(flags)


@pytest.mark.slow
def test_three_seeds_started_at_once_have_the_numbers_of_each_alone(settings, tmp_path):
    keys = {**settings, "epochs": 3}
    flags = ["--dataset=tiny", "--model=BPR", "--quiet"]
    flags += [f"--{key}={value}" for key, value in keys.items() if key != "load_col"]
    columns = tmp_path / "columns.yaml"
    columns.write_text("load_col: {inter: [user_id, item_id, rating, timestamp]}\n")
    flags.append(f"--config_files={columns}")
    processes = [fresh_process(start, [*flags, f"--seed={seed}"]) for seed in (1, 2, 3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    records = [json.loads(file.read_text()) for file in tmp_path.glob("saved/runs/*/run.json")]
    assert sorted(record["seed"] for record in records) == [1, 2, 3]
    names = {f"BPR-{SECOND}.pth", f"BPR-{SECOND}-2.pth", f"BPR-{SECOND}-3.pth"}
    assert {Path(record["checkpoint"]).name for record in records} == names
    assert {file.name for file in tmp_path.glob("saved/*.pth")} == names
    assert len(list(tmp_path.glob("log/BPR/*.log"))) == 3
    assert len(list(tmp_path.glob("log_tensorboard/*"))) == 3
    for record in records:
        alone = run("BPR", "tiny", config_dict={**keys, "seed": record["seed"]})
        assert record["test"] == alone.record["test"]
        assert record["valid"] == alone.record["valid"]
