"""What a leaderboard took: its command, environment, seconds, tokens, raw numbers of every run."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Sequence
from typing import Any

from recbole_gacllm.artifacts.csv_cells import csv_text
from recbole_gacllm.compare import markdown
from recbole_gacllm.compare import markdown as cells
from recbole_gacllm.compare.results import Board, FinishedRun
from recbole_gacllm.config import MODELS


def command(board: Board) -> str:
    """The command that makes a leaderboard again."""
    plan = board.plan
    n_all = len(plan["seeds"])
    models = [
        model if plan["n_seeds"][model] == n_all else f"{model}:seeds={plan['n_seeds'][model]}"
        for model in plan["models"]
    ]
    flags = [
        f"--models={','.join(models)}",
        f"--datasets={','.join(plan['datasets'])}",
        f"--seeds={n_all}",
        f"--protocol={plan['protocol']}",
        f"--seed={plan['seeds'][0]}",
        *(f"--{key}={value}" for key, value in plan["given"].items()),
    ]
    if plan["nproc"] > 1:
        flags.append(f"--nproc={plan['nproc']}")
    if plan["config_files"]:
        flags.append(f'--config_files="{" ".join(plan["config_files"])}"')
    return "python run_recbole_gacllm.py leaderboard " + " ".join(flags)


def costs(run: FinishedRun) -> dict[str, Any]:
    """Seconds of a run, and the tokens that its LLM stages took when they were made.

    A stage that several runs share is counted in each of them.
    """
    tokens: dict[str, int] = {}
    for stage, manifest in run.record.get("stages", {}).items():
        reports = [manifest, *manifest.get("layers", [])]
        for report in reports:
            for key, value in report.items():
                if "tokens" in key and isinstance(value, int):
                    tokens[f"{stage}.{key}"] = tokens.get(f"{stage}.{key}", 0) + value
    return {"seconds": run.record["seconds"], "tokens": tokens, "device": run.record["device"]}


def cost_rows(board: Board, dataset: str) -> list[list[str]]:
    """A row for each model: mean seconds of a run, and of its training; tokens of its LLM stages.

    The seconds of a run hold those of the stages that it made itself, not of those it reused.
    """
    rows = []
    for model in board.plan["models"]:
        runs = board.of(dataset, model)
        if not runs:
            continue
        seconds = [run.record["seconds"] for run in runs]
        tokens = [costs(run)["tokens"] for run in runs]
        sums = [
            statistics.mean(
                sum(count for name, count in of_run.items() if name.endswith(kind))
                for of_run in tokens
            )
            for kind in ("prompt_tokens", "output_tokens")
        ]
        rows.append(
            [
                markdown.bold(model),
                f"{len(runs)}",
                *(f"{statistics.mean(each[what] for each in seconds):,.1f}" for what in _SECONDS),
                *(f"{total:,.0f}" for total in sums),
            ]
        )
    return rows


_SECONDS = ("total", "train")


def environment_rows(board: Board, dataset: str) -> list[list[str]]:
    """A row for each environment that runs were made in: its runs, device, packages.

    The code of this package stands in it for the rows that it determines: baselines are RecBole's.
    """
    numbers: collections.Counter[tuple[str, ...]] = collections.Counter()
    for model in board.plan["models"]:
        ours = model.partition(":")[0] in MODELS
        for run in board.of(dataset, model):
            record = run.record
            name, commit = ("baselines", "")
            if ours:
                name, commit = markdown.bold(model), record["code"]["commit"] or "not in git"
            packages = ", ".join(map(" ".join, record["versions"].items()))
            about = (commit, record["device"], packages)
            numbers[name, *map(cells.markdown, about)] += 1
    return [[name, f"{n}", *rest] for (name, *rest), n in numbers.items()]


def runs_to_csv(board: Board) -> str:
    """One row for each finished run: seconds, commit, validation and test metrics."""
    metrics = list(dict.fromkeys(name for run in board.runs for name in run.record["test"]))
    rows: list[Sequence[Any]] = [
        [
            *("dataset", "model", "seed", "seconds_total", "seconds_train", "commit"),
            *(f"{part}_{metric}" for part in _PARTS for metric in metrics),
        ]
    ]
    for run in board.runs:
        record = run.record
        rows.append(
            [
                *(record[key] for key in ("dataset", "model", "seed")),
                *(record["seconds"][what] for what in _SECONDS),
                record["code"]["commit"] or "",
                *((record[part] or {}).get(name, "") for part in _PARTS for name in metrics),
            ]
        )
    return csv_text(rows)


_PARTS = ("valid", "test")
