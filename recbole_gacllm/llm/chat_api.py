"""OpenAI's chat completions as this package asks for them: a request's body, an answer's content.

What the OpenAI protocol lacks (repetition penalty, end tokens, no thinking, going on with an answer
that is begun) is in vLLM's and SGLang's, over HTTP as in batch files.
"""

from __future__ import annotations

from typing import Any, Final

from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.generator import Completion, Request

_MAX_COUNT: Final = 2**31  # tokens; no answer has more, and a store's column holds them added up


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
        ValueError: If the answer is not a finished completion, whatever it is instead.
    """
    try:
        choice, usage = answer["choices"][0], answer["usage"]
        text, reason = _text(choice["message"]["content"]), choice["finish_reason"]
        n_prompt, n_output = _count(usage["prompt_tokens"]), _count(usage["completion_tokens"])
        details = usage.get("prompt_tokens_details") or {}
        n_cached = _count(details.get("cached_tokens") or 0)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"an answer that is no chat completion ({error!r:.200})") from None
    if reason not in ("stop", "length", "content_filter"):
        raise ValueError(f"an answer that ended with finish_reason {reason!r:.80}")
    return Completion(
        id=request_id,
        text=text,
        finish_reason="length" if reason == "length" else "stop",
        n_prompt_tokens=n_prompt,
        n_cached_tokens=n_cached,
        n_output_tokens=n_output,
    )


def no_completion(request_id: str, problem: str) -> Completion:
    """What stands for an answer that is none."""
    return Completion(request_id, "", "stop", 0, 0, 0, problem)


def _text(content: Any) -> str:
    """The content of a message: a string, none, or the protocol's list of parts."""
    parts = content if isinstance(content, list) else [content or ""]
    texts = [
        part if isinstance(part, str) else part["text"]
        for part in parts
        if isinstance(part, str) or part["type"] == "text"  # not what it thought, not a picture
    ]
    return "".join(texts)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_COUNT:
        raise ValueError(f"a number of tokens is {value!r:.40}")
    return value
