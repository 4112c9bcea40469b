"""Supervised fine-tuning with LoRA.

A pair is a chat and the completion it should get. The loss of an update is the mean negative
log-likelihood of its completion tokens, end of turn included; prompt tokens are read, not learned.
Perplexity is ``exp(summed NLL / number of completion tokens)`` over held-out pairs.

``finetune`` owns one folder: ``adapter/`` (peft's safetensors format), ``sft.json`` (what is known
so far, at the end the report) and ``checkpoints/``, from which a killed run goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer

from recbole_gacllm.artifacts.disk import whole_folder, write_atomic
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.llm.adapter import linear_layers
from recbole_gacllm.llm.generator import SFTPair
from recbole_gacllm.llm.hardware import out_of_memory, training_dtype
from recbole_gacllm.sft.batches import completion_loss, encode_pairs, pad_left, perplexity
from recbole_gacllm.sft.trainer import (
    Progress,
    last_checkpoint,
    remove_newer,
    training_arguments,
)

logger = logging.getLogger(__name__)

PROGRESS_FILE = "sft.json"
# Parameters. What a 7B keeps for the way back is 12.7 MB a token; a small model has room for it.
CHECKPOINTING_ABOVE = 1_000_000_000


class SFTMemoryError(GaCLLMError):
    """Memory ran out; fewer sequences at once may do."""


@dataclass(frozen=True)
class SFTReport:
    """What a fine-tuning did."""

    perplexity_before: float | None  # held-out, of the base model; None without held-out pairs
    perplexity_after: float | None  # the same with the adapter
    n_pairs: int  # trained on
    n_heldout: int
    n_dropped: int  # pairs of either kind left out because they exceed sft_max_tokens
    n_steps: int  # weight updates
    n_tokens: int  # read in training, padding left out
    seconds: float  # wall time of the process that finished it
    train_losses: tuple[float, ...]  # of each weight update, in order


def finetune(
    model_dir: Path,
    pairs: Sequence[SFTPair],
    heldout: Sequence[SFTPair],
    out_dir: Path,
    options: GaCLLMConfig,
    *,
    seed: int,
    show_progress: bool = False,
    model_name: str | None = None,
    at_once: int | None = None,
) -> SFTReport:
    """Train a LoRA adapter on ``pairs`` into ``out_dir/adapter``.

    Started again on the same folder it goes on from its last complete checkpoint and ends with the
    same adapter (where other dropout is drawn in another number of processes, one as good); a
    damaged checkpoint is named, and the one before it taken, or the start. A finished folder is
    read, not repeated. Where several processes of one group call this (:mod:`.processes`), they
    share each update and the first one writes.

    Args:
        model_dir: Folder of the base model (safetensors, tokenizer with a chat template).
        pairs: To learn.
        heldout: For perplexity before and after; may be empty.
        out_dir: Of one model, one set of pairs and one set of options.
        options: The ``sft_`` keys; ``llm_dtype`` is that of the frozen base.
        seed: Of the adapter's first weights, dropout and the order of pairs.
        show_progress: One bar.
        model_name: For the adapter's config; the folder's name if None.
        at_once: At most so many sequences a step of a process; an update takes more steps then.

    Raises:
        ValueError: If no pair fits ``max_tokens``, ``target_modules`` match nothing, or the
            processes cannot share an update equally.
        SFTMemoryError: If memory runs out.
        GaCLLMError: If the loss is no longer finite.
    """
    started = time.perf_counter()
    args = training_arguments(out_dir, options, seed, at_once)
    # The first process looks, for all: it may write before another one has looked.
    looked: list[Any] = [None, None, None]
    if args.process_index == 0:
        looked[0] = finished(out_dir)
        looked[1] = _progress(out_dir)
        looked[2] = last_checkpoint(out_dir / "checkpoints", args.world_size)
        remove_newer(out_dir / "checkpoints", looked[2])
    done, progress, checkpoint = broadcast_object_list(looked)

    def keep_progress(**more: Any) -> None:
        if args.process_index == 0:
            text = json.dumps(progress | more, indent=2)
            write_atomic(out_dir / PROGRESS_FILE, text.encode())

    if isinstance(done, SFTReport):
        logger.info("SFT: done earlier, the adapter is in %s", out_dir / "adapter")
        return done

    lora = _lora_config(model_dir, options)
    train = encode_pairs(model_dir, pairs, options.sft_max_tokens)
    test = encode_pairs(model_dir, heldout, options.sft_max_tokens)
    n_dropped = len(pairs) + len(heldout) - len(train) - len(test)
    if n_dropped:
        logger.warning(
            "SFT: %d pairs longer than sft_max_tokens=%d left out",
            n_dropped,
            options.sft_max_tokens,
        )
    if not train:
        raise ValueError(
            f"sft_max_tokens={options.sft_max_tokens}: none of the {len(pairs)} SFT pairs fits; "
            "raise it, shorten the texts, or set sft: False"
        )
    logger.info("SFT: %d pairs, %d held out", len(train), len(test))

    transformers.set_seed(seed)
    transformers.utils.logging.disable_progress_bar()
    at_once = args.per_device_train_batch_size
    model = _load(model_dir, lora, options.llm_dtype, args.device)
    try:
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=train,
            data_collator=pad_left,
            compute_loss_func=completion_loss,
            callbacks=[Progress(show_progress and args.process_index == 0)],
        )
        trainer.remove_callback(transformers.PrinterCallback)  # Trainer adds it, and it prints
        if "perplexity_before" not in progress:
            with model.disable_adapter():
                progress["perplexity_before"] = perplexity(model, test, at_once)
            keep_progress()
        before = progress["perplexity_before"]
        logger.info("SFT: held-out perplexity before: %s", before)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        after = perplexity(model, test, at_once)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise SFTMemoryError(
            f"SFT ran out of memory with {at_once} sequences of up to sft_max_tokens="
            f"{options.sft_max_tokens} tokens at once. Lower sft_batch_size="
            f"{options.sft_batch_size} (raise sft_accumulation_steps="
            f"{options.sft_accumulation_steps} by the same factor), "
            f"sft_max_tokens or sft_lora_rank={options.sft_lora_rank}, or take a smaller llm_model"
        ) from error
    report = SFTReport(
        perplexity_before=before,
        perplexity_after=after,
        n_pairs=len(train),
        n_heldout=len(test),
        n_dropped=n_dropped,
        n_steps=trainer.state.global_step,
        n_tokens=options.sft_epochs * sum(len(example.input_ids) for example in train),
        seconds=round(time.perf_counter() - started, 2),
        train_losses=tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
    )
    logger.info("SFT: held-out perplexity after: %s (%d updates)", after, report.n_steps)
    if before is not None and after is not None and after >= before:
        logger.warning("SFT: held-out perplexity did not fall; try another sft_learning_rate")
    if args.process_index == 0:
        _save_adapter(model, out_dir / "adapter", model_name or model_dir.name)
        keep_progress(report=asdict(report))
        shutil.rmtree(out_dir / "checkpoints", ignore_errors=True)
        for left in out_dir.glob(f".{PROGRESS_FILE}.*.tmp"):  # by writes that were killed
            left.unlink(missing_ok=True)
    return report


def finished(out_dir: Path) -> SFTReport | None:
    """The report of a finished fine-tuning."""
    report = _progress(out_dir).get("report")
    return report and SFTReport(**report | {"train_losses": tuple(report["train_losses"])})


def _progress(out_dir: Path) -> dict[str, Any]:
    file = out_dir / PROGRESS_FILE
    return dict(json.loads(file.read_bytes())) if file.is_file() else {}


def _lora_config(model_dir: Path, options: GaCLLMConfig) -> LoraConfig:
    """Adapters for linear layers that are named one by one, before any weight is read.

    Raises:
        ValueError: If the model has no such layer, or ``target_modules`` match none.
    """
    names = [name for name, layer in linear_layers(model_dir).items() if layer.on_disk]
    if options.sft_target_modules != "all-linear":
        names_of = options.sft_target_modules
        targets = [names_of] if isinstance(names_of, str) else names_of
        ends = {target: [n for n in names if f".{n}".endswith(f".{target}")] for target in targets}
        unknown = [target for target, modules in ends.items() if not modules]
        if unknown or not targets:
            endings = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ValueError(
                f"sft_target_modules: {unknown or targets} match no linear module of the model; "
                f"use all-linear or some of {endings}"
            )
        names = sorted({name for modules in ends.values() for name in modules})
    if not names:
        raise ValueError(
            f"llm_model: {model_dir} has no linear layer that is stored as a plain matrix of "
            "float32, bfloat16 or float16 (quantised?), so it cannot be fine-tuned. Take the model "
            "without quantisation, or set sft: False."
        )
    return LoraConfig(
        r=options.sft_lora_rank,
        lora_alpha=options.sft_lora_alpha,
        lora_dropout=options.sft_lora_dropout,
        target_modules=names,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _load(model_dir: Path, config: LoraConfig, dtype: str, device: torch.device) -> Any:
    """The model with a new adapter, read straight to its device.

    A large one keeps the inputs of its layers only and computes the rest again on the way back.

    Raises:
        GaCLLMError: If the weights alone need more memory than there is.
    """
    try:
        base = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=training_dtype(dtype),
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
        )
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise GaCLLMError(
            f"SFT: the weights of {model_dir} do not fit into the memory of {device}. Take a "
            "smaller llm_model or llm_dtype: bfloat16, or free the memory that others hold there."
        ) from error
    base.config.use_cache = False
    if base.num_parameters() > CHECKPOINTING_ABOVE:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(base, config)


def _save_adapter(model: PeftModel, adapter_dir: Path, model_name: str) -> None:
    config = model.peft_config["default"]
    config.base_model_name_or_path = model_name  # not this machine's path
    config.target_modules = sorted(config.target_modules)
    config.inference_mode = True
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with whole_folder(adapter_dir) as folder:
        config.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
