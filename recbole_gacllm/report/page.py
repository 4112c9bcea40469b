"""Assembling the page: the parts of a run or a leaderboard, style and script in one file.

HTML stands in ``templates/`` alone. Whatever they show is escaped, and without the machine's
folders, by the template engine (:func:`_environment`); only what is a ``Markup`` is ready as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from recbole_gacllm import __version__
from recbole_gacllm.artifacts import disk
from recbole_gacllm.artifacts.locate import RUN_FILE
from recbole_gacllm.compare.leaderboard import PLAN_FILE
from recbole_gacllm.compare.markdown import metric_name
from recbole_gacllm.compare.results import Board
from recbole_gacllm.report import board as boards
from recbole_gacllm.report import sections
from recbole_gacllm.report.browser import browser_data, map_data, packed
from recbole_gacllm.report.folders import paths_with_blanks, without_folders
from recbole_gacllm.report.source import Source

# Anchor, title, template, and what makes its data.
_Plan = Iterable[tuple[str, str, str, Callable[[], dict[str, Any]]]]


@dataclass(frozen=True)
class Section:
    """A part of the page: anchor, title, and what its template shows or why it is left out."""

    anchor: str
    title: str
    template: str
    data: dict[str, Any]
    left_out: str = ""


@dataclass(frozen=True)
class Page:
    """What ``templates/page.html`` shows."""

    kind: str
    subtitle: str
    tiles: list[tuple[str, str]]
    parts: list[Section]
    data: dict[str, Any]
    records: list[dict[str, Any]]
    counts: dict[str, int]
    seeds: list[int]
    protocol: str = ""


def write_report(path: Path, output: Path | None = None, artifact_dir: Path | None = None) -> Path:
    """Write the page of a run or a leaderboard.

    Args:
        path: A ``run.json``, its folder, or the folder of a leaderboard.
        output: The file; default ``report.html`` beside what it shows.
        artifact_dir: Where to look for artefacts that were moved away from the run.

    Returns:
        The file.

    Raises:
        ValueError: If there is neither a run nor a leaderboard, or a record of other make.
        GaCLLMError: If the file cannot be written, or splits of a leaderboard differ.
    """
    is_board = (path / PLAN_FILE).is_file()
    if not (is_board or path.is_file() or (path / RUN_FILE).is_file()):
        raise ValueError(
            f"{path} is neither a run (a folder with {RUN_FILE}) nor the folder of a leaderboard; "
            "a run's last line of output names it."
        )
    try:
        page = (_leaderboard_page if is_board else _run_page)(path, artifact_dir)
        text = _render(page)
    except (AttributeError, LookupError, StopIteration, TypeError, UndefinedError) as error:
        raise ValueError(
            f"a record in {path} has a part of another form than this version writes ({error!r}). "
            "It was edited, or is of another version: take the file as it was written."
        ) from error
    target = output or (path if path.is_dir() else path.parent) / "report.html"
    disk.write_atomic(target, text.encode("utf-8", "backslashreplace"))
    return target


def _render(page: Page) -> str:
    assets = files("recbole_gacllm.report")
    environment = _environment(paths_with_blanks(page.records))
    return environment.get_template("page.html").render(
        page=page,
        data=Markup(packed(page.data)) if page.data else "",
        style=Markup(assets.joinpath("style.css").read_text("utf-8")),
        script=Markup(assets.joinpath("browser.js").read_text("utf-8")),
        version=__version__,
        date=datetime.now().strftime("%-d %B %Y"),
    )


def _environment(with_blanks: list[str]) -> Environment:
    environment = Environment(
        loader=PackageLoader("recbole_gacllm.report"),
        autoescape=True,
        finalize=functools.partial(without_folders, with_blanks=with_blanks),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"form": _form, "duration": _duration, "words": _words, "metric_name": metric_name}
    environment.filters |= filters
    return environment


def _form(value: float | None, spec: str = ",") -> str:
    """A number in the page: a dash for none, a true minus where signs are shown."""
    if value is None:
        return "–"
    return f"{value:{spec}}".replace("-", "−") if spec[0] == "+" else f"{value:{spec}}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _words(value: Any) -> str:
    """A setting; a dictionary without its quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_words(inner)}" for key, inner in value.items())
    return str(value)


def _run_page(path: Path, artifact_dir: Path | None) -> Page:
    source = Source.read(path, artifact_dir)
    record = source.record
    parts = _sections(
        [
            ("results", "Results", "results", lambda: sections.results(source)),
            ("curves", "Learning curves", "figures", lambda: sections.curves(source)),
            ("degrees", "Who and what it serves", "figures", lambda: sections.by_degree(source)),
        ]
    )
    text_parts, data = _text_sections(source)
    parts += [*text_parts, _setup(record, sections.command(record))]
    tiles = [
        (f"Test {metric_name(name)}", f"{value:.4f}") for name, value in record["test"].items()
    ]
    subtitle = f"{record['model']} on {record['dataset']}"
    counts = sections.interactions(source)
    return Page("Run", subtitle, tiles[:5], parts, data, [record], counts, [record["seed"]])


