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

import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from recbole_gacllm.artifacts import children, disk
from recbole_gacllm.compare.job import LOG_FILE, RUN_FILE
from recbole_gacllm.compare.plan import Job, Plan
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inspection.data_door import check_plan

logger = logging.getLogger(__name__)

PLAN_FILE = "leaderboard.json"
FAILED_FILE = "failed.json"
SECONDS_BETWEEN_LOOKS = 1.0
_LOG_TAIL_LINES = 20
# As RecBole's trainer writes it: "epoch 3 evaluating [time: 0.1s, valid_score: 0.2]", in colours.
_EPOCH = re.compile(r"epoch (\d+) evaluating.*?valid_score\S*: (-?[\d.]+)")


class Outcome(Enum):
    """What became of a run."""

    DONE = "done"
    FAILED = "failed"
    BUSY = "busy"


def run_leaderboard(plan: Plan, output: Path, show_progress: bool = True) -> Path:
    """Make every run of a plan that is not finished yet; a failed run is recorded, the rest go on.

    Start it again after a kill, or on several machines on one folder: a file lock a run sees to it
    that each is made once. A run that had failed before this start is tried again.

    Args:
        plan: Of :func:`recbole_gacllm.compare.plan.make_plan`.
        output: Folder of the leaderboard, on a file system with working locks.
        show_progress: A bar: runs done, the current run with its epoch and score, time left.

    Returns:
        ``output``.

    Raises:
        ValueError: If the folder cannot be written.
        GaCLLMError: If the disk is full.
    """
    try:
        (output / "runs").mkdir(parents=True, exist_ok=True)
        _write_plan(output, plan)
    except (OSError, GaCLLMError) as error:
        raise ValueError(
            f"--output: {str(output)!r} cannot be written ({error}). Give a folder that this user "
            "may write, on a disk with room."
        ) from error
    runs = [(job, output / "runs" / job.name) for job in plan.jobs]
    failed_before = {folder: read_if_there(folder / FAILED_FILE) for _, folder in runs}
    n_done = sum((folder / RUN_FILE).is_file() for _, folder in runs)
    with tqdm(total=len(runs), initial=n_done, unit="run", disable=not show_progress) as bar:
        waiting = [(job, folder) for job, folder in runs if not (folder / RUN_FILE).is_file()]
        while waiting:
            busy = []
            for job, folder in waiting:
                label = f"{job.dataset} {job.model} seed {job.seed}"
                with watched(bar, label, folder):
                    same_split = [
                        other_folder
                        for other, other_folder in runs
                        if (other.dataset, other.seed) == (job.dataset, job.seed)
                    ]
                    outcome = attempt(job, folder, failed_before[folder], same_split)
                if outcome is Outcome.BUSY:
                    busy.append((job, folder))
                else:
                    bar.update()
            if len(busy) == len(waiting):
                time.sleep(SECONDS_BETWEEN_LOOKS)  # others work on all that is left
            waiting = busy
    _write_plan(output, plan)  # another command on this folder may have written its own meanwhile
    return output


def check_data(plan: Plan, output: Path) -> None:
    """Read the data of all runs that are not finished, before the first is made.

    Raises:
        ValueError: If it cannot serve.
    """
    missing = [job for job in plan.jobs if not (output / "runs" / job.name / RUN_FILE).is_file()]
    check_plan(job.arguments for job in missing)


def _write_plan(output: Path, plan: Plan) -> None:
    text = json.dumps(plan.summary, indent=2, ensure_ascii=False)
    disk.write_atomic(output / PLAN_FILE, text.encode())


def attempt(
    job: Job, folder: Path, failed_before: bytes | None, same_split: Iterable[Path]
) -> Outcome:
    """Make one run, unless it is made already or another process is at it.

    Args:
        job: The run.
        folder: Its folder.
        failed_before: Content of its ``failed.json`` when we started; it is tried once more.
        same_split: Folders of runs that must have the same split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return Outcome.BUSY
    try:
        if (folder / RUN_FILE).is_file():
            return Outcome.DONE
        if (failed := read_if_there(folder / FAILED_FILE)) is not None and failed != failed_before:
            return Outcome.FAILED  # another process has just tried
        shutil.rmtree(folder / "saved", ignore_errors=True)  # of a killed attempt
        (folder / LOG_FILE).unlink(missing_ok=True)
        description = {
            "model": job.model,
            "dataset": job.dataset,
            "seed": job.seed,
            "config_files": job.config_files,
            "config_dict": job.config_dict,
            "key": job.key,
            "nproc": job.nproc,
            "expected": _known_split(same_split),
        }
        disk.write_atomic(folder / "job.json", json.dumps(description, indent=2).encode())
        logger.info("%s starts; its log: %s", job.name, folder / LOG_FILE)
        try:
            children.run_child(job.name, folder, module="recbole_gacllm.compare.job")
        except (ValueError, GaCLLMError) as error:
            _record_failure(job, folder, str(error))
            return Outcome.FAILED
        (folder / FAILED_FILE).unlink(missing_ok=True)
        logger.info("%s is done", job.name)
        return Outcome.DONE
    finally:
        lock.release()


def _known_split(folders: Iterable[Path]) -> dict[str, Any] | None:
    """Name and split hashes of the first finished run."""
    for folder in folders:
        if (content := read_if_there(folder / RUN_FILE)) is not None:
            return {"run": folder.name, "split": json.loads(content)["split"]}
    return None


def _record_failure(job: Job, folder: Path, error: str) -> None:
    log = (read_if_there(folder / LOG_FILE) or b"").decode("utf-8", "replace")
    record = {
        "model": job.model,
        "dataset": job.dataset,
        "seed": job.seed,
        "error": error,
        "log": str(folder / LOG_FILE),
        "log_tail": log.splitlines()[-_LOG_TAIL_LINES:],
        "time": time.time(),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    disk.write_atomic(folder / FAILED_FILE, text.encode())
    logger.error("%s failed, the others go on: %s", job.name, error)


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
