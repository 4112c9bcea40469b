"""The ways to answer prompts and to encode texts that ``descriptions.py`` compares."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.description_work import Clock, Work
from recbole_gacllm.alignment.encoder import TextEncoder
from recbole_gacllm.llm import weights
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.hardware import resolve_dtype


def open_engine(
    work: Work, dtype: str, model_dir: Path | None = None, adapter_dir: Path | None = None
) -> Any:
    """Our generator; its ``_llm`` is the ``vllm.LLM`` that it runs on."""
    from recbole_gacllm.llm.vllm_engine import VLLMGenerator

    return VLLMGenerator(
        model_dir or work.model_dir,
        adapter_dir,
        dtype=dtype,
        max_model_len=work.options.llm_max_prompt_tokens + work.options.llm_max_new_tokens,
    )


def raw_vllm(
    generator: Any, work: Work, prompts: list[list[int]], max_new_tokens: int | None = None
) -> tuple[dict[str, float], list[tuple[int, ...]]]:
    """One call of vLLM's own ``generate``: what it took, and each answer's token ids."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=max_new_tokens or work.sampling.max_new_tokens,
        temperature=work.sampling.temperature,
        repetition_penalty=work.sampling.repetition_penalty,
        seed=work.sampling.seed,
        stop_token_ids=sorted(ChatTokenizer(work.model_dir).stop_token_ids),
        detokenize=False,
    )
    clock = Clock()
    outputs = generator._llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], parameters, lora_request=generator._lora
    )
    clock.stop()
    return {
        **clock.read(),
        "n_answers": len(outputs),
        "n_prompt_tokens": sum(len(o.prompt_token_ids) for o in outputs),
        "n_cached_tokens": sum(o.num_cached_tokens or 0 for o in outputs),
        "n_output_tokens": sum(len(o.outputs[0].token_ids) for o in outputs),
    }, [tuple(o.outputs[0].token_ids) for o in outputs]


def our_stage(generator: Any, work: Work) -> dict[str, float]:
    """What the stage took."""
    report, clock = work.convolve(generator)
    return {
        **clock.read(),
        "n_answers": report.n_generated + report.n_retried,
        "n_prompt_tokens": report.n_prompt_tokens,
        "n_cached_tokens": report.n_cached_tokens,
        "n_output_tokens": report.n_output_tokens,
        "n_failed": report.n_failed,
    }


def plain_transformers(
    work: Work, prompts: list[list[int]], batch_size: int, dtype: str
) -> dict[str, float]:
    """Batched ``generate`` as its documentation shows it, in the order of the prompts."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        work.model_dir, dtype=getattr(torch, resolve_dtype(dtype))
    )
    model = model.to(device).eval()
    tokenizer = ChatTokenizer(work.model_dir)
    stops, pad = tokenizer.stop_token_ids, tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=work.sampling.max_new_tokens,
        do_sample=False,
        repetition_penalty=work.sampling.repetition_penalty,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
    )
    model.generation_config = GenerationConfig()
    n_output_tokens, clock = 0, Clock()
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
        with torch.inference_mode():
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for row in made[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            n_output_tokens += end
    clock.stop()
    return {
        **clock.read(),
        "n_answers": len(prompts),
        "n_prompt_tokens": sum(map(len, prompts)),
        "n_cached_tokens": 0,
        "n_output_tokens": n_output_tokens,
    }


def encoding(
    work: Work, texts: list[str], n_texts: int = 1024, n_rounds: int = 3
) -> dict[str, Any]:
    """Texts a second of our encoder, file and all, and of sentence-transformers' ``encode``.

    The texts differ from each other: that ours encodes equal ones once is not in the figures.
    """
    from sentence_transformers import SentenceTransformer

    different = list(dict.fromkeys(texts))
    texts = random.Random(work.seed).sample(different, min(n_texts, len(different)))
    options = work.options
    folder = weights.resolve_encoder(options.encoder_model)
    ours = TextEncoder(folder, options.encoder_dtype, options.encoder_batch_size)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    plain = SentenceTransformer(str(folder), model_kwargs={"dtype": ours.dtype})
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(-1, n_rounds):  # the first warms up
            for way in ("ours", "plain") if number % 2 else ("plain", "ours"):
                started = time.perf_counter()
                if way == "ours":
                    ours.encode_to_file(texts, Path(scratch) / f"{number}.npy")
                else:
                    plain.encode(texts, batch_size=options.encoder_batch_size)
                if number >= 0:
                    seconds[way].append(time.perf_counter() - started)
    found: dict[str, Any] = {
        "n_texts": len(texts),
        "dtype": str(ours.dtype),
        "texts_per_second": {way: len(texts) / statistics.median(t) for way, t in seconds.items()},
    }
    found["ratio"] = statistics.median(seconds["plain"]) / statistics.median(seconds["ours"])
    if ours.dtype != torch.float32:  # sentence-transformers' own default
        started = time.perf_counter()
        SentenceTransformer(str(folder)).encode(texts, batch_size=options.encoder_batch_size)
        rate = len(texts) / (time.perf_counter() - started)
        found["texts_per_second"]["plain_float32"] = rate
        found["ratio_to_float32"] = found["texts_per_second"]["ours"] / rate
    return found


def differing(one: list[tuple[int, ...]], other: list[tuple[int, ...]]) -> float:
    """Share of answers that are not the same, token by token."""
    return sum(a != b for a, b in zip(one, other, strict=True)) / len(one)
