"""Runs of a leaderboard: each once, in a process of its own, resumable, shared by many processes.

    OUTPUT/leaderboard.json             what is compared
    OUTPUT/runs/<run>/run.json          a finished run, written last and atomically
                      per_user.npz      every user's test metrics
                      failed.json       why a run failed, instead
                      job.json log.txt saved/

A run's folder is named by a fingerprint of all that determines it, so a run is never made twice,
and a changed setting never finds an old result.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from recbole_gacllm.artifacts import children, disk
from recbole_gacllm.compare.job import LOG_FILE, RUN_FILE
from recbole_gacllm.compare.plan import Plan, PlannedRun
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inspection.data_door import check_plan

logger = logging.getLogger(__name__)

PLAN_FILE = "leaderboard.json"
FAILED_FILE = "failed.json"
SECONDS_BETWEEN_LOOKS = 1.0
_LOG_TAIL_LINES = 20
# As RecBole's trainer writes it: "epoch 3 evaluating [time: 0.1s, valid_score: 0.2]", in colours.
_EPOCH = re.compile(r"epoch (\d+) evaluating.*?valid_score\S*: (-?[\d.]+)")


Outcome = Enum("Outcome", ["DONE", "FAILED", "BUSY"])  # what became of a run


def run_leaderboard(plan: Plan, output: Path, show_progress: bool = True) -> None:
    """Make every run of a plan that is not finished yet; a failed run is recorded, the rest go on.

    Start it again after a kill, or on several machines on one folder: a file lock a run sees to it
    that each is made once. A run that had failed before this start is tried again.

    Args:
        plan: What is compared.
        output: Folder of the leaderboard, on a file system with working locks.
        show_progress: A bar: runs done, the current run with its epoch and score, time left.

    Raises:
        ValueError: If the folder cannot be written.
        GaCLLMError: If the disk is full.
    """
    try:
        (output / "runs").mkdir(parents=True, exist_ok=True)
        _write_json(output / PLAN_FILE, plan.summary)
    except (OSError, GaCLLMError) as error:
        raise ValueError(
            f"--output: {str(output)!r} cannot be written ({error}). Give a folder that this user "
            "may write, on a disk with room."
        ) from error
    runs = [(run, output / "runs" / run.name) for run in plan.runs]
    failed_before = {folder: read_if_there(folder / FAILED_FILE) for _, folder in runs}
    waiting = [(run, folder) for run, folder in runs if not (folder / RUN_FILE).is_file()]
    n_done = len(runs) - len(waiting)
    with tqdm(total=len(runs), initial=n_done, unit="run", disable=not show_progress) as bar:
        while waiting:
            busy = []
            for run, folder in waiting:
                same_split = [
                    other_folder
                    for other, other_folder in runs
                    if (other.dataset, other.seed) == (run.dataset, run.seed)
                ]
                with watched(bar, f"{run.dataset} {run.model} seed {run.seed}", folder):
                    outcome = attempt(run, folder, failed_before[folder], same_split)
                if outcome is Outcome.BUSY:
                    busy.append((run, folder))
                else:
                    bar.update()
            if len(busy) == len(waiting):
                time.sleep(SECONDS_BETWEEN_LOOKS)  # others work on all that is left
            waiting = busy
    # Another command on this folder may have written its own meanwhile.
    _write_json(output / PLAN_FILE, plan.summary)


def check_data(plan: Plan, output: Path) -> None:
    """Read the data of all runs that are not finished; raises ``ValueError`` if it cannot serve."""
    finished = {file.parent.name for file in output.glob(f"runs/*/{RUN_FILE}")}
    check_plan(run.arguments for run in plan.runs if run.name not in finished)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    disk.write_atomic(file, json.dumps(content, indent=2, ensure_ascii=False).encode())


def attempt(
    run: PlannedRun, folder: Path, failed_before: bytes | None, same_split: Iterable[Path]
) -> Outcome:
    """Make one run in its folder, unless it is made already or another process is at it.

    Args:
        run: What to make.
        folder: Where.
        failed_before: Content of its ``failed.json`` when we started; it is tried once more.
        same_split: Folders of runs that must have the same split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            return _attempt(run, folder, failed_before, same_split)
    except Timeout:
        return Outcome.BUSY


def _attempt(
    run: PlannedRun, folder: Path, failed_before: bytes | None, same_split: Iterable[Path]
) -> Outcome:
    if (folder / RUN_FILE).is_file():
        return Outcome.DONE
    if read_if_there(folder / FAILED_FILE) not in (None, failed_before):
        return Outcome.FAILED  # another process has just tried
    shutil.rmtree(folder / "saved", ignore_errors=True)  # of a killed attempt
    (folder / LOG_FILE).unlink(missing_ok=True)
    _write_json(
        folder / "job.json", {**dataclasses.asdict(run), "expected": _first_split(same_split)}
    )
    logger.info("%s starts; its log: %s", run.name, folder / LOG_FILE)
    try:
        children.run_child(run.name, folder, module="recbole_gacllm.compare.job")
    except (ValueError, GaCLLMError) as error:
        log = (read_if_there(folder / LOG_FILE) or b"").decode("utf-8", "replace")
        failure = {
            "model": run.model,
            "dataset": run.dataset,
            "seed": run.seed,
            "error": str(error),
            "log": str(folder / LOG_FILE),
            "log_tail": log.splitlines()[-_LOG_TAIL_LINES:],
            "time": time.time(),
        }
        _write_json(folder / FAILED_FILE, failure)
        logger.error("%s failed, the others go on: %s", run.name, error)
        return Outcome.FAILED
    (folder / FAILED_FILE).unlink(missing_ok=True)
    logger.info("%s is done", run.name)
    return Outcome.DONE


def _first_split(folders: Iterable[Path]) -> dict[str, Any] | None:
    """Name and split hashes of the first finished run."""
    for folder in folders:
        if (content := read_if_there(folder / RUN_FILE)) is not None:
            return {"run": folder.name, "split": json.loads(content)["split"]}
    return None


@contextmanager
def watched(bar: tqdm[Any], label: str, folder: Path) -> Iterator[None]:
    """Show a run's epoch and validation score beside the bar while it goes on."""
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(SECONDS_BETWEEN_LOOKS):
            tail = (read_if_there(folder / LOG_FILE) or b"")[-20_000:].decode("utf-8", "replace")
            epochs = _EPOCH.findall(tail)
            state = f", epoch {epochs[-1][0]}, valid {epochs[-1][1]}" if epochs else ""
            bar.set_postfix_str(label + state)

    thread = threading.Thread(target=follow, daemon=True)
    bar.set_postfix_str(label)
    if not bar.disable:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def read_if_there(file: Path) -> bytes | None:
    """Content of a file, None if there is none."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
