"""A leaderboard's tables: Markdown in RecBole-GNN's page format, LaTeX (booktabs), CSV, JSON.

OUTPUT/results.json  results.csv  runs.csv  results/<data set>.md .tex .svg .png
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from recbole_gacllm.artifacts import disk
from recbole_gacllm.compare import degrees, markdown, plots
from recbole_gacllm.compare.costs import command, cost_rows, environment_rows, runs_to_csv
from recbole_gacllm.compare.markdown import latex, metric_name
from recbole_gacllm.compare.results import DECIMALS, Board, summarize
from recbole_gacllm.config import MODEL, MODELS, PEERS

RESULTS_FILE = "results.json"
_PROPERTIES = (
    *("field_separator", "seq_separator", "USER_ID_FIELD", "ITEM_ID_FIELD", "RATING_FIELD"),
    *("TIME_FIELD", "load_col", "val_interval", "user_inter_num_interval"),
    *("item_inter_num_interval", "eval_args", "metrics", "topk", "valid_metric"),
    *("epochs", "stopping_step", "MAX_ITEM_LIST_LENGTH"),
)
_FILTERS = ("rm_dup_inter", "val_interval", "user_inter_num_interval", "item_inter_num_interval")
_P_VALUES = ("t_p", "t_p_holm", "wilcoxon_p", "wilcoxon_p_holm")
_PARTS = ("train", "valid", "test")
_SEQUENTIAL_NOTE = (
    "RecBole ranks all items for sequential models, those of the user's history too, and gives "
    "them the validation item as the last of the history at test time; for general models it "
    "leaves out the history and does not train on validation items.\n"
)


def export(folder: Path, baseline: str | None = None) -> list[Path]:
    """Write every table of a leaderboard's folder, finished or not; return the files.

    Raises:
        ValueError: If there is no leaderboard, no finished run, or no such baseline.
        GaCLLMError: If splits differ between runs.
    """
    board = Board.read(folder)
    summary = summarize(board, baseline)
    if not summary["datasets"]:
        logs = ", ".join(failure["log"] for failure in board.failures)
        raise ValueError(f"{folder}: no run has finished. Logs: {logs or 'none'}.")
    pages = {
        RESULTS_FILE: json.dumps(summary, indent=2),
        "results.csv": to_csv(summary),
        "runs.csv": runs_to_csv(board),
    }
    for dataset in summary["datasets"]:
        pages[f"results/{dataset}.md"] = to_markdown(summary, board, dataset)
        pages[f"results/{dataset}.tex"] = to_latex(summary, dataset)
    files = {name: text.encode() for name, text in pages.items()}
    for dataset, table in summary["datasets"].items():
        metric = board.plan["properties"][dataset]["valid_metric"].lower()
        title = f"Test results on {dataset}, {summary['protocol']} protocol"
        for kind, content in plots.draw(table, title, metric).items():
            files[f"results/{dataset}.{kind}"] = content
    (folder / "results").mkdir(exist_ok=True)
    for name, content in files.items():
        disk.write_atomic(folder / name, content)
    return [folder / name for name in files]


def to_csv(summary: dict[str, Any]) -> str:
    """One row for each data set, model and metric."""
    rows = []
    for dataset, table in summary["datasets"].items():
        for model, of_model in table["models"].items():
            for metric, cell in of_model["metrics"].items():
                test = cell["test"] or {}
                low, high = cell["interval"] or (None, None)
                test_low, test_high = test.get("interval", (None, None))
                row = {
                    "dataset": dataset,
                    "model": model,
                    "metric": metric,
                    "mean": round(cell["mean"], 6),
                    "std": None if cell["std"] is None else round(cell["std"], 6),
                    "n_seeds": len(of_model["seeds"]),
                    "interval_low": low,
                    "interval_high": high,
                    "mark": cell["mark"],
                    "baseline": table["baseline"],
                    "difference": test.get("difference"),
                    "difference_low": test_low,
                    "difference_high": test_high,
                }
                rows.append(row | {name: test.get(name) for name in _P_VALUES})
    return markdown.csv_text(rows)


def to_latex(summary: dict[str, Any], dataset: str) -> str:
    """A booktabs table: best bold, second underlined, deviation over seeds where there are several.

    A dagger marks a difference from the baseline whose Holm-corrected Wilcoxon p is below 0.05.
    """
    table = summary["datasets"][dataset]

    def cell(value: dict[str, Any]) -> str:
        text = f"{value['mean']:.{DECIMALS}f}"
        if value["mark"]:
            text = f"\\{'textbf' if value['mark'] == 'best' else 'underline'}{{{text}}}"
        if value["std"] is not None:
            text += f"{{\\scriptsize\\,$\\pm$\\,{value['std']:.{DECIMALS}f}}}"
        if value["test"] and value["test"]["wilcoxon_p_holm"] < 0.05:
            text += "$^\\dagger$"
        return text

    rows = [
        [latex(model), *(cell(row["metrics"][metric]) for metric in table["metrics"])]
        for model, row in table["models"].items()
    ]
    head = ["Method", *(latex(metric_name(metric)) for metric in table["metrics"])]
    caption = (
        f"{latex(_caption(summary, dataset))} $\\dagger$: differs from "
        f"{latex(table['baseline'])}, $p<0.05$ (paired Wilcoxon over users, Holm)."
    )
    style = pd.DataFrame(rows, columns=head).style.hide(axis="index")
    return "% needs \\usepackage{booktabs}\n" + style.to_latex(
        hrules=True,
        column_format=f"l{'c' * len(table['metrics'])}",
        position_float="centering",
        caption=caption,
    )


def to_markdown(summary: dict[str, Any], board: Board, dataset: str) -> str:
    """A page as RecBole-GNN publishes them; below: tests, costs, the proof of equal splits."""
    table, plan = summary["datasets"][dataset], board.plan
    metrics = [markdown.markdown(metric_name(metric)) for metric in table["metrics"]]
    made_by = f"{command(board)} --baseline={table['baseline']}"
    parts = [
        _setting(table, plan["properties"][dataset], dataset, metrics),
        "# Evaluation Results\n",
        markdown.table(
            ["Method", *metrics],
            [
                [markdown.bold(model), *map(_cell, row["metrics"].values())]
                for model, row in table["models"].items()
            ],
        ),
        markdown.markdown(_caption(summary, dataset)) + " **Best**, <u>second</u>.\n",
        _failures(summary, dataset),
        _SEQUENTIAL_NOTE if summary["protocol"] == "sequential" else "",
        degrees.section(table["by_degree"], DECIMALS),
        "# Hyper-parameters\n",
        markdown.table(["", "Hyper-parameters", "Source"], _hyper_parameters(plan, table, dataset)),
        _tuning(plan, table, dataset),
        "# Paired Tests\n",
        _tests(table),
        "# Cost\n",
        f"Made by {markdown.markdown_code(made_by)}; means over the runs of a "
        "model. Every run's own numbers: runs.csv.\n",
        markdown.table(
            ["Method", "Runs", "Seconds", "Of these, training", "LLM tokens in", "LLM tokens out"],
            cost_rows(board, dataset),
        ),
        "# Environment\n",
        markdown.table(
            ["", "Runs", "Commit", "Device", "Packages"], environment_rows(board, dataset)
        ),
        "# Splits\n",
        "All models of a seed had the same split: SHA-256 of the sorted (user, item) pairs.\n",
        markdown.table(
            ["Seed", "Train", "Valid", "Test"],
            [
                [seed, *(f"{split[part][:16]}… ({split[f'n_{part}']:,})" for part in _PARTS)]
                for seed, split in table["splits"].items()
            ],
        ),
    ]
    return "\n".join(part for part in parts if part)


def _setting(
    table: dict[str, Any], config: dict[str, Any], dataset: str, metrics: list[str]
) -> str:
    properties = {key: config[key] for key in _PROPERTIES if config.get(key) is not None}
    # The interval is RecBole's own value for "no filter on the number of interactions".
    filters = "; ".join(
        f"{key}: {config[key]}" for key in _FILTERS if config.get(key) not in (None, "[0,inf)")
    )
    numbers, name = table["statistics"], markdown.markdown(dataset)
    n_users, n_items, n_edges = (numbers[f"n_{of}"] for of in ("users", "items", "interactions"))
    n_repeats = numbers.get("n_repeats", 0)
    sparsity = 1 - (n_edges - n_repeats) / (n_users * n_items)
    yaml_lines = yaml.safe_dump(properties, sort_keys=False, default_flow_style=None, width=96)
    parts = [
        f"# Experimental Setting\n\n**Dataset:** {name}\n",
        f"**Filtering:** {markdown.markdown(filters or 'none')}\n",
        f"**Repeats:** {n_repeats:,} of {n_edges:,} interactions are of a user and an item that "
        "stand in an earlier one: held-out ones may be known from training.\n"
        if n_repeats
        else "",
        f"**Evaluation:** {markdown.markdown(evaluation(config))}\n",
        f"**Metrics:** {', '.join(metrics)}\n",
        f"**Properties:**\n\n```yaml\n{yaml_lines}```\n",
        "# Dataset Statistics\n",
        markdown.table(
            ["Dataset", "#Users", "#Items", "#Interactions", "Sparsity"],
            [[name, f"{n_users:,}", f"{n_items:,}", f"{n_edges:,}", f"{sparsity:.2%}"]],
        ),
    ]
    return "\n".join(part for part in parts if part)


def _cell(value: dict[str, Any]) -> str:
    text = markdown.mean_std(value["mean"], value["std"], DECIMALS)
    mean, *deviation = text.split(" ", 1)
    marked = {"best": f"**{mean}**", "second": f"<u>{mean}</u>"}.get(value["mark"], mean)
    return " ".join([marked, *deviation])


def evaluation(config: dict[str, Any]) -> str:
    """RecBole's ``eval_args`` and the keys of ``splits.py`` in words."""
    arguments = config["eval_args"]
    share = config.get("train_share") or 1
    sparse = "" if share == 1 else f"; {share:.0%} of the training interactions kept"
    if config.get("known_users_only"):
        sparse += "; users without training interactions left out"
    if config.get("mask_history"):
        sparse += "; no model ranks items of the user's history"
    if cold := config.get("cold_item_share"):
        return (
            f"by item: {cold:.0%} of the items have no training interaction, those of half of them "
            f"are validation, of the others test, each ranked within its half{sparse}"
        )
    if cold := config.get("cold_user_share"):
        return (
            f"by user: {cold:.0%} of the users have no training interaction, those of half of them "
            f"are validation, of the others test, all items ranked{sparse}"
        )
    mode = arguments["mode"]["test"]
    ranking = "full sort" if mode == "full" else mode
    if files := config.get("benchmark_filename"):
        return f"ready split files ({', '.join(files)}), {ranking}{sparse}"
    order = {"RO": "random order", "TO": "order of time"}[arguments["order"]]
    match next(iter(arguments["split"].items())):
        case "RS", ratios:
            split = f"ratio-based {':'.join(f'{part:g}' for part in ratios)}"
        case "LS", _:
            split = "leave one out"
        case rule, value:
            split = f"{rule} {value}"
    return f"{split}, {order}, {ranking}; grouped by {arguments['group_by']}{sparse}"


