"""What the sections of a leaderboard's page show: table, tests, curves, degrees of all models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_gacllm.artifacts.locate import RunFiles
from recbole_gacllm.compare.markdown import metric_name
from recbole_gacllm.compare.results import Board, FinishedRun, summarize
from recbole_gacllm.report import charts
from recbole_gacllm.report.charts import Series
from recbole_gacllm.report.degrees import item_chart, user_chart
from recbole_gacllm.report.scoring import Scored
from recbole_gacllm.report.source import main_metric, scored_again

# More colours than these cannot be told apart, nor more bars.
_MAX_MODELS = charts.N_COLOURS


@dataclass(frozen=True)
class BoardData:
    """One data set of a leaderboard.

    Attributes:
        dataset: Its name.
        table: Means, deviations, intervals and tests, of :func:`.compare.results.summarize`.
        failures: Of its runs.
        n_missing: Runs of the leaderboard that have not finished.
        first: The first seed's run of each model.
        record: The ``run.json`` of the first of these.
        metric: The metric that chose the epochs.
        of_metric: Each model's figures of this metric.
        colours: Each model's colour in all charts of the page.
        variants: GaCLLM and such as ``GaCLLM:use_text=False``; an ablation if several.
        artifact_dir: Where to look for artefacts that were moved away from the runs.
    """

    dataset: str
    table: dict[str, Any]
    failures: list[dict[str, Any]]
    n_missing: int
    first: dict[str, FinishedRun]
    record: dict[str, Any]
    metric: str
    of_metric: dict[str, dict[str, Any]]
    colours: dict[str, int]
    variants: list[str]
    artifact_dir: Path | None


def read_board(board: Board, artifact_dir: Path | None) -> list[BoardData]:
    """Every data set of a leaderboard that has a finished run.

    Raises:
        ValueError: If no run has finished.
    """
    summary = summarize(board)
    if not summary["datasets"]:
        raise ValueError(f"{board.folder}: no run has finished yet.")
    of_datasets = []
    for dataset, table in summary["datasets"].items():
        models = table["models"]
        first = {model: board.of(dataset, model)[0] for model in models}
        record = next(iter(first.values())).record
        metric = main_metric(record)
        one = BoardData(
            dataset=dataset,
            table=table,
            failures=[failed for failed in summary["failures"] if failed["dataset"] == dataset],
            n_missing=summary["n_missing"],
            first=first,
            record=record,
            metric=metric,
            of_metric={model: row["metrics"][metric] for model, row in models.items()},
            colours={model: place % charts.N_COLOURS for place, model in enumerate(models)},
            variants=[model for model in models if model.partition(":")[0] == "GaCLLM"],
            artifact_dir=artifact_dir,
        )
        of_datasets.append(one)
    return of_datasets


def results(data: BoardData) -> dict[str, Any]:
    """Means with deviations and intervals, best bold, second underlined; then the tests."""
    models = data.table["models"]
    numbers = [len(row["seeds"]) for row in models.values()]
    seeds = " to ".join(map(str, sorted({min(numbers), max(numbers)})))
    averaged = f", each averaged over {seeds} seeds; ± deviation over seeds"
    rows = [
        (model, value["mean"], *value["interval"])
        for model, value in data.of_metric.items()
        if value["interval"]
    ]
    label = f"{metric_name(data.metric)}, 95 % intervals"
    return {
        **{"metrics": data.table["metrics"], "models": models, "metric": data.metric},
        "averaged": averaged if max(numbers) > 1 else "",
        "chart": charts.interval_chart(rows, label) if rows else None,
        "tests": {model: value["test"] for model, value in data.of_metric.items() if value["test"]},
        "baseline": data.table["baseline"],
        "failures": data.failures,
        "n_missing": data.n_missing,
    }


def curves(data: BoardData) -> dict[str, Any]:
    """Validation scores of all models by epoch."""
    lines = []
    for model, run in data.first.items():
        history = [entry for entry in run.record["history"] if entry["valid"]]
        if len(history) > 1:
            scores = [entry["valid"].get(data.metric) for entry in history]
            epochs = [entry["epoch"] for entry in history]
            lines.append(Series(model, scores, epochs, colour=data.colours[model]))
    if not lines:
        raise LookupError("no run.json has a history of several epochs; runs of this version have")
    shown = lines[:_MAX_MODELS]
    label = f"Validation {metric_name(data.metric)}"
    label += f", {shown[0].name}" if len(shown) == 1 else ""
    without = ", ".join(model for model in data.first if model not in {line.name for line in shown})
    note = f"Seed {data.record['seed']}. "
    note += f"Not drawn, for want of a curve: {without}." if without else ""
    return {"figures": [(label, charts.line_chart(shown, label, "epoch"))], "note": note}


def by_degree(data: BoardData) -> dict[str, Any]:
    """Metric by user degree and held-out items found by item degree, of all models."""
    scored: dict[str, Scored] = {}
    reasons = []
    for model, run in list(data.first.items())[:_MAX_MODELS]:
        again = scored_again(RunFiles(run.record, run.folder, data.artifact_dir))
        if isinstance(again, str):
            reasons.append(f"{model}: {again}.")
        else:
            scored[model] = again
    if not scored:
        raise LookupError(" ".join(reasons))
    figures = []
    if values := {m: one.test[data.metric] for m, one in scored.items() if data.metric in one.test}:
        label = f"Test {metric_name(data.metric)} by user degree"
        degrees = next(iter(scored.values())).degrees["user"]
        figures.append((label, user_chart(values, degrees, data.colours, label)))
    if ranked := {model: one for model, one in scored.items() if one.top}:
        label = "Share of held-out items in the top 10, by item degree"
        figures.append((label, item_chart(ranked, data.colours, label)))
    note = (
        "First seed. Five groups of users or items, equal in number where degrees allow; n: users, "
        "held-out interactions. Whiskers: 95 % intervals."
    )
    return {"figures": figures, "note": " ".join([note, *reasons])}


def side_by_side(data: BoardData) -> dict[str, Any]:
    """All metrics as bars: of GaCLLM's variants if there are several, else of all models."""
    rows, metrics = data.table["models"], data.table["metrics"]
    models = data.variants if len(data.variants) > 1 else list(rows)[:_MAX_MODELS]
    if len(models) < 2:
        raise LookupError("the leaderboard has one model only")
    series = []
    for model in models:
        values = [rows[model]["metrics"][metric] for metric in metrics]
        means, intervals = zip(*((v["mean"], v["interval"]) for v in values), strict=True)
        series.append(Series(model, means, (), intervals, data.colours[model]))
    categories = [(metric_name(metric), "") for metric in metrics]
    chart = charts.bar_chart(categories, series, "Test metrics of all models", "")
    return {"figures": [("Test metrics, 95 % intervals", chart)], "note": ""}
