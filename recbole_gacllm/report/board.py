"""The sections of a leaderboard's page: table, tests, curves and degrees of all models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from recbole_gacllm.benchmark.degrees import edges
from recbole_gacllm.benchmark.markdown import metric_name
from recbole_gacllm.benchmark.results import Board, FinishedRun, summarize
from recbole_gacllm.report import charts
from recbole_gacllm.report.charts import Series
from recbole_gacllm.report.degrees import Bucket, heldout_found, metric_by_degree
from recbole_gacllm.report.markup import figure, figures, note, signed, table
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

    def colour(self, model: str) -> int:
        """A model's colour in all charts of the page."""
        return list(self.table["models"]).index(model) % charts.N_COLOURS

    @property
    def metric(self) -> str:
        """The metric that chose the epochs."""
        return main_metric(next(iter(self.first.values())).record)


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


def results(data: BoardData) -> str:
    """Means with deviations and intervals, best bold, second underlined; then the tests."""
    shown, rows = data.table, []
    for model, row in shown["models"].items():
        cells = [f'<th scope="row">{escape(model)}</th>']
        cells += [_cell(row["metrics"][metric]) for metric in shown["metrics"]]
        rows.append(cells)
    text = table(["", *(metric_name(metric) for metric in shown["metrics"])], rows, "numbers")
    numbers = [len(row["seeds"]) for row in shown["models"].values()]
    most = max(numbers)
    seeds = str(most) if min(numbers) == most else f"{min(numbers)} to {most}"
    words = "Best bold, second underlined. Small figures: 95 % t interval over users"
    words += f", each averaged over {seeds} seeds; ± deviation over seeds." if most > 1 else "."
    text += note(words)
    rows_of_chart = [
        (model, row["metrics"][data.metric]["mean"], *row["metrics"][data.metric]["interval"])
        for model, row in shown["models"].items()
        if row["metrics"][data.metric]["interval"]
    ]
    drawn = []
    if rows_of_chart:
        label = f"{metric_name(data.metric)}, 95 % intervals"
        drawn.append(figure(label, charts.interval_chart(rows_of_chart, label)))
    tests = _tests(data)
    if tests:
        drawn.append(tests)
    failures = [
        failure for failure in data.summary["failures"] if failure["dataset"] == data.dataset
    ]
    lost = "".join(
        f"<li>{escape(one['model'])}, seed {one['seed']}: "
        f"{escape(' '.join(one['error'].split()))}</li>"
        for one in failures
    )
    missing = data.summary["n_missing"]
    return (
        text
        + figures(drawn)
        + (f"<h3>Failed runs</h3><ul>{lost}</ul>" if lost else "")
        + (note(f"{missing} runs have not finished yet.") if missing else "")
    )


def _cell(value: dict[str, Any]) -> str:
    text = f"{value['mean']:.4f}"
    text = {"best": f"<b>{text}</b>", "second": f"<u>{text}</u>"}.get(value["mark"], text)
    if value["std"] is not None:
        text += f' <span class="faint">± {value["std"]:.4f}</span>'
    if value["interval"]:
        low, high = value["interval"]
        text += f"<small>{low:.4f} – {high:.4f}</small>"
    return f"<td>{text}</td>"


def _tests(data: BoardData) -> str:
    shown, rows = data.table, []
    for model, row in shown["models"].items():
        test = row["metrics"][data.metric]["test"]
        if test:
            low, high = test["interval"]
            rows.append(
                [
                    f'<th scope="row">{escape(model)}</th>',
                    f"<td>{signed(test['difference'])}"
                    f"<small>{signed(low)} to {signed(high)}</small></td>",
                    f"<td>{_p(test['t_p_holm'])}</td>",
                    f"<td>{_p(test['wilcoxon_p_holm'])}</td>",
                ]
            )
    if not rows:
        return ""
    caption = f"{metric_name(data.metric)} against {shown['baseline']}"
    head = ["", "Difference", "p (t)", "p (Wilcoxon)"]
    words = "Paired over users, two-sided, Holm's correction over the models."
    return figure(caption, table(head, rows, "numbers") + note(words))


def _p(value: float) -> str:
    return "&lt; .001" if value < 0.001 else f"{value:.3f}".replace("0.", ".", 1)


def curves(data: BoardData) -> str:
    """Validation scores of all models by epoch."""
    lines = []
    for model, run in data.first.items():
        history = [entry for entry in run.record.get("history") or [] if entry["valid"]]
        if len(history) > 1:
            scores = [entry["valid"].get(data.metric) for entry in history]
            epochs = [entry["epoch"] for entry in history]
            lines.append(Series(model, scores, epochs, colour=data.colour(model)))
    if not lines:
        raise LookupError("no run.json has a history of several epochs; runs of this version have")
    shown = lines[:_MAX_MODELS]
    label = f"Validation {metric_name(data.metric)}"
    label += f", {shown[0].name}" if len(shown) == 1 else ""
    seed = next(iter(data.first.values())).record["seed"]
    without = [model for model in data.first if model not in {line.name for line in shown}]
    words = f"Seed {seed}. "
    words += f"Not drawn, for want of a curve: {', '.join(without)}." if without else ""
    return figures([figure(label, charts.line_chart(shown, label, "epoch"))]) + note(words)


def by_degree(data: BoardData) -> str:
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
    drawn = []
    if bars:
        label = f"Test {metric_name(data.metric)} by user degree"
        drawn.append(
            figure(label, _bars(bars, data.colour, label, "training interactions of the user"))
        )
    found = {model: heldout_found(one) for model, one in scored.items() if one.top}
    if found:
        label = "Share of held-out items in the top 10, by item degree"
        x_label = "training interactions of the item"
        drawn.append(figure(label, _bars(found, data.colour, label, x_label)))
    words = (
        "First seed. Five groups of users or items, equal in number where degrees allow; n: users, "
        "held-out interactions. Whiskers: 95 % intervals."
    )
    return figures(drawn) + note(" ".join([words, *reasons]))


def _bars(
    bars: dict[str, list[Bucket]], colour: Callable[[str], int], label: str, x_label: str
) -> str:
    first = next(iter(bars.values()))
    series = [
        Series(model, [b.value for b in buckets], (), [b.interval for b in buckets], colour(model))
        for model, buckets in bars.items()
    ]
    return charts.bar_chart([(b.label, f"n = {b.n:,}") for b in first], series, label, x_label)


def variants(data: BoardData) -> list[str]:
    """GaCLLM and its variants, such as ``GaCLLM:use_text=False``; an ablation if several."""
    return [model for model in data.table["models"] if model.partition(":")[0] == "GaCLLM"]


def side_by_side(data: BoardData) -> str:
    """All metrics as bars: of GaCLLM's variants if there are several, else of all models."""
    shown = data.table
    models = variants(data) if len(variants(data)) > 1 else list(shown["models"])[:_MAX_MODELS]
    if len(models) < 2:
        raise LookupError("the leaderboard has one model only")
    series = []
    for model in models:
        values = [shown["models"][model]["metrics"][metric] for metric in shown["metrics"]]
        means, intervals = zip(*((v["mean"], v["interval"]) for v in values), strict=True)
        series.append(Series(model, means, (), intervals, data.colour(model)))
    categories = [(metric_name(metric), "") for metric in shown["metrics"]]
    chart = charts.bar_chart(categories, series, "Test metrics of all models", "")
    return figures([figure("Test metrics, 95 % intervals", chart)])
