"""A text generator without a model, for unit tests of whatever uses one."""

import hashlib
import itertools

from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm.generator import Completion

WORDS = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india")


class FakeGenerator:
    """Answers with words drawn from a hash of the request; the same request, the same answer.

    A token is a word between blanks. Completions of a window come out in reverse order.

    Args:
        window: Requests taken ahead.
        max_model_len: Longest prompt plus completion, in words.
        answer: Makes the text instead, if given; cut to ``max_new_tokens`` words.
        fail_after: Completions handed out before the generator raises ``failure``.
    """

    def __init__(
        self, window=4, max_model_len=4096, answer=None, fail_after=None, failure=GenerationError
    ):
        self.window = window
        self.max_model_len = max_model_len
        self.answer = answer or _hashed_words
        self.fail_after, self.failure = fail_after, failure
        self.requests = []
        self.closed = False
        self.n_completed = 0

    def generate(self, requests):
        source = iter(requests)
        while window := list(itertools.islice(source, self.window)):
            self.requests += window
            for request in reversed(window):
                if self.n_completed == self.fail_after:
                    raise self.failure(f"fake failure after {self.fail_after} completions")
                completion = self._complete(request)
                self.n_completed += 1
                yield completion

    def close(self):
        self.closed = True

    def _complete(self, request):
        n_prompt = sum(len(message["content"].split()) for message in request.messages)
        n_new = request.sampling.max_new_tokens
        if n_prompt + n_new > self.max_model_len:
            raise ValueError(
                f"Request {request.id!r} does not fit the context window: {n_prompt} prompt tokens "
                f"+ {n_new} new tokens > {self.max_model_len}."
            )
        words = self.answer(request).split()
        blank = " " if words and request.messages[-1]["role"] == "assistant" else ""
        return Completion(
            id=request.id,
            text=blank + " ".join(words[:n_new]),
            finish_reason="length" if len(words) > n_new else "stop",
            n_prompt_tokens=n_prompt,
            n_cached_tokens=0,
            n_output_tokens=min(len(words), n_new),
        )


def _hashed_words(request):
    seed = request.sampling.seed if request.sampling.temperature > 0 else None
    digest = hashlib.sha256(repr((request.messages, seed)).encode()).digest()
    return " ".join(WORDS[byte % len(WORDS)] for byte in digest[: 8 + digest[0] % 16])
