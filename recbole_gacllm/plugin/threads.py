"""With how many threads a recommender trains and is evaluated on the CPU.

A short batch is hundreds of pieces of a tenth of a millisecond: its threads wait for one another
more than they compute, and for long as soon as anything else runs on a core. The choice depends on
the data, the model and the machine's cores, never on the time, so that a run repeats to the bit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

# Multiply-adds a second of one thread, about: in dense layers, and of rows gathered along edges.
_DENSE, _GATHERED = 2e10, 1.5e9
#: Seconds of one thread for the forward pass of a batch below which one thread is chosen.
SHORT = 0.025


def batch_seconds(config: Any, model: nn.Module, n_interactions: int) -> float:
    """About how long one thread computes on the forward pass of a batch.

    A row of the batch (of a sequential model each place of its history) meets every parameter that
    is no embedding; an embedding is gathered along each interaction in both directions.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    width = max((table.embedding_dim for table in tables), default=0)
    n_dense = sum(parameter.numel() for parameter in model.parameters())
    n_dense -= sum(table.weight.numel() for table in tables)
    length = config["MAX_ITEM_LIST_LENGTH"] if config["MODEL_TYPE"].name == "SEQUENTIAL" else 1
    dense = config["train_batch_size"] * length * n_dense
    return float(dense / _DENSE + 2 * n_interactions * width / _GATHERED)


@contextmanager
def chosen(config: Any, model: nn.Module, n_interactions: int) -> Iterator[None]:
    """Train and evaluate with the threads of the key ``n_threads``, or chosen ones; log them.

    Without the key ``OMP_NUM_THREADS``, and what PyTorch has on a GPU's host, stay. Else it is one
    for batches that are :data:`SHORT`, and PyTorch's own number, shared by DDP's processes.
    """
    before = torch.get_num_threads()
    n_threads, reason = before, "PyTorch's own"
    if (given := config["n_threads"]) is not None:
        n_threads, reason = int(given), "n_threads"
    elif os.environ.get("OMP_NUM_THREADS"):
        reason = "OMP_NUM_THREADS"
    elif config["device"].type == "cpu":
        seconds = batch_seconds(config, model, n_interactions)
        n_threads = 1 if seconds < SHORT else max(1, before // int(config["nproc"] or 1))
        reason = f"a batch takes one thread about {seconds * 1e3:.0f} ms; n_threads sets another"
    logger.info("threads of training and evaluation: %d (%s)", n_threads, reason)
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
