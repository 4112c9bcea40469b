"""What the sections of a run's page show, or the reason why there is nothing to show."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from recbole_gacllm.compare.markdown import metric_name
from recbole_gacllm.compare.significance import mean_interval
from recbole_gacllm.inspection.leakage import blind_spots
from recbole_gacllm.inspection.leakage import verdict as leakage_verdict
from recbole_gacllm.report import charts
from recbole_gacllm.report.charts import Series
from recbole_gacllm.report.degrees import degree_chart, heldout_found, metric_by_degree
from recbole_gacllm.report.source import Source, Texts

_SETTINGS = {
    "Recommender": (
        *("embedding_size", "n_layers", "loss_type", "text_weight", "align_weight", "reg_weight"),
        *("linear_weight", "learning_rate", "train_batch_size", "epochs", "stopping_step"),
    ),
    "Texts": (
        *("text_source", "llm_model", "llm_backend", "llm_n_layers", "n_neighbors"),
        *("neighbor_rule", "sft", "encoder_model"),
    ),
    "Evaluation": ("valid_metric", "topk", "eval_args", "seed"),
}


def results(source: Source) -> dict[str, Any]:
    """Validation and test metrics, with t intervals over users."""
    metrics = list(source.record["test"])
    valid = {} if isinstance(source.scored, str) else source.scored.valid
    rows = []
    for split, label, users in (
        ("valid", "Validation", valid),
        ("test", "Test", source.test),
    ):
        values = source.record[split] or {}
        intervals = [mean_interval({0: users[name]}) if name in users else None for name in metrics]
        rows.append((label, [*zip(map(values.get, metrics), intervals, strict=True)]))
    n_users = len(next(iter(source.test.values()), ()))
    return {"metrics": metrics, "rows": rows, "n_users": n_users, "without": source.scored}


def curves(source: Source) -> dict[str, Any]:
    """Training loss and validation score of each epoch."""
    history = source.record.get("history")
    if history is None:
        raise LookupError("this run.json has no history; runs of this version have")
    if len(history) < 2:
        raise LookupError("fewer than two epochs make no curve")
    metric = source.main_metric
    epochs = [entry["epoch"] for entry in history]
    losses = [entry["train_loss"] for entry in history]
    valid = [(entry["valid"] or {}).get(metric) for entry in history]
    figures = []
    if any(value is not None for value in losses):
        chart = charts.line_chart([Series("loss", losses, epochs)], "Training loss", "epoch")
        figures.append(("Training loss", chart))
    known = [
        (value, -epoch) for epoch, value in zip(epochs, valid, strict=True) if value is not None
    ]
    if known:
        best, negative = max(known)
        marked = (-negative, best, f"best {best:.4f}, epoch {-negative}")
        chart = charts.line_chart(
            [Series(metric, valid, epochs)], "Validation score", "epoch", marked
        )
        figures.append((f"Validation {metric_name(metric)}", chart))
    return {"figures": figures, "note": ""}


def by_degree(source: Source) -> dict[str, Any]:
    """Metric by user degree, and held-out items found by item degree."""
    if isinstance(source.scored, str):
        raise LookupError(source.scored)
    metric = source.main_metric if source.main_metric in source.test else None
    figures = []
    if metric is not None:
        users = {metric: metric_by_degree(source.test[metric], source.scored.degrees["user"])}
        chart = degree_chart(users, {metric: 0}, "Metric by user degree", "user")
        figures.append((f"Test {metric_name(metric)} by user degree", chart))
    if source.scored.top:
        items = {"found": heldout_found(source.scored)}
        chart = degree_chart(items, {"found": 0}, "Held-out items found by item degree", "item")
        figures.append(("Share of held-out items in the top 10, by item degree", chart))
    if not figures:
        raise LookupError("the run has no top-k metric")
    note = (
        "Five groups of users or items, equal in number where degrees allow; n: users, held-out "
        "interactions. Whiskers: 95 % intervals (t over users, Wilson over interactions)."
    )
    return {"figures": figures, "note": note}


def cost(source: Source) -> dict[str, Any]:
    """Tokens, seconds, caches and failures of the LLM stages."""
    stages = source.record.get("stages")
    if not stages:
        raise LookupError(_why_no_texts(source))
    described = stages.get("descriptions", {})
    layers = {
        f"Layer {number}": layer
        for number, layer in enumerate(described.get("layers", []), 1)
        if "n_generated" in layer
    }
    words = [f"Backend: {reason}." for reason in [described.get("backend_reason")] if reason]
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
        why = source.texts if isinstance(source.texts, str) else "the run recorded no such figures"
        raise LookupError(why)
    sides = {
        f"Layer {layer['number']}, {side}s": figures
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
    steps = list(range(1, len(losses) + 1))
    curve = [Series("loss", losses, steps)]
    chart = charts.line_chart(curve, "SFT loss", "step") if len(losses) > 1 else None
    return {"sft": sft, "chart": chart}


def leakage(source: Source) -> dict[str, Any]:
    """What the leakage audit found."""
    audit = source.record.get("leakage_audit")
    if audit is None:
        raise LookupError(_why_no_texts(source, "no text was generated"))
    p = audit["p_value"]
    facts = {
        "Held-out pairs in the training graph": f"{audit['edges_in_graph']:,}",
        "Held-out pairs named in their texts": (
            f"{audit['heldout_mentions']:,} of {audit['n_pairs']:,}"
        ),
        "Matched pairs named there": f"{audit['matched_mentions']:,} of {audit['n_pairs']:,}",
        "Sign tests, one-sided": "no pair differs" if p is None else f"p = {p:.3g}",
    }
    for kind, found in audit.get("kinds", {}).items():
        if any(found.values()):
            name = f"By {kind.replace('_', ' ')}, held-out and matched"
            facts[name] = f"{found['heldout_mentions']:,} and {found['matched_mentions']:,}"
    if "n_known_names" in audit:  # runs of older versions compared these, too
        facts["Not compared: a training item of the user bears the name"] = (
            f"{audit['n_known_names']:,}"
        )
    facts |= blind_spots(audit)
    words = (
        "Each held-out item is compared with an item of nearly the same popularity that the user "
        "never touched: does the user's text name the item, or the item's text the user? If texts "
        "knew the future, held-out pairs would be named more often; so they would be if texts "
        "guessed well. Names in another language or with other endings, nicknames and hints "
        "without a name are not seen."
    )
    if audit["heldout_mentions"] == audit["matched_mentions"] == 0:
        words += " These texts name neither, so the comparison has little to see."
    return {"verdict": leakage_verdict(audit), "facts": facts, "words": words}


def text_map(source: Source, data: dict[str, Any] | None) -> dict[str, Any]:
    """Item texts of every layer in two dimensions."""
    if isinstance(source.texts, str):
        raise LookupError(source.texts)
    if data is None:
        raise LookupError("the text embeddings are gone")
    figures = []
    for number, points in enumerate(data["layers"]):
        groups: list[list[tuple[int, int]]] = [[] for _ in data["groups"]]
        for point, group in zip(points, data["group"], strict=True):
            groups[group].append(point)
        chart = charts.point_map(groups, f"Item texts of layer {number}")
        figures.append((f"Layer {number}" if number else "Layer 0, raw texts", chart))
    last = len(data["groups"]) - 1
    legend = [
        (data["groups"][at], "other" if at == last else f"c{at}")
        for at in sorted(set(data["group"]))
    ]
    category = source.texts.category and source.texts.category[0]
    return {"figures": figures, "legend": legend, "category": category, "share": data["share"]}


def setup(record: dict[str, Any], command: str) -> dict[str, Any]:
    """Command, settings and versions."""
    config = record["config"]
    groups = {
        title: {key: _words(config[key]) for key in keys if key in config}
        for title, keys in _SETTINGS.items()
    }
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return {"command": command, "groups": groups, "versions": versions}


def command(record: dict[str, Any]) -> str:
    """The command line without the keys that name folders."""
    program, *flags = record["command"] or [""]
    shown = [flag for flag in flags if not flag.split("=")[0].endswith(("_dir", "_path"))]
    return " ".join([Path(program).name, *shown])


def interactions(source: Source) -> dict[str, int]:
    """Users, items and interactions of the data, as far as the run knows them."""
    if "statistics" in source.record:
        return dict(source.record["statistics"])
    if isinstance(source.texts, Texts) and not isinstance(source.scored, str):
        return {
            "n_users": len(source.texts.layers[0].tokens["user"]),
            "n_items": len(source.texts.layers[0].tokens["item"]),
            "n_training_interactions": int(source.texts.degrees["user"].sum()),
        }
    return {}


def _words(value: Any) -> str:
    """A setting; a dictionary without its quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_words(inner)}" for key, inner in value.items())
    return str(value)


def _why_no_texts(source: Source, otherwise: str = "the run generated no texts") -> str:
    return source.texts if isinstance(source.texts, str) else otherwise
