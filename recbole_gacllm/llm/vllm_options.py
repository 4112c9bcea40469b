"""What vLLM needs around it: environment, processes, options of its CPU backend and for LoRA."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from multiprocessing import connection
from pathlib import Path
from typing import Any, Final

import psutil
from transformers import AutoConfig

from recbole_gacllm.llm.adapter import check_adapter

# What we use of vLLM beyond what it documents, as module:attribute; a test looks for each in the
# vLLM that is installed. 0.30 to 0.33 have them all: a newer one is allowed (pyproject.toml) when
# that test has passed on it.
PRIVATE_NAMES: Final = (
    "vllm.distributed:cleanup_dist_env_and_memory",
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
# Requests at once on a CPU: more bring no throughput and delays the first completions.
CPU_SEQUENCES: Final = 32
# Starts, with half the sequences each, after memory ran out or the engine's process died.
MAX_RESTARTS: Final = 3
# The KV cache on a CPU: this share of the memory that is free, or holds copies of files only, at
# most so many bytes.
_CPU_KV_SHARE: Final = 0.25
_CPU_KV_BYTES: Final = 4 << 30
# What vLLM's process says of one that it had started and that ended at once.
_FAILED_IN_ITS_PROCESS: Final = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
)
# The ranks vLLM has LoRA kernels for.
_LORA_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)


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


def has_own_process() -> bool:
    """Whether the engine runs in a process of its own, as it does unless the variable says no."""
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") != "0"


def failed_in_its_process(error: BaseException) -> bool:
    """Whether the engine's process or a worker's ended at the start, with its reason in the log."""
    return any(text in str(error) for text in _FAILED_IN_ITS_PROCESS)


def tell_of_death(client: Any) -> None:
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


def stay_in_this_process() -> None:
    """Keep vLLM's CPU engine, and its look at the model's class, in this process.

    An engine process of its own takes three times as long to start, competes with this one for
    cores, and is a fresh Python without what `compat.hide_broken_torchvision` hid here, in which
    transformers cannot import its models. That is also why the look at the model's class, which
    vLLM takes in another Python so as not to touch CUDA, is taken here. End: with that repair.
    """
    from vllm.model_executor.models import registry

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    registry._run_in_subprocess = lambda inspect: inspect()


def cpu_options(max_model_len: int, n_sequences: int) -> dict[str, Any]:
    """What vLLM's CPU backend needs: no compilation, small cache blocks, a bounded KV cache.

    Compiling takes a minute and a half and brings one percent; prefix caching works on whole
    blocks, 128 tokens by default; without a bound the cache asks for nearly all memory. A step
    takes every prompt whole: vLLM 0.32 fails on a split prompt that draws with a seed of its own,
    as it would set back PyTorch's CPU generator, which cannot be set back.
    """
    cache = min(int(psutil.virtual_memory().available * _CPU_KV_SHARE), _CPU_KV_BYTES)
    return {
        "enforce_eager": True,
        "block_size": 32,
        "max_num_seqs": n_sequences,
        "max_num_batched_tokens": n_sequences * max_model_len,
        "kv_cache_memory_bytes": cache * n_sequences // CPU_SEQUENCES,
    }


def text_only_options(model_dir: Path) -> dict[str, Any]:
    """For a model that also reads images or sound: its language model alone.

    Its other parts need room, and a processor, which vLLM does not make without a tokenizer.
    """
    from vllm.engine.arg_utils import EngineArgs

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    names = {field.name for field in dataclasses.fields(EngineArgs)}
    is_whole = config.get_text_config() is not config
    return {"language_model_only": True} if is_whole and "language_model_only" in names else {}


def gpu_options(max_model_len: int, n_sequences: int | None) -> dict[str, Any]:
    """Nothing where vLLM chooses; else so many sequences, and tokens a step in proportion.

    32 tokens a sequence are vLLM's own proportion on most cards (8192 and 256).
    """
    if n_sequences is None:
        return {}
    tokens = max(max_model_len, 32 * n_sequences)
    return {"max_num_seqs": n_sequences, "max_num_batched_tokens": tokens}


def lora_options(model_dir: Path, adapter_dir: Path) -> dict[str, Any]:
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
