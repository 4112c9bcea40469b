"""A leaderboard's tables: Markdown in RecBole-GNN's page format, LaTeX (booktabs), CSV, JSON.

OUTPUT/results.json  results.csv  runs.csv  results/<data set>.md  results/<data set>.tex
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from recbole.utils import list_to_latex

from recbole_gacllm.artifacts import disk
from recbole_gacllm.artifacts.csv_cells import csv_text
from recbole_gacllm.compare import degrees, markdown
from recbole_gacllm.compare import markdown as cells
from recbole_gacllm.compare.costs import command, cost_rows, environment_rows, runs_to_csv
from recbole_gacllm.compare.results import DECIMALS, Board, summarize
from recbole_gacllm.config import MODELS

RESULTS_FILE = "results.json"
_PROPERTIES = (
    *("field_separator", "seq_separator", "USER_ID_FIELD", "ITEM_ID_FIELD", "RATING_FIELD"),
    *("TIME_FIELD", "load_col", "val_interval", "user_inter_num_interval"),
    *("item_inter_num_interval", "eval_args", "metrics", "topk", "valid_metric"),
    *("epochs", "stopping_step", "MAX_ITEM_LIST_LENGTH"),
)


def export(folder: Path, baseline: str | None = None) -> list[Path]:
    """Write every table of a leaderboard's folder.

    Args:
        folder: Of a leaderboard, finished or not.
        baseline: What the models are tested against; default the first named one with results.

    Returns:
        The files written.

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
    (folder / "results").mkdir(exist_ok=True)
    for name, text in pages.items():
        disk.write_atomic(folder / name, text.encode())
    return [folder / name for name in pages]


def to_csv(summary: dict[str, Any]) -> str:
    """One row for each data set, model and metric."""
    head = (
        *("dataset", "model", "metric", "mean", "std", "n_seeds", "interval_low", "interval_high"),
        *("mark", "baseline", "difference", "difference_low", "difference_high"),
        *("t_p", "t_p_holm", "wilcoxon_p", "wilcoxon_p_holm"),
    )
    rows: list[Sequence[Any]] = [head]
    for dataset, table in summary["datasets"].items():
        for model, row in table["models"].items():
            for metric, cell in row["metrics"].items():
                test = cell["test"] or {}
                rows.append(
                    [
                        *(dataset, model, metric, round(cell["mean"], 6)),
                        "" if cell["std"] is None else round(cell["std"], 6),
                        len(row["seeds"]),
                        *(cell["interval"] or ("", "")),
                        *(cell["mark"], table["baseline"], test.get("difference", "")),
                        *test.get("interval", ("", "")),
                        *(test.get(key, "") for key in head[-4:]),
                    ]
                )
    return csv_text(rows)


