"""GaCLLM for RecBole: importing this package repairs RecBole and makes GaCLLM one of its models."""

from importlib import import_module
from typing import Any

from recbole_gacllm.plugin import compat, registration

__version__ = "0.1.0"

compat.apply()
registration.register()


def __getattr__(name: str) -> Any:
    """``recommend``, which loads PyTorch, when it is asked for."""
    if name == "recommend":
        return import_module("recbole_gacllm.inspection.recommend").recommend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
