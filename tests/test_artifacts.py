import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gacllm.artifacts import children, disk
from recbole_gacllm.artifacts.children import run_child
from recbole_gacllm.artifacts.disk import write_atomic
from recbole_gacllm.artifacts.manifests import (
    fingerprint,
    read_manifest,
    stage_lock,
    write_manifest,
)
from recbole_gacllm.errors import GaCLLMError, StoreError

from .conftest import job_of

ROOT = Path(disk.__file__).parents[2]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(obj):
    assert fingerprint(obj) == fingerprint(dict(reversed(obj.items())))


def test_fingerprints_are_stable_across_releases():
    expected = "43258cff783fe7036d8a43033f830adfc60ec037382473548ac742b888292777"
    assert fingerprint({"b": 2, "a": 1}) == expected  # SHA-256 of {"a":1,"b":2}


def test_different_values_have_different_fingerprints():
    values = [1, 1.0, True, "1", None, [1], {"1": 1}, "é", "e\u0301"]
    assert len({fingerprint({"key": value}) for value in values}) == len(values)


@pytest.mark.parametrize("value", [Path("x"), float("nan"), {1, 2}, b"x"])
def test_a_value_that_is_not_json_is_refused(tmp_path, value):
    for write in (fingerprint, partial(write_manifest, tmp_path)):
        with pytest.raises((TypeError, ValueError), match="JSON"):
            write({"a": {"b": [0, value]}})
    assert read_manifest(tmp_path) is None


