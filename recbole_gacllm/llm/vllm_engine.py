"""vLLM as a text generator: one engine in this process, fed over a bounded window.

A window of requests is kept in flight with ``add_request`` and ``step``; each completion is handed
out as soon as it is finished, so that the caller can make it durable at once. Prompts go in and
completions come out as token ids: both engines share one tokenizer and one decoder.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from recbole_gacllm.errors import GenerationError, MemoryRanOutError
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.generator import Completion, Request
from recbole_gacllm.llm.hardware import (
    OLDEST_DRIVER,
    driver_version,
    memory_share,
    out_of_memory,
    resolve_dtype,
    visible_cards,
)
from recbole_gacllm.llm.vllm_options import (
    CPU_SEQUENCES,
    MAX_RESTARTS,
    cpu_options,
    failed_in_its_process,
    gpu_options,
    has_own_process,
    lora_options,
    prepare_environment,
    stay_in_this_process,
    tell_of_death,
    text_only_options,
)

logger = logging.getLogger(__name__)

# vLLM's own choice on most GPUs, known for sure once an engine has started.
_GPU_SEQUENCES: Final = 256


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
        n_sequences: Prompts at once; None is vLLM's choice on GPUs, ours on a CPU.

    Attributes:
        window: Requests in flight that keep the engine busy.

    Raises:
        GenerationError: If vLLM does not start; holds its message.
        MemoryRanOutError: If it lacked memory in this process, which no second start would help.
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
        gpu_memory_utilization: float | None = None,
        n_sequences: int | None = None,
    ) -> None:
        self._chat = ChatTokenizer(model_dir)
        self._max_model_len = self._chat.context_window(max_model_len)
        self._options: dict[str, Any] = {
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
        self._gpu_memory_utilization = gpu_memory_utilization
        self._adapter_dir = adapter_dir
        if adapter_dir is not None:
            self._options |= lora_options(model_dir, adapter_dir)
        self._llm: Any = None
        self._engine: Any = None
        self._n_sequences = n_sequences
        self._n_restarts = 0
        self._names = itertools.count()
        self._busy = False
        environment, self._set_num_threads = dict(os.environ), torch.set_num_threads
        prepare_environment()
        self._start()
        self._new_variables = set(os.environ) - set(environment)
        self._old_variables = {
            name: old for name, old in environment.items() if os.environ.get(name) != old
        }

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
                outputs = None
                try:
                    for request in itertools.islice(source, self.window - len(in_flight)):
                        self._add(request, in_flight)
                    if not in_flight:
                        return
                    outputs = self._step()
                except GenerationError as failure:
                    self._check_restart(failure)
                if outputs is None:  # not within `except`, as in `_start`
                    self._stop()
                    self._start()
                    source = itertools.chain(list(in_flight.values()), source)
                    in_flight.clear()
                    continue
                for output in outputs:
                    yield self._completion(in_flight.pop(output.request_id), output)
        finally:
            self._busy = False
            if in_flight and self._alive:
                self._engine.abort_request(list(in_flight))

    def close(self) -> None:
        """Stop the engine, free its memory and put back what vLLM changed in this process."""
        if self._engine is not None:
            self._stop()
        # vLLM's CPU worker replaced the one, and set LD_PRELOAD and more in the other.
        torch.set_num_threads = self._set_num_threads
        for name in self._new_variables:
            os.environ.pop(name, None)
        os.environ.update(self._old_variables)

    def _start(self) -> None:
        """Load the engine; where memory runs out in a process of its own, with half, and again.

        What fails in the engine's process has no reason here: one start with half is tried.

        Raises:
            GenerationError: If it does not start.
        """
        blind = False
        while True:
            try:
                self._load()
                return
            except Exception as error:
                hidden = failed_in_its_process(error)
                again = out_of_memory(error) or (hidden and not blind)
                blind = blind or hidden
                if not (again and self._halve(error)):
                    raise self._failure(
                        error, f"did not start on {self._options['model']}", self._advice(hidden)
                    ) from error
            self._stop()  # not within `except`, which keeps the engine's memory alive

    def _load(self) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform

        options, on_cpu = dict(self._options), current_platform.is_cpu()
        options |= text_only_options(Path(options["model"]))
        if on_cpu:
            stay_in_this_process()
            self._n_sequences = self._n_sequences or CPU_SEQUENCES
            options |= cpu_options(self._max_model_len, self._n_sequences)
        else:
            options["gpu_memory_utilization"] = memory_share(self._gpu_memory_utilization)
            options |= gpu_options(self._max_model_len, self._n_sequences)
        self._llm = LLM(**options)
        self._engine = self._llm.llm_engine
        tell_of_death(self._engine.engine_core)
        self._lora = None
        if self._adapter_dir is not None:
            self._lora = LoRARequest("adapter", 1, str(self._adapter_dir))
            self._engine.add_lora(self._lora)
        self._n_sequences = n = int(self._engine.vllm_config.scheduler_config.max_num_seqs)
        self.window = n if on_cpu else 2 * n
        self._alive = True

    def _halve(self, error: BaseException) -> bool:
        """Half as many sequences at once from now on; False where that was tried often enough.

        An engine in this process has one start: what it held when memory ran out is not freed.
        """
        if self._n_restarts == MAX_RESTARTS or not has_own_process():
            return False
        self._n_restarts += 1
        self._n_sequences = max(1, (self._n_sequences or _GPU_SEQUENCES) // 2)
        logger.warning(
            "vLLM starts again with %d sequences at once: %s", self._n_sequences, _said(error)
        )
        return True

    def _check_restart(self, failure: GenerationError) -> None:
        """Prepare a new start, if that may help: memory ran out, or the engine's process is gone.

        Raises:
            GenerationError: The failure, if it may not.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        cause = failure.__cause__
        gone = isinstance(cause, EngineDeadError) or (cause is not None and out_of_memory(cause))
        if cause is None or not gone or not self._halve(cause):
            raise failure

    def _stop(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._alive = False
        if self._engine is not None:
            self._engine.engine_core.shutdown()
        self._engine = self._llm = None
        cleanup_dist_env_and_memory()

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
        with self._failures():
            self._engine.add_request(
                name, {"prompt_token_ids": ids}, parameters, lora_request=self._lora
            )

    def _step(self) -> list[Any]:
        """One step of the engine; the requests it finished."""
        with self._failures():
            return [output for output in self._engine.step() if output.finished]

    def _completion(self, request: Request, output: Any) -> Completion:
        """What the engine made of a request."""
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
    def _failures(self) -> Iterator[None]:
        """Turn a failure of the engine into a GenerationError; the engine counts as dead then."""
        try:
            yield
        except Exception as error:
            self._alive = False
            raise self._failure(
                error,
                "stopped working",
                "Completions handed out before are good; start again to go on from there.",
            ) from error

    def _failure(self, error: Exception, what: str, advice: str) -> GenerationError:
        message = f"vLLM {what}: {_said(error)}. {advice}"
        if out_of_memory(error) and not has_own_process():
            return MemoryRanOutError(message)
        return GenerationError(message)

    def _advice(self, hidden: bool) -> str:
        """What to look at where the engine does not start."""
        advice = "Its own log above may say more. "
        if hidden:
            share = self._gpu_memory_utilization
            parallel = self._options["tensor_parallel_size"]
            advice = (
                "The cause is in its process's log above; VLLM_ENABLE_V1_MULTIPROCESSING=0 brings "
                "it here. To check: memory "
                f"({'; '.join(map(str, visible_cards())) or 'nvidia-smi tells no card'}; "
                f"llm_gpu_memory_utilization: {'null' if share is None else share}), driver "
                f"{OLDEST_DRIVER} or newer ({driver_version()}), llm_tensor_parallel_size "
                f"({parallel}), llm_dtype ({self._options['dtype']}), the model's architecture. "
            )
        return advice + "llm_backend: transformers needs no vLLM."


def _said(error: BaseException) -> str:
    """An error in words, and what helps if memory ran out."""
    text = f"{type(error).__name__}: {error}"
    if out_of_memory(error):
        text += (
            ". Memory ran out: lower llm_max_prompt_tokens or llm_max_new_tokens, take a smaller "
            "llm_model, or on GPUs more of them (llm_tensor_parallel_size)"
        )
    return text
