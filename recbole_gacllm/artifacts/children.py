"""The child processes that stages run in: they die with their parent, and their errors come back.

Standard library only, so that a child has this module before it loads anything heavy.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from recbole_gacllm import errors
from recbole_gacllm.artifacts import disk
from recbole_gacllm.artifacts.launchers import WAITING, without_launcher
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.redaction import redact

logger = logging.getLogger(__name__)
CHILD = "child"  # last argument of a process that run_child starts
_SECONDS_TO_STOP = 10.0  # how long an interrupted child may tidy up before it is killed
_MAX_ERROR_BYTES = 60_000  # fits the socket's buffer: the parent reads when the child has ended
_to_parent: int | None = None  # of a child: where its error goes


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
    """
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
        with disk.explaining_disk_errors(folder):
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
    environment.setdefault(*WAITING)
    root = Path(__file__).resolve().parent.parent.parent
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
    error_class = getattr(errors, name, None)
    if isinstance(error_class, type) and issubclass(error_class, GaCLLMError):
        raise error_class(text)
    last_line = sent.strip().splitlines()[-1]
    raise GaCLLMError(f"stage {stage} {end}: {last_line} (traceback in the log above)")
