"""What the processes of ``forked_engines`` have loaded: each is a fork of it."""

from __future__ import annotations

import gc
import sys

for name in ("torchvision", "torchaudio", "torchcodec"):  # as a run's processes have it
    sys.modules[name] = None  # type: ignore[assignment]

from recbole_gacllm.llm import vllm_engine  # noqa: E402

vllm_engine.prepare_environment()

from vllm import LLM  # noqa: E402, F401
from vllm.lora.request import LoRARequest  # noqa: E402, F401

gc.freeze()  # no fork copies these objects to count them