def test_a_manifest_comes_back_and_is_json_for_other_programs(tmp_path):
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, {"n": 1})
    manifest = {"lone": "\udc80", "text": "é", "n": [1, 2.5, None]}
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text("utf-8")) == manifest
    assert os.listdir(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize("content", [b'{"n": 1', b"", b"[1]", b"\xff\xfe"])
def test_a_damaged_manifest_is_named_with_the_next_step(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(GaCLLMError, match=r"manifest\.json is damaged: .*Delete this file"):
        read_manifest(tmp_path)


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(GaCLLMError, match=rf"{re.escape(str(path))}.*No space left.*artifact_dir"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_kill_between_temporary_file_and_rename_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    code = """
        import os, signal, sys
        from pathlib import Path
        from recbole_gacllm.artifacts import disk
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        disk.write_atomic(Path(sys.argv[1]), b"new")
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_second_user_of_a_folder_waits_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path\n"
            "from recbole_gacllm.artifacts.manifests import stage_lock\n"
            "with stage_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    order = []

    def wait_for_it():
        with stage_lock(tmp_path):
            order.append("second")

    second = threading.Thread(target=wait_for_it)
    second.start()
    wait_until(lambda: "waiting for another process" in caplog.text)
    assert str(tmp_path) in caplog.text
    order.append("first")
    holder.kill()  # the lock of a killed process is free
    holder.wait()
    second.join()
    assert order == ["first", "second"]


def test_a_free_lock_is_taken_silently_and_makes_its_folder(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        with stage_lock(tmp_path / "a" / "b"):
            pass
    assert "waiting" not in caplog.text


def test_a_folder_that_cannot_be_written_names_the_key_and_the_path(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "stage"
    with (
        pytest.raises(ValueError, match=rf"artifact_dir: {re.escape(str(folder))}"),
        stage_lock(folder),
    ):
        pass


def test_an_error_under_the_lock_is_not_taken_for_the_lock_s(tmp_path):
    with pytest.raises(OSError, match=r"^other$"), stage_lock(tmp_path):
        raise OSError("other")


# run_child: each test writes its own tiny stage module.

STAGE = """
import os, sys, time, signal, subprocess
from pathlib import Path
from recbole_gacllm.artifacts import disk
from recbole_gacllm.artifacts.children import die_with_parent, reporting_errors
from recbole_gacllm.errors import GaCLLMError, StoreError

stage, folder = sys.argv[1], Path(sys.argv[2])
die_with_parent()
with reporting_errors(folder):
"""

Stage = Callable[[str], None]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs a body as stage "tiny" in tmp_path / "folder"."""
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def run(body):
        write_stage(tmp_path, body)
        run_child("tiny", tmp_path / "folder", module="tiny_stage")

    return run


def write_stage(root, body):
    text = STAGE + textwrap.indent(textwrap.dedent(body), "    ")
    (root / "tiny_stage.py").write_text(text)


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid):
    """Zombies, which wait for an init that reaps, do not count."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_stage_gets_its_name_and_folder_and_runs_to_its_end(tmp_path, stage):
    before = dict(os.environ)
    stage("(folder / 'done').write_text(stage + repr(sys.stdin.read()))")
    assert (tmp_path / "folder" / "done").read_text() == "tiny''"
    assert os.listdir(tmp_path / "folder") == ["done"]
    assert dict(os.environ) == before


def test_a_stage_finds_the_package_from_any_folder(tmp_path, stage, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    stage("pass")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("ValueError('llm_model: a: b\\nnext é')", ValueError("llm_model: a: b\nnext é")),
        ("GaCLLMError('no memory')", GaCLLMError("no memory")),
        ("StoreError('damaged')", StoreError("damaged")),
        ("GaCLLMError('long ' * 100_000)", GaCLLMError(("long " * 100_000)[: 60_000 - 13])),
    ],
    ids=["bad input", "failed stage", "store", "longer than a socket holds"],
)
def test_a_stage_s_own_errors_come_back_with_type_and_text(stage, capfd, raised, expected):
    with pytest.raises(type(expected)) as caught:
        stage(f"raise {raised}")
    assert type(caught.value) is type(expected)
    assert str(caught.value) == str(expected)
    assert capfd.readouterr().err == "", "told once, by the parent"


@pytest.mark.parametrize(
    "raised",
    [
        "OSError(28, 'No space left on device')",
        "OSError(30, 'Read-only file system')",
        "RuntimeError('I/O error: No space left on device (os error 28)')",
        "RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0')",
    ],
)
def test_a_full_or_read_only_disk_is_told_with_the_folder_and_the_next_step(
    tmp_path, stage, capfd, raised
):
    match = rf"cannot write {re.escape(str(tmp_path / 'folder'))}: .*Free space or rights"
    with pytest.raises(GaCLLMError, match=match):
        stage(f"raise {raised}")
    assert capfd.readouterr().err == ""
    assert os.listdir(tmp_path / "folder") == [], "nothing is needed on the disk to tell it"


def test_a_defect_in_a_stage_is_a_failed_stage_with_a_traceback(stage, capfd):
    match = "stage tiny ended with exit code 1: UnicodeDecodeError: .*invalid start byte"
    with pytest.raises(GaCLLMError, match=match):
        stage("b'\\xff'.decode()")
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("os._exit(7)", "stage tiny ended with exit code 7 and left no error"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "stage tiny was killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"killed by SIGKILL \(out of memory\?\)"),
    ],
)
def test_an_end_without_a_word_names_code_or_signal(stage, body, match):
    with pytest.raises(GaCLLMError, match=match):
        stage(body)


# Starts a helper that ignores Ctrl-C, as vLLM starts its engine, and writes both pids.
WITH_HELPER = """
helper = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"])
disk.write_atomic(folder / "pids", f"{os.getpid()} {helper.pid}".encode())
"""


def test_what_a_crashed_stage_left_running_is_killed(tmp_path, stage):
    with pytest.raises(GaCLLMError, match="SIGKILL"):
        stage(WITH_HELPER + "os.kill(os.getpid(), signal.SIGKILL)")
    helper = int((tmp_path / "folder" / "pids").read_text().split()[1])
    wait_until(lambda: not is_alive(helper), seconds=2)


def start_parent(tmp_path, body):
    """A parent in run_child, with the pids of its stage and of the stage's helper."""
    write_stage(tmp_path, WITH_HELPER + textwrap.dedent(body))
    folder = tmp_path / "folder"
    folder.mkdir()
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path\n"
            "from recbole_gacllm.artifacts.children import run_child\n"
            "try: run_child('tiny', Path(sys.argv[1]), module='tiny_stage')\n"
            "except KeyboardInterrupt: print('interrupted')",
            str(folder),
        ],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until((folder / "pids").exists)
    return parent, [int(pid) for pid in (folder / "pids").read_text().split()]


BUSY = "import re; re.match('(a+)+b', 'a' * 64)"  # never gives the interpreter back


@pytest.mark.parametrize(
    ("body", "with_stage"),
    [("time.sleep(600)", False), (BUSY, False), ("time.sleep(600)", True)],
    ids=["asleep", "busy interpreter", "killed with its stage"],
)
def test_a_stage_and_its_helpers_die_with_a_killed_parent(tmp_path, body, with_stage):
    parent, pids = start_parent(tmp_path, body)
    assert all(is_alive(pid) for pid in pids)
    parent.kill()
    if with_stage:
        os.kill(pids[0], signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in pids), seconds=2)


