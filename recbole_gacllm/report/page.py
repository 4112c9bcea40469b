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
from recbole_gacllm.report import sections
from recbole_gacllm.report.board import OF_BOARD, read_board
from recbole_gacllm.report.browser import packed
from recbole_gacllm.report.folders import paths_with_blanks, without_folders
from recbole_gacllm.report.source import Source
from recbole_gacllm.report.texts import Texts


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
    """Write the page of a run or a leaderboard; returns the file.

    Args:
        path: A ``run.json``, its folder, or the folder of a leaderboard.
        output: The file; default ``report.html`` beside what it shows.
        artifact_dir: Where to look for artefacts that were moved away from the run.

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
    program, *flags = record["command"] or [""]
    command = [Path(program).name, *(f for f in flags if not _names_folder(f.split("=")[0]))]
    parts = _sections((*sections.OF_RUN, *sections.OF_TEXTS), source)
    tiles = [
        (f"Test {metric_name(name)}", f"{value:.4f}") for name, value in record["test"].items()
    ]
    counts = record.get("statistics", {})
    if not counts and isinstance(source.texts, Texts) and not isinstance(source.scored, str):
        graph = source.texts.run.graph
        counts = {"n_users": len(graph.user_tokens), "n_items": len(graph.item_tokens)}
        counts["n_training_interactions"] = graph.n_edges
    return Page(
        kind="Run",
        subtitle=f"{record['model']} on {record['dataset']}",
        tiles=tiles[:5],
        parts=[*parts, _setup(record, command)],
        data=source.data,
        records=[record],
        counts=counts,
        seeds=[record["seed"]],
    )


def _leaderboard_page(path: Path, artifact_dir: Path | None) -> Page:
    board = Board.read(path)
    plan, of_datasets = board.plan, read_board(board, artifact_dir)
    parts = []
    for number, one in enumerate(of_datasets):
        on = f" on {one.dataset}" if len(of_datasets) > 1 else ""
        parts += _sections(OF_BOARD, one, f"-{number}" if number else "", on)
    data: dict[str, Any] = {}
    if run := next((run for run in board.runs if run.record.get("artifacts")), None):
        source = Source.read(run.folder, artifact_dir)
        about = {key: run.record[key] for key in ("dataset", "seed")} | {"run": run.name}
        parts.append(Section("texts", "GaCLLM’s texts", "texts.html", about))
        parts += _sections(sections.OF_TEXTS, source)
        data = source.data
    else:
        why = "no finished run of this leaderboard used texts"
        parts.append(Section("texts", "Texts", "", {}, why))
    first, models = of_datasets[0], plan["models"]
    best, figures = max(first.of_metric.items(), key=lambda row: float(row[1]["mean"]))
    flags = {
        "models": ",".join(models),
        "datasets": ",".join(plan["datasets"]),
        "seeds": len(plan["seeds"]),
        "protocol": plan["protocol"],
        **{key: value for key, value in plan["given"].items() if not _names_folder(key)},
    }
    command = ["leaderboard", *(f"--{key}={value}" for key, value in flags.items())]
    names = ", ".join(models) if len(models) < 6 else f"{len(models)} models"
    return Page(
        kind="Leaderboard",
        subtitle=f"{names} on {', '.join(plan['datasets'])}",
        tiles=[
            ("Best model", best),
            (f"Its {metric_name(first.metric)}", f"{figures['mean']:.4f}"),
            ("Models", str(len(models))),
            ("Data sets", str(len(plan["datasets"]))),
            ("Seeds", str(len(plan["seeds"]))),
        ],
        parts=[*parts, _setup(first.record, command)],
        data=data,
        records=[first.record, *(run.record for run in board.runs)],
        counts=first.table["statistics"],
        seeds=plan["seeds"],
        protocol=plan["protocol"],
    )


def _names_folder(key: str) -> bool:
    return key.endswith(("_dir", "_path"))


def _setup(record: dict[str, Any], command: list[str]) -> Section:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    data = {"command": " ".join(command), "config": record["config"], "versions": versions}
    data["choices"] = record.get("choices", {})
    return Section("setup", "Setup", "setup.html", data)


def _sections(
    rows: Iterable[tuple[str, str, str, Callable[[Any], dict[str, Any]]]],
    subject: Any,
    end: str = "",
    on: str = "",
) -> list[Section]:
    """The sections of a table about a run or a board, or one line that says why one is left out."""
    parts = []
    for anchor, title, template, make in rows:
        data: dict[str, Any] = {}
        left_out = ""
        try:
            data = make(subject)
        except LookupError as missing:
            left_out = str(missing.args[0]).rstrip(".")
        title = data.get("title", title)
        parts.append(Section(anchor + end, title + on, f"{template}.html", data, left_out))
    return parts
