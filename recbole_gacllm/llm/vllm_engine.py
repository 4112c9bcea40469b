"""vLLM as a text generator: one engine, fed over a bounded window, in a process of its own.

A window of requests is kept in flight with ``add_request`` and ``step``; each completion is handed
out as soon as it is finished, so that the caller can make it durable at once. Prompts go in and
completions come out as token ids: both engines share one tokenizer and one decoder.

The process is this engine's alone, see :mod:`.fleet`: vLLM's CPU worker changes it for good, and
what vLLM held when memory ran out is freed with it only.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any, Final

import psutil
from transformers import AutoConfig

from recbole_gacllm.errors import GenerationError, MemoryRanOutError
from recbole_gacllm.llm.adapter import check_adapter
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.generator import Completion, Request
from recbole_gacllm.llm.hardware import (
    OLDEST_DRIVER,
    DType,
    driver_version,
    memory_share,
    out_of_memory,
    resolve_dtype,
    visible_cards,
)

# What we use of vLLM beyond what it documents, as module:attribute; a test looks for each in the
# vLLM that is installed. 0.30 to 0.33 have them all: a newer one is allowed (pyproject.toml) when
# that test has passed on it.
PRIVATE_NAMES: Final = (
    "vllm.model_executor.models.registry:_run_in_subprocess",
    "vllm.platforms:current_platform.is_cpu",
    "vllm.v1.engine.core_client:MPClient.resources",
    "vllm.v1.engine.core_client:BackgroundResources.engine_manager",
    "vllm.v1.engine.core_client:SyncMPClient.outputs_queue",
    "vllm.v1.engine.exceptions:EngineDeadError",
    "vllm.v1.engine.llm_engine:LLMEngine.engine_core",
    "vllm.v1.engine.utils:CoreEngineProcManager.sentinels",
    "vllm.v1.engine.utils:wait_for_engine_startup.Engine core initialization failed",
    "vllm.v1.executor.multiproc_executor:WorkerProc.WorkerProc initialization failed",
)
# Requests at once on a CPU: more bring no throughput and delay the first completions.
CPU_WINDOW: Final = 32
# The KV cache on a CPU, at most: this share of the memory that is free, or holds copies of files
# only, and so many bytes.
_CPU_KV_SHARE: Final = 0.25
_CPU_KV_BYTES: Final = 4 << 30
_CPU_BLOCK: Final = 32
# What vLLM's process says of one that it had started and that ended at once.
_FAILED_IN_ITS_PROCESS: Final = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
)
# The ranks vLLM has LoRA kernels for.
_LORA_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)


class VLLMGenerator:
    """A model served by vLLM, on the GPUs or on the CPU, whichever vLLM was built for.

    Args:
        model_dir: Folder with config, safetensors and tokenizer.
        adapter_dir: LoRA adapter in peft's format, applied un-merged. Slow on CPUs, where vLLM
            gathers its matrices per token; merge it beforehand unless there is a reason not to.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        seed: Seed of the engine. Draws are seeded per request.
        max_model_len: Longest prompt plus completion in tokens; None is the model's window.
        tensor_parallel_size: GPUs that share each layer.
        pipeline_parallel_size: Groups of layers on different GPUs.
        gpu_memory_utilization: Share of GPU memory for weights and KV cache; None is what is free.
        window: Requests in flight at most; None is vLLM's choice on GPUs, ours on a CPU.

    Attributes:
        window: Requests in flight that keep the engine busy.

    Raises:
        MemoryRanOutError: If it lacks memory, or maybe: a smaller one may do, in another process.
        GenerationError: If vLLM does not start; holds its message.
        ValueError: If the adapter does not fit.
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
        gpu_memory_utilization: float | None = None,
        window: int | None = None,
    ) -> None:
        self._chat = ChatTokenizer(model_dir)
        self._max_model_len = max_model_len or self._chat.max_length
        self._names = itertools.count()
        self._lora = None
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
        try:
            prepare_environment()
            from vllm import LLM
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform

            on_cpu = current_platform.is_cpu()
            options |= text_only_options(model_dir)
            if on_cpu:
                _stay_in_this_process()
                n_bytes = token_bytes(model_dir, options["dtype"])
                options |= cpu_options(self._max_model_len, window or CPU_WINDOW, n_bytes)
            else:
                options["gpu_memory_utilization"] = memory_share(gpu_memory_utilization)
                options |= _gpu_options(self._max_model_len, window)
            self._engine: Any = LLM(**options).llm_engine
            _tell_of_death(self._engine.engine_core)
            if adapter_dir is not None:
                self._lora = LoRARequest("adapter", 1, str(adapter_dir))
                self._engine.add_lora(self._lora)
        except Exception as error:
            unseen = any(text in str(error) for text in _FAILED_IN_ITS_PROCESS)
            advice = "Its own log above may say more. "
            if unseen:
                advice = _checklist(options, gpu_memory_utilization)
            raise _failure(
                error,
                f"did not start on {model_dir}",
                f"{advice}llm_backend: transformers needs no vLLM.",
                smaller_may_do=out_of_memory(error) or (unseen and window is None),
            ) from error
        n_sequences = int(self._engine.vllm_config.scheduler_config.max_num_seqs)
        self.window = n_sequences if on_cpu else 2 * n_sequences

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Complete requests; see :class:`~recbole_gacllm.llm.generator.TextGenerator`."""
        source = iter(requests)
        in_flight: dict[str, Request] = {}
        try:
            while True:
                for request in itertools.islice(source, self.window - len(in_flight)):
                    self._add(request, in_flight)
                if not in_flight:
                    return
                with _failures(in_flight):
                    outputs = [output for output in self._engine.step() if output.finished]
                for output in outputs:
                    yield self._completion(in_flight.pop(output.request_id), output)
        finally:
            if in_flight:
                self._engine.abort_request(list(in_flight))

    def close(self) -> None:
        """Stop the engine and its processes; the rest goes with this process."""
        self._engine.engine_core.shutdown()

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
        in_flight[name] = request
        with _failures(in_flight):
            self._engine.add_request(
                name, {"prompt_token_ids": ids}, parameters, lora_request=self._lora
            )

    def _completion(self, request: Request, output: Any) -> Completion:
        made = output.outputs[0]
        return Completion(
            id=request.id,
            text=self._chat.decode(made.token_ids, output.prompt_token_ids),
            finish_reason="length" if made.finish_reason == "length" else "stop",
            n_prompt_tokens=len(output.prompt_token_ids),
            n_cached_tokens=output.num_cached_tokens or 0,
            n_output_tokens=len(made.token_ids),
        )


@contextmanager
def _failures(in_flight: dict[str, Request]) -> Iterator[None]:
    """Turn a failure of the engine into a GenerationError; it is dead then, and holds nothing."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except Exception as error:
        in_flight.clear()
        raise _failure(
            error,
            "stopped working",
            "Completions handed out before are good; start again to go on from there.",
            smaller_may_do=out_of_memory(error) or isinstance(error, EngineDeadError),
        ) from error


