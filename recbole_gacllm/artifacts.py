"""How every stage writes its folder: fingerprint, manifest, lock, and the child process it runs in.

A stage folder is complete when its ``manifest.json`` is there: it is written last and atomically. A
folder without one is half-written and is resumed by the stage that owns it. Standard library and
filelock only, so that a child process has this module before it loads anything heavy.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from recbole_gacllm import errors
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.launchers import without_launcher
from recbole_gacllm.locate import require_no_links
from recbole_gacllm.redaction import redact

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
JOB_FILE = "job.json"
CHILD = "child"  # last argument of a process that run_child starts
_SECONDS_TO_STOP = 10.0  # how long an interrupted child may tidy up before it is killed
_MAX_ERROR_BYTES = 60_000  # fits the socket's buffer: the parent reads when the child has ended
# How safetensors (the first two) and torch.save tell a full disk.
_DISK_TEXTS = (
    *(os.strerror(errno.ENOSPC), "unexpected pos", "PytorchStreamWriter failed", "iostream error"),
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_to_parent: int | None = None  # of a child: where its error goes


def fingerprint(obj: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a mapping: keys sorted, no blanks, ASCII, exact numbers.

    Lists and tuples are the same array; ``1``, ``1.0`` and ``True`` are three different values.

    Raises:
        ValueError: If a value is not JSON (a path, a set, NaN, a key that is not a string); the
            message names where it stands.
    """
    _require_json(obj, "fingerprint")
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: at any moment it holds the old content or all of the new one.

    A temporary file in the same folder is written, synced and renamed, then the folder is synced.

    Raises:
        GaCLLMError: If the file cannot be written (full disk, lost folder, permissions).
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; it takes the place of ``folder`` when all is written."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


@contextmanager
def explaining_disk_errors(path: Path) -> Iterator[None]:
    """Tell a full, read-only or failing disk by the path that was written and the next step.

    Raises:
        GaCLLMError: For an error of the disk. safetensors and PyTorch raise their own classes,
            which are known by their text. Any other error passes.
    """
    try:
        yield
    except Exception as error:
        of_disk = isinstance(error, OSError) and error.errno in _DISK_ERRORS
        if of_disk or any(text in str(error) for text in _DISK_TEXTS):
            raise _cannot_write(path, error) from error
        raise


def _cannot_write(path: Path, error: Exception) -> GaCLLMError:
    return GaCLLMError(
        f"cannot write {path}: {error}. Free space or rights there, or choose another folder "
        "(artifact_dir, checkpoint_dir, --output), and start again: what was finished is kept."
    )


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a stage folder, or None if the stage has not finished there.

    Raises:
        GaCLLMError: If the file is there but is not a JSON object, or cannot be read.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged_manifest(path, str(error)) from error
    if not isinstance(manifest, dict):
        raise _damaged_manifest(path, f"a JSON object expected, {type(manifest).__name__} found")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Declare a stage folder complete; call it last.

    Raises:
        ValueError: If the manifest holds a value that is not JSON.
        GaCLLMError: If it cannot be written.
    """
    _require_json(manifest, MANIFEST_FILE)
    text = json.dumps(manifest, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / MANIFEST_FILE, text.encode("utf-8", "backslashreplace"))


@contextmanager
def stage_lock(folder: Path) -> Iterator[None]:
    """Hold a stage folder for this process; others wait here. The folder is made if need be.

    The operating system frees the lock when its holder ends, however it ends.

    Raises:
        ValueError: If the folder cannot be made or written.
        GaCLLMError: If it holds symbolic links, through which a stage would write elsewhere.
    """
    require_no_links(folder)
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that works on %s", folder)
            lock.acquire()
    except OSError as error:
        raise ValueError(
            f"artifact_dir: {folder} cannot be written ({error}). Set artifact_dir to a folder "
            "that this user may write."
        ) from error
    try:
        yield
    finally:
        lock.release()


def run_child(stage: str, folder: Path, *, module: str = "recbole_gacllm.stage") -> None:
    """Run ``python -m module stage folder child`` to its end, in a process group of its own.

    The child inherits standard output and error and a copy of the environment, without what a
    launcher such as torchrun told this process. Its standard input
    is a socket to this process: its end tells the child when this process dies
    (:func:`die_with_parent`), and the child's error comes back on it, so that a full disk cannot
    swallow it. Ctrl-C here interrupts the child, waits for it and goes on here. Whatever the child
    started and left behind, such as a vLLM engine, is killed when it ends.

    Raises:
        ValueError: What the child raised as ``ValueError``, with the same text.
        GaCLLMError: What it raised from the ``GaCLLMError`` family, same class and text; or any
            other end than exit code 0, with stage, exit code or signal and the last error.
    """
    ours, of_child = socket.socketpair()
    with ours:
        with of_child:
            child = subprocess.Popen(
                [sys.executable, "-m", module, stage, str(folder), CHILD],
                stdin=of_child.fileno(),
                env=_child_environment(),
                process_group=0,
            )
        try:
            # Wait without reaping: until then the group's number cannot belong to anybody else.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        except BaseException:
            _interrupt(child)
            raise
        finally:
            _kill_group(child.pid)
            child.wait()
        if child.returncode != 0:
            _raise_child_error(stage, _received(ours), child.returncode)


def die_with_parent() -> None:
    """End this process group when the process that holds our standard input ends, even by SIGKILL.

    To be called first in a child that :func:`run_child` started. A forked guard blocks on standard
    input and kills the whole group at its end. A thread and PR_SET_PDEATHSIG would end this process
    only, and the first only between bytecodes: vLLM's engine processes do not notice the death of
    their parent and would keep their memory. Standard input of this process becomes empty, and the
    socket it was is kept for :func:`reporting_errors`.

    Raises:
        GaCLLMError: If the process was not started by :func:`run_child`.
    """
    if os.getpgrp() != os.getpid():
        raise GaCLLMError("a stage is started by the pipeline (run_child), not by hand")
    group = os.getpid()
    if os.fork() == 0:
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            with suppress(OSError):  # the parent died with something of ours unread
                while os.read(0, 4096):
                    pass
            os.killpg(group, signal.SIGKILL)
        finally:
            os._exit(1)
    global _to_parent
    _to_parent = os.dup(0)
    with open(os.devnull, "rb") as empty:
        os.dup2(empty.fileno(), 0)


@contextmanager
def reporting_errors(folder: Path) -> Iterator[None]:
    """The child's side of errors: send them to the parent and exit with code 1.

    ``ValueError`` itself and the ``GaCLLMError`` family, errors of the disk under ``folder`` among
    them, are told once, by the parent; anything else is a defect, and its traceback goes to
    standard error here.
    """
    try:
        with explaining_disk_errors(folder):
            yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}").encode("utf-8", "backslashreplace")
        assert _to_parent is not None, "die_with_parent comes first"
        os.write(_to_parent, text[:_MAX_ERROR_BYTES])
        if type(error) is not ValueError and not isinstance(error, GaCLLMError):
            sys.stderr.write(redact(traceback.format_exc()))
        sys.exit(1)


def _child_environment() -> dict[str, str]:
    """A copy of ours, of no launcher's, in which this package can be imported from a checkout."""
    environment = without_launcher(os.environ)
    # Idle OpenMP threads that spin cost five times the speed on a machine that does anything else;
    # libgomp reads this when it is loaded, so it cannot be set later.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    root = Path(__file__).resolve().parent.parent
    if root.name not in ("site-packages", "dist-packages"):
        paths = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([*paths, str(root)])
    return environment


