"""Assembling the page: the parts of a run or a leaderboard, style and script in one file."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from recbole_gacllm import __version__, artifacts
from recbole_gacllm.benchmark.leaderboard import PLAN_FILE
from recbole_gacllm.benchmark.markdown import metric_name
from recbole_gacllm.benchmark.results import Board
from recbole_gacllm.report import board as board_sections
from recbole_gacllm.report import sections
from recbole_gacllm.report.browser import browser_data, map_data, packed
from recbole_gacllm.report.markup import definition_list, note
from recbole_gacllm.report.quality import quality
from recbole_gacllm.report.source import Source, Texts

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its title, its HTML, or one line on why it is left out."""

    anchor: str
    title: str
    body: str
    is_left_out: bool = False


def write_report(path: Path, output: Path | None = None, artifact_dir: Path | None = None) -> Path:
    """Write the page of a run or a leaderboard.

    Args:
        path: A ``run.json``, its folder, or the folder of a leaderboard.
        output: The file; default ``report.html`` beside what it shows.
        artifact_dir: Where to look for artefacts that were moved away from the run.

    Returns:
        The file.

    Raises:
        ValueError: If there is neither a run nor a leaderboard.
        GaCLLMError: If the file cannot be written, or splits of a leaderboard differ.
    """
    if (path / PLAN_FILE).is_file():
        page = _leaderboard_page(path, artifact_dir)
    else:
        page = _run_page(Source.read(path, artifact_dir))
    target = output or (path if path.is_dir() else path.parent) / "report.html"
    artifacts.write_atomic(target, page.encode("utf-8", "backslashreplace"))
    return target


def _run_page(source: Source) -> str:
    record = source.record
    parts: list[Section] = []
    _add(parts, "results", "Results", lambda: sections.results(source))
    _add(parts, "curves", "Learning curves", lambda: sections.curves(source))
    _add(parts, "degrees", "Who and what it serves", lambda: sections.by_degree(source))
    data = _add_text_sections(parts, source)
    _add(parts, "setup", "Setup", lambda: _setup(record, _command(record)))
    subtitle = f"{record['model']} on {record['dataset']}"
    tiles = [
        (f"Test {metric_name(name)}", f"{value:.4f}") for name, value in record["test"].items()
    ]
    counts = sections.interactions(source) or {}
    return _render(subtitle, "Run", tiles[:5], _facts(record, counts), parts, data)


def _leaderboard_page(folder: Path, artifact_dir: Path | None) -> str:
    found = Board.read(folder)
    parts: list[Section] = []
    boards = board_sections.read_board(found)
    for number, one in enumerate(boards):
        on = f" on {one.dataset}" if len(boards) > 1 else ""
        end = f"-{number}" if number else ""
        bars = "Ablation" if len(board_sections.variants(one)) > 1 else "Side by side"
        for anchor, title, make in (
            ("results", "Results", board_sections.results),
            ("bars", bars, board_sections.side_by_side),
            ("curves", "Learning curves", board_sections.curves),
            ("degrees", "Who and what they serve", board_sections.by_degree),
        ):
            _add(parts, anchor + end, title + on, functools.partial(make, one))
    runs = [run for run in found.runs if run.record.get("artifacts")]
    data: dict[str, Any] = {}
    if runs:
        run = runs[0]
        words = (
            f"What follows is about the texts of one run: {run.record['dataset']}, seed "
            f"{run.record['seed']}, {run.name}. For another, give its folder to the command report."
        )
        parts.append(Section("texts", "GaCLLM’s texts", f"<p>{escape(words)}</p>"))
        data = _add_text_sections(parts, Source.read(run.folder, artifact_dir))
    else:
        parts.append(_absent("texts", "Texts", "no finished run of this leaderboard used texts"))
    first = boards[0]
    record = next(iter(first.first.values())).record
    plan = found.plan
    command = (
        f"leaderboard --models={','.join(plan['models'])} --datasets={','.join(plan['datasets'])} "
        f"--seeds={len(plan['seeds'])} --protocol={plan['protocol']}"
    )
    given = {
        key: value for key, value in plan["given"].items() if not key.endswith(("_dir", "_path"))
    }
    command += "".join(f" --{key}={value}" for key, value in given.items())
    _add(parts, "setup", "Setup", lambda: _setup(record, command))
    best = max(
        first.table["models"],
        key=lambda model: first.table["models"][model]["metrics"][first.metric]["mean"],
    )
    score = first.table["models"][best]["metrics"][first.metric]["mean"]
    tiles = [
        ("Best model", best),
        (f"Its {metric_name(first.metric)}", f"{score:.4f}"),
        ("Models", str(len(plan["models"]))),
        ("Data sets", str(len(plan["datasets"]))),
        ("Seeds", str(len(plan["seeds"]))),
    ]
    facts = {"Protocol": escape(plan["protocol"]), **_facts(record, first.table["statistics"])}
    facts["Seed"] = ", ".join(map(str, plan["seeds"]))
    models = (
        ", ".join(plan["models"]) if len(plan["models"]) < 6 else f"{len(plan['models'])} models"
    )
    subtitle = f"{models} on {', '.join(plan['datasets'])}"
    return _render(subtitle, "Leaderboard", tiles, facts, parts, data)


