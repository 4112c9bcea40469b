"""Assembling the page: the parts of a run or a leaderboard, style and script in one file.

HTML stands in ``templates/`` alone. Whatever they show is escaped, and without the machine's
folders, by the template engine (:func:`_environment`); only what is a ``Markup`` is ready as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from recbole_gacllm import __version__
from recbole_gacllm.artifacts import disk
from recbole_gacllm.compare.leaderboard import PLAN_FILE
from recbole_gacllm.compare.markdown import metric_name
from recbole_gacllm.compare.results import Board
from recbole_gacllm.report import board as board_sections
from recbole_gacllm.report import sections
from recbole_gacllm.report.browser import browser_data, map_data, packed
from recbole_gacllm.report.folders import paths_with_blanks, without_folders
from recbole_gacllm.report.source import Source, Texts


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
    hero: dict[str, str]
    parts: list[Section]
    data: dict[str, Any]
    records: list[dict[str, Any]]


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
    try:
        if (path / PLAN_FILE).is_file():
            page = _leaderboard_page(path, artifact_dir)
        else:
            page = _run_page(Source.read(path, artifact_dir))
        text = render(page)
    except (AttributeError, LookupError, StopIteration, TypeError, UndefinedError) as error:
        raise ValueError(
            f"a record in {path} has a part of another form than this version writes ({error!r}). "
            "It was edited, or is of another version: take the file as it was written."
        ) from error
    target = output or (path if path.is_dir() else path.parent) / "report.html"
    disk.write_atomic(target, text.encode("utf-8", "backslashreplace"))
    return target


def render(page: Page) -> str:
    """The page as HTML."""
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
    environment.filters |= {"form": _form, "duration": _duration, "metric_name": metric_name}
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


def _run_page(source: Source) -> Page:
    record = source.record
    parts = [
        _section("results", "Results", lambda: sections.results(source)),
        _section("curves", "Learning curves", lambda: sections.curves(source), "figures"),
        _section(
            "degrees", "Who and what it serves", lambda: sections.by_degree(source), "figures"
        ),
    ]
    data = _add_text_sections(parts, source)
    command = sections.command(record)
    parts.append(_section("setup", "Setup", lambda: sections.setup(record, command)))
    tiles = [
        (f"Test {metric_name(name)}", f"{value:.4f}") for name, value in record["test"].items()
    ]
    facts = _facts(record, sections.interactions(source))
    subtitle = f"{record['model']} on {record['dataset']}"
    return Page("Run", subtitle, tiles[:5], facts, parts, data, [record])


def _leaderboard_page(folder: Path, artifact_dir: Path | None) -> Page:
    found = Board.read(folder)
    parts: list[Section] = []
    boards = board_sections.read_board(found)
    for number, one in enumerate(boards):
        on = f" on {one.dataset}" if len(boards) > 1 else ""
        end = f"-{number}" if number else ""
        bars = "Ablation" if len(board_sections.variants(one)) > 1 else "Side by side"
        for anchor, title, make, template in (
            ("results", "Results", board_sections.results, "board_results"),
            ("bars", bars, board_sections.side_by_side, "figures"),
            ("curves", "Learning curves", board_sections.curves, "figures"),
            ("degrees", "Who and what they serve", board_sections.by_degree, "figures"),
        ):
            parts.append(_section(anchor + end, title + on, functools.partial(make, one), template))
    data: dict[str, Any] = {}
    if run := next((run for run in found.runs if run.record.get("artifacts")), None):
        about = {key: run.record[key] for key in ("dataset", "seed")} | {"run": run.name}
        parts.append(Section("texts", "GaCLLM’s texts", "texts.html", about))
        data = _add_text_sections(parts, Source.read(run.folder, artifact_dir))
    else:
        why = "no finished run of this leaderboard used texts"
        parts.append(Section("texts", "Texts", "", {}, why))
    plan, first = found.plan, boards[0]
    record = next(iter(first.first.values())).record
    command = _leaderboard_command(plan)
    parts.append(_section("setup", "Setup", lambda: sections.setup(record, command)))
    best, score = first.best
    tiles = [
        ("Best model", best),
        (f"Its {metric_name(first.metric)}", f"{score:.4f}"),
        ("Models", str(len(plan["models"]))),
        ("Data sets", str(len(plan["datasets"]))),
        ("Seeds", str(len(plan["seeds"]))),
    ]
    facts = {"Protocol": plan["protocol"], **_facts(record, first.table["statistics"])}
    facts["Seed"] = ", ".join(map(str, plan["seeds"]))
    models = (
        ", ".join(plan["models"]) if len(plan["models"]) < 6 else f"{len(plan['models'])} models"
    )
    subtitle = f"{models} on {', '.join(plan['datasets'])}"
    return Page(
        "Leaderboard", subtitle, tiles, facts, parts, data, [run.record for run in found.runs]
    )


def _leaderboard_command(plan: dict[str, Any]) -> str:
    """Without the keys that name folders."""
    given = {
        key: value for key, value in plan["given"].items() if not key.endswith(("_dir", "_path"))
    }
    flags = {
        "models": ",".join(plan["models"]),
        "datasets": ",".join(plan["datasets"]),
        "seeds": len(plan["seeds"]),
        "protocol": plan["protocol"],
        **given,
    }
    return " ".join(["leaderboard", *(f"--{key}={value}" for key, value in flags.items())])


def _add_text_sections(parts: list[Section], source: Source) -> dict[str, Any]:
    """Sections about texts; returns the data of the map and the browser."""
    data: dict[str, Any] = {}
    if isinstance(source.texts, Texts):
        data = {"browser": browser_data(source), "map": map_data(source.texts)}

    def browser() -> dict[str, Any]:
        if not data:
            raise LookupError(source.texts)
        items = data["browser"]["item"]
        return {"example": items["c"][max(range(len(items["d"])), key=items["d"].__getitem__)]}

    parts += [
        _section("browser", "Description browser", browser),
        _section("map", "Map of item texts", lambda: sections.text_map(source, data.get("map"))),
        _section("cost", "Cost of the texts", lambda: sections.cost(source)),
        _section("quality", "Quality of the texts", lambda: sections.quality(source)),
        _section("sft", "Fine-tuning", lambda: sections.finetuning(source)),
        _section("leakage", "Leakage audit", lambda: sections.leakage(source)),
    ]
    return data


def _section(
    anchor: str, title: str, make: Callable[[], dict[str, Any]], template: str = ""
) -> Section:
    """A section, or one line that says why it is left out."""
    try:
        return Section(anchor, title, f"{template or anchor}.html", make())
    except LookupError as missing:
        return Section(anchor, title, "", {}, str(missing.args[0]).rstrip("."))


def _facts(record: dict[str, Any], counts: dict[str, int]) -> dict[str, str]:
    names = {
        "n_users": "Users",
        "n_items": "Items",
        "n_interactions": "Interactions",
        "n_training_interactions": "Training interactions",
    }
    return {
        **{name: f"{counts[key]:,}" for key, name in names.items() if key in counts},
        "Seed": str(record["seed"]),
        "Device": record["device"],
        "RecBole": record["versions"].get("recbole", "?"),
        "recbole_gacllm": record["versions"].get("recbole_gacllm", "?"),
    }