def _interrupt(child: subprocess.Popen[bytes]) -> None:
    """Ctrl-C for the child's group, which the terminal does not reach; give it time to end."""
    _kill_group(child.pid, signal.SIGINT)
    deadline = time.monotonic() + _SECONDS_TO_STOP
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            return
        time.sleep(0.05)
    logger.warning("the stage did not stop %.0f s after the interrupt: killed", _SECONDS_TO_STOP)


def _kill_group(group: int, number: signal.Signals = signal.SIGKILL) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return  # nobody is left (macOS: nobody but the unreaped leader), which is what is wanted


def _received(socket_of_child: socket.socket) -> str:
    """What a child that has ended had sent."""
    socket_of_child.setblocking(False)
    parts = []
    with suppress(OSError):
        while part := socket_of_child.recv(1 << 16):
            parts.append(part)
    return b"".join(parts).decode("utf-8", "replace")


def _raise_child_error(stage: str, sent: str, returncode: int) -> NoReturn:
    if returncode < 0:
        end = f"was killed by {signal.Signals(-returncode).name}"
    else:
        end = f"ended with exit code {returncode}"
    if not sent:
        memory = " (out of memory?)" if returncode == -signal.SIGKILL else ""
        raise GaCLLMError(
            f"stage {stage} {end}{memory} and left no error; its last lines are in the log above. "
            "Start again to resume: what was finished is kept."
        )
    name, _, text = sent.partition(": ")
    if name == "ValueError":
        raise ValueError(text)
    known = getattr(errors, name, None)
    if isinstance(known, type) and issubclass(known, GaCLLMError):
        raise known(text)
    last_line = sent.strip().splitlines()[-1]
    raise GaCLLMError(f"stage {stage} {end}: {last_line} (traceback in the log above)")


def _damaged_manifest(path: Path, reason: str) -> GaCLLMError:
    return GaCLLMError(
        f"{path} is damaged: {reason}. Delete this file and start again: the stage then checks and "
        "completes the folder."
    )


def _require_json(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} is a {type(key).__name__}, not a string")
            _require_json(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _require_json(item, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} is not a JSON number")
    elif not (value is None or isinstance(value, (str, int))):
        raise ValueError(
            f"{where}: {value!r} is a {type(value).__name__}; allowed are None, bool, int, float, "
            "str, list, tuple and mappings of these with string keys"
        )
