"""What loads an engine in a process of its own; light, as each process imports it."""

import functools
import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

from recbole_gacllm.errors import GenerationError

from .fake_generator import FakeGenerator, _hashed_words


def _slow_words(request):
    time.sleep(0.01)
    return " ".join([*filter(None, [os.environ.get("NOTE")]), _hashed_words(request)])


def load(window=None, error=None, failure=None, room=0):
    """A fake engine that takes its time and begins texts with the variable NOTE, if it is set.

    With a window larger than ``room`` it does not start (``error``), or fails after nine texts.
    """
    window = window or 4
    is_small = window <= room
    if error is not None and not is_small:
        raise error
    return FakeGenerator(
        window,
        max_model_len=512,
        answer=_slow_words,
        fail_after=None if failure is None or is_small else 9,
        failure=failure or GenerationError,
    )


def fork_processes_of_vllm():
    """They find loaded what this process has; spawned ones load it for ten seconds each."""
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    for module in (utils, multiproc_executor):
        assert callable(module.get_mp_context)
        module.get_mp_context = lambda: multiprocessing.get_context("fork")


def open_watched_vllm(options, window):
    """A real vLLM; every address that Python code of its process connects to stands in HOSTS."""
    import vllm
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from recbole_gacllm.llm.vllm_engine import VLLMGenerator

    # As on GPUs, the worker is in the process of the engine's core.
    vllm.LLM = functools.partial(vllm.LLM, distributed_executor_backend=UniProcExecutor)

    connect = socket.socket.connect

    def recording(self, address):
        if isinstance(address, tuple):
            with hosts.open("a") as file:
                file.write(f"{address[0]}\n")
        connect(self, address)

    if "FORK" in os.environ:
        fork_processes_of_vllm()
    hosts = Path(os.environ["HOSTS"])
    hosts.touch()
    socket.socket.connect = recording
    return VLLMGenerator(**options, window=window)


def serve_vllm(arguments, environment, log):
    """The process of ``vllm serve``, in a session of its own."""
    os.setsid()
    with log.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    sys.argv = ["serve", *arguments]
    fork_processes_of_vllm()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def without_torchvision(folder):
    """An environment in which vLLM's own processes import nothing that fails.

    PyPI's builds of these do not fit a CPU build of torch; see `compat.hide_broken_torchvision`.
    A process of a run's has this from its main module, which is not pytest's.
    """
    names = ("torchvision", "torchaudio", "torchcodec")
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in names)]
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def pids(fleet):
    """The processes of a fleet."""
    return [member._process.pid or 0 for member in fleet._members]
