"""The rooms of the package, who may import whom, how long a module may be: docs/architecture.md."""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "recbole_gacllm"
MODULES = sorted(PACKAGE.rglob("*.py"))
#: A room (folder, or module at the top) -> the rooms that it may import, each of a line above it.
ROOMS = {
    "console": "",
    "literals": "",
    "objective": "",
    "redaction": "",
    "config": "literals redaction",
    "errors": "redaction",
    "artifacts": "errors redaction",
    "data": "config",
    "job": "artifacts config errors",
    "llm": "artifacts errors redaction",
    "convolution": "artifacts config data errors job llm redaction",
    "alignment": "artifacts convolution errors llm",
    "inputs": "config convolution",
    "sft": "artifacts config convolution errors llm",
    "estimate": "config convolution inputs llm objective",
    "pipeline": "alignment artifacts config convolution errors estimate inputs job llm sft",
    "plugin": "alignment artifacts config data errors literals llm",
    "stage": "alignment artifacts console convolution job llm sft",
    "__init__": "plugin",
    "model": "alignment config estimate inputs objective pipeline",
    "text_knn": "config inputs objective pipeline",
    "peers": "alignment config inputs objective pipeline text_knn",
    "run_config": "config data inputs literals plugin",
    "inspection": "alignment artifacts config convolution data errors inputs llm objective "
    "run_config",
    "run": "__init__ alignment artifacts console convolution data errors inputs inspection model "
    "plugin redaction run_config",
    "compare": "__init__ artifacts config console convolution data errors inspection literals llm "
    "run run_config",
    "report": "__init__ artifacts compare convolution data errors inspection",
    "cli": "artifacts compare config console convolution data errors inspection pipeline report "
    "run run_config",
    "__main__": "cli",
}
#: A library -> the modules, or rooms, that may import it.
LIBRARIES = {
    "recbole": "plugin/ run_config.py run.py model.py peers/ text_knn.py inspection/ compare/ "
    "report/scoring.py",
    "vllm": "llm/vllm_engine.py",
    "peft": "sft/finetune.py sft/merge.py llm/transformers_engine.py",
    "transformers": "llm/ sft/",
    "sentence_transformers": "alignment/encoder.py",
    "httpx": "llm/endpoints.py",
    "jinja2": "report/page.py llm/chat.py",
    "matplotlib": "compare/plots.py",
    "py3langid": "inspection/quality.py",
}
MAX_LINES = 400
PRINTING = {"console.py", "cli/main.py", "convolution/ray_describe.py"}


def place(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def room_of(place_or_name: str) -> str:
    return place_or_name.replace(".", "/").partition("/")[0]


@functools.cache
def imported_names(module: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_rooms(module: Path) -> set[str]:
    names = {name.partition(".")[2] for name in imported_names(module) if is_ours(name)}
    rooms = {room_of(name) for name in names}
    return {room if room in ROOMS else "__init__" for room in rooms} - {room_of(place(module))}


def is_ours(name: str) -> bool:
    return name.partition(".")[0] == "recbole_gacllm"


def test_every_room_imports_only_rooms_above_it_in_the_table():
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= above, room
        above.add(room)
    assert above == {room_of(place(module)) for module in MODULES}


@pytest.mark.parametrize("module", MODULES, ids=place)
def test_a_module_imports_only_what_it_may(module):
    assert imported_rooms(module) <= set(ROOMS[room_of(place(module))].split())
    for name in imported_names(module):
        if (library := name.partition(".")[0]) in LIBRARIES:
            allowed = LIBRARIES[library].split()
            assert any(place(module).startswith(start) for start in allowed), name


def test_the_table_allows_nothing_that_nobody_does():
    for room, allowed in ROOMS.items():
        modules = [module for module in MODULES if room_of(place(module)) == room]
        assert set().union(*map(imported_rooms, modules)) == set(allowed.split()), room
    for library, allowed in LIBRARIES.items():
        for start in allowed.split():
            modules = [module for module in MODULES if place(module).startswith(start)]
            names = {name.partition(".")[0] for m in modules for name in imported_names(m)}
            assert library in names, f"{library}: {start}"


@pytest.mark.parametrize(
    ("module", "only"),
    [
        # An engine is loaded where it was chosen.
        ("llm.vllm_engine", "llm/engines.py"),
        ("llm.transformers_engine", "llm/engines.py"),
        # Registration hands them RecBole's modules; they load PyTorch, which children must not.
        ("plugin.fast", ""),
        ("plugin.splits", ""),
        ("plugin.history", ""),
    ],
)
def test_some_modules_are_imported_by_one_or_by_name_only(module, only):
    name = f"recbole_gacllm.{module}"
    importing = {
        place(other)
        for other in MODULES
        if any(f"{imported}.".startswith(f"{name}.") for imported in imported_names(other))
    }
    assert importing == set(only.split())


def test_a_module_is_read_in_one_sitting():
    n_lines = {place(module): len(module.read_text("utf-8").splitlines()) for module in MODULES}
    assert not [name for name, n in n_lines.items() if n > MAX_LINES]


def test_only_the_console_prints():
    """What strangers wrote reaches a terminal by ``console.say``; two tools stand alone."""
    printing = {
        place(module)
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    assert printing == PRINTING


@pytest.mark.parametrize("name", ["alignment/propagation.py", "objective"])
def test_the_mathematics_knows_only_arrays(name):
    modules = [module for module in MODULES if place(module).startswith(name)]
    names = {imported for m in modules for imported in imported_names(m)}
    roots = {n.partition(".")[0] for n in names if not n.startswith("recbole_gacllm.objective.")}
    known = {"__future__", "collections", "dataclasses", "typing", "warnings"}
    assert roots <= known | {"numpy", "scipy", "torch"}
