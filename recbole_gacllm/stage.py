"""The stages that run in child processes: ``python -m recbole_gacllm.stage NAME FOLDER``.

Started by :func:`recbole_gacllm.artifacts.run_child`, never by hand. A stage reads
``FOLDER/job.json``, goes on where an earlier process stopped, and writes its
manifest last.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recbole_gacllm import artifacts
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.descriptions import text
from recbole_gacllm.descriptions.convolution import Convolution, ConvolutionOptions
from recbole_gacllm.descriptions.layers import Layer, Side
from recbole_gacllm.descriptions.neighbors import TrainGraph
from recbole_gacllm.descriptions.pairs import sample_pairs
from recbole_gacllm.descriptions.prompts import PromptTemplates
from recbole_gacllm.descriptions.store import DescriptionStore
from recbole_gacllm.llm.generator import Sampling, TextGenerator

logger = logging.getLogger("recbole_gacllm.stage")


def sft(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """LoRA fine-tuning on matched pairs: ``adapter/``."""
    from recbole_gacllm.llm.sft import finetune
    from recbole_gacllm.llm.sft_trainer import SFTOptions

    options = _options(job)
    graph, raw = _inputs(job)
    learn, heldout = sample_pairs(
        graph, raw, _templates(job), options.sft_n_pairs, options.sft_n_heldout, job["seed"]
    )
    modules = options.sft_target_modules
    report = finetune(
        Path(job["model_dir"]),
        learn,
        heldout,
        folder,
        SFTOptions(
            epochs=options.sft_epochs,
            batch_size=options.sft_batch_size,
            accumulation_steps=options.sft_accumulation_steps,
            learning_rate=options.sft_learning_rate,
            lora_rank=options.sft_lora_rank,
            lora_alpha=options.sft_lora_alpha,
            lora_dropout=options.sft_lora_dropout,
            target_modules=modules if isinstance(modules, str) else tuple(modules),
            checkpoint_steps=options.sft_checkpoint_steps,
            max_tokens=options.sft_max_tokens,
            dtype=options.llm_dtype,
            seed=job["seed"],
            show_progress=job["show_progress"],
        ),
        model_name=job["model_name"],
    )
    return dataclasses.asdict(report)


def merged(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The base model with the adapter merged into its weights: ``model/``."""
    from recbole_gacllm.llm.sft import merge

    merge(Path(job["model_dir"]), Path(job["adapter_dir"]), folder / "model")
    return {}


def descriptions(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Description convolution: ``layer_1.parquet`` to ``layer_L.parquet``."""
    from recbole_gacllm.llm.chat import ChatTokenizer
    from recbole_gacllm.llm.engines import choose_backend, open_generator
    from recbole_gacllm.llm.weights import check_adapter

    options = _options(job)
    graph, layer = _inputs(job)
    generator_dir = Path(job["generator_dir"])
    adapter_dir = Path(job["adapter_dir"]) if job["adapter_dir"] else None
    if adapter_dir:
        check_adapter(generator_dir, adapter_dir)
    backend, reason = choose_backend(options.llm_backend)
    logger.info("llm_backend: %s (%s)", backend, reason)

    only_vllm = {
        "tensor_parallel_size": options.llm_tensor_parallel_size,
        "pipeline_parallel_size": options.llm_pipeline_parallel_size,
        "gpu_memory_utilization": options.llm_gpu_memory_utilization,
    }

    def load() -> TextGenerator:
        return open_generator(
            backend,
            model_dir=generator_dir,
            adapter_dir=adapter_dir,
            dtype=options.llm_dtype,
            seed=job["seed"],
            max_model_len=options.llm_max_prompt_tokens + options.llm_max_new_tokens,
            **(only_vllm if backend == "vllm" else {}),
        )

    reports = []
    with DescriptionStore(Path(job["store"])) as store:
        convolution = Convolution(
            graph,
            _templates(job),
            ChatTokenizer(generator_dir),
            store,
            job["generator_key"],
            load,
            ConvolutionOptions(
                neighbor_rule=options.neighbor_rule,
                n_neighbors=options.n_neighbors,
                max_prompt_tokens=options.llm_max_prompt_tokens,
                max_neighbor_tokens=options.llm_max_neighbor_tokens,
                sampling=Sampling(
                    options.llm_max_new_tokens,
                    options.llm_temperature,
                    options.llm_repetition_penalty,
                ),
                seed=job["seed"],
                show_progress=job["show_progress"],
            ),
        )
        nothing_known: dict[Side, str] = {
            "user": text.nothing_known(options.text_user_noun),
            "item": text.nothing_known(options.text_item_noun),
        }
        try:
            for number in range(1, options.llm_n_layers + 1):
                layer, report = convolution.next_layer(layer, nothing_known, f"layer {number}")
                layer.write(folder / f"layer_{number}.parquet")
                reports.append(dataclasses.asdict(report))
                logger.info(
                    "layer %d: %d of %d nodes generated, %d from the store, %d failed %s, "
                    "%d prompt and %d output tokens, %.0f s",
                    number,
                    report.n_generated,
                    report.n_nodes,
                    report.n_from_store,
                    report.n_failed,
                    report.failures or "",
                    report.n_prompt_tokens,
                    report.n_output_tokens,
                    report.seconds,
                )
        finally:
            convolution.close()
    return {"backend": backend, "backend_reason": reason, "layers": reports}


def embeddings(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Encoding: ``layer_0.npy`` to ``layer_L.npy``, users first, in the order of the inputs."""
    from recbole_gacllm.descriptions.encoder import TextEncoder

    options = _options(job)
    encoder = TextEncoder(
        Path(job["encoder_dir"]), options.encoder_dtype, options.encoder_batch_size
    )
    reports = []
    for number, file in enumerate(job["layer_files"]):
        layer = Layer.read(Path(file))
        stats = encoder.encode_to_file(
            layer.texts["user"] + layer.texts["item"],
            folder / f"layer_{number}.npy",
            show_progress=job["show_progress"],
        )
        reports.append(dataclasses.asdict(stats))
    return {"dim": encoder.dim, "layers": reports}


STAGES: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "sft": sft,
    "merged": merged,
    "descriptions": descriptions,
    "embeddings": embeddings,
}


def _options(job: dict[str, Any]) -> GaCLLMConfig:
    return GaCLLMConfig.from_mapping(job["options"])


def _inputs(job: dict[str, Any]) -> tuple[TrainGraph, Layer]:
    folder = Path(job["inputs"])
    return TrainGraph.load(folder / "graph.npz"), Layer.read(folder / "layer_0.parquet")


def _templates(job: dict[str, Any]) -> PromptTemplates:
    options = _options(job)
    return PromptTemplates.load(
        Path(job["prompts_dir"]), options.text_user_noun, options.text_item_noun
    )


def main() -> None:
    """Run one stage of one folder."""
    artifacts.die_with_parent()
    name, folder = sys.argv[1], Path(sys.argv[2])
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    # Models are local folders by now; no library asks a hub about them.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with artifacts.reporting_errors(folder):
        job = json.loads((folder / "job.json").read_text())
        started = time.perf_counter()
        report = STAGES[name](folder, job)
        # Of this process; what an earlier, killed one took is not counted.
        seconds = round(time.perf_counter() - started, 2)
        artifacts.write_manifest(
            folder, {**report, "stage": name, "key": job["key"], "seconds": seconds}
        )


if __name__ == "__main__":
    main()
