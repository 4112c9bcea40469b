"""How transformers' Trainer is set up for fine-tuning: options, checkpoints, progress."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.errors import GaCLLMError

logger = logging.getLogger(__name__)

# What reading a file that was cut short or changed raises.
_DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError),
    *(SafetensorError, zipfile.BadZipFile),
)


def batch_of_a_process(
    options: GaCLLMConfig, n_processes: int, at_once: int | None = None
) -> tuple[int, int]:
    """Sequences a step and steps an update of each of several processes.

    A step takes ``batch_size`` sequences at most, or ``at_once``. All steps of all processes
    together take the sequences of one update that one process would take. Where a pass over
    the pairs does not end with a full step of all, its first pairs fill that up, by accelerate's
    rule.

    Raises:
        ValueError: If an update cannot be shared equally.
    """
    n_sequences = options.sft_batch_size * options.sft_accumulation_steps
    share = n_sequences // n_processes
    if n_sequences % n_processes:
        raise ValueError(
            f"an update of {n_sequences} sequences (sft_batch_size: {options.sft_batch_size} x "
            f"sft_accumulation_steps: {options.sft_accumulation_steps}) cannot be shared equally "
            f"by {n_processes} processes; start a number of processes that divides it."
        )
    at_most = min(options.sft_batch_size, at_once or options.sft_batch_size)
    batch_size = max(n for n in range(1, at_most + 1) if share % n == 0)
    return batch_size, share // batch_size


def training_arguments(
    out_dir: Path, options: GaCLLMConfig, seed: int, at_once: int | None = None
) -> TrainingArguments:
    """Trainer's arguments; everything it writes goes to ``out_dir/checkpoints``."""
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch_size, accumulation_steps = batch_of_a_process(options, n_processes, at_once)
    args = TrainingArguments(
        output_dir=str(out_dir / "checkpoints"),
        num_train_epochs=options.sft_epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation_steps,
        learning_rate=options.sft_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.03,  # below 1: a share of all steps
        save_strategy="steps",
        save_steps=options.sft_checkpoint_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        # without it, torchrun on a machine without GPU would train each process on its own
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        report_to="none",
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # one process uses one GPU; Trainer would wrap the model in DataParallel
    return args


class Progress(TrainerCallback):  # type: ignore[misc]
    """One bar with the loss; stops training when the loss is not finite."""

    def __init__(self, show: bool) -> None:
        self._show = show

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, after a resume where the checkpoint ended."""
        self._bar = tqdm(
            desc="SFT",
            unit="update",
            total=state.max_steps,
            initial=state.global_step,
            disable=not self._show,
        )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar by one update; note for :func:`last_checkpoint` who made it."""
        state.log_history[-1]["n_processes"] = args.world_size
        loss = state.log_history[-1].get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise GaCLLMError(
                f"SFT: the loss is {loss} at update {state.global_step}; "
                f"lower sft_learning_rate={args.learning_rate} or set llm_dtype: float32"
            )
        self._bar.update()
        self._bar.set_postfix(loss=f"{loss:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self._bar.close()


def last_checkpoint(folder: Path, n_processes: int) -> Path | None:
    """The newest checkpoint that is whole, of any number of processes; the others are logged.

    Of as many processes as go on now, the random states of all must be there: then training ends
    as if it had not been interrupted. Another number reads the same sequences in each update, at
    the same learning rates, and draws its own dropout.
    """
    for checkpoint in _newest_first(folder):
        try:
            n_writers = _written_by(checkpoint, n_processes)
        except _DAMAGE as error:
            logger.warning("SFT: %s is half-written or damaged (%s): not used", checkpoint, error)
            continue
        if n_writers != n_processes:
            logger.info(
                "SFT: %s is of %d processes, now there are %d: it goes on with other dropout",
                *(checkpoint, n_writers, n_processes),
            )
        return checkpoint
    return None


def remove_newer(folder: Path, checkpoint: Path | None) -> None:
    """Remove checkpoints that are not used, so that new ones do not mix with what is left."""
    for unused in _newest_first(folder):
        if unused == checkpoint:
            return
        shutil.rmtree(unused)


def _newest_first(folder: Path) -> list[Path]:
    checkpoints = folder.glob("checkpoint-*")
    return sorted(checkpoints, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)


def _written_by(checkpoint: Path, n_processes: int) -> int:
    """How many processes wrote a checkpoint, after a check of all that training needs of it.

    Trainer writes ``trainer_state.json`` last, in the first process. The others write their random
    states only. Any of ``_DAMAGE`` is raised if something is missing or is not what was written.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    with safe_open(checkpoint / "adapter_model.safetensors", "pt"):
        pass  # its header says how long it must be
    random_states = sorted(checkpoint.glob("rng_state*.pth"))
    for file in (checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *random_states):
        with zipfile.ZipFile(file) as parts:
            if (part := parts.testzip()) is not None:
                raise ValueError(f"{file.name}: {part} has another checksum")
    n_writers = int(state["log_history"][-1]["n_processes"])
    if n_writers == n_processes != len(random_states):
        raise ValueError(f"random states of {len(random_states)} of {n_writers} processes")
    return n_writers