def _caption(summary: dict[str, Any], dataset: str) -> str:
    rows = summary["datasets"][dataset]["models"]
    n_seeds = {model: len(row["seeds"]) for model, row in rows.items()}
    most = max(n_seeds.values())
    spread = f"mean ± standard deviation of {most} seeds" if most > 1 else "one seed"
    if fewer := [f"{model} {n}" for model, n in n_seeds.items() if n < most]:
        spread += (
            f" ({', '.join(fewer)}: the first ones, not ranked; each test is on the seeds that "
            "both have)"
        )
    return f"Test results on {dataset}, {summary['protocol']} protocol, {spread}."


def _tests(table: dict[str, Any]) -> str:
    rows = []
    for metric in table["metrics"]:
        for model, row in table["models"].items():
            if test := row["metrics"][metric]["test"]:
                low, high = (f"{end:+.{DECIMALS}f}" for end in test["interval"])
                name = markdown.markdown(metric_name(metric))
                numbers = f"{test['difference']:+.{DECIMALS}f}", f"[{low}, {high}]"
                p_values = f"{test['t_p_holm']:.2g}", f"{test['wilcoxon_p_holm']:.2g}"
                rows.append([markdown.bold(model), name, *numbers, *p_values])
    if not rows:
        return "No model to compare with.\n"
    difference = f"Method - {markdown.markdown(table['baseline'])}"
    head = ["Method", "Metric", difference, "95 % interval", "p (t)", "p (Wilcoxon)"]
    note = (
        "Two-sided, paired over users (each averaged over the seeds), Holm's correction over the "
        "compared methods. Uncorrected values and those of each seed: results.json.\n"
    )
    return markdown.table(head, rows) + "\n" + note


