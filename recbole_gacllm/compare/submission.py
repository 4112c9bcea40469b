"""``submission/``: what a leaderboard's maintainer needs to trust a table; its README lists it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from pathlib import Path

import yaml

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.artifacts.hashing import sha256
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
    copies = [*tables]
    for run in board.runs:
        copies += [run.folder / name for name in (RUN_FILE, PER_USER_FILE, DEGREES_FILE)]
    for file in copies:
        copy = target / file.relative_to(board.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    records = {run.name: run.record for run in board.runs}
    for name, record in records.items():
        config = yaml.safe_dump(record["config"], sort_keys=True, allow_unicode=True)
        (target / "runs" / name / "config.yaml").write_text(config, "utf-8")
    packages = {
        str(package.metadata["Name"]): package.version
        for package in importlib.metadata.distributions()
    }
    pages = {
        "splits.json": {name: record["split"] for name, record in records.items()},
        "environment.json": {
            "code": board.plan["code"],
            "code_of_runs": {name: record["code"] for name, record in records.items()},
            "versions_of_runs": {name: record["versions"] for name, record in records.items()},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": dict(sorted(packages.items())),
        },
        "costs.json": {run.name: costs(run) for run in board.runs},
        "leakage_audit.json": {
            name: record["leakage_audit"]
            for name, record in records.items()
            if "leakage_audit" in record
        },
    }
    for name, content in pages.items():
        (target / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
    readme = _README.format(command=" ".join(command(board).split()))
    (target / "README.md").write_text(readme, "utf-8")
    sums = [
        f"{sha256(file)}  {file.relative_to(target).as_posix()}\n"
        for file in sorted(target.rglob("*"))
        if file.is_file()
    ]
    (target / "SHA256SUMS").write_text("".join(sums), "utf-8")
