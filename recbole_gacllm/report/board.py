"""What the sections of a leaderboard's page show: table, tests, curves, degrees of all models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recbole_gacllm.compare.degrees import edges
from recbole_gacllm.compare.markdown import metric_name
from recbole_gacllm.compare.results import Board, FinishedRun, summarize
from recbole_gacllm.report import charts
from recbole_gacllm.report.charts import Series
from recbole_gacllm.report.degrees import degree_chart, heldout_found, metric_by_degree
from recbole_gacllm.report.scoring import Scored
from recbole_gacllm.report.source import main_metric, scored_again

# More colours than these cannot be told apart, nor more bars.
_MAX_MODELS = charts.N_COLOURS


@dataclass(frozen=True)
class BoardData:
    """One data set of a leaderboard.

    Attributes:
        summary: Of :func:`.benchmark.results.summarize`.
        first: The first seed's run of each model.
    """

    summary: dict[str, Any]
    dataset: str
    first: dict[str, FinishedRun]

    @property
    def table(self) -> dict[str, Any]:
        """Means, deviations, intervals and tests of this data set."""
        return dict(self.summary["datasets"][self.dataset])

    @property
    def colours(self) -> dict[str, int]:
        """Each model's colour in all charts of the page."""
        return {model: place % charts.N_COLOURS for place, model in enumerate(self.table["models"])}

    @property
    def metric(self) -> str:
        """The metric that chose the epochs."""
        return main_metric(next(iter(self.first.values())).record)

    @property
    def best(self) -> tuple[str, float]:
        """The model with the highest mean, and this mean."""
        means = {
            model: float(row["metrics"][self.metric]["mean"])
            for model, row in self.table["models"].items()
        }
        return max(means.items(), key=lambda pair: pair[1])


def read_board(board: Board) -> list[BoardData]:
    """Every data set of a leaderboard that has a finished run.

    Raises:
        ValueError: If no run has finished.
    """
    summary = summarize(board)
    if not summary["datasets"]:
        raise ValueError(f"{board.folder}: no run has finished yet.")
    return [
        BoardData(
            summary,
            dataset,
            {
                model: board.of(dataset, model)[0]
                for model in summary["datasets"][dataset]["models"]
            },
        )
        for dataset in summary["datasets"]
    ]


def results(data: BoardData) -> dict[str, Any]:
    """Means with deviations and intervals, best bold, second underlined; then the tests."""
    shown, metric = data.table, data.metric
    numbers = [len(row["seeds"]) for row in shown["models"].values()]
    seeds = " to ".join(map(str, sorted({min(numbers), max(numbers)})))
    of_metric = {model: row["metrics"][metric] for model, row in shown["models"].items()}
    rows = [
        (model, value["mean"], *value["interval"])
        for model, value in of_metric.items()
        if value["interval"]
    ]
    label = f"{metric_name(metric)}, 95 % intervals"
    return {
        **{"metrics": shown["metrics"], "models": shown["models"], "metric": metric},
        "averaged": f", each averaged over {seeds} seeds; ± deviation over seeds"
        if max(numbers) > 1
        else "",
        "chart": charts.interval_chart(rows, label) if rows else None,
        "tests": {model: value["test"] for model, value in of_metric.items() if value["test"]},
        "baseline": shown["baseline"],
        "failures": [one for one in data.summary["failures"] if one["dataset"] == data.dataset],
        "n_missing": data.summary["n_missing"],
    }


def curves(data: BoardData) -> dict[str, Any]:
    """Validation scores of all models by epoch."""
    lines = []
    for model, run in data.first.items():
        history = [entry for entry in run.record.get("history") or [] if entry["valid"]]
        if len(history) > 1:
            scores = [entry["valid"].get(data.metric) for entry in history]
            epochs = [entry["epoch"] for entry in history]
            lines.append(Series(model, scores, epochs, colour=data.colours[model]))
    if not lines:
        raise LookupError("no run.json has a history of several epochs; runs of this version have")
    shown = lines[:_MAX_MODELS]
    label = f"Validation {metric_name(data.metric)}"
    label += f", {shown[0].name}" if len(shown) == 1 else ""
    seed = next(iter(data.first.values())).record["seed"]
    without = [model for model in data.first if model not in {line.name for line in shown}]
    note = f"Seed {seed}. "
    note += f"Not drawn, for want of a curve: {', '.join(without)}." if without else ""
    return {"figures": [(label, charts.line_chart(shown, label, "epoch"))], "note": note}


def by_degree(data: BoardData) -> dict[str, Any]:
    """Metric by user degree and held-out items found by item degree, of all models."""
    scored: dict[str, Scored] = {}
    reasons = []
    for model, run in list(data.first.items())[:_MAX_MODELS]:
        again = scored_again(run.record, run.folder)
        if isinstance(again, str):
            reasons.append(f"{model}: {again}.")
        else:
            scored[model] = again
    if not scored:
        raise LookupError(" ".join(reasons))
    any_scored = next(iter(scored.values()))
    users, degrees = next(iter(any_scored.test.values())).index, any_scored.degrees["user"]
    ranges = edges(users.map(lambda user: degrees.get(user, 0)).to_numpy())
    bars = {
        model: metric_by_degree(one.test[data.metric], degrees, ranges)
        for model, one in scored.items()
        if data.metric in one.test
    }
    found = {model: heldout_found(one) for model, one in scored.items() if one.top}
    figures = [
        (label, degree_chart(of_models, data.colours, label, side))
        for label, of_models, side in (
            (f"Test {metric_name(data.metric)} by user degree", bars, "user"),
            ("Share of held-out items in the top 10, by item degree", found, "item"),
        )
        if of_models
    ]
    note = (
        "First seed. Five groups of users or items, equal in number where degrees allow; n: users, "
        "held-out interactions. Whiskers: 95 % intervals."
    )
    return {"figures": figures, "note": " ".join([note, *reasons])}


def variants(data: BoardData) -> list[str]:
    """GaCLLM and its variants, such as ``GaCLLM:use_text=False``; an ablation if several."""
    return [model for model in data.table["models"] if model.partition(":")[0] == "GaCLLM"]


def side_by_side(data: BoardData) -> dict[str, Any]:
    """All metrics as bars: of GaCLLM's variants if there are several, else of all models."""
    shown = data.table
    models = variants(data) if len(variants(data)) > 1 else list(shown["models"])[:_MAX_MODELS]
    if len(models) < 2:
        raise LookupError("the leaderboard has one model only")
    series = []
    for model in models:
        values = [shown["models"][model]["metrics"][metric] for metric in shown["metrics"]]
        means, intervals = zip(*((v["mean"], v["interval"]) for v in values), strict=True)
        series.append(Series(model, means, (), intervals, data.colours[model]))
    categories = [(metric_name(metric), "") for metric in shown["metrics"]]
    chart = charts.bar_chart(categories, series, "Test metrics of all models", "")
    return {"figures": [("Test metrics, 95 % intervals", chart)], "note": ""}
