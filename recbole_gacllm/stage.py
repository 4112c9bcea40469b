"""The stages that run in child processes: ``python -m recbole_gacllm.stage NAME FOLDER child``.

Started by :func:`.children.run_child`. A stage reads ``FOLDER/job.json``, goes on where an earlier
process stopped, and writes its manifest last. By hand only ``torchrun … -m recbole_gacllm.stage sft
FOLDER`` makes sense, for a fine-tuning on several machines whose run was
interrupted after it had written the job.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_gacllm import console
from recbole_gacllm.artifacts import children, manifests
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.convolution import text
from recbole_gacllm.convolution.convolution import Convolution
from recbole_gacllm.convolution.costs import stage_name
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.imported import ImportedTexts, describe, manifest_of
from recbole_gacllm.convolution.layers import Layer, Side
from recbole_gacllm.convolution.neutralize import neutralize
from recbole_gacllm.convolution.prompts import PromptTemplates
from recbole_gacllm.convolution.requests import ConvolutionOptions, renderer_for
from recbole_gacllm.convolution.store import DescriptionStore
from recbole_gacllm.llm.engines import choose_backend, open_generator
from recbole_gacllm.llm.generator import Backend, Sampling, TextGenerator
from recbole_gacllm.sft.pairs import sample_pairs

if TYPE_CHECKING:
    from recbole_gacllm.llm.chat import ChatTokenizer

logger = logging.getLogger("recbole_gacllm.stage")


def sft(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """LoRA fine-tuning on matched pairs: ``adapter/``."""
    from recbole_gacllm.sft.finetune import PROGRESS_FILE, seconds_so_far
    from recbole_gacllm.sft.processes import finetune_on_all_cards
    from recbole_gacllm.sft.trainer import SFTOptions

    if _is_first_process() and not (folder / "adapter").is_dir():
        _forget_report(folder / PROGRESS_FILE)
    earlier = seconds_so_far(folder)
    options = _options(job)
    graph, raw = inputs_of(job)
    special = _tokenizer(job, job["model_dir"]).special_tokens
    for side, texts in raw.texts.items():
        raw.texts[side] = [neutralize(text, special) for text in texts]
    learn, heldout = sample_pairs(
        graph,
        raw,
        _templates(job),
        nothing_known_of(job),
        options.sft_n_pairs,
        options.sft_n_heldout,
        job["seed"],
    )
    modules = options.sft_target_modules
    report = finetune_on_all_cards(
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
    return {**dataclasses.asdict(report), "earlier_seconds": earlier}


def _is_first_process() -> bool:
    """Of those that ``torchrun`` started; a child of a run is one process, without a rank."""
    return os.environ.get("RANK", "0") == "0"


def _forget_report(progress: Path) -> None:
    """An adapter that was finished and is lost must be trained again."""
    if progress.is_file() and "report" in json.loads(progress.read_bytes()):
        progress.unlink()


def merged(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The base model with the adapter merged into its weights: ``model/``."""
    from recbole_gacllm.sft.merge import merge

    merge(Path(job["model_dir"]), Path(job["adapter_dir"]), folder / "model")
    return {}


