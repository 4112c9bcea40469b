"""The repair of RecBole's choice of cards; ``compat.py`` says when it acts."""

from __future__ import annotations

import functools
import os
from typing import Any

from recbole_gacllm.llm.hardware import check_cards

_VARIABLE = "CUDA_VISIBLE_DEVICES"


def cards_as_asked(configurator: Any) -> None:
    """Give a run the cards that its user asked for, or say why it cannot have them.

    Causes: ``Config._init_device`` writes ``gpu_id`` into CUDA_VISIBLE_DEVICES, and its default is
    "0": on a shared node that is the first card of all, not the one that was given to the user, so
    the variable is the default here. ``use_gpu: False`` alone leaves the model on the GPU, so it
    means an empty ``gpu_id`` here, for training and for the stages, which inherit the variable. And
    where torch cannot use the driver, RecBole takes the CPU without a word.
    What a ``Config`` has written into the variable is not the user's: the next one in the process
    begins with what stood there before.
    Upstream: none reported. End: a RecBole release with the three.
    """
    config_class = configurator.Config
    original = config_class._init_device
    of_user, written = os.environ.get(_VARIABLE), os.environ.get(_VARIABLE)

    @functools.wraps(original)
    def _init_device(self: Any) -> None:
        nonlocal of_user, written
        now, final = os.environ.get(_VARIABLE), self.final_config_dict
        if now != written:
            of_user = now
        if not final["use_gpu"]:
            final["gpu_id"] = ""
        elif "gpu_id" not in self.external_config_dict and of_user is not None:
            final["gpu_id"] = of_user
        elif isinstance(final["gpu_id"], list):
            final["gpu_id"] = tuple(final["gpu_id"])
        original(self)
        written = os.environ.get(_VARIABLE)
        check_cards(final["gpu_id"])

    config_class._init_device = _init_device
