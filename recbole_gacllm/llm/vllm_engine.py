"""vLLM as a text generator: one engine in this process, fed over a bounded window.

A window of requests is kept in flight with ``add_request`` and ``step``; each completion is handed
out as soon as it is finished, so that the caller can make it durable at once. Prompts go in and
completions come out as token ids: both engines share one tokenizer and one decoder.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.engines import resolve_dtype
from recbole_gacllm.llm.generator import Completion, Request
from recbole_gacllm.llm.weights import check_adapter

logger = logging.getLogger(__name__)

# Requests in flight on a CPU: more brings no throughput and delays the first completions.
_CPU_WINDOW: Final = 32
# The KV cache on a CPU: this share of the memory that is free, at most so many bytes.
_CPU_KV_SHARE: Final = 0.25
_CPU_KV_BYTES: Final = 4 << 30
# The ranks vLLM has LoRA kernels for.
_LORA_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)


class VLLMGenerator:
    """A model served by vLLM, on the GPUs or on the CPU, whichever vLLM was built for.

    Args:
        model_dir: Folder with config, safetensors and tokenizer.
        adapter_dir: LoRA adapter in peft's format, applied un-merged. Slow on CPUs, where vLLM
            gathers its matrices per token; merge it beforehand unless there is a reason not to.
        dtype: ``auto``, ``bfloat16`` or ``float32``.
        seed: Seed of the engine. Draws are seeded per request.
        max_model_len: Longest prompt plus completion in tokens; None is the model's window.
        tensor_parallel_size: GPUs that share each layer.
        pipeline_parallel_size: Groups of layers on different GPUs.
        gpu_memory_utilization: Share of GPU memory for weights and KV cache.

    Raises:
        GenerationError: If vLLM does not start; holds its message.
        ValueError: If the adapter does not fit, or the window is longer than the model's.
    """

    def __init__(
        self,
        model_dir: Path,
        adapter_dir: Path | None = None,
        dtype: str = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        self._chat = ChatTokenizer(model_dir)
        self._max_model_len = self._chat.context_window(max_model_len)
        options: dict[str, Any] = {
            "model": str(model_dir),
            "skip_tokenizer_init": True,
            "dtype": resolve_dtype(dtype),
            "seed": seed,
            "max_model_len": self._max_model_len,
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "enable_prefix_caching": True,
            "generation_config": "vllm",
            "use_tqdm_on_load": False,
        }
        if adapter_dir is not None:
            options |= _lora_options(model_dir, adapter_dir)
        environment, self._set_num_threads = dict(os.environ), torch.set_num_threads
        _prepare_environment()
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform

            if current_platform.is_cpu():
                _stay_in_this_process()
                options |= _cpu_options(self._max_model_len)
            else:
                options["gpu_memory_utilization"] = gpu_memory_utilization
            self._llm: Any = LLM(**options)
            self._engine: Any = self._llm.llm_engine
            self._lora = None
            if adapter_dir is not None:
                self._lora = LoRARequest("adapter", 1, str(adapter_dir))
                self._engine.add_lora(self._lora)
        except Exception as error:
            raise GenerationError(
                f"vLLM did not start on {model_dir}: {type(error).__name__}: {error}. Its own log "
                "above may say more. llm_backend: transformers needs no vLLM."
            ) from error
        self._new_variables = set(os.environ) - set(environment)
        self._old_variables = {
            name: old for name, old in environment.items() if os.environ.get(name) != old
        }
        scheduler = self._engine.vllm_config.scheduler_config
        self._window = _CPU_WINDOW if current_platform.is_cpu() else 2 * scheduler.max_num_seqs
        self._names = itertools.count()
        self._busy = False
        self._alive = True

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Complete requests; see :class:`~recbole_gacllm.llm.generator.TextGenerator`."""
        if not self._alive:
            raise GenerationError("This vLLM engine has stopped; open another generator.")
        if self._busy:
            raise RuntimeError("This generator serves another call; finish or close that first.")
        source = iter(requests)
        in_flight: dict[str, Request] = {}
        self._busy = True
        try:
            while True:
                for request in itertools.islice(source, self._window - len(in_flight)):
                    self._add(request, in_flight)
                if not in_flight:
                    return
                for output in self._step():
                    yield self._completion(in_flight.pop(output.request_id), output)
        finally:
            self._busy = False
            if in_flight and self._alive:
                self._engine.abort_request(list(in_flight))

    def close(self) -> None:
        """Stop the engine, free its memory and put back what vLLM changed in this process."""
        if self._engine is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self._alive = False
            self._engine.engine_core.shutdown()
            self._engine = self._llm = None
            cleanup_dist_env_and_memory()
            # vLLM's CPU worker replaced the one, and set LD_PRELOAD and more in the other.
            torch.set_num_threads = self._set_num_threads
            for name in self._new_variables:
                os.environ.pop(name, None)
            os.environ.update(self._old_variables)

    def _add(self, request: Request, in_flight: dict[str, Request]) -> None:
        """Hand a request to the engine under a name of our own."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ids = self._chat.encode_request(request, self._max_model_len)
        sampling = request.sampling
        parameters = SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop_token_ids=sorted(self._chat.stop_token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = str(next(self._names))
        with self._failures():
            self._engine.add_request(
                name, {"prompt_token_ids": ids}, parameters, lora_request=self._lora
            )
        in_flight[name] = request

    def _step(self) -> list[Any]:
        """One step of the engine; the requests it finished."""
        with self._failures():
            return [output for output in self._engine.step() if output.finished]

    def _completion(self, request: Request, output: Any) -> Completion:
        """What the engine made of a request."""
        made = output.outputs[0]
        return Completion(
            id=request.id,
            text=self._chat.decode(made.token_ids),
            finish_reason="length" if made.finish_reason == "length" else "stop",
            n_prompt_tokens=len(output.prompt_token_ids),
            n_cached_tokens=output.num_cached_tokens or 0,
            n_output_tokens=len(made.token_ids),
        )

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn a failure of the engine into a GenerationError; the engine counts as dead then."""
        try:
            yield
        except Exception as error:
            self._alive = False
            raise GenerationError(
                f"vLLM stopped working: {type(error).__name__}: {error}. Completions handed out "
                "before are good; start again to go on from there."
            ) from error


