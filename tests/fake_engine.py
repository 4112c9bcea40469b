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
    fail_after: int | None = None,
    error: Exception | None = None,
    failure: type[GenerationError] = GenerationError,
) -> FakeGenerator:
    """A fake engine that takes its time and begins texts with the variable NOTE, if it is set."""
    if error is not None:
        raise error
    return FakeGenerator(
        answer=_slow_words, fail_after=fail_after, failure=failure, max_model_len=512
    )


def pids(fleet: Fleet) -> list[int]:
    """The processes of a fleet."""
    return [member._process.pid or 0 for member in fleet._members]