def descriptions(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Description convolution, or import: ``layer_1.parquet`` to ``layer_L.parquet``."""
    options = _options(job)
    graph, layer = inputs_of(job)
    imported = ImportedTexts.read(Path(job["import_file"])) if job["import_file"] else None
    nothing_known = nothing_known_of(job)
    manifest: dict[str, Any] = {"layers": [], "earlier_seconds": 0.0}
    convolution: Convolution | None = None
    with ExitStack() as stack:
        for number in range(1, options.llm_n_layers + 1):
            if imported is not None and number in imported.layers:
                layer = imported.fill(number, layer)
                found = imported.report(number, layer.tokens)
                manifest["layers"].append(manifest_of(found))
                logger.info("imported %s", describe(found))
            else:
                if convolution is None:
                    backend, reason = choose_backend(options.llm_backend)
                    logger.info("llm_backend: %s (%s)", backend, reason)
                    manifest |= {"backend": backend, "backend_reason": reason}
                    store = stack.enter_context(DescriptionStore(Path(job["store"])))
                    convolution = convolution_of(job, graph, store, backend)
                    stack.callback(convolution.close)
                layer, report = convolution.next_layer(
                    layer, nothing_known, number, stage_name(folder)
                )
                manifest["layers"].append(dataclasses.asdict(report))
                manifest["earlier_seconds"] += report.earlier_seconds
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
            layer.write(folder / f"layer_{number}.parquet")
    return manifest


def convolution_of(
    job: dict[str, Any], graph: TrainGraph, store: DescriptionStore, backend: Backend
) -> Convolution:
    """The convolution of a job, which loads its engine when it is needed."""
    from recbole_gacllm.llm.adapter import check_adapter

    options = _options(job)
    tokenizer = _tokenizer(job, job["generator_dir"])
    generator_dir = Path(job["generator_dir"])
    adapter_dir = Path(job["adapter_dir"]) if job["adapter_dir"] else None
    if adapter_dir:
        check_adapter(generator_dir, adapter_dir)
    in_process = {"adapter_dir": adapter_dir, "dtype": options.llm_dtype, "seed": job["seed"]}
    endpoints = options.llm_endpoints
    only_of: dict[Backend, dict[str, Any]] = {
        "transformers": in_process,
        "vllm": {
            **in_process,
            "tensor_parallel_size": options.llm_tensor_parallel_size,
            "pipeline_parallel_size": options.llm_pipeline_parallel_size,
            "gpu_memory_utilization": options.llm_gpu_memory_utilization,
        },
        "server": {
            "endpoints": [endpoints] if isinstance(endpoints, str) else endpoints,
            "served_model": job["served_model"],
            "concurrency": options.llm_endpoint_concurrency,
            "key_variable": options.llm_api_key_variable,
        },
    }

    def load() -> TextGenerator:
        return open_generator(
            backend,
            model_dir=generator_dir,
            # Pieces tokenised together may, rarely, take a few tokens more than alone.
            max_model_len=min(
                options.llm_max_prompt_tokens + options.llm_max_new_tokens + 64,
                tokenizer.max_length,
            ),
            **only_of[backend],
        )

    return Convolution(
        graph,
        _templates(job),
        tokenizer,
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


def embeddings(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Encoding: ``layer_0.npy`` to ``layer_L.npy``, users first, in the order of the inputs."""
    from recbole_gacllm.alignment.encoder import TextEncoder

    options = _options(job)
    encoder = TextEncoder(
        Path(job["encoder_dir"]),
        options.encoder_dtype,
        options.encoder_batch_size,
        prompt=options.encoder_prompt,
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


def _tokenizer(job: dict[str, Any], model_dir: str) -> ChatTokenizer:
    """The model's tokenizer, after a check that the prompts fit: found before hours of work.

    Raises:
        ValueError: If the budget is below the instructions or above the model's window.
    """
    from recbole_gacllm.llm.chat import ChatTokenizer

    options = _options(job)
    tokenizer = ChatTokenizer(Path(model_dir))
    window = options.llm_max_prompt_tokens + options.llm_max_new_tokens
    if window > tokenizer.max_length:
        raise ValueError(
            f"llm_max_prompt_tokens: {options.llm_max_prompt_tokens} and llm_max_new_tokens: "
            f"{options.llm_max_new_tokens} together are above the model's window of "
            f"{tokenizer.max_length} tokens; lower one of them."
        )
    renderer_for(_templates(job), tokenizer, options.llm_max_prompt_tokens)
    return tokenizer


STAGES: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "sft": sft,
    "merged": merged,
    "descriptions": descriptions,
    "embeddings": embeddings,
}


def _options(job: dict[str, Any]) -> GaCLLMConfig:
    return GaCLLMConfig.from_mapping(job["options"])


def inputs_of(job: dict[str, Any]) -> tuple[TrainGraph, Layer]:
    """The training graph and layer 0 of a job."""
    folder = Path(job["inputs"])
    return TrainGraph.load(folder / "graph.npz"), Layer.read(folder / "layer_0.parquet")


def nothing_known_of(job: dict[str, Any]) -> dict[Side, str]:
    """The text of a node of which a job knows nothing."""
    options = _options(job)
    return text.nothing_known_of(options.text_user_noun, options.text_item_noun)


def _templates(job: dict[str, Any]) -> PromptTemplates:
    options = _options(job)
    return PromptTemplates.load(
        Path(job["prompts_dir"]), options.text_user_noun, options.text_item_noun
    )


def main() -> None:
    """Run one stage of one folder."""
    name, folder, *role = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
    is_child = role == [children.CHILD]
    if is_child:
        children.die_with_parent()
    elif "RANK" not in os.environ:
        sys.exit("a stage is started by a run, or by torchrun to go on with one; not by hand")
    console.prepare()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    # Models are local folders by now; no library asks a hub about them.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    guard = children.reporting_errors if is_child else manifests.stage_lock
    with guard(folder) if _is_first_process() else nullcontext():
        job = json.loads((folder / manifests.JOB_FILE).read_text())
        started = time.perf_counter()
        report = STAGES[name](folder, job)
        # Of this process and of earlier, killed ones, as far as these had made anything durable.
        earlier = report.get("earlier_seconds", 0.0)
        took = {
            "seconds": round(earlier + time.perf_counter() - started, 2),
            "earlier_seconds": round(earlier, 2),
        }
        if _is_first_process():
            made = {"key": job["key"], "files": manifests.digests(folder, job["outputs"])}
            manifests.write_manifest(folder, {**report, "stage": name, **made, **took})


if __name__ == "__main__":
    main()
