"""How transformers' Trainer is set up for fine-tuning: options, checkpoints, progress."""

from __future__ import annotations

import json
import logging
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from recbole_gacllm.errors import GaCLLMError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SFTOptions:
    """How to fine-tune; the ``sft_*`` keys of ``properties/model/GaCLLM.yaml`` explain each.

    ``dtype`` is that of the frozen base (``llm_dtype``); the adapter is always float32.
    """

    epochs: int
    batch_size: int
    accumulation_steps: int
    learning_rate: float
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    target_modules: str | tuple[str, ...]
    checkpoint_steps: int
    max_tokens: int
    dtype: str
    seed: int
    show_progress: bool = True


def batch_of_a_process(options: SFTOptions, n_processes: int) -> tuple[int, int]:
    """Sequences a step and steps an update of each of several processes.

    Together they take the sequences of one update that one process would take. Where a pass over
    the pairs does not end with a full step of all, its first pairs fill that up, by accelerate's
    rule.

    Raises:
        ValueError: If an update cannot be shared equally.
    """
    n_sequences = options.batch_size * options.accumulation_steps
    share = n_sequences // n_processes
    if n_sequences % n_processes:
        raise ValueError(
            f"an update of {n_sequences} sequences (sft_batch_size: {options.batch_size} x "
            f"sft_accumulation_steps: {options.accumulation_steps}) cannot be shared equally by "
            f"{n_processes} processes; start a number of processes that divides it."
        )
    batch_size = max(n for n in range(1, options.batch_size + 1) if share % n == 0)
    return batch_size, share // batch_size


def training_arguments(out_dir: Path, options: SFTOptions) -> TrainingArguments:
    """Trainer's arguments; everything it writes goes to ``out_dir/checkpoints``.

    Raises:
        ValueError: As :func:`batch_of_a_process`.
    """
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch_size, accumulation_steps = batch_of_a_process(options, n_processes)
    args = TrainingArguments(
        output_dir=str(out_dir / "checkpoints"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.03,  # below 1: a share of all steps
        save_strategy="steps",
        save_steps=options.checkpoint_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        # without it, torchrun on a machine without GPU would train each process on its own
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
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
        self._bar: Any = None

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
        """Move the bar by one update."""
        loss = state.log_history[-1].get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise GaCLLMError(
                f"SFT: the loss is {loss} at update {state.global_step}; "
                f"lower sft_learning_rate={args.learning_rate} or set llm_dtype: float32"
            )
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix(loss=f"{loss:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def last_checkpoint(folder: Path, world_size: int) -> Path | None:
    """The newest complete checkpoint; half-written ones are skipped.

    Trainer writes ``trainer_state.json`` last: one that parses ends a complete checkpoint of the
    first process. The others write their random states only, so all of these must be there, whole.
    """

    def step(checkpoint: Path) -> int:
        return int(checkpoint.name.rsplit("-", 1)[1])

    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.info("SFT: skipping the half-written %s", checkpoint)
            continue
        random_states = list(checkpoint.glob("rng_state*.pth"))
        if len(random_states) == world_size and all(map(zipfile.is_zipfile, random_states)):
            return checkpoint
    return None
