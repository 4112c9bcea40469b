"""What a job's stage works with: graph, texts, prompts, tokenizer, the convolution itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_gacllm.config import GaCLLMConfig, shipped_path
from recbole_gacllm.convolution import text
from recbole_gacllm.convolution.convolution import Convolution
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.imported import ImportedTexts
from recbole_gacllm.convolution.layers import Layer, Side
from recbole_gacllm.convolution.prompts import PromptRenderer, PromptTemplates
from recbole_gacllm.convolution.requests import RequestMaker
from recbole_gacllm.convolution.store import DescriptionStore
from recbole_gacllm.job import Job
from recbole_gacllm.llm.engines import open_generator
from recbole_gacllm.llm.generator import Backend, TextGenerator

if TYPE_CHECKING:
    from recbole_gacllm.llm.chat import ChatTokenizer

# What loads transformers is imported where it is used: runs on raw texts do without, and a child
# says first that no hub is to be asked.


def inputs_of(job: Job) -> tuple[TrainGraph, Layer]:
    """The training graph and layer 0."""
    return TrainGraph.load(job.inputs / "graph.npz"), Layer.read(job.inputs / "layer_0.parquet")


def imported_of(job: Job) -> ImportedTexts | None:
    """The texts that a file brings."""
    file = job.options.text_import_file
    return None if file is None else ImportedTexts.read(Path(file))


def nothing_known_of(options: GaCLLMConfig) -> dict[Side, str]:
    """The text of a node of which nothing is known."""
    nouns: dict[Side, str] = {"user": options.text_user_noun, "item": options.text_item_noun}
    return {side: text.nothing_known(noun) for side, noun in nouns.items()}


def templates_of(options: GaCLLMConfig) -> PromptTemplates:
    """The prompt files, with the nouns of the data set.

    Raises:
        ValueError: If one is missing or cannot be used.
    """
    folder = options.llm_prompts_dir
    return PromptTemplates.load(
        Path(folder) if folder else shipped_path("properties", "prompts"),
        *(options.text_user_noun, options.text_item_noun),
        options.has_knowledge,
    )


def tokenizer_of(job: Job) -> ChatTokenizer:
    """The model's tokenizer, after a check that the prompts fit: found before hours of work.

    Raises:
        ValueError: If the budget is below the instructions or above the model's window.
    """
    from recbole_gacllm.llm.chat import ChatTokenizer

    assert job.model_dir is not None
    options = job.options
    tokenizer = ChatTokenizer(job.model_dir)
    for name in ("llm_max_new_tokens", "llm_knowledge_tokens"):
        n_tokens = getattr(options, name)
        if options.llm_max_prompt_tokens + n_tokens > tokenizer.max_length:
            raise ValueError(
                f"llm_max_prompt_tokens: {options.llm_max_prompt_tokens} and {name}: {n_tokens} "
                f"together are above the model's window of {tokenizer.max_length} tokens; lower "
                "one of them."
            )
    PromptRenderer(templates_of(options), tokenizer, options.llm_max_prompt_tokens)
    return tokenizer


def convolution_of(
    job: Job, graph: TrainGraph, store: DescriptionStore, backend: Backend
) -> Convolution:
    """The convolution of a job, which loads its engine when it is needed."""
    assert job.model_dir is not None
    assert job.generator_key is not None
    model_dir, options = job.model_dir, job.options
    tokenizer = tokenizer_of(job)
    in_process = {"adapter_dir": job.adapter_dir, "dtype": options.llm_dtype, "seed": job.seed}
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
            "served_model": job.served_model,
            "concurrency": options.llm_endpoint_concurrency,
            "key_variable": options.llm_api_key_variable,
        },
    }
    # Pieces tokenised together may, rarely, take a few tokens more than alone.
    n_new_tokens = max(options.llm_max_new_tokens, options.llm_knowledge_tokens)
    window = min(options.llm_max_prompt_tokens + n_new_tokens + 64, tokenizer.max_length)

    def load() -> TextGenerator:
        return open_generator(
            backend, model_dir=model_dir, max_model_len=window, **only_of[backend]
        )

    templates = templates_of(options)
    maker = RequestMaker(graph, templates, tokenizer, job.generator_key, options, job.seed)
    return Convolution(maker, store, load, job.show_progress)