def _prepare_environment() -> None:
    """Settings that vLLM reads from the environment; the user's own win.

    vLLM gives a dozen warnings at each start that nobody here can act on: only errors pass.
    """
    level = "INFO" if logger.isEnabledFor(logging.DEBUG) else "ERROR"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", level)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")


def _stay_in_this_process() -> None:
    """Keep vLLM's CPU engine, and its look at the model's class, in this process.

    An engine process of its own takes three times as long to start, competes with this one for
    cores, and is a fresh Python without what `compat.hide_broken_torchvision` hid here, in which
    transformers cannot import its models. That is also why the look at the model's class, which
    vLLM takes in another Python so as not to touch CUDA, is taken here. End: with that repair.
    """
    from vllm.model_executor.models import registry

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    registry._run_in_subprocess = lambda inspect: inspect()


def _cpu_options(max_model_len: int) -> dict[str, Any]:
    """What vLLM's CPU backend needs: no compilation, small cache blocks, a bounded KV cache.

    Compiling takes a minute and a half and brings one percent; prefix caching works on whole
    blocks, 128 tokens by default; without a bound the cache asks for nearly all memory. A step
    takes every prompt whole: vLLM 0.32 fails on a split prompt that draws with a seed of its own,
    as it would set back PyTorch's CPU generator, which cannot be set back.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "enforce_eager": True,
        "block_size": 32,
        "max_num_seqs": _CPU_WINDOW,
        "max_num_batched_tokens": _CPU_WINDOW * max_model_len,
        "kv_cache_memory_bytes": min(int(free * _CPU_KV_SHARE), _CPU_KV_BYTES),
    }


def _lora_options(model_dir: Path, adapter_dir: Path) -> dict[str, Any]:
    """LoRA settings for an adapter that has been checked against the model."""
    check_adapter(model_dir, adapter_dir)
    config = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    rank = next((rank for rank in _LORA_RANKS if rank >= config["r"]), None)
    if rank is None:
        raise ValueError(
            f"The adapter {adapter_dir} has rank {config['r']}; vLLM serves ranks up to "
            f"{_LORA_RANKS[-1]}. Merge it (llm_merge_adapter: True)."
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
