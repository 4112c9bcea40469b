"""Fixtures shared by all tests: a small data set in RecBole's format."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Two contended threads are slower than one; NumPy reads this when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import psutil
import pytest
import torch
from recbole.utils import utils as recbole_utils
from torch.utils.tensorboard import SummaryWriter

from recbole_gacllm.artifacts import children, manifests
from recbole_gacllm.cli.main import main
from recbole_gacllm.config import GaCLLMConfig, model_defaults
from recbole_gacllm.job import Job

# A deadline is a timed test: it fails on a machine that does something else.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
multiprocessing.set_forkserver_preload(["tests.warm"])
ROOT = Path(__file__).resolve().parent.parent
# A shell starts what it puts into the background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# GaCLLM without the linear model: SSM, one layer of short texts.
PLAIN = {
    **{"preset": "paper", "loss_type": "SSM"},
    **{"llm_n_layers": 1, "llm_max_new_tokens": 48, "sft_n_pairs": 128, "sft_n_heldout": 32},
}
GENRES = ["Action", "Comedy", "Drama", "Horror"]
OCCUPATIONS = ["teacher", "farmer", "nurse"]
#: Files with few tests that are long without being marked so.
LONG = ("adapter", "artifacts", "console", "examples", "registration", "sft_processes", "text_init")
#: Files with tests that start a fork of ``warm``.
FORKS = ("cli", "device", "faults", "kill_sweep", "run_folder", "sft", "sft_processes", "training")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n`` a file goes to one worker, in the order of the hook below."""
    if config.option.dist != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        """Files whose processes are forks of ``warm`` go to the same one, so that it loads once."""

        def _split_scope(self, nodeid: str) -> str:
            scope: str = super()._split_scope(nodeid)
            forks = Path(scope).stem.removeprefix("test_") in FORKS
            return "forks" if forks else scope

    config.option.loadscopereorder = False
    return Scheduling(config, log)


gc.disable()  # while modules are loaded: a third of that time


def pytest_collection_finish() -> None:
    """What is loaded stays: nobody looks through it again for what is garbage."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that short ones fill the end."""
    weights: Counter[Path] = Counter()
    for item in items:
        markers = [item.get_closest_marker(name) for name in ("slow", "engine")]
        is_long = item.path.stem.removeprefix("test_") in LONG
        weights[item.path] += 1 + 10 * is_long + 20 * sum(map(bool, markers))
    items.sort(key=lambda item: (-weights[item.path], item.path))


@pytest.fixture(autouse=True)
def _quiet_process(monkeypatch, tmp_path_factory, request):
    """RecBole reads sys.argv and writes log/ and saved/ into the working folder."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    if "tmp_path" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))
    yield
    torch.autograd.set_detect_anomaly(False)  # RecBole's SINE switches it on when imported


@pytest.fixture(autouse=True, scope="session")
def _process():
    """What fixtures of wider scope need, too, and child processes: this checkout, one thread."""
    sys.argv = ["pytest"]  # without pytest's own flags
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    torch.set_num_threads(1)
    psutil.cpu_percent = lambda interval: 0.0  # RecBole's runs tell it, and wait a second for it
    # Its thread writes minutes later, from a folder that a test has long left; RecBole closes none.
    recbole_utils.SummaryWriter = lambda folder: SummaryWriter(Path(folder).absolute())


def our_keys(**keys) -> GaCLLMConfig:
    """All keys of ours: these, and those of :data:`PLAIN`."""
    return GaCLLMConfig.from_mapping({**model_defaults("paper"), **PLAIN, **keys})


def job_of(stage: str, inputs: Path, **more) -> Job:
    """A job of the default keys."""
    parts = {"key": {}, "outputs": (), "options": our_keys(), "seed": 1, "show_progress": False}
    return Job(stage=stage, inputs=inputs, **{**parts, **more})


def byte_tokenizer(special: tuple[str, ...] = ()) -> Any:
    """A tokenizer of bytes; special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model with a tokenizer of bytes."""
    from .test_generator_contract import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def fresh_process(target: Callable[..., Any], *args: Any) -> Any:
    """A process of its own, forked from one that has only imported what takes seconds."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    process.start()
    return process


