"""What a run will take, told before the first expensive stage: memory, disk, tokens of the LLM.

Estimates within a factor of 1.5, from counts alone: no tokenizer, no model is loaded. Descriptions
and embeddings that lie there already are not made again, and cost less than is told.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import psutil

from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.layers import SIDES, Layer, Side
from recbole_gacllm.convolution.prompts import PromptTemplates
from recbole_gacllm.inputs import TrainingData
from recbole_gacllm.llm import formats, weights
from recbole_gacllm.objective import choice, linear, local

logger = logging.getLogger(__name__)

_CHARS_A_TOKEN = 4.3  # of English, in the tokenizers of today's models
_CHAT_TOKENS = 12  # roles and separators of a chat template
_SHARE_WRITTEN = 0.6  # of llm_max_new_tokens, by a description
_LIBRARIES = 30_000_000  # bytes of what is loaded for the linear part
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def announce(options: GaCLLMConfig, data: TrainingData) -> None:
    """Log memory and disk of a run of GaCLLM without its LLM; end it where they cannot suffice.

    Raises:
        ValueError: Names the key to change.
    """
    n_items = 1 + len(data.graph.item_tokens)
    n_nodes, width, n_layers = 1 + len(data.graph.user_tokens) + n_items, 0, 0
    if options.use_text:
        encoder = weights.resolve_encoder(options.encoder_model)
        width = int(formats.read_object(encoder / "config.json").get("hidden_size", 0))
        n_layers = 1 + (options.n_text_layers if options.is_described else 0)
    matrices = 0
    if options.linear_weight > 0:
        n_users = 1 + len(data.graph.user_tokens)
        matrices = linear_bytes(options, n_items, width, n_layers, n_pairs(data.graph), n_users)
    tables = 2 * n_nodes * width * n_layers  # float16
    is_early = options.text_fusion == "early" and options.text_weight > 0
    rows = 4 * tables * is_early  # carried, from float32
    checkpoint = 3 * 4 * n_nodes * options.embedding_size  # with Adam's moments
    logger.info(
        "this run takes about: memory %s for the linear part and %s for text embeddings, disk %s",
        *map(in_words, (matrices, tables + rows, tables + checkpoint)),
    )
    if matrices > (free := free_memory()):
        raise ValueError(
            f"linear_weight: {options.linear_weight} takes about {in_words(matrices)} of memory "
            f"for the linear part of {n_items:,} items, and "
            f"{in_words(free)} are free. Free memory, or set linear_weight: 0."
        )
    _require_room(options, data.dataset, tables + checkpoint)


def announce_llm(
    options: GaCLLMConfig, data: TrainingData, raw: Layer, templates: PromptTemplates, model: Path
) -> None:
    """Log tokens and disk of the LLM's stages; end the run where the disk cannot suffice.

    Args:
        options: The run's keys.
        data: Training edges.
        raw: Layer 0.
        templates: The prompt files.
        model: The base LLM's folder.

    Raises:
        ValueError: Names the key to change.
    """
    n_prompt, n_written = tokens_of(options, data.graph, raw, templates)
    # Texts stand in the store and in the layers' files.
    n_bytes = int(2 * _CHARS_A_TOKEN * n_written)
    if options.sft and options.llm_merge_adapter and options.llm_adapter is None:
        n_bytes += sum(file.stat().st_size for file in formats.weight_files(model))
    logger.info(
        "the LLM reads about %s tokens and writes %s, less what is stored already; disk %s",
        f"{n_prompt:,}",
        f"{n_written:,}",
        in_words(n_bytes),
    )
    _require_room(options, data.dataset, n_bytes)


def _require_room(options: GaCLLMConfig, dataset: str, n_bytes: int) -> None:
    place = Path(options.artifact_dir).resolve()
    of_dataset = (file for file in (place / dataset).rglob("*") if file.is_file())
    n_bytes -= sum(file.stat().st_size for file in of_dataset)  # not written again
    while not place.exists():
        place = place.parent
    if n_bytes > (room := shutil.disk_usage(place).free):
        raise ValueError(
            f"artifact_dir: {options.artifact_dir!r} will take about {in_words(n_bytes)} more, and "
            f"{in_words(room)} are free there. Free space, or set artifact_dir to another disk."
        )


def linear_bytes(
    options: GaCLLMConfig,
    n_items: int,
    width: int,
    n_layers: int,
    n_pairs: int = 0,
    n_users: int = 0,
) -> int:
    """Peak of the linear part in memory: of its choice, of its making, or with kept scores.

    The choice has two matrices in float64 and weights in float32 at once, of fewer items, scores of
    1,024 users, and of each candidate's texts the rows of all items in float64. The making has the
    matrix, its weights, and a few copies of the rows that were chosen; of more than
    ``linear.MAX_ITEMS`` items the pairs that have a common user in place of the matrix (twice,
    while blocks of them are joined), some dense columns, and sparse weights. Of few users and items
    there are the scores that evaluations keep, besides the weights.
    """
    n_of_choice = min(n_items, choice.MAX_ITEMS)
    n_widest = n_rows = 0  # in rows of one layer
    if options.linear_text_weight != 0 and n_layers:
        is_auto = options.text_layers == "auto" and n_layers > 1
        n_widest, n_rows = (n_layers, 2 * n_layers) if is_auto else (1, 1)
    row = 8 * n_items * width
    chosen = 20 * n_of_choice**2 + 4 * 4 * 1024 * n_of_choice + (n_rows + n_widest) * row
    made = 12 * n_items**2
    if n_items > linear.MAX_ITEMS:
        weights = n_items * (1 + local.N_NEIGHBORS)
        columns = 24 * local.BLOCK * n_items
        made = max(16 * n_pairs, 8 * n_pairs + columns + 8 * weights, 28 * weights)
    kept = 4 * n_users * n_items if n_users * n_items <= linear.KEPT else 0
    evaluated = kept + made // 3  # a third are the weights
    making = max(made + 4 * n_widest * row, (n_rows + 5 * n_widest) * row)
    return _LIBRARIES + max(chosen, making, evaluated)


def n_pairs(graph: TrainGraph) -> int:
    """How many pairs of items have a common user, if users drew items by their degrees."""
    users = graph.degrees("user").astype(np.float64)
    degrees, n_items = np.unique(graph.degrees("item"), return_counts=True)
    common = (users * (users - 1)).sum() / max(users.sum(), 1.0) ** 2  # of degrees 1 and 1
    have_one = -np.expm1(-common * np.outer(degrees, degrees))
    return round(float(n_items @ have_one @ n_items) / 2)


def free_memory() -> int:
    """Bytes that this process may still take, swap included; a container's limit counts."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    if _CGROUP_LIMIT.is_file() and (limit := _CGROUP_LIMIT.read_text().strip()).isdecimal():
        free = min(free, int(limit))
    return int(free)


