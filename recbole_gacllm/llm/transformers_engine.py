"""transformers as a text generator: the reference, and the fallback where vLLM cannot run.

Batches of prompts of similar length, padded on the left. Every rule of a completion (repetition
penalty, temperature, draw, length) is applied per request and leaves the padding out, so that a
completion does not depend on the prompts beside it, up to rounding.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm.adapter import check_adapter
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.generator import Completion, Request, Sampling
from recbole_gacllm.llm.hardware import out_of_memory, resolve_dtype

logger = logging.getLogger(__name__)

# Batches read ahead, sorted by length and worked off: enough to make their lengths similar.
_BATCHES_AHEAD: Final = 4


class TransformersGenerator:
    """A model run by ``transformers.generate``, on the GPU if there is one.

    Options are those of :class:`.vllm_engine.VLLMGenerator`, and ``batch_size``: prompts completed
    at once, None for 16 on the CPU and 128 on a GPU; halved for good whenever memory runs out.
    ``seed`` has no effect: every draw has its request's own.

    Raises:
        GenerationError: If the model cannot be loaded.
        ValueError: If the adapter does not fit.
    """

    def __init__(
        self,
        model_dir: Path,
        adapter_dir: Path | None = None,
        dtype: str = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        self._chat = ChatTokenizer(model_dir)
        self._max_model_len = max_model_len or self._chat.max_length
        if adapter_dir is not None:
            check_adapter(model_dir, adapter_dir)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._batch_size = batch_size or (128 if device == "cuda" else 16)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                model_dir,
                dtype=getattr(torch, resolve_dtype(dtype)),
                device_map=device,
                use_safetensors=True,
                local_files_only=True,
            )
            # The model's own sampling defaults would fill in what a call leaves open.
            model.generation_config = GenerationConfig()
            if adapter_dir is not None:
                model = PeftModel.from_pretrained(model, str(adapter_dir))
            self._model: Any = model.to(device).eval()
        except Exception as error:
            raise GenerationError(
                f"transformers could not load {model_dir} (adapter: {adapter_dir}): "
                f"{type(error).__name__}: {error}"
            ) from error

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Complete requests; see :class:`~recbole_gacllm.llm.generator.TextGenerator`."""
        source = iter(requests)
        n_ahead = self._batch_size * _BATCHES_AHEAD
        while window := list(itertools.islice(source, n_ahead)):
            prompts = [
                (request, self._chat.encode_request(request, self._max_model_len))
                for request in window
            ]
            prompts.sort(key=lambda prompt: len(prompt[1]))
            while prompts:
                batch = prompts[: self._batch_size]
                completions = self._complete(batch)
                if completions is None:
                    self._batch_size = len(batch) // 2
                    logger.warning(
                        "memory ran out on a batch of %d prompts; going on with %d at once",
                        len(batch),
                        self._batch_size,
                    )
                    continue
                del prompts[: len(batch)]
                yield from completions

    def close(self) -> None:
        """Drop the model and free its memory."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _complete(self, batch: Sequence[tuple[Request, list[int]]]) -> list[Completion] | None:
        """Complete one batch; None if it is too large for the memory.

        Raises:
            GenerationError: If memory does not do for one prompt, or anything else fails.
        """
        width = max(len(ids) for _, ids in batch)
        ids = torch.full((len(batch), width), self._chat.pad_token_id)  # [batch, width]
        mask = torch.zeros_like(ids)  # [batch, width]
        for row, (_, prompt) in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        samplings = [request.sampling for request, _ in batch]
        rules = _PerRequest(samplings, [width - len(prompt) for _, prompt in batch])
        stops = self._chat.stop_token_ids
        config = GenerationConfig(
            max_new_tokens=max(sampling.max_new_tokens for sampling in samplings),
            do_sample=False,
            eos_token_id=sorted(stops) or None,
            pad_token_id=self._chat.pad_token_id,
        )
        try:
            with torch.inference_mode():
                output = self._model.generate(
                    input_ids=ids.to(self._model.device),
                    attention_mask=mask.to(self._model.device),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([rules]),
                )
        except Exception as error:
            if out_of_memory(error):
                if len(batch) > 1:
                    return None
                raise GenerationError(
                    f"memory does not do for one prompt of {width} tokens and "
                    f"{samplings[0].max_new_tokens} new ones ({type(error).__name__}). Lower "
                    "llm_max_prompt_tokens or llm_max_new_tokens, take a smaller llm_model or "
                    "llm_dtype: bfloat16. Completions handed out before are good."
                ) from error
            raise GenerationError(
                f"transformers failed on a batch of {len(batch)} prompts of up to {width} tokens: "
                f"{type(error).__name__}: {error}. Completions handed out before are good."
            ) from error
        completions = []
        for (request, prompt), row in zip(batch, output[:, width:].tolist(), strict=True):
            made = row[: request.sampling.max_new_tokens]
            end = next((i for i, token in enumerate(made) if token in stops), None)
            if end is not None:
                made = made[: end + 1]
            completions.append(
                Completion(
                    id=request.id,
                    text=self._chat.decode(made, prompt),
                    finish_reason="length" if end is None else "stop",
                    n_prompt_tokens=len(prompt),
                    n_cached_tokens=0,
                    n_output_tokens=len(made),
                )
            )
        return completions


class _PerRequest(LogitsProcessor):  # type: ignore[misc]
    """Each row's own repetition penalty, temperature and draw, ahead of an argmax.

    The penalty is vLLM's and transformers' own: positive logits of tokens seen in prompt or
    completion are divided by it, negative ones multiplied; transformers' processor would count
    padding as seen. A draw is the argmax of logits / temperature plus Gumbel noise, which is a draw
    from the softmax, with a generator for each request.
    """

    def __init__(self, samplings: Sequence[Sampling], n_padding: Sequence[int]) -> None:
        self._samplings = samplings
        self._n_padding = torch.tensor(n_padding)[:, None]
        self._penalties = torch.tensor([[s.repetition_penalty] for s in samplings])
        self._generators = [torch.Generator().manual_seed(s.seed) for s in samplings]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores to take the argmax of.

        Shapes:
            input_ids: [batch, tokens so far]; scores and result: [batch, vocabulary].
        """
        scores = scores.to(torch.float32, copy=True)
        device = scores.device
        real = torch.arange(input_ids.shape[1], device=device) >= self._n_padding.to(device)
        seen = torch.where(real, input_ids, input_ids[:, -1:])  # the last token is never padding
        logits, penalties = scores.gather(1, seen), self._penalties.to(device)
        scores.scatter_(1, seen, torch.where(logits > 0, logits / penalties, logits * penalties))
        for row, sampling in enumerate(self._samplings):
            if sampling.temperature > 0:
                noise = torch.empty(scores.shape[1]).exponential_(generator=self._generators[row])
                scores[row] = scores[row] / sampling.temperature - noise.log().to(scores.device)
        return scores