def _hyper_parameters(plan: dict[str, Any], table: dict[str, Any], dataset: str) -> list[list[str]]:
    rows = []
    for model in table["models"]:
        tuned = plan["tuned"][f"{dataset}/{model}"]
        name = model.partition(":")[0]
        own = f"{name if name in PEERS else MODEL}.yaml" if name in MODELS else "RecBole's defaults"
        sources = [_lines(tuned["files"]) or own]
        if tuned["given"]:
            sources.append("the command line")
        if plan["config_files"]:
            sources.append(_lines(plan["config_files"]))
        values = {**tuned["values"], **tuned["given"]}
        text = _lines(f"{key}={value}" for key, value in values.items())
        rows.append([markdown.bold(model), text, "<br/>".join(sources)])
    return rows


def _lines(texts: Iterable[str]) -> str:
    """Lines of one cell."""
    return "<br/>".join(map(markdown.markdown, texts))


def _tuning(plan: dict[str, Any], table: dict[str, Any], dataset: str) -> str:
    """Where the files of hyper-parameters are from and what was tried, as their heads say."""
    notes: dict[str, str] = {}
    for model in table["models"]:
        notes |= plan["tuned"][f"{dataset}/{model}"]["files"]
    return _listing(
        "Sources and ranges",
        [
            f"{markdown.markdown_code(file)}: {markdown.markdown(note)}"
            for file, note in notes.items()
            if note
        ],
    )


def _failures(summary: dict[str, Any], dataset: str) -> str:
    return _listing(
        "Failed runs, not in the table",
        [
            f"{markdown.markdown(failure['model'])}, seed {markdown.markdown(failure['seed'])}: "
            f"{markdown.markdown_code(failure['error'])}"
            for failure in summary["failures"]
            if failure["dataset"] == dataset
        ],
    )


def _listing(head: str, lines: list[str]) -> str:
    return "\n".join([f"{head}:\n", *(f"- {line}" for line in lines), ""]) if lines else ""
