"""One run in several processes, with RecBole's DDP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from recbole_gacllm import console
from recbole_gacllm.artifacts.launchers import free_port, leave_launcher
from recbole_gacllm.run import run
from recbole_gacllm.run_config import build_config


def run_distributed(
    model: str,
    dataset: str,
    config_files: Sequence[str | Path],
    nproc: int,
    config_dict: dict[str, Any] | None = None,
) -> Path:
    """:func:`.runner.run` in several processes with RecBole's DDP, on one machine.

    Returns:
        The ``run.json``.

    Raises:
        ValueError: Bad input of the configuration; a failure in a process comes as it was raised
            there, with its traceback.
    """
    keys = dict(config_dict or {})
    # A mistake is told once, not by every process.
    config = build_config(model, dataset, config_files, dict(keys))
    if config["device"].type == "cuda" and len(config["gpu_id"].split(",")) < nproc:
        raise ValueError(
            f"nproc: {nproc} needs as many GPUs; gpu_id: {config['gpu_id']!r} names fewer. Name "
            f"{nproc}, such as --gpu_id={','.join(map(str, range(nproc)))}, lower nproc, or set "
            "use_gpu: False."
        )
    port = str(free_port())
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    ddp = {"world_size": nproc, "nproc": nproc, "ip": "localhost", "port": port, "offset": 0}
    files = [str(file) for file in config_files]
    arguments = (model, dataset, files, {**keys, **ddp}, queue)
    torch.multiprocessing.spawn(  # type: ignore[attr-defined,no-untyped-call]
        _run_rank, args=arguments, nprocs=nproc, join=True
    )
    run_file: Path = queue.get()
    return run_file


def _run_rank(
    rank: int, model: str, dataset: str, files: list[str], keys: dict[str, Any], queue: Any
) -> None:
    console.prepare()
    leave_launcher()  # RecBole says who is who
    done = run(model, dataset, files, {**keys, "local_rank": rank})
    if rank == 0:
        # A path, not the record: a pipe that nobody reads yet holds 64 KiB.
        queue.put(done.run_file)
