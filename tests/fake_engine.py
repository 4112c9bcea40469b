"""What loads a fake engine in a process of its own; light, as each process imports it."""

import os
import time

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