def _add_text_sections(parts: list[Section], source: Source) -> dict[str, Any]:
    """Sections about texts; returns the data of the map and the browser."""
    data: dict[str, Any] = {}
    if isinstance(source.texts, Texts):
        data = {"browser": browser_data(source), "map": map_data(source.texts)}
    browser = Template(_asset("browser.html"))
    if data:
        items = data["browser"]["item"]
        popular = items["c"][max(range(len(items["d"])), key=items["d"].__getitem__)]
        body = browser.substitute(example=escape(popular))
        parts.append(Section("browser", "Description browser", body))
    else:
        parts.append(_absent("browser", "Description browser", str(source.texts)))
    _add(parts, "map", "Map of item texts", lambda: sections.text_map(source, data.get("map")))
    _add(parts, "cost", "Cost of the texts", lambda: sections.cost(source))
    _add(parts, "quality", "Quality of the texts", lambda: quality(source))
    _add(parts, "sft", "Fine-tuning", lambda: sections.finetuning(source))
    _add(parts, "leakage", "Leakage audit", lambda: sections.leakage(source))
    return data


def _add(parts: list[Section], anchor: str, title: str, make: Callable[[], str]) -> None:
    """Add a section, or one line that says why it is left out."""
    try:
        parts.append(Section(anchor, title, make()))
    except LookupError as missing:
        parts.append(_absent(anchor, title, str(missing.args[0])))


def _absent(anchor: str, title: str, reason: str) -> Section:
    line = f'<p class="absent">Left out: {escape(reason.rstrip("."))}.</p>'
    return Section(anchor, title, line, is_left_out=True)


def _facts(record: dict[str, Any], counts: dict[str, int]) -> dict[str, str]:
    names = {
        "n_users": "Users",
        "n_items": "Items",
        "n_interactions": "Interactions",
        "n_training_interactions": "Training interactions",
    }
    facts = {name: f"{counts[key]:,}" for key, name in names.items() if key in counts}
    return {
        **facts,
        "Seed": str(record["seed"]),
        "Device": escape(record["device"]),
        "RecBole": escape(record["versions"].get("recbole", "?")),
        "recbole_gacllm": escape(record["versions"].get("recbole_gacllm", "?")),
    }


def _setup(record: dict[str, Any], command: str) -> str:
    """Command, settings and versions; without the paths of the machine."""
    config = record["config"]
    groups = []
    for title, keys in _SETTINGS.items():
        shown = {
            key: f"<code>{escape(_words(config[key]))}</code>" for key in keys if key in config
        }
        if shown:
            groups.append(f"<div><h3>{title}</h3>{definition_list(shown)}</div>")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f'<p><code>{escape(command)}</code></p><div class="settings">{"".join(groups)}</div>'
        + note(versions)
    )


def _words(value: Any) -> str:
    """A setting; a dictionary without its quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_words(inner)}" for key, inner in value.items())
    return str(value)


def _command(record: dict[str, Any]) -> str:
    """The command line without the folders of the machine."""
    program, *flags = record["command"] or [""]
    kept = [flag for flag in flags if not flag.split("=")[0].endswith(("_dir", "_path"))]
    return " ".join([Path(program).name, *kept])


def _render(
    subtitle: str,
    kind: str,
    tiles: list[tuple[str, str]],
    facts: dict[str, str],
    parts: list[Section],
    data: dict[str, Any],
) -> str:
    return Template(_asset("template.html")).substitute(
        title=escape(f"{subtitle} – {kind.lower()}"),
        heading=escape(subtitle),
        kind=kind,
        style=_asset("style.css"),
        script=_asset("browser.js"),
        tiles="".join(
            f"<div><span>{escape(name)}</span><strong>{escape(value)}</strong></div>"
            for name, value in tiles
        ),
        facts=definition_list(facts),
        navigation="".join(
            f'<a href="#{part.anchor}">{escape(part.title)}</a>'
            for part in parts
            if not part.is_left_out
        ),
        sections="".join(
            f'<section id="{part.anchor}"><h2>{escape(part.title)}</h2>{part.body}</section>'
            for part in parts
        ),
        data=packed(data) if data else "",
        version=escape(__version__),
        date=datetime.now().strftime("%-d %B %Y"),
    )


def _asset(name: str) -> str:
    return files("recbole_gacllm.report").joinpath(name).read_text("utf-8")
