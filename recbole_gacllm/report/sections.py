"""What the sections of a run's page show, or the reason why there is nothing to show."""

from __future__ import annotations

from collections import Counter
from typing import Any

from recbole_gacllm.compare.markdown import metric_name
from recbole_gacllm.compare.significance import mean_interval
from recbole_gacllm.convolution.layers import layer_name
from recbole_gacllm.inspection.leakage import verdict
from recbole_gacllm.report import charts
from recbole_gacllm.report.charts import Series
from recbole_gacllm.report.degrees import item_chart, user_chart
from recbole_gacllm.report.source import Source, main_metric


def results(source: Source) -> dict[str, Any]:
    """Validation and test metrics, with t intervals over users."""
    metrics = list(source.record["test"])
    valid = {} if isinstance(source.scored, str) else source.scored.valid
    rows = []
    for split, label, users in (("valid", "Validation", valid), ("test", "Test", source.test)):
        values = source.record[split] or {}
        intervals = [mean_interval({0: users[name]}) if name in users else None for name in metrics]
        rows.append((label, [*zip(map(values.get, metrics), intervals, strict=True)]))
    n_users = len(next(iter(source.test.values()), ()))
    return {"metrics": metrics, "rows": rows, "n_users": n_users, "without": source.scored}


def curves(source: Source) -> dict[str, Any]:
    """Training loss and validation score of each epoch."""
    history, metric = source.record["history"], main_metric(source.record)
    if len(history) < 2:
        raise LookupError("fewer than two epochs make no curve")
    epochs = [entry["epoch"] for entry in history]
    losses = [entry["train_loss"] for entry in history]
    scores = [(entry["valid"] or {}).get(metric) for entry in history]
    figures = []
    if any(value is not None for value in losses):
        chart = charts.line_chart([Series("loss", losses, epochs)], "Training loss", "epoch")
        figures.append(("Training loss", chart))
    if any(value is not None for value in scores):
        pairs = zip(scores, epochs, strict=True)
        best, negative = max((score, -epoch) for score, epoch in pairs if score is not None)
        marked = (-negative, best, f"best {best:.4f}, epoch {-negative}")
        line = Series(metric, scores, epochs)
        chart = charts.line_chart([line], "Validation score", "epoch", marked)
        figures.append((f"Validation {metric_name(metric)}", chart))
    return {"figures": figures, "note": ""}


def by_degree(source: Source) -> dict[str, Any]:
    """Metric by user degree, and held-out items found by item degree."""
    if isinstance(source.scored, str):
        raise LookupError(source.scored)
    metric = main_metric(source.record)
    figures = []
    if metric in source.test:
        values, degrees = {metric: source.test[metric]}, source.scored.degrees["user"]
        chart = user_chart(values, degrees, {metric: 0}, "Metric by user degree")
        figures.append((f"Test {metric_name(metric)} by user degree", chart))
    if source.scored.top:
        scored = {"found": source.scored}
        chart = item_chart(scored, {"found": 0}, "Held-out items found by item degree")
        figures.append(("Share of held-out items in the top 10, by item degree", chart))
    if not figures:
        raise LookupError("the run has no top-k metric")
    note = (
        "Five groups of users or items, equal in number where degrees allow; n: users, held-out "
        "interactions. Whiskers: 95 % intervals (t over users, Wilson over interactions)."
    )
    return {"figures": figures, "note": note}


def browser(source: Source) -> dict[str, Any]:
    """An example of what may be searched: the title of the item with most interactions."""
    if isinstance(source.texts, str):
        raise LookupError(source.texts)
    items = source.data["browser"]["item"]
    return {"example": items["c"][max(range(len(items["d"])), key=items["d"].__getitem__)]}