def test_ctrl_c_reaches_the_stage_and_then_the_parent(tmp_path):
    parent, pids = start_parent(
        tmp_path,
        """
        try:
            (folder / "ready").write_text("")
            time.sleep(600)
        finally:
            (folder / "tidied").write_text("")
        """,
    )
    wait_until((tmp_path / "folder" / "ready").exists)
    parent.send_signal(signal.SIGINT)
    assert parent.communicate()[0] == "interrupted\n"
    assert (tmp_path / "folder" / "tidied").exists()
    wait_until(lambda: not any(is_alive(pid) for pid in pids), seconds=2)


def test_a_stage_that_ignores_ctrl_c_is_killed(tmp_path, stage, monkeypatch):
    monkeypatch.setattr(children, "_SECONDS_TO_STOP", 0.2)

    def interrupt_once_it_runs():
        wait_until((tmp_path / "folder" / "pids").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_once_it_runs).start()
    with pytest.raises(KeyboardInterrupt):
        stage("signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WITH_HELPER + "time.sleep(600)")
    pids = (tmp_path / "folder" / "pids").read_text().split()
    wait_until(lambda: not any(is_alive(int(pid)) for pid in pids), seconds=2)


# Launchers

LAUNCHED = """
import sys
from pathlib import Path
from recbole_gacllm.artifacts import children, manifests

folder = Path(sys.argv[1])
with manifests.stage_lock(folder):  # as the pipeline holds it while a stage runs
    children.run_child("fast", folder, module="fast_stage")
"""
FAST_STAGE = """
import os, sys
from pathlib import Path
from recbole_gacllm import stage

stage.STAGES["fast"] = lambda folder, job: {"environment": dict(os.environ)}
stage.main(*sys.argv[1:2], Path(sys.argv[2]), *sys.argv[3:])
"""


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_stage_of_a_run_under_a_launcher_is_the_run_s_own(tmp_path, monkeypatch, launcher):
    (tmp_path / "launched.py").write_text(LAUNCHED)
    (tmp_path / "fast_stage.py").write_text(FAST_STAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "folder"
    folder.mkdir()
    job_of("fast", folder).write(folder)
    command = [sys.executable, "-m"]
    if launcher == "torchrun":
        command += ["torch.distributed.run", "--nproc-per-node=1"]
    else:
        command += ["accelerate.commands.launch", "--cpu", "--num_processes=1"]
        command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command += [str(tmp_path / "launched.py"), str(folder)]
    subprocess.run(command, check=True, timeout=120)
    environment = read_manifest(folder)["environment"]
    names = {name for name in environment if name.startswith(("TORCHELASTIC", "ACCELERATE_"))}
    assert not names | {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & environment.keys()
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_a_stage_started_by_hand_says_who_starts_it(tmp_path):
    command = [sys.executable, "-m", "recbole_gacllm.stage", "sft", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "a stage is started by a run, or by torchrun to go on with one; not by hand"
    )
