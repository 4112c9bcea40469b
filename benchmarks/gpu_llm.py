"""Sections of ``gpu_check.py`` about language models: encoder, fine-tuning, merging, engines.

Each takes the device, whether sizes are toys, and a folder of its own. Models are random and
seeded, with a tokenizer of bytes: nothing is downloaded. What finds its device by itself is
started again without a card for the CPU's figures (``python gpu_llm.py NAME ARGUMENTS``).
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import recbole_gacllm  # noqa: F401, I001  (before transformers)
import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Trainer

from recbole_gacllm.alignment.encoder import TextEncoder
from recbole_gacllm.config import GaCLLMConfig, model_defaults
from recbole_gacllm.sft import finetune as sft
from recbole_gacllm.llm.engines import choose_backend, open_generator
from recbole_gacllm.llm.generator import Request, Sampling, SFTPair
from recbole_gacllm.llm.hardware import out_of_memory
from recbole_gacllm.sft.merge import merge as merge_adapter
from recbole_gacllm.llm.transformers_engine import TransformersGenerator

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["toy", "story", "comedy", "drama", "horror", "western", "crime", "war", "love", "space"]
OPTIONS = GaCLLMConfig.from_mapping(
    {
        **model_defaults(),
        "sft_epochs": 1,
        "sft_batch_size": 8,
        "sft_accumulation_steps": 2,
        "sft_learning_rate": 0.001,
        "sft_lora_rank": 8,
        "sft_lora_alpha": 16,
        "sft_lora_dropout": 0.0,  # draws of two devices differ
        "sft_target_modules": "all-linear",
        "sft_checkpoint_steps": 2,
        "sft_max_tokens": 384,
        "llm_dtype": "float32",
    }
)
finetune = partial(sft.finetune, seed=3)
KILLED_AFTER = 2  # updates
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
LOGIT_TOLERANCE = 1e-3
#: Least cosine of an embedding with the CPU's in float32.
COSINE = {"float32": 0.9999, "bfloat16": 0.99, "float16": 0.999}
# Llama 2 7B
SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
TOKENS = 512


def tokenizer() -> Any:
    """Of bytes, with a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(special + alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=special[0],
        pad_token=special[0],
        additional_special_tokens=special[1:],
        model_max_length=512,
    )
    fast.chat_template = TEMPLATE
    return fast


def llama(folder: Path, small: bool, **more: Any) -> Path:
    """A folder of a random Llama of four layers."""
    width = 64 if small else 512
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4 if small else 8, "max_position_embeddings": 1024}
    dtype = more.pop("dtype", torch.float32)
    config = transformers.LlamaConfig(
        **{"vocab_size": 259, "eos_token_id": [0, 2], "pad_token_id": 0, **sizes, **more},
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="500MB")
    tokenizer().save_pretrained(folder)
    return folder


def words(n: int, draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=n))


def pairs(n: int, seed: int) -> list[SFTPair]:
    """Of very unequal lengths."""
    draw = random.Random(seed)
    return [
        SFTPair(
            ({"role": "user", "content": words(draw.choice([1, 5, 20]), draw)},),
            words(draw.randint(1, 6), draw),
        )
        for _ in range(n)
    ]


def requests(n: int) -> list[Request]:
    """Prompts of unequal lengths, half of them greedy."""
    draw = random.Random(5)
    return [
        Request(
            f"r{n}",
            ({"role": "user", "content": words(draw.choice([1, 5, 20]), draw)},),
            Sampling(24, temperature=0.7 * (n % 2), repetition_penalty=1.05, seed=n),
        )
        for n in range(n)
    ]


# In a process without cards


