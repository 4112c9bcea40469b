"""OpenAI's chat completions as this package asks for them: a request's body, an answer's content.

What the OpenAI protocol lacks (repetition penalty, end tokens, no thinking, going on with an answer
that is begun) is in vLLM's and SGLang's, over HTTP as in batch files.
"""

from __future__ import annotations

from typing import Any

from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.generator import Completion, Request


def chat_body(request: Request, chat: ChatTokenizer, served_model: str) -> dict[str, Any]:
    """A request as an endpoint reads it; sampling defaults of the served model are overridden."""
    sampling, messages = request.sampling, chat.adapted(request.messages)
    is_begun = messages[-1]["role"] == "assistant"
    return {
        "model": served_model,
        "messages": messages,
        "add_generation_prompt": not is_begun,
        "continue_final_message": is_begun,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "seed": sampling.seed,
        "repetition_penalty": sampling.repetition_penalty,
        "top_k": -1,
        "min_p": 0.0,
        "stop_token_ids": sorted(chat.stop_token_ids),
        "chat_template_kwargs": {"enable_thinking": False},
    }


def completion_of(request_id: str, answer: Any) -> Completion:
    """What an endpoint made of a request.

    Raises:
        ValueError: If the answer is not a finished completion.
    """
    try:
        choice, usage = answer["choices"][0], answer["usage"]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"]
        n_prompt, n_output = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"an answer that is no chat completion ({error!r})") from None
    if reason not in ("stop", "length", "content_filter"):
        raise ValueError(f"an answer that ended with finish_reason {reason!r}")
    return Completion(
        id=request_id,
        text=text,
        finish_reason="length" if reason == "length" else "stop",
        n_prompt_tokens=n_prompt,
        n_cached_tokens=int(cached),
        n_output_tokens=n_output,
    )
