"""What the processes of :func:`.conftest.fresh_process` have loaded: each is a fork of it."""

from __future__ import annotations

import gc

from recbole_gacllm.alignment import encoder  # noqa: F401
from recbole_gacllm.llm import transformers_engine  # noqa: F401
from tests import crash_lab, ddp_process, test_sft_processes  # noqa: F401

import torch._dynamo  # isort: skip  # noqa: F401  (an optimiser loads it)

gc.freeze()  # no fork copies these objects to count them