def worker(name: str, *arguments: str, cards: bool = False) -> Any:
    """What a function below gives in another process, which sees no card unless asked for."""
    environment = dict(os.environ) | ({} if cards else {"CUDA_VISIBLE_DEVICES": ""})
    ran = subprocess.run(
        [sys.executable, __file__, name, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    if ran.returncode == -signal.SIGKILL:
        return "killed"
    ran.check_returncode()
    return json.loads(ran.stdout.splitlines()[-1])


def losses_of(model: str, out: str, n: str) -> list[float]:
    report = finetune(Path(model), pairs(int(n), 1), pairs(8, 2), Path(out), OPTIONS)
    return [*report.train_losses, report.perplexity_before or 0.0, report.perplexity_after or 0.0]


def killed(model: str, out: str, n: str) -> list[float]:
    """The same, killed when a checkpoint is whole."""
    save = Trainer._save_checkpoint

    def save_and_die(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        if self.state.global_step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._save_checkpoint = save_and_die
    return losses_of(model, out, n)


def completions(model: str, n: str, dtype: str = "float32") -> dict[str, str]:
    engine = TransformersGenerator(Path(model), dtype=dtype)
    found = {completion.id: completion.text for completion in engine.generate(requests(int(n)))}
    engine.close()
    return found


# Sections


def finetuning(device: str, small: bool, folder: Path) -> dict[str, Any]:
    """LoRA on the device against the CPU; killed and resumed against uninterrupted."""
    model = llama(folder / "model", small)
    n = "48" if small else "192"
    cpu = worker("losses_of", str(model), str(folder / "cpu"), n)
    started = time.perf_counter()
    whole = losses_of(str(model), str(folder / "whole"), n)
    figures: dict[str, Any] = {"seconds_of_one": time.perf_counter() - started, "cpu": cpu}
    died = worker("killed", str(model), str(folder / "killed"), n, cards=True)
    resumed = losses_of(str(model), str(folder / "killed"), n)
    half_options = replace(OPTIONS, llm_dtype="bfloat16")
    half = finetune(model, pairs(int(n), 1), [], folder / "half", half_options)
    one, other = (
        load_file(folder / run / "adapter" / "adapter_model.safetensors")
        for run in ("whole", "killed")
    )

    def differ(found: Any, expected: Any) -> float:
        return max(abs(a / b - 1) for a, b in zip(found, expected, strict=False))

    figures |= {
        "device": whole,
        "difference": differ(whole, cpu),
        "difference_bfloat16": differ(half.train_losses, cpu),
        "resumed_difference": differ(resumed, whole),
        "resumed_same_adapter": all(torch.equal(one[name], other[name]) for name in one),
    }
    return figures | {
        "checks": {
            "losses as on the CPU": figures["difference"] <= LOSS_TOLERANCE["float32"],
            "losses in bfloat16": figures["difference_bfloat16"] <= LOSS_TOLERANCE["bfloat16"],
            "it learns": whole[-1] < whole[-2],
            "it was killed": died == "killed",
            "resumed as uninterrupted": figures["resumed_difference"] <= LOSS_TOLERANCE["float32"],
        }
    }


def _merged(device: str, small: bool, folder: Path, name: str, **sizes: Any) -> dict[str, Any]:
    model = llama(folder / name, small, **sizes)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(1)
    tuned = get_peft_model(
        base, LoraConfig(r=8, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapter = folder / f"{name}-adapter"
    tuned.save_pretrained(adapter)
    ids = torch.arange(3, 203, device=device)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tuned.unload(), adapter).eval()(ids).logits.cpu()
    del base, tuned
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    merge_adapter(model, adapter, folder / f"{name}-merged")
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    merged = AutoModelForCausalLM.from_pretrained(folder / f"{name}-merged", dtype=torch.float32)
    with torch.no_grad():
        found = merged.to(device).eval()(ids).logits.cpu()
    return {
        "seconds": seconds,
        "peak_kib_before": before,
        "peak_kib": peak,
        "bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "difference": float((found - expected).abs().max() / expected.abs().max()),
    }


def merge(device: str, small: bool, folder: Path) -> dict[str, Any]:
    """Merged weights against base and adapter; a larger model in bfloat16, in several files."""
    figures = {"float32": _merged(device, small, folder, "small")}
    sizes = {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192}
    sizes = {"num_hidden_layers": 6} if small else sizes
    figures["bfloat16"] = _merged(device, small, folder, "large", dtype=torch.bfloat16, **sizes)
    return {
        **figures,
        "checks": {
            "float32": figures["float32"]["difference"] <= LOGIT_TOLERANCE,
            # Merged weights are rounded to bfloat16, those of the adapter are not: .067 on a CPU.
            "bfloat16": figures["bfloat16"]["difference"] <= 0.1,
        },
    }


def engine(device: str, small: bool, folder: Path) -> dict[str, Any]:
    """Completions of transformers on the device against the CPU's, by number type."""
    model, n = llama(folder / "model", small), 8 if small else 128
    cpu = worker("completions", str(model), str(n))
    figures: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16", "float16"):
        started = time.perf_counter()
        found = completions(str(model), str(n), dtype)
        figures[dtype] = {
            "seconds": time.perf_counter() - started,
            "n": len(found),
            "as_on_cpu": sum(found[name] == text for name, text in cpu.items()) / n,
        }
    return {
        **figures,
        "checks": {
            "all came": all(figures[dtype]["n"] == n for dtype in figures),
            # Where two tokens are nearly as likely, rounding decides.
            "as on the CPU": figures["float32"]["as_on_cpu"] >= 0.9,
        },
    }


def encoder(device: str, small: bool, folder: Path) -> dict[str, Any]:
    """Embeddings of a random BERT on the device against the CPU's, by number type."""
    width, depth = (32, 2) if small else (384, 6)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=259,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=4 * width,
        initializer_range=0.1,
    )
    transformers.BertModel(config).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    draw = random.Random(1)
    texts = [words(draw.choice([1, 5, 20]), draw) for _ in range(64 if small else 2000)] + [""]

    def encoded(name: str, dtype: str, where: str) -> tuple[np.ndarray, float]:
        file = folder / f"{name}.npy"
        stats = TextEncoder(folder / "bert", dtype, 32, where).encode_to_file(texts, file)
        vectors = np.load(file).astype(np.float64)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)  # float16 rounds them
        return vectors / lengths.clip(min=0.5), stats.seconds

    expected, seconds = encoded("cpu", "float32", "cpu")
    figures: dict[str, Any] = {"cpu_seconds": seconds}
    for dtype in COSINE:
        found, seconds = encoded(dtype, dtype, device)
        cosines = (found * expected).sum(axis=1)[:-1]
        figures[dtype] = {"seconds": seconds, "cosine": float(cosines.min())}
        figures[dtype]["empty_is_zero"] = not found[-1].any()
    checks = {dtype: figures[dtype]["cosine"] >= least for dtype, least in COSINE.items()}
    checks["empty texts"] = all(figures[dtype]["empty_is_zero"] for dtype in COSINE)
    return figures | {"checks": checks}


def memory(device: str, small: bool, folder: Path) -> dict[str, Any]:
    """A random 7B's memory a token of fine-tuning, with and without gradient checkpointing."""
    sizes = SEVEN_B
    if small:
        sizes = {**SEVEN_B, "hidden_size": 64, "intermediate_size": 172, "vocab_size": 259}
        sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    with torch.device(device):
        config = transformers.LlamaConfig(**sizes, use_cache=False)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    n_parameters = base.num_parameters()
    tuned = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    tuned.train()
    figures: dict[str, Any] = {"parameters": n_parameters}
    for mode in ("without", "with"):
        if mode == "with":
            base.gradient_checkpointing_enable({"use_reentrant": False})
        figures[mode] = {str(n): _step(tuned, device, n) for n in (1, 4)}
        first, last = (figures[mode][n]["saved_bytes"] for n in ("1", "4"))
        if first and last:
            figures[mode]["saved_bytes_a_token"] = (last - first) / (3 * TOKENS)
    with_, without = (figures[mode].get("saved_bytes_a_token", 0) for mode in ("with", "without"))
    return figures | {
        "checks": {
            "a batch of one fits with checkpointing": figures["with"]["1"]["error"] is None,
            "checkpointing keeps less": not without or 0 < with_ < without / 2,
            "the product uses it": small or n_parameters > sft.CHECKPOINTING_ABOVE,
        }
    }


def _step(model: Any, device: str, n: int) -> dict[str, Any]:
    """Forward and backward of some sequences: what was kept in between, the peak, seconds."""
    ids = torch.randint(3, 250, (n, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_leaf:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    error = None
    started = time.perf_counter()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, logits_to_keep=64).logits.float().square().mean()
        loss.backward()
    except RuntimeError as failure:
        if not out_of_memory(failure):
            raise
        error = "out of memory"
    model.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return {
        "saved_bytes": None if error else sum(kept.values()),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "seconds": time.perf_counter() - started,
        "error": error,
    }


def vllm(device: str, small: bool, folder: Path) -> dict[str, Any]:
    """Completions of vLLM against those of transformers, plain and with an adapter."""
    chosen, reason = choose_backend("auto")
    if chosen != "vllm" or device == "cpu":
        return {"left_out": reason if device == "cuda" else "only on a GPU"}
    model, n = llama(folder / "model", small), 24 if small else 128
    finetune(model, pairs(64, 1), [], folder / "sft", OPTIONS)
    expected = completions(str(model), str(n), "bfloat16")
    figures: dict[str, Any] = {}
    for name, adapter in (("plain", None), ("adapter", folder / "sft" / "adapter")):
        started = time.perf_counter()
        opened = open_generator("vllm", model_dir=model, adapter_dir=adapter, dtype="bfloat16")
        ready = time.perf_counter()
        found = {completion.id: completion.text for completion in opened.generate(requests(n))}
        opened.close()
        figures[name] = {
            "start_seconds": ready - started,
            "seconds": time.perf_counter() - ready,
            "n": len(found),
            "as_transformers": sum(found.get(k) == text for k, text in expected.items()) / n,
        }
    return figures | {"checks": {name: figures[name]["n"] == n for name in figures}}


if __name__ == "__main__":
    name, *given = sys.argv[1:]
    functions = {"losses_of": losses_of, "killed": killed, "completions": completions}
    print(json.dumps(functions[name](*given)))