def _failure(error: Exception, what: str, advice: str, *, smaller_may_do: bool) -> GenerationError:
    reason = f"{type(error).__name__}: {error}"
    if out_of_memory(error):
        reason += (
            ". Memory ran out: lower llm_max_prompt_tokens or llm_max_new_tokens, take a smaller "
            "llm_model, or on GPUs more of them (llm_tensor_parallel_size)"
        )
    kind = MemoryRanOutError if smaller_may_do else GenerationError
    return kind(f"vLLM {what}: {reason}. {advice}")


def _checklist(options: dict[str, Any], share: float | None) -> str:
    """What to look at where the engine's own process ended at its start."""
    return (
        "The cause is in its process's log above; VLLM_ENABLE_V1_MULTIPROCESSING=0 brings it here. "
        f"To check: memory ({'; '.join(map(str, visible_cards())) or 'nvidia-smi tells no card'}; "
        f"llm_gpu_memory_utilization: {'null' if share is None else share}), driver "
        f"{OLDEST_DRIVER} or newer ({driver_version()}), llm_tensor_parallel_size "
        f"({options['tensor_parallel_size']}), llm_dtype ({options['dtype']}), the model's "
        "architecture. "
    )


def prepare_environment() -> None:
    """Settings that vLLM reads from the environment; the user's own win.

    vLLM gives a dozen warnings at each start that nobody here can act on: only errors pass. Its
    engine's process is spawned: whether a GPU is there, and which number type it does, is asked
    before, and a fork of a process that has asked cannot use CUDA (vLLM issue 15681).
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def _tell_of_death(client: Any) -> None:
    """Let a step fail when the engine's process, where it has one, is killed meanwhile.

    Cause: vLLM 0.32's synchronous client notices the death, but whoever waits for outputs then
    waits for ever, because nothing is put into the queue.
    Upstream: none found; pull request 21443 is about the same in its server. End: with a vLLM
    whose ``SyncMPClient.get_output`` raises ``EngineDeadError`` by itself.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    manager = getattr(getattr(client, "resources", None), "engine_manager", None)
    if manager is None or not hasattr(manager, "sentinels"):  # in this process, or under Ray
        return
    sentinels, outputs = manager.sentinels(), client.outputs_queue

    def wait() -> None:
        connection.wait(sentinels)
        outputs.put_nowait(EngineDeadError())

    threading.Thread(target=wait, daemon=True, name="vllm_engine_death").start()


