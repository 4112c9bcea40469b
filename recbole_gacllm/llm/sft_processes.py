"""Fine-tuning on all cards: a process each, which share every update."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.llm.generator import SFTPair
from recbole_gacllm.llm.sft import SFTReport, finetune, finished
from recbole_gacllm.llm.sft_trainer import SFTOptions


def finetune_on_all_cards(
    model_dir: Path,
    pairs: Sequence[SFTPair],
    heldout: Sequence[SFTPair],
    out_dir: Path,
    options: SFTOptions,
    *,
    model_name: str | None = None,
    n_processes: int | None = None,
) -> SFTReport:
    """:func:`.sft.finetune` in one process a card, with the sequences of an update shared.

    The number of processes is the largest that divides an update's sequences. Processes that
    ``torchrun`` started, on one machine or on several that see the same folders, take part as they
    are.

    Args:
        model_dir: This and all others but the last as in :func:`.sft.finetune`.
        pairs: Pairs to learn.
        heldout: Pairs for perplexity.
        out_dir: Folder of this fine-tuning.
        options: An update takes ``batch_size * accumulation_steps`` sequences, of all processes.
        model_name: Name of the base model for the adapter's config.
        n_processes: At most so many; None is the number of visible GPUs.

    Raises:
        ValueError, GaCLLMError: As :func:`.sft.finetune`.
    """
    work = partial(finetune, model_dir, pairs, heldout, out_dir, options, model_name=model_name)
    if distributed.is_torchelastic_launched():
        return _in_group(work)
    n_sequences = options.batch_size * options.accumulation_steps
    n_at_most = torch.cuda.device_count() if n_processes is None else n_processes
    n = max(n for n in range(1, max(1, n_at_most) + 1) if n_sequences % n == 0)
    if n == 1:
        return work()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    level = logging.getLogger().getEffectiveLevel()
    try:
        multiprocessing.spawn(  # type: ignore[attr-defined,no-untyped-call]
            _rank, args=(group, level, errors, work), nprocs=n, join=True
        )
    except multiprocessing.ProcessRaisedException:  # type: ignore[attr-defined]
        if errors.empty():
            raise
        raise errors.get() from None
    report = finished(out_dir)
    assert report is not None
    return report


def _rank(
    rank: int, group: dict[str, str], level: int, errors: Any, work: Callable[[], SFTReport]
) -> None:
    """A process of the group."""
    os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank))
    if rank == 0:
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    try:
        _in_group(work)
    except (ValueError, GaCLLMError) as error:
        errors.put(type(error)(str(error)))
        raise


def _in_group(work: Callable[[], SFTReport]) -> SFTReport:
    try:
        return work()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
