"""What the processes of :func:`.conftest.fresh_process` have loaded: each is a fork of it."""

from __future__ import annotations

import gc

from tests import ddp_process, test_sft_processes  # noqa: F401

import torch._dynamo  # isort: skip  # noqa: F401  (an optimiser loads it)

gc.freeze()  # no fork copies these objects to count them
