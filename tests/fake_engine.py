"""What loads a fake engine in a process of its own; light, as each process imports it."""

from __future__ import annotations

import os
import time

from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm.fleet import Fleet
from recbole_gacllm.llm.generator import Request

from .fake_generator import FakeGenerator, _hashed_words


def _slow_words(request: Request) -> str:
    time.sleep(0.01)
    return " ".join([*filter(None, [os.environ.get("NOTE")]), _hashed_words(request)])


def load(
    window: int | None = None,
    error: Exception | None = None,
    failure: type[GenerationError] | None = None,
    room: int = 0,
) -> FakeGenerator:
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


def pids(fleet: Fleet) -> list[int]:
    """The processes of a fleet."""
    return [member._process.pid or 0 for member in fleet._members]