def _stay_in_this_process() -> None:
    """Keep vLLM's CPU engine, and its look at the model's class, in this process.

    An engine process of vLLM's takes three times as long to start, competes with this one for
    cores, and is a fresh Python without what `compat.hide_broken_torchvision` hid here, in which
    transformers cannot import its models. That is also why the look at the model's class, which
    vLLM takes in another Python so as not to touch CUDA, is taken here. End: with that repair.
    """
    from vllm.model_executor.models import registry

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    registry._run_in_subprocess = lambda inspect: inspect()


def cpu_options(max_model_len: int, n_sequences: int, n_bytes: int | None) -> dict[str, Any]:
    """What vLLM's CPU backend needs: no compilation, small cache blocks, a bounded KV cache.

    Compiling takes a minute and a half and brings one percent; prefix caching works on whole
    blocks, 128 tokens by default; without a bound the cache asks for nearly all memory. It is
    filled with zeros at the start, which takes seconds a gigabyte: it has room for all sequences at
    their longest, one to spare, at ``n_bytes`` a token, and no more. A step takes every prompt
    whole: vLLM 0.32 fails on a split prompt that draws with a seed of its own, as it would set back
    PyTorch's CPU generator, which cannot be set back.
    """
    cache = min(int(psutil.virtual_memory().available * _CPU_KV_SHARE), _CPU_KV_BYTES)
    cache = cache * n_sequences // CPU_WINDOW
    if n_bytes is not None:
        cache = min(cache, (n_sequences + 1) * (max_model_len + _CPU_BLOCK) * n_bytes)
    return {
        "enforce_eager": True,
        "block_size": _CPU_BLOCK,
        "max_num_seqs": n_sequences,
        "max_num_batched_tokens": n_sequences * max_model_len,
        "kv_cache_memory_bytes": cache,
    }


def token_bytes(model_dir: Path, dtype: DType) -> int | None:
    """Of keys and values of a token in all layers; None where the config does not tell."""
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    n_layers, n_heads, width = (getattr(text, name, None) for name in names)
    if not (isinstance(n_layers, int) and isinstance(n_heads, int) and isinstance(width, int)):
        return None
    n_kept = getattr(text, "num_key_value_heads", None) or n_heads
    width = getattr(text, "head_dim", None) or width // n_heads
    if not (isinstance(n_kept, int) and isinstance(width, int)):  # of each layer its own
        return None
    return 2 * n_layers * n_kept * width * (4 if dtype == "float32" else 2)


def text_only_options(model_dir: Path) -> dict[str, Any]:
    """For a model that also reads images or sound: its language model alone.

    Its other parts need room, and a processor, which vLLM does not make without a tokenizer.
    """
    from vllm.engine.arg_utils import EngineArgs

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    names = {field.name for field in dataclasses.fields(EngineArgs)}
    is_whole = config.get_text_config() is not config
    return {"language_model_only": True} if is_whole and "language_model_only" in names else {}


def _gpu_options(max_model_len: int, window: int | None) -> dict[str, Any]:
    """Nothing where vLLM chooses; else half as many sequences, and tokens a step in proportion.

    32 tokens a sequence are vLLM's own proportion on most cards (8192 and 256).
    """
    if window is None:
        return {}
    n_sequences = max(1, window // 2)
    tokens = max(max_model_len, 32 * n_sequences)
    return {"max_num_seqs": n_sequences, "max_num_batched_tokens": tokens}


def _lora_options(model_dir: Path, adapter_dir: Path) -> dict[str, Any]:
    check_adapter(model_dir, adapter_dir)
    config = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    rank = next((rank for rank in _LORA_RANKS if rank >= config["r"]), None)
    if rank is None:
        raise ValueError(
            f"The adapter {adapter_dir} has rank {config['r']}; vLLM serves ranks up to "
            f"{_LORA_RANKS[-1]}. Merge it (llm_merge_adapter: True)."
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