def text_map(source: Source) -> dict[str, Any]:
    """Item texts of every layer in two dimensions."""
    if isinstance(source.texts, str):
        raise LookupError(source.texts)
    if (points_of := source.data["map"]) is None:
        raise LookupError("the text embeddings are gone")
    names, colours = points_of["groups"], points_of["group"]
    figures = []
    for number, points in enumerate(points_of["layers"]):
        groups: list[list[tuple[int, int]]] = [[] for _ in names]
        for point, group in zip(points, colours, strict=True):
            groups[group].append(point)
        name = layer_name(number, source.texts.run.kinds[number])
        chart = charts.point_map(groups, f"Item texts of {name}")
        figures.append((name.capitalize() if number else "Layer 0, raw texts", chart))
    last = len(names) - 1
    legend = [(names[at], "other" if at == last else f"c{at}") for at in sorted(set(colours))]
    category = source.texts.category and source.texts.category[0]
    return {"figures": figures, "legend": legend, "category": category, "share": points_of["share"]}


def cost(source: Source) -> dict[str, Any]:
    """Tokens, seconds, caches and failures of the LLM stages."""
    stages = source.record.get("stages")
    if not stages:
        raise LookupError(_why_no_texts(source, "the run generated no texts"))
    descriptions = stages.get("descriptions", {})
    layers = {
        layer_name(number, layer.get("kind")).capitalize(): layer
        for number, layer in enumerate(descriptions.get("layers", []), 1)
        if "n_generated" in layer
    }
    reason = descriptions.get("backend_reason")
    words = [f"Backend: {reason}."] if reason else []
    if any(stage["reused"] for stage in stages.values()):
        words.append("Reused stages were made by an earlier run; the figures are that run's.")
    failures: Counter[str] = Counter()
    for layer in layers.values():
        failures.update(layer.get("failures", {}))
    if failures:
        words.append("Failures: " + ", ".join(f"{k} {v}" for k, v in failures.items()) + ".")
    train = source.record["seconds"]["train"]
    return {"stages": stages, "train": train, "layers": layers, "words": words}


def quality(source: Source) -> dict[str, Any]:
    """The figures that the run recorded of each layer and side."""
    layers = source.record.get("description_quality")
    if not layers:
        raise LookupError(_why_no_texts(source, "the run recorded no such figures"))
    sides = {
        f"{layer_name(layer['number'], layer.get('kind'))}, {side}s".capitalize(): figures
        for layer in layers
        for side, figures in layer["sides"].items()
    }
    return {"sides": sides}


def finetuning(source: Source) -> dict[str, Any]:
    """SFT loss and held-out perplexity."""
    sft = source.record.get("stages", {}).get("sft")
    if not sft:
        raise LookupError("the language model was not fine-tuned in this run")
    losses = sft.get("train_losses") or []
    curve = [Series("loss", losses, range(1, len(losses) + 1))]
    chart = charts.line_chart(curve, "SFT loss", "step") if len(losses) > 1 else None
    return {"sft": sft, "chart": chart}


def leakage(source: Source) -> dict[str, Any]:
    """What the leakage audit counted."""
    audit = source.record.get("leakage_audit")
    if audit is None:
        raise LookupError(_why_no_texts(source, "no text was generated"))
    return {"audit": audit, "verdict": verdict(audit)}


def _why_no_texts(source: Source, otherwise: str) -> str:
    return source.texts if isinstance(source.texts, str) else otherwise


#: Anchor, title, template, and what makes its data or raises LookupError with the reason why not.
OF_RUN = (
    ("results", "Results", "results", results),
    ("curves", "Learning curves", "figures", curves),
    ("degrees", "Who and what it serves", "figures", by_degree),
)
OF_TEXTS = (
    ("browser", "Description browser", "browser", browser),
    ("map", "Map of item texts", "map", text_map),
    ("cost", "Cost of the texts", "cost", cost),
    ("quality", "Quality of the texts", "quality", quality),
    ("sft", "Fine-tuning", "sft", finetuning),
    ("leakage", "Leakage audit", "leakage", leakage),
)
