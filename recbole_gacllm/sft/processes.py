"""Fine-tuning on all cards: a process each, which share every update."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from recbole_gacllm.artifacts.launchers import free_port
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.llm.generator import SFTPair
from recbole_gacllm.sft.finetune import SFTMemoryError, SFTReport, finetune, finished
from recbole_gacllm.sft.trainer import batch_of_a_process

logger = logging.getLogger(__name__)
_last_group: list[Any] = []


def finetune_on_all_cards(
    model_dir: Path,
    pairs: Sequence[SFTPair],
    heldout: Sequence[SFTPair],
    out_dir: Path,
    options: GaCLLMConfig,
    *,
    seed: int,
    show_progress: bool = False,
    model_name: str | None = None,
    n_processes: int | None = None,
) -> SFTReport:
    """:func:`.finetune.finetune` in one process a card, with the sequences of an update shared.

    The number of processes is the largest that divides an update's sequences. Where memory runs
    out, each goes on from the last checkpoint with half as many sequences at once, and twice the
    steps an update. Processes that ``torchrun`` started, on one machine or on several that see the
    same folders, take part as they are.

    There are ``n_processes`` at most; None is the number of visible GPUs.

    Raises:
        ValueError, GaCLLMError: As :func:`.finetune.finetune`.
    """
    work = partial(
        finetune,
        *(model_dir, pairs, heldout, out_dir, options),
        seed=seed,
        show_progress=show_progress,
        model_name=model_name,
    )
    if distributed.is_torchelastic_launched():
        return _in_group(work)
    n_sequences = options.sft_batch_size * options.sft_accumulation_steps
    n_at_most = torch.cuda.device_count() if n_processes is None else n_processes
    n = max(n for n in range(1, max(1, n_at_most) + 1) if n_sequences % n == 0)
    at_once, _ = batch_of_a_process(options, n)
    while True:
        try:
            return _in_processes(n, partial(work, at_once=at_once), out_dir)
        except SFTMemoryError:
            if at_once == 1:
                raise
        # Not within `except`, which keeps the model's memory alive.
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        at_once, steps = batch_of_a_process(options, n, at_once // 2)
        logger.warning(
            "SFT: memory ran out; it goes on from its last checkpoint with %d sequences at once "
            "and %d steps an update, which takes the same sequences",
            *(at_once, steps),
        )


def _in_processes(n: int, work: Callable[[], SFTReport], out_dir: Path) -> SFTReport:
    """The same work in each of several processes of one group."""
    if n == 1:
        return work()
    port = str(free_port())
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n)}
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
    """The work, and the end of the group that it joined.

    What is left of the group lives until the next, or the process' end: gloo's destructor waits for
    its threads with Python's lock in hand, for which a thread that still lets a tensor go waits
    (pytorch/pytorch#56297).
    """
    try:
        return work()
    finally:
        if distributed.is_initialized():
            _last_group[:] = [distributed.group.WORLD]
            distributed.destroy_process_group()
