"""What a leaderboard took: its command, environment, seconds, tokens, raw numbers of every run."""

from __future__ import annotations

import collections
import statistics
from typing import Any

from recbole_gacllm.compare import markdown
from recbole_gacllm.compare.results import Board, FinishedRun
from recbole_gacllm.config import MODELS

_SECONDS = ("total", "train")


def command(board: Board) -> str:
    """The command that makes a leaderboard again."""
    plan = board.plan
    n_all = len(plan["seeds"])
    models = [
        model if n_seeds == n_all else f"{model}:seeds={n_seeds}"
        for model, n_seeds in plan["n_seeds"].items()
    ]
    flags = {
        "models": ",".join(models),
        "datasets": ",".join(plan["datasets"]),
        "seeds": n_all,
        "protocol": plan["protocol"],
        "seed": plan["seeds"][0],
        **plan["given"],
    }
    if plan["nproc"] > 1:
        flags["nproc"] = plan["nproc"]
    if plan["config_files"]:
        flags["config_files"] = " ".join(plan["config_files"])
    words = [
        f'--{name}="{value}"' if " " in str(value) else f"--{name}={value}"
        for name, value in flags.items()
    ]
    return " ".join(["python run_recbole_gacllm.py leaderboard", *words])


def costs(run: FinishedRun) -> dict[str, Any]:
    """Seconds of a run, and the tokens that its LLM stages took when they were made.

    A stage that several runs share is counted in each of them.
    """
    tokens: collections.Counter[str] = collections.Counter()
    for stage, manifest in run.record.get("stages", {}).items():
        for report in (manifest, *manifest.get("layers", [])):
            for name, value in report.items():
                if "tokens" in name and isinstance(value, int):
                    tokens[f"{stage}.{name}"] += value
    return {"seconds": run.record["seconds"], "tokens": tokens, "device": run.record["device"]}


def cost_rows(board: Board, dataset: str) -> list[list[str]]:
    """A row for each model: mean seconds of a run, and of its training; tokens of its LLM stages.

    The seconds of a run hold those of the stages that it made itself, not of those it reused.
    """
    rows = []
    for model, runs in board.by_model(dataset).items():
        seconds = [
            statistics.mean(run.record["seconds"][what] for run in runs) for what in _SECONDS
        ]
        tokens = [
            statistics.mean(
                sum(n for name, n in costs(run)["tokens"].items() if name.endswith(kind))
                for run in runs
            )
            for kind in ("prompt_tokens", "output_tokens")
        ]
        means = [*(f"{mean:,.1f}" for mean in seconds), *(f"{mean:,.0f}" for mean in tokens)]
        rows.append([markdown.bold(model), f"{len(runs)}", *means])
    return rows


def environment_rows(board: Board, dataset: str) -> list[list[str]]:
    """A row for each environment that runs were made in: its runs, device, packages.

    The code of this package stands in it for the rows that it determines: baselines are RecBole's.
    """
    numbers: collections.Counter[tuple[str, ...]] = collections.Counter()
    for model, runs in board.by_model(dataset).items():
        for record in (run.record for run in runs):
            name, commit = "baselines", ""
            if model.partition(":")[0] in MODELS:
                name, commit = markdown.bold(model), record["code"]["commit"] or "not in git"
            packages = ", ".join(map(" ".join, record["versions"].items()))
            numbers[name, *map(markdown.markdown, (commit, record["device"], packages))] += 1
    return [[name, f"{n}", *rest] for (name, *rest), n in numbers.items()]


def runs_to_csv(board: Board) -> str:
    """One row for each finished run: seconds, commit, validation and test metrics."""
    metrics = dict.fromkeys(name for run in board.runs for name in run.record["test"])
    rows = []
    for record in (run.record for run in board.runs):
        row = {name: record[name] for name in ("dataset", "model", "seed")}
        row |= {f"seconds_{what}": record["seconds"][what] for what in _SECONDS}
        row["commit"] = record["code"]["commit"]
        for part in ("valid", "test"):
            row |= {f"{part}_{name}": (record[part] or {}).get(name) for name in metrics}
        rows.append(row)
    return markdown.csv_text(rows)