def tokens_of(
    options: GaCLLMConfig, graph: TrainGraph, raw: Layer, templates: PromptTemplates
) -> tuple[int, int]:
    """Tokens of all prompts of a run, and of what is written.

    Args:
        options: The run's keys.
        graph: Training edges.
        raw: Layer 0.
        templates: The prompt files.
    """
    n_nodes = sum(len(raw.texts[side]) for side in SIDES)
    written = _SHARE_WRITTEN * options.llm_max_new_tokens
    prompts, generated = 0.0, options.llm_n_layers * n_nodes * written
    # Each side's own texts, as the layer below has them.
    own: dict[Side, np.ndarray] = {
        side: np.array([len(text) for text in raw.texts[side]]) / _CHARS_A_TOKEN for side in SIDES
    }
    if options.has_knowledge:
        written_by_it = _SHARE_WRITTEN * options.llm_knowledge_tokens
        generated += n_nodes * written_by_it
        for side in SIDES:
            prompts += float((_frame(templates, f"{side}_knowledge") + own[side]).sum())
            own[side] = np.full(len(own[side]), written_by_it)
    for layer in range(1, options.llm_n_layers + 1):
        for side, other in (SIDES, SIDES[::-1]):
            n_shown = np.minimum(graph.degrees(side), options.n_neighbors)
            a_neighbor = np.minimum(own[other], options.llm_max_neighbor_tokens).mean() + 2
            frame = _frame(templates, side if layer == 1 else f"{side}_deeper")
            whole = frame + own[side] + n_shown * a_neighbor
            prompts += float(np.minimum(whole, options.llm_max_prompt_tokens).sum())
        own = {side: np.full(len(own[side]), written) for side in SIDES}
    return round(prompts), round(generated)


def _frame(templates: PromptTemplates, name: str) -> float:
    """Tokens of a prompt beside the texts that are inserted."""
    n_chars = len(templates.texts["system"]) + len(templates.texts[name])
    return n_chars / _CHARS_A_TOKEN + _CHAT_TOKENS


def in_words(n_bytes: float) -> str:
    """``1.2 GB``; powers of 1,000."""
    for unit in ("kB", "MB"):
        n_bytes /= 1000
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
    return f"{n_bytes / 1000:.3g} GB"
