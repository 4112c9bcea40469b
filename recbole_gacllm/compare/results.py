"""Reading a leaderboard's folder: finished runs, failed ones, and the proof of equal splits."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gacllm.artifacts.locate import inside
from recbole_gacllm.compare.degrees import DEGREES_FILE, by_degree
from recbole_gacllm.compare.job import PER_USER_FILE, RUN_FILE
from recbole_gacllm.compare.leaderboard import FAILED_FILE, PLAN_FILE
from recbole_gacllm.compare.significance import compare, marks, mean_interval
from recbole_gacllm.errors import GaCLLMError

DECIMALS = 4


@dataclass(frozen=True)
class FinishedRun:
    """A run with its ``run.json`` and its folder."""

    name: str
    folder: Path
    record: dict[str, Any]

    def per_user(self, metric: str) -> pd.Series[float] | None:
        """A metric's value of every user, by raw token; None if the metric has none per user.

        Users with several test rows (sequential models on a ratio split) count with their mean.
        """
        with np.load(self.folder / PER_USER_FILE) as stored:
            if metric not in stored:
                return None
            values = pd.Series(stored[metric], index=stored["users"])
        return values.groupby(level=0, sort=True).mean()

    def degrees(self) -> dict[str, Any]:
        """The arrays of ``degrees.npz``."""
        with np.load(self.folder / DEGREES_FILE) as stored:
            return dict(stored)


@dataclass(frozen=True)
class Board:
    """A leaderboard's folder as it stands.

    Attributes:
        plan: ``leaderboard.json``.
        runs: Finished runs, in the order of the plan.
        failures: ``failed.json`` of those that failed.
        n_missing: Runs that neither finished nor failed.
    """

    folder: Path
    plan: dict[str, Any]
    runs: list[FinishedRun]
    failures: list[dict[str, Any]]
    n_missing: int

    @classmethod
    def read(cls, folder: Path) -> Board:
        """Read what is there.

        Raises:
            ValueError: If the folder holds no leaderboard.
            GaCLLMError: If runs of one data set and seed had different splits; names them.
        """
        file = folder / PLAN_FILE
        if not file.is_file():
            raise ValueError(f"{folder} holds no {PLAN_FILE}; the command leaderboard writes it.")
        plan = json.loads(file.read_text("utf-8"))
        runs, failures, n_missing = [], [], 0
        for name in plan["runs"]:
            path = inside(folder / "runs", name)
            if (path / RUN_FILE).is_file():
                record = json.loads((path / RUN_FILE).read_text("utf-8"))
                runs.append(FinishedRun(name, path, record))
            elif (path / FAILED_FILE).is_file():
                failures.append(json.loads((path / FAILED_FILE).read_text("utf-8")))
            else:
                n_missing += 1
        board = cls(folder, plan, runs, failures, n_missing)
        board._require_equal_splits()
        return board

    def of(self, dataset: str, model: str | None = None) -> list[FinishedRun]:
        """Finished runs of a data set, or of one model on it."""
        return [
            run
            for run in self.runs
            if run.record["dataset"] == dataset and model in (None, run.record["model"])
        ]

    def by_model(self, dataset: str) -> dict[str, list[FinishedRun]]:
        """The same by model, in the order of the tables; of those that have any."""
        runs = {model: self.of(dataset, model) for model in self.plan["models"]}
        return {model: of_model for model, of_model in runs.items() if of_model}

    def _require_equal_splits(self) -> None:
        first: dict[tuple[str, int], FinishedRun] = {}
        for run in self.runs:
            other = first.setdefault((run.record["dataset"], run.record["seed"]), run)
            if other.record["split"] != run.record["split"]:
                raise GaCLLMError(
                    f"the splits of {other.name} and {run.name} differ, so their numbers cannot be "
                    "compared. Did the data or the code change between them? Delete the folders of "
                    f"the old ones under {self.folder / 'runs'} and start again."
                )


def summarize(board: Board, baseline: str | None = None) -> dict[str, Any]:
    """All tables as plain values: mean, deviation, intervals, marks, tests, for each data set.

    Args:
        board: A leaderboard.
        baseline: What every model is tested against; default the first one named that has results.

    Raises:
        ValueError: If the baseline is none of the models.
    """
    plan = board.plan
    require_baseline(baseline, plan["models"])
    return {
        "protocol": plan["protocol"],
        "seeds": plan["seeds"],
        "code": plan["code"],
        "n_missing": board.n_missing,
        "failures": [
            {key: failure[key] for key in ("model", "dataset", "seed", "error")}
            for failure in board.failures
        ],
        "datasets": {
            dataset: _dataset_table(board, dataset, baseline)
            for dataset in plan["datasets"]
            if board.of(dataset)
        },
    }


def require_baseline(baseline: str | None, models: list[str]) -> None:
    """Refuse a baseline that is none of the models."""
    if baseline is not None and baseline not in models:
        raise ValueError(f"baseline: {baseline!r} is not one of the models: {', '.join(models)}.")


def _dataset_table(board: Board, dataset: str, baseline: str | None) -> dict[str, Any]:
    by_model = board.by_model(dataset)
    reference = baseline if baseline in by_model else next(iter(by_model))
    first = next(iter(by_model.values()))[0].record
    rows: dict[str, dict[str, Any]] = {
        model: {"seeds": [run.record["seed"] for run in runs], "metrics": {}}
        for model, runs in by_model.items()
    }
    most = max(len(row["seeds"]) for row in rows.values())
    for metric in first["test"]:
        scores: dict[str, dict[int, pd.Series[float]]] = {}
        for model, runs in by_model.items():
            for run in runs:
                if (of_users := run.per_user(metric)) is not None:
                    scores.setdefault(model, {})[run.record["seed"]] = of_users
        tests = compare(scores, reference) if reference in scores else {}
        means = {}
        for model, runs in by_model.items():
            values = [run.record["test"][metric] for run in runs]
            rows[model]["metrics"][metric] = {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "values": values,
                "interval": mean_interval(scores[model]) if model in scores else None,
                "test": dataclasses.asdict(tests[model]) if model in tests else None,
            }
            if len(values) == most:  # a mean over fewer splits is not ranked
                means[model] = round(statistics.fmean(values), DECIMALS)
        ranked = marks(means, metric.rpartition("@")[0] in board.plan["smaller_is_better"])
        for model, row in rows.items():
            row["metrics"][metric]["mark"] = ranked.get(model, "")
    return {
        "baseline": reference,
        "metrics": list(first["test"]),
        "statistics": first["statistics"],
        "splits": {str(run.record["seed"]): run.record["split"] for run in board.of(dataset)},
        "models": rows,
        "by_degree": by_degree(by_model),
    }