def run_python(*arguments: str, **how: Any) -> str:
    """Standard output of a fresh interpreter."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **how).stdout


def run_stage(stage: str, folder: Path, **_: object) -> None:
    """A stage in this process, as :func:`recbole_gacllm.stage.main` runs it in a child."""
    from recbole_gacllm.stage import STAGES

    job = Job.read(folder)
    report = STAGES[stage](folder, job)
    told = {"stage": stage, "key": job.key, "files": manifests.digests(folder, job.outputs)}
    manifests.write_manifest(folder, {**report, **told, "seconds": 0})


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No interpreter for each stage: where the child process is not the claim."""
    monkeypatch.setattr(children, "run_child", run_stage)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a model, an encoder and the data set ``tiny``, for runs that are disturbed."""
    from .crash_lab import save_tiny_encoder

    root = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_model, root / "model")
    save_tiny_encoder(root / "encoder")
    write_dataset(root / "data", n_users=14, n_items=16)
    return root


@pytest.fixture(scope="session")
def lab(place: Path) -> Iterator[Any]:
    from .crash_lab import Lab

    lab = Lab(place / "lab.log")
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def whole(place: Path, lab: Any) -> tuple[dict[str, Any], dict[str, Any], list[list[Any]]]:
    """Results, answer and record of a run that nobody disturbed, in ``place / "whole"``."""
    from .test_kill_sweep import Folder

    folder = Folder(place, "whole")
    answer, lines = folder.run(lab)
    assert answer["status"] == "done", answer
    return folder.results(), answer, lines


@pytest.fixture
def no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that starts is an error."""

    def refuse(stage: str, folder: Path, **_: object) -> None:
        raise AssertionError(f"stage {stage} was started in {folder}")

    monkeypatch.setattr(children, "run_child", refuse)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Starts a command that must fail; gives the one line that ends it, with exit code 2."""

    def failing(*argv: object) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(map(str, argv)))
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return failing


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A nvidia-smi that knows these cards, first on PATH."""
    folder = tmp_path / "bin"

    def write(*rows: str, driver: str = "550.54.14") -> None:
        folder.mkdir()
        lines = "\n".join(rows)
        (folder / "nvidia-smi").write_text(
            f"#!/bin/sh\ncase $1 in\n--query-gpu=driver_version) echo '{driver}';;\n"
            f"*) cat <<'END'\n{lines}\nEND\n;;\nesac\n"
        )
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

    return write


def write_dataset(root: Path, name: str = "tiny", n_users: int = 24, n_items: int = 30) -> Path:
    """Write ``root/name/name.{inter,user,item}`` of four tastes; returns ``root``."""
    rng = random.Random(7)
    folder = root / name
    folder.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(n_users):
        liked = [item for item in range(n_items) if item % 4 == user % 4]
        others = [item for item in range(n_items) if item % 4 != user % 4]
        for item in rng.sample(liked, min(6, len(liked))) + rng.sample(others, 4):
            lines.append(f"u{user}\ti{item}\t{rng.randint(1, 5)}\t{rng.randint(1, 10**6)}")
    (folder / f"{name}.inter").write_text("\n".join(lines) + "\n")
    lines = ["user_id:token\tage:token\toccupation:token"]
    lines += [f"u{u}\t{20 + u}\t{OCCUPATIONS[u % 3]}" for u in range(n_users)]
    (folder / f"{name}.user").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\tmovie_title:token_seq\tclass:token_seq"]
    lines += [f"i{i}\tThe Great Film {i}\t{GENRES[i % 4]}" for i in range(n_items)]
    (folder / f"{name}.item").write_text("\n".join(lines) + "\n")
    return root


def add_rows(root: Path, *lines: str, ending: str = "inter") -> None:
    """Append to a file of the data set ``tiny``."""
    with (root / "tiny" / f"tiny.{ending}").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


@pytest.fixture
def dataset_root(tmp_path: Path) -> Path:
    """A folder for RecBole's ``data_path`` that holds the data set ``tiny``."""
    return write_dataset(tmp_path / "data")


@pytest.fixture
def settings(dataset_root: Path, tmp_path: Path) -> dict:
    """Keys that every run on ``tiny`` takes."""
    return tiny_settings(dataset_root, tmp_path)


def tiny_settings(dataset_root: Path, root: Path) -> dict:
    """The same for a fixture of wider scope: data in ``dataset_root``, all else under ``root``."""
    return {
        "data_path": str(dataset_root),
        "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
        "artifact_dir": str(root / "artifacts"),
        "checkpoint_dir": str(root / "saved"),
        "show_progress": False,
        "use_gpu": False,
        "epochs": 2,
        "embedding_size": 8,
        **PLAIN,
    }
