"""The sections of a run's page, each HTML or the reason why there is none."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

import pandas as pd

from recbole_gacllm.benchmark.markdown import metric_name
from recbole_gacllm.benchmark.significance import mean_interval
from recbole_gacllm.descriptions.audit import blind_spots
from recbole_gacllm.descriptions.audit import verdict as leakage_verdict
from recbole_gacllm.report import charts
from recbole_gacllm.report.charts import Series
from recbole_gacllm.report.degrees import heldout_found, metric_by_degree
from recbole_gacllm.report.markup import (
    definition_list,
    figure,
    figures,
    note,
    seconds,
    signed,
    table,
)
from recbole_gacllm.report.source import Source, Texts

_STAGES = {
    "inputs": "Raw texts",
    "sft": "Fine-tuning",
    "merged": "Merging",
    "descriptions": "Descriptions",
    "embeddings": "Encoding",
}


def results(source: Source) -> str:
    """Validation and test metrics, with t intervals over users."""
    record, names = source.record, list(source.record["test"])
    per_user = {"valid": {}, "test": source.test}
    if not isinstance(source.scored, str):
        per_user["valid"] = source.scored.valid
    rows = []
    for split, label in (("valid", "Validation"), ("test", "Test")):
        cells = [f'<th scope="row">{label}</th>']
        for name in names:
            value, users = record[split].get(name), per_user[split].get(name)
            cells.append(_value_cell(value, users))
        rows.append(cells)
    head = ["", *(metric_name(name) for name in names)]
    text = table(head, rows, "numbers")
    if not source.test:
        return text + note(f"No intervals: {source.scored}.")
    n_users = len(next(iter(source.test.values())))
    return text + note(f"Small figures: 95 % t interval over {n_users:,} users.")


def _value_cell(value: float | None, users: pd.Series[float] | None) -> str:
    if value is None:
        return "<td>–</td>"
    interval = ""
    if users is not None:
        low, high = mean_interval({0: users})
        interval = f"<small>{low:.4f} – {high:.4f}</small>"
    return f"<td><b>{value:.4f}</b>{interval}</td>"


def curves(source: Source) -> str:
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
    drawn = []
    if any(value is not None for value in losses):
        chart = charts.line_chart([Series("loss", losses, epochs)], "Training loss", "epoch")
        drawn.append(figure("Training loss", chart))
    known = [
        (value, -epoch) for epoch, value in zip(epochs, valid, strict=True) if value is not None
    ]
    if known:
        best, negative = max(known)
        marked = (-negative, best, f"best {best:.4f}, epoch {-negative}")
        chart = charts.line_chart(
            [Series(metric, valid, epochs)], "Validation score", "epoch", marked
        )
        drawn.append(figure(f"Validation {metric_name(metric)}", chart))
    return figures(drawn)


def by_degree(source: Source) -> str:
    """Metric by user degree, and held-out items found by item degree."""
    if isinstance(source.scored, str):
        raise LookupError(source.scored)
    metric = source.main_metric if source.main_metric in source.test else None
    drawn = []
    if metric is not None:
        buckets = metric_by_degree(source.test[metric], source.scored.degrees["user"])
        chart = charts.bar_chart(
            [(bucket.label, f"n = {bucket.n:,}") for bucket in buckets],
            [Series(metric, [b.value for b in buckets], (), [b.interval for b in buckets])],
            "Metric by user degree",
            "training interactions of the user",
        )
        drawn.append(figure(f"Test {metric_name(metric)} by user degree", chart))
    if source.scored.top:
        buckets = heldout_found(source.scored)
        chart = charts.bar_chart(
            [(bucket.label, f"n = {bucket.n:,}") for bucket in buckets],
            [Series("found", [b.value for b in buckets], (), [b.interval for b in buckets])],
            "Held-out items found by item degree",
            "training interactions of the item",
        )
        drawn.append(figure("Share of held-out items in the top 10, by item degree", chart))
    if not drawn:
        raise LookupError("the run has no top-k metric")
    return figures(drawn) + note(
        "Five groups of users or items, equal in number where degrees allow; n: users, held-out "
        "interactions. Whiskers: 95 % intervals (t over users, Wilson over interactions)."
    )


def cost(source: Source) -> str:
    """Tokens, seconds, caches and failures of the LLM stages."""
    stages = source.record.get("stages")
    if not stages:
        raise LookupError(_why_no_texts(source))
    rows = []
    for name, label in _STAGES.items():
        if name in stages and stages[name].get("seconds") is not None:
            reused = '<span class="tag">reused</span>' if stages[name]["reused"] else ""
            cells = [f'<th scope="row">{label} {reused}</th>']
            rows.append([*cells, f"<td>{seconds(stages[name]['seconds'])}</td>"])
    rows.append(
        [
            '<th scope="row">Training of the recommender</th>',
            f"<td>{seconds(source.record['seconds']['train'])}</td>",
        ]
    )
    text = '<div class="columns"><div>' + table(["Stage", "Time"], rows, "numbers") + "</div>"
    layers = [
        (number, layer)
        for number, layer in enumerate(stages.get("descriptions", {}).get("layers", []), 1)
        if "n_generated" in layer
    ]
    if layers:
        lines = {
            "Nodes": "n_nodes",
            "Generated": "n_generated",
            "From the store": "n_from_store",
            "Equal prompts": "n_duplicates",
            "Asked twice": "n_retried",
            "Cut by the length limit": "n_truncated",
            "Failed": "n_failed",
            "Prompt tokens": "n_prompt_tokens",
            "… served by the prefix cache": "n_cached_tokens",
            "Output tokens": "n_output_tokens",
        }
        rows = [
            [f'<th scope="row">{label}</th>', *(_count_cell(layer.get(key)) for _, layer in layers)]
            for label, key in lines.items()
        ]
        rate = [
            f"<td>{layer['n_output_tokens'] / layer['seconds']:,.0f}</td>"
            if layer["seconds"]
            else "<td>–</td>"
            for _, layer in layers
        ]
        rows.append(['<th scope="row">Output tokens per second</th>', *rate])
        head = ["Descriptions", *(f"Layer {number}" for number, _ in layers)]
        text += "<div>" + table(head, rows, "numbers") + "</div>"
    text += "</div>"
    words = []
    if backend := stages.get("descriptions", {}).get("backend_reason"):
        words.append(f"Backend: {backend}.")
    if any(stage["reused"] for stage in stages.values()):
        words.append("Reused stages were made by an earlier run; the figures are that run's.")
    failures: Counter[str] = Counter()
    for _, layer in layers:
        failures.update(layer.get("failures", {}))
    if failures:
        words.append("Failures: " + ", ".join(f"{k} {v}" for k, v in failures.items()) + ".")
    return text + note(" ".join(words))


def _count_cell(value: int | None) -> str:
    return "<td>–</td>" if value is None else f"<td>{value:,}</td>"


def finetuning(source: Source) -> str:
    """SFT loss and held-out perplexity."""
    sft = source.record.get("stages", {}).get("sft")
    if not sft:
        raise LookupError("the language model was not fine-tuned in this run")
    losses = sft.get("train_losses") or []
    drawn = []
    if len(losses) > 1:
        steps = list(range(1, len(losses) + 1))
        chart = charts.line_chart([Series("loss", losses, steps)], "SFT loss", "step")
        drawn.append(figure("Training loss of the completions", chart))
    facts = {
        "Pairs": f"{sft['n_pairs']:,}",
        "Held-out pairs": f"{sft['n_heldout']:,}",
        "Steps": f"{sft['n_steps']:,}",
        "Tokens": f"{sft['n_tokens']:,}",
    }
    if sft.get("perplexity_before") is not None:
        before, after = sft["perplexity_before"], sft["perplexity_after"]
        change = signed(after / before - 1, ".0%")
        facts = {
            "Held-out perplexity before": f"{before:.2f}",
            "Held-out perplexity after": f"<b>{after:.2f}</b> ({change})",
            **facts,
        }
    drawn.append(definition_list(facts))
    return figures(drawn)


def leakage(source: Source) -> str:
    """What the leakage audit found."""
    audit = source.record.get("leakage_audit")
    if audit is None:
        raise LookupError(
            _why_no_texts(source) if isinstance(source.texts, str) else "no text was generated"
        )
    p = audit["p_value"]
    verdict = {
        "suspicious": (
            '<p class="verdict bad">Look closer: held-out interactions may have leaked.</p>'
        ),
        "unseen": '<p class="verdict">Little could be checked, so this says little.</p>',
        "clean": '<p class="verdict good">No sign of leakage.</p>',
    }[leakage_verdict(audit)]
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
    return verdict + definition_list(facts) + note(words)


def text_map(source: Source, data: dict[str, Any] | None) -> str:
    """Item texts of every layer in two dimensions."""
    if isinstance(source.texts, str):
        raise LookupError(_why_no_texts(source))
    if data is None:
        raise LookupError("the text embeddings are gone")
    drawn = []
    for number, points in enumerate(data["layers"]):
        groups: list[list[tuple[int, int]]] = [[] for _ in data["groups"]]
        for point, group in zip(points, data["group"], strict=True):
            groups[group].append(point)
        label = f"Item texts of layer {number}"
        panel = charts.point_map(groups, label)
        drawn.append(figure("Layer 0, raw texts" if number == 0 else f"Layer {number}", panel))
    used = sorted(set(data["group"]))
    last = len(data["groups"]) - 1
    keys = [(data["groups"][at], "other" if at == last else f"c{at}") for at in used]
    coloured = ""
    if source.texts.category is not None:
        coloured = f"Colour: first value of <code>{escape(source.texts.category[0])}</code>. "
    return (
        f'<div id="map">{figures(drawn)}</div>{charts.legend(keys)}'
        '<p class="found-name" aria-live="polite"></p>'
        f'<p class="note">{coloured}Both axes are principal components of the text embeddings, the '
        f"same for all layers, each layer centred ({data['share']:.0%} of the variance). "
        '<span class="screen">Point at a dot for its title, click to read its texts.</span></p>'
    )


def interactions(source: Source) -> dict[str, int] | None:
    """Users, items and interactions of the data, where the run knows them."""
    if "statistics" in source.record:
        return dict(source.record["statistics"])
    if isinstance(source.texts, Texts) and not isinstance(source.scored, str):
        return {
            "n_users": len(source.texts.layers[0].tokens["user"]),
            "n_items": len(source.texts.layers[0].tokens["item"]),
            "n_training_interactions": int(source.texts.degrees["user"].sum()),
        }
    return None


def _why_no_texts(source: Source) -> str:
    if isinstance(source.texts, str):
        return source.texts
    return "the run generated no texts"