def _leaderboard_page(path: Path, artifact_dir: Path | None) -> Page:
    board = Board.read(path)
    of_datasets = boards.read_board(board, artifact_dir)
    parts = []
    for number, one in enumerate(of_datasets):
        on = f" on {one.dataset}" if len(of_datasets) > 1 else ""
        end = f"-{number}" if number else ""
        bars = "Ablation" if len(one.variants) > 1 else "Side by side"
        plan: _Plan = (
            (f"{anchor}{end}", f"{title}{on}", template, functools.partial(make, one))
            for anchor, title, template, make in (
                ("results", "Results", "board_results", boards.results),
                ("bars", bars, "figures", boards.side_by_side),
                ("curves", "Learning curves", "figures", boards.curves),
                ("degrees", "Who and what they serve", "figures", boards.by_degree),
            )
        )
        parts += _sections(plan)
    data: dict[str, Any] = {}
    if run := next((run for run in board.runs if run.record.get("artifacts")), None):
        about = {key: run.record[key] for key in ("dataset", "seed")} | {"run": run.name}
        text_parts, data = _text_sections(Source.read(run.folder, artifact_dir))
        parts += [Section("texts", "GaCLLM’s texts", "texts.html", about), *text_parts]
    else:
        why = "no finished run of this leaderboard used texts"
        parts.append(Section("texts", "Texts", "", {}, why))
    made, first = board.plan, of_datasets[0]
    parts.append(_setup(first.record, _leaderboard_command(made)))
    best = max(first.of_metric.items(), key=lambda row: float(row[1]["mean"]))
    tiles = [
        ("Best model", best[0]),
        (f"Its {metric_name(first.metric)}", f"{best[1]['mean']:.4f}"),
        ("Models", str(len(made["models"]))),
        ("Data sets", str(len(made["datasets"]))),
        ("Seeds", str(len(made["seeds"]))),
    ]
    names = made["models"]
    models = ", ".join(names) if len(names) < 6 else f"{len(names)} models"
    subtitle = f"{models} on {', '.join(made['datasets'])}"
    records = [first.record, *(run.record for run in board.runs)]
    counts, seeds = first.table["statistics"], made["seeds"]
    protocol = made["protocol"]
    return Page("Leaderboard", subtitle, tiles, parts, data, records, counts, seeds, protocol)


def _leaderboard_command(plan: dict[str, Any]) -> str:
    """Without the keys that name folders."""
    flags = {
        "models": ",".join(plan["models"]),
        "datasets": ",".join(plan["datasets"]),
        "seeds": len(plan["seeds"]),
        "protocol": plan["protocol"],
        **{k: v for k, v in plan["given"].items() if not k.endswith(("_dir", "_path"))},
    }
    return " ".join(["leaderboard", *(f"--{key}={value}" for key, value in flags.items())])


def _text_sections(source: Source) -> tuple[list[Section], dict[str, Any]]:
    """Sections about texts, and the data of the map and the browser."""
    data: dict[str, Any] = {}
    if not isinstance(source.texts, str):
        browser = browser_data(source.texts, source.scored)
        data = {"browser": browser, "map": map_data(source.texts)}
    plan: _Plan = (
        ("browser", "Description browser", "browser", lambda: sections.browser(source, data)),
        ("map", "Map of item texts", "map", lambda: sections.text_map(source, data)),
        ("cost", "Cost of the texts", "cost", lambda: sections.cost(source)),
        ("quality", "Quality of the texts", "quality", lambda: sections.quality(source)),
        ("sft", "Fine-tuning", "sft", lambda: sections.finetuning(source)),
        ("leakage", "Leakage audit", "leakage", lambda: sections.leakage(source)),
    )
    return _sections(plan), data


def _setup(record: dict[str, Any], command: str) -> Section:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    data = {"command": command, "config": record["config"], "versions": versions}
    return Section("setup", "Setup", "setup.html", data)


def _sections(plan: _Plan) -> list[Section]:
    """Each section, or one line that says why it is left out."""
    parts = []
    for anchor, title, template, make in plan:
        try:
            parts.append(Section(anchor, title, f"{template}.html", make()))
        except LookupError as missing:
            parts.append(Section(anchor, title, "", {}, str(missing.args[0]).rstrip(".")))
    return parts
