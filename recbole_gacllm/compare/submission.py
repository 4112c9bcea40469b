"""A folder with what a leaderboard's maintainer needs to trust a table.

submission/README.md               what is in it
submission/results.json, .csv      the tables
submission/results/                pages
submission/runs/<run>/             run.json, per_user.npz, config.yaml of every run
submission/splits.json             hashes of train, valid and test of every run
submission/environment.json        code version, packages
submission/costs.json              seconds, and tokens of the LLM stages
submission/leakage_audit.json
submission/SHA256SUMS
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from pathlib import Path

import yaml

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.compare.costs import command, costs
from recbole_gacllm.compare.degrees import DEGREES_FILE
from recbole_gacllm.compare.job import PER_USER_FILE, RUN_FILE
from recbole_gacllm.compare.results import Board
from recbole_gacllm.compare.tables import export

_README = """\
# Submission

| | |
|---|---|
| `results/`, `results.csv`, `results.json` | tables, tests, intervals |
| `runs.csv` | every run's metrics and seconds |
| `runs/<run>/run.json` | metrics, seconds, versions, resolved configuration, split hashes |
| `runs/<run>/per_user.npz` | every user's test metrics: `users` and one array for each metric |
| `runs/<run>/config.yaml` | the resolved configuration alone |
| `splits.json` | SHA-256 of train, valid and test (sorted user-item pairs) of every run |
| `environment.json` | code version and installed packages |
| `costs.json` | seconds of every run, tokens of its LLM stages |
| `leakage_audit.json` | whether a text or a graph held a held-out pair, for runs with texts |
| `SHA256SUMS` | check with `sha256sum -c SHA256SUMS` |

Made again by:

    {command}
"""


def write_submission(folder: Path, baseline: str | None = None) -> Path:
    """Write ``submission/`` of a leaderboard's folder, anew.

    Returns:
        Its path.

    Raises:
        ValueError: If there is no leaderboard, no finished run, or no such baseline.
        GaCLLMError: If splits differ between runs.
    """
    target = folder / "submission"
    with manifests.stage_lock(folder):  # another process on the folder may come to its end, too
        tables = export(folder, baseline)
        if target.exists():
            shutil.rmtree(target)
        _write(Board.read(folder), target, tables)
    return target


def _write(board: Board, target: Path, tables: list[Path]) -> None:
    for file in tables:
        copy = target / file.relative_to(board.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    for run in board.runs:
        copy = target / "runs" / run.name
        copy.mkdir(parents=True)
        for name in (RUN_FILE, PER_USER_FILE, DEGREES_FILE):
            if (run.folder / name).is_file():  # some have no degrees
                shutil.copyfile(run.folder / name, copy / name)
        config = yaml.safe_dump(run.record["config"], sort_keys=True, allow_unicode=True)
        (copy / "config.yaml").write_text(config, "utf-8")
    packages = {
        str(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()
    }
    pages = {
        "splits.json": {run.name: run.record["split"] for run in board.runs},
        "environment.json": {
            "code": board.plan["code"],
            "code_of_runs": {run.name: run.record["code"] for run in board.runs},
            "versions_of_runs": {run.name: run.record["versions"] for run in board.runs},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": dict(sorted(packages.items())),
        },
        "costs.json": {run.name: costs(run) for run in board.runs},
        "leakage_audit.json": {
            run.name: run.record["leakage_audit"]
            for run in board.runs
            if "leakage_audit" in run.record
        },
    }
    for name, content in pages.items():
        (target / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
    (target / "README.md").write_text(
        _README.format(command=" ".join(command(board).split())), "utf-8"
    )
    sums = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(target).as_posix()}\n"
        for file in sorted(target.rglob("*"))
        if file.is_file()
    ]
    (target / "SHA256SUMS").write_text("".join(sums), "utf-8")
