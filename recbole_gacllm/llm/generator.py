"""What every text generator is: the protocol, its requests and its completions.

``convolution/`` knows this module and no engine. vLLM, transformers and servers implement it and
pass one contract test (``tests/test_generator_contract.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict

Backend = Literal["vllm", "transformers", "server"]


class Message(TypedDict):
    """One chat message, in the form every chat template takes."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy; above it the draw is seeded with ``seed``
    repetition_penalty: float = 1.0  # of tokens of prompt and completion; 1 is none
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One prompt to complete.

    The generator applies the model's own chat template. A last message of the assistant is the
    beginning of its answer; the completion goes on there.
    """

    id: str  # the caller's name; comes back in the completion, unique within a call
    messages: tuple[Message, ...]
    sampling: Sampling


@dataclass(frozen=True)
class SFTPair:
    """One example for supervised fine-tuning: a chat and the assistant's answer to learn."""

    messages: tuple[Message, ...]
    completion: str


@dataclass(frozen=True)
class Completion:
    """What a generator made of one request."""

    id: str
    text: str  # decoded, not cleaned, without special tokens and the beginning of the request
    finish_reason: Literal["stop", "length"]  # the model ended it, or max_new_tokens did
    n_prompt_tokens: int  # chat template included
    n_cached_tokens: int  # of those, how many the engine's prefix cache served
    n_output_tokens: int
    problem: str = ""  # why there is no answer to judge, such as a server's that is none; no text


class TextGenerator(Protocol):
    """A loaded model that completes chats."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Complete requests, each as soon as it is finished, in any order.

        Takes requests lazily, a bounded number ahead of the completions it has yielded, so that a
        layer of any size needs no list of all prompts. An abandoned iterator stops the work.

        Raises:
            GenerationError: If the engine fails. Completions already yielded stay good.
            ValueError: If a prompt does not fit the model's context window.
        """
        ...

    def close(self) -> None:
        """Free the engine and its memory; a closed generator is not used again."""
        ...