def to_latex(summary: dict[str, Any], dataset: str) -> str:
    """A booktabs table: best bold, second underlined, deviation over seeds where there are several.

    A dagger marks a difference from the baseline whose Holm-corrected Wilcoxon p is below 0.05.
    """
    table = summary["datasets"][dataset]

    def cell(value: dict[str, Any]) -> str:
        text = f"{value['mean']:.{DECIMALS}f}"
        if value["mark"]:
            command = {"best": "textbf", "second": "underline"}[value["mark"]]
            text = f"\\{command}{{{text}}}"
        if value["std"] is not None:
            text += f"{{\\scriptsize\\,$\\pm$\\,{value['std']:.{DECIMALS}f}}}"
        if value["test"] and value["test"]["wilcoxon_p_holm"] < 0.05:
            text += "$^\\dagger$"
        return text

    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{cells.latex(_caption(summary, dataset))} $\\dagger$: differs from "
        f"{cells.latex(table['baseline'])}, $p<0.05$ (paired Wilcoxon over users, Holm).}}",
        f"\\begin{{tabular}}{{l{'c' * len(table['metrics'])}}}",
        "\\toprule",
        " & ".join(
            ["Method", *(cells.latex(markdown.metric_name(name)) for name in table["metrics"])]
        )
        + " \\\\",
        "\\midrule",
    ]
    lines += [" & ".join(row) + " \\\\" for row in _rows(table, cell, cells.latex)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def to_markdown(summary: dict[str, Any], board: Board, dataset: str) -> str:
    """A page as RecBole-GNN publishes them; below: tests, costs, the proof of equal splits."""
    table, plan = summary["datasets"][dataset], board.plan
    config = plan["properties"][dataset]
    properties = {key: config[key] for key in _PROPERTIES if config.get(key) is not None}
    filters = (
        *("rm_dup_inter", "val_interval", "user_inter_num_interval", "item_inter_num_interval"),
    )
    # RecBole's own value for "no filter on the number of interactions".
    given = [f"{key}: {config[key]}" for key in filters if config.get(key) not in (None, "[0,inf)")]
    numbers = table["statistics"]
    n_users, n_items, n_edges = (
        numbers[f"n_{what}"] for what in ("users", "items", "interactions")
    )
    n_repeats = numbers.get("n_repeats", 0)
    sparsity = 1 - (n_edges - n_repeats) / (n_users * n_items)
    repeats = (
        f"**Repeats:** {n_repeats:,} of {n_edges:,} interactions are of a user and an item that "
        "stand in an earlier one: held-out ones may be known from training.\n"
    )
    metrics = [cells.markdown(markdown.metric_name(metric)) for metric in table["metrics"]]
    name = cells.markdown(dataset)

    def cell(value: dict[str, Any]) -> str:
        text = f"{value['mean']:.{DECIMALS}f}"
        text = {"best": f"**{text}**", "second": f"<u>{text}</u>"}.get(value["mark"], text)
        return text if value["std"] is None else f"{text} ± {value['std']:.{DECIMALS}f}"

    made_by = f"{command(board)} --baseline={table['baseline']}"
    parts = [
        f"# Experimental Setting\n\n**Dataset:** {name}\n",
        f"**Filtering:** {cells.markdown('; '.join(given) or 'none')}\n",
        repeats if n_repeats else "",
        f"**Evaluation:** {cells.markdown(evaluation(config))}\n",
        f"**Metrics:** {', '.join(metrics)}\n",
        f"**Properties:**\n\n```yaml\n{_yaml(properties)}```\n",
        "# Dataset Statistics\n",
        markdown.table(
            ["Dataset", "#Users", "#Items", "#Interactions", "Sparsity"],
            [[name, f"{n_users:,}", f"{n_items:,}", f"{n_edges:,}", f"{sparsity:.2%}"]],
        ),
        "# Evaluation Results\n",
        markdown.table(["Method", *metrics], _rows(table, cell, markdown.bold)),
        cells.markdown(_caption(summary, dataset)) + " **Best**, <u>second</u>.\n",
        _failures(summary, dataset),
        _notes(summary),
        degrees.section(table["by_degree"], DECIMALS),
        "# Hyper-parameters\n",
        markdown.table(["", "Hyper-parameters", "Source"], _hyper_parameters(plan, table, dataset)),
        _tuning(plan, table, dataset),
        "# Paired Tests\n",
        _tests(table),
        "# Cost\n",
        f"Made by {cells.markdown_code(made_by)}; means over the runs of a "
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


_PARTS = ("train", "valid", "test")


def evaluation(config: dict[str, Any]) -> str:
    """RecBole's ``eval_args`` and the keys of ``splits.py`` in words."""
    arguments = config["eval_args"]
    kept = config.get("train_share") or 1
    sparse = "" if kept == 1 else f"; {kept:.0%} of the training interactions kept"
    if cold := config.get("cold_item_share"):
        return (
            f"by item: {cold:.0%} of the items have no training interaction, those of half of them "
            f"are validation, of the others test, each ranked within its half{sparse}"
        )
    mode = arguments["mode"]["test"]
    ranking = "full sort" if mode == "full" else mode
    if files := config.get("benchmark_filename"):
        return f"ready split files ({', '.join(files)}), {ranking}{sparse}"
    order = {"RO": "random order", "TO": "order of time"}[arguments["order"]]
    (rule, value), *_ = arguments["split"].items()
    split = f"ratio-based {':'.join(f'{part:g}' for part in value)}" if rule == "RS" else None
    leave = "leave one out" if rule == "LS" else f"{rule} {value}"
    return f"{split or leave}, {order}, {ranking}; grouped by {arguments['group_by']}{sparse}"


def _caption(summary: dict[str, Any], dataset: str) -> str:
    rows = summary["datasets"][dataset]["models"]
    most = max(len(row["seeds"]) for row in rows.values())
    spread = f"mean ± standard deviation of {most} seeds" if most > 1 else "one seed"
    if fewer := [
        f"{name} {len(row['seeds'])}" for name, row in rows.items() if len(row["seeds"]) < most
    ]:
        spread += (
            f" ({', '.join(fewer)}: the first ones, not ranked; each test is on the seeds that "
            "both have)"
        )
    return f"Test results on {dataset}, {summary['protocol']} protocol, {spread}."


def _rows(
    table: dict[str, Any],
    cell: Callable[[dict[str, Any]], str],
    name: Callable[[str], str],
) -> list[list[str]]:
    return [
        [name(model), *(cell(row["metrics"][metric]) for metric in table["metrics"])]
        for model, row in table["models"].items()
    ]


def _tests(table: dict[str, Any]) -> str:
    rows = []
    for metric in table["metrics"]:
        for model, row in table["models"].items():
            if test := row["metrics"][metric]["test"]:
                low, high = test["interval"]
                rows.append(
                    [
                        markdown.bold(model),
                        cells.markdown(markdown.metric_name(metric)),
                        f"{test['difference']:+.{DECIMALS}f}",
                        f"[{low:+.{DECIMALS}f}, {high:+.{DECIMALS}f}]",
                        f"{test['t_p_holm']:.2g}",
                        f"{test['wilcoxon_p_holm']:.2g}",
                    ]
                )
    if not rows:
        return "No model to compare with.\n"
    baseline = cells.markdown(table["baseline"])
    head = ["Method", "Metric", f"Method - {baseline}", "95 % interval", "p (t)", "p (Wilcoxon)"]
    note = (
        "Two-sided, paired over users (each averaged over the seeds), Holm's correction over the "
        "compared methods. Uncorrected values and those of each seed: results.json.\n"
    )
    return markdown.table(head, rows) + "\n" + note


def _hyper_parameters(plan: dict[str, Any], table: dict[str, Any], dataset: str) -> list[list[str]]:
    rows = []
    for model in table["models"]:
        tuned = plan["tuned"][f"{dataset}/{model}"]
        given = tuned["given"]
        values = {**tuned["values"], **given}
        source = _lines(tuned["files"])
        if not source:
            source = "GaCLLM.yaml" if model.partition(":")[0] in MODELS else "RecBole's defaults"
        if given:
            source += "<br/>the command line"
        if plan["config_files"]:
            source += "<br/>" + _lines(plan["config_files"])
        text = _lines(f"{key}={value}" for key, value in values.items())
        rows.append([markdown.bold(model), text, source])
    return rows


def _lines(texts: Iterable[str]) -> str:
    """Lines of one cell."""
    return "<br/>".join(map(cells.markdown, texts))


def _tuning(plan: dict[str, Any], table: dict[str, Any], dataset: str) -> str:
    """Where the files of hyper-parameters are from and what was tried, as their heads say."""
    notes = {
        file: note
        for model in table["models"]
        for file, note in plan["tuned"][f"{dataset}/{model}"]["files"].items()
        if note
    }
    lines = [
        f"- {cells.markdown_code(file)}: {cells.markdown(note)}" for file, note in notes.items()
    ]
    return "Sources and ranges:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _failures(summary: dict[str, Any], dataset: str) -> str:
    lines = [
        f"- {cells.markdown(failure['model'])}, seed {cells.markdown(failure['seed'])}: "
        f"{cells.markdown_code(failure['error'])}"
        for failure in summary["failures"]
        if failure["dataset"] == dataset
    ]
    return "Failed runs, not in the table:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _notes(summary: dict[str, Any]) -> str:
    if summary["protocol"] != "sequential":
        return ""
    return (
        "RecBole ranks all items for sequential models, those of the user's history too, and gives "
        "them the validation item as the last of the history at test time; for general models it "
        "leaves out the history and does not train on validation items.\n"
    )


def _yaml(values: dict[str, Any]) -> str:
    return str(yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=96))


def write_latex(board: Board, dataset: str, part: str, file: Path) -> None:
    """Write one table with RecBole's own function; means over seeds where there are several.

    Args:
        board: A leaderboard with at least one finished run of the data set.
        dataset: Name of the data set.
        part: ``valid`` or ``test``.
        file: ``.tex`` file to write; its folder is made if need be.
    """
    rows = []
    for model in board.plan["models"]:
        runs = board.of(dataset, model)
        metrics = runs[0].record[part] if runs else {}
        means = {
            metric: statistics.fmean(run.record[part][metric] for run in runs) for metric in metrics
        }
        if means:
            rows.append({"Model": cells.latex(model), **means})
    bigger = all(run.record["config"]["valid_metric_bigger"] for run in board.of(dataset))
    columns = [name for name in rows[0] if name != "Model"]
    _, text = list_to_latex(rows, bigger_flag=bigger, subset_columns=columns)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
