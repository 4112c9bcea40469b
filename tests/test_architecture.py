"""Who may import whom, and how long a module may be: docs/architecture.md, held by the code."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "recbole_gacllm"
MODULES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = {
    "recbole": {
        "plugin/compat.py",
        "plugin/compat_distributed.py",
        "run_config.py",
        "inspection/data_door.py",
        "plugin/key_checks.py",
        "plugin/import_hooks.py",
        "plugin/registration.py",
        "run.py",
        "plugin/run_folder.py",
        "model.py",
        "text_knn.py",
        "report/scoring.py",
        "compare/",
    },
    "vllm": {"llm/vllm_engine.py", "llm/vllm_options.py"},
    "peft": {"sft/finetune.py", "sft/merge.py", "llm/transformers_engine.py"},
    "transformers": {"llm/", "sft/"},
    "jinja2": {"report/page.py", "llm/chat.py"},
    "httpx": {"llm/endpoints.py", "llm/traffic.py"},
    "sentence_transformers": {"alignment/encoder.py"},
    # Registration hands it RecBole's modules; it loads PyTorch, which the children must not.
    "recbole_gacllm.plugin.fast": set(),
    "recbole_gacllm.plugin.fast_graph": set(),
    "recbole_gacllm.plugin.splits": set(),
    "recbole_gacllm.cli.main": {"__main__.py"},
    "recbole_gacllm.llm.vllm_engine": {"llm/engines.py"},
    "recbole_gacllm.llm.transformers_engine": {"llm/engines.py"},
    "recbole_gacllm.run": {"cli/main.py", "compare/"},
}


def imported_names(module: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_it_may(module):
    place = module.relative_to(PACKAGE).as_posix()
    for name in imported_names(module):
        for guarded, places in ALLOWED.items():
            if name == guarded or name.startswith(f"{guarded}."):
                assert any(
                    place == allowed or (allowed.endswith("/") and place.startswith(allowed))
                    for allowed in places
                ), f"{place} imports {name}"
        if place.startswith("convolution/"):
            known = ("recbole_gacllm.llm.generator", "recbole_gacllm.llm.hardware")
            assert not name.startswith("recbole_gacllm.llm.") or name.startswith(known), (
                f"{place} imports {name}"
            )


def test_only_the_console_prints():
    """What strangers wrote reaches a terminal by ``console.say``; two tools stand alone."""
    printing = {
        module.relative_to(PACKAGE).as_posix()
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    tools = {"convolution/ray_describe.py"}
    assert printing == {"console.py", "cli/main.py"} | tools


@pytest.mark.parametrize(
    "name",
    [
        "alignment/propagation.py",
        "objective/losses.py",
        "objective/linear.py",
        "objective/unseen.py",
    ],
)
def test_the_mathematics_knows_only_arrays(name):
    roots = {imported.split(".")[0] for imported in imported_names(PACKAGE / name)}
    assert roots <= {"__future__", "collections", "typing", "warnings", "numpy", "scipy", "torch"}
