"""All that only a GPU can tell, in one go: what runs on it against the same on the CPU.

    python benchmarks/gpu_check.py --json=benchmarks/results/gpu.json
    python benchmarks/gpu_check.py --device=cpu --small    # the script itself, at toy size

Needs one card, no network and at most eight minutes; vLLM only for the section of that name, which
is left out where vLLM for CUDA is not installed. Each section runs in a process of its own
(``gpu_recommender.py``, ``gpu_llm.py``), makes its own CPU references, and gives figures and
``checks``. Where there are cores, some run beside each other, and their seconds are upper bounds.
What fails is recorded and the others run; FILE is written after each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

#: Section -> the module that has its function.
SECTIONS = {
    "versions": "gpu_check",
    "functions": "gpu_recommender",
    "training": "gpu_recommender",
    "graph": "gpu_recommender",
    "encoder": "gpu_llm",
    "finetuning": "gpu_llm",
    "merge": "gpu_llm",
    "engine": "gpu_llm",
    "memory": "gpu_llm",
    "vllm": "gpu_llm",
    "suite": "gpu_check",
}
#: Those that fill the card or all cores come last, one after the other.
ALONE = ("training", "memory", "vllm", "suite")
CORES = 4  # of a section beside others
#: For all of them, and for each: one that hangs would leave the rest nothing.
SECONDS, MOST_OF_A_SECTION = 480.0, 150.0
PACKAGES = ("torch", "transformers", "peft", "accelerate", "sentence-transformers", "recbole")
SUITE = ["tests", "-m", "not engine and not slow and not browser"]
SMALL_SUITE = [f"tests/test_{name}.py" for name in ("propagation", "losses", "hardware")]


def versions(device: str, small: bool, folder: Path) -> dict[str, Any]:
    """Versions, cards, what a fork can do: asking what is there must leave CUDA untouched."""
    import torch

    from recbole_gacllm.llm import hardware
    from recbole_gacllm.llm.engines import choose_backend
    from recbole_gacllm.llm.vllm_engine import prepare_environment

    figures: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "driver": hardware.driver_version(),
        "cards": [str(card) for card in hardware.cards()],
        "threads": torch.get_num_threads(),
        "engine": choose_backend("auto")[1],
        "number_type": hardware.resolve_dtype("auto", device=device),
        "memory_share": hardware.memory_share(None),
    }
    hardware.check_cards("0" if device == "cuda" else "")
    figures["is_available"] = torch.cuda.is_available()
    untouched = not torch.cuda.is_initialized()
    # On CUDA both may be errors, which is why vLLM's engine is spawned.
    figures["forked_after_asking"] = _forked(device)
    torch.ones(2, device=device).sum().item()
    figures["forked_after_use"] = _forked(device)
    prepare_environment()
    figures["vllm_starts_by"] = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")
    figures["checks"] = {
        "device is there": device == "cpu" or torch.cuda.is_available(),
        "asking leaves CUDA untouched": untouched,
        "vLLM spawns": figures["vllm_starts_by"] == "spawn",
    }
    return figures


def _forked(device: str) -> str:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compute, args=(device, sender))
    process.start()
    process.join(60)
    return str(receiver.recv()) if receiver.poll() else f"ended with {process.exitcode}"


def _compute(device: str, sender: Any) -> None:
    import torch

    try:
        sender.send(str(torch.ones(2, device=device).sum().item()))
    except RuntimeError as error:
        sender.send(str(error).split("\n")[0])


def suite(device: str, small: bool, folder: Path) -> dict[str, Any]:
    """The tests that start no engine, on this machine, in several processes where they can be."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and not small:
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "loadfile"]
    ran = subprocess.run(
        [*command, *(SMALL_SUITE if small else SUITE)], cwd=ROOT, capture_output=True, text=True
    )
    return {"output": ran.stdout[-2000:], "checks": {"passed": ran.returncode == 0}}


def in_its_process(name: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A section's figures, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, f"--device={arguments.device}", f"--inside={folder}"]
        command += ["--small"] if arguments.small else []
        environment = dict(os.environ)
        if arguments.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        started = time.perf_counter()
        with open(Path(folder, "output"), "w+", encoding="utf-8") as output:
            process = subprocess.Popen(
                [*command, f"--sections={name}"],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                ended = f"ended with {process.wait(seconds)}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                ended = f"stopped after {seconds:.0f} seconds"
        file = Path(folder, "figures.json")
        figures = json.loads(file.read_text("utf-8")) if file.exists() else {"error": ended}
        if "error" in figures:
            figures["output"] = Path(folder, "output").read_text("utf-8", "replace")[-3000:]
        figures["seconds"] = round(time.perf_counter() - started, 1)
        figures["ok"] = "error" not in figures and all(figures.get("checks", {}).values())
        return dict(figures)


def inside(name: str, arguments: argparse.Namespace) -> None:
    """The process of a section: its figures go to ``figures.json``."""
    sys.argv[1:] = []  # RecBole reads it
    warnings.filterwarnings("ignore")
    module = importlib.import_module(SECTIONS[name])
    try:
        figures = getattr(module, name)(arguments.device, arguments.small, arguments.inside)
    except Exception as error:
        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {error}"[:1000]}
    (arguments.inside / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside is not None:
        inside(arguments.sections[0], arguments)
        return
    started, lock = time.perf_counter(), threading.Lock()
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]]),
        "sections": {},
    }

    def run(name: str) -> None:
        left = SECONDS - (time.perf_counter() - started)
        most = left if name == "suite" else min(left, MOST_OF_A_SECTION)
        if arguments.small:
            most = SECONDS  # nobody pays for the minutes
        result: dict[str, Any] = {"ok": False, "error": "no time was left"}
        if most >= 5:
            result = in_its_process(name, arguments, most)
        said = {
            "ok": result["ok"],
            **{key: result[key] for key in ("seconds", "left_out", "error") if key in result},
            "failed": [check for check, passed in result.get("checks", {}).items() if not passed],
        }
        with lock:
            report["sections"][name] = result
            print(name, json.dumps(said), flush=True)
            report["seconds"] = round(time.perf_counter() - started, 1)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // CORES)) as pool:
        list(pool.map(run, (name for name in arguments.sections if name not in ALONE)))
    for name in ALONE:
        if name in arguments.sections:
            run(name)
    if not all(result["ok"] for result in report["sections"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
