"""OpenAI-compatible servers as a text generator: any number of endpoints, each a `vllm serve`.

The endpoints serve what their operator loaded: the same weights everywhere, those of ``llm_model``
or what ``llm_served_model`` names. :mod:`.endpoints` brings the requests to them and back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.chat_api import chat_body
from recbole_gacllm.llm.endpoints import EndpointError, Endpoints, Job
from recbole_gacllm.llm.generator import Completion, Request
from recbole_gacllm.redaction import RedactingFilter, api_key, redact

logger = logging.getLogger(__name__)

_MAX_ODD_IN_A_ROW: Final = 20  # requests without an answer: then it is not the requests
# They log headers at level DEBUG. A filter holds for a logger itself, not for those below it.
_HTTP_LOGGERS: Final = (
    "httpx",
    *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")),
)
_redacting = RedactingFilter()


class ServerGenerator:
    """A model behind OpenAI-compatible chat endpoints.

    Args:
        model_dir: Folder with the tokenizer of the served model, for checks of the length.
        endpoints: Base URLs, such as ``http://host:8000/v1``; all serve the same weights.
        served_model: Name of the model, or of a LoRA adapter, in each request.
        concurrency: Requests under way at one endpoint.
        key_variable: Environment variable that holds the API key; not set means no key.
        max_model_len: Longest prompt plus completion in tokens; None is the model's window.
        patience_seconds, timeout_seconds: As :class:`.endpoints.Endpoints`.

    Raises:
        GenerationError: If no endpoint answers, or one refuses the key.
        ValueError: If an endpoint does not serve the model, or the key cannot be one.
    """

    def __init__(
        self,
        model_dir: Path,
        endpoints: Sequence[str],
        served_model: str,
        concurrency: int = 64,
        key_variable: str = "OPENAI_API_KEY",
        max_model_len: int | None = None,
        patience_seconds: float = 60.0,
        timeout_seconds: float = 600.0,
    ) -> None:
        self._chat = ChatTokenizer(model_dir)
        self._max_model_len = max_model_len or self._chat.max_length
        for name in _HTTP_LOGGERS:
            logging.getLogger(name).addFilter(_redacting)
        self._served_model = served_model
        self._urls = [url.rstrip("/") for url in endpoints]
        self._options = (
            *(self._urls, api_key(key_variable), key_variable),
            *(concurrency, patience_seconds, timeout_seconds),
        )
        # As many wait as are under way: an endpoint that is free has its next request at once.
        self._window = 2 * concurrency * len(endpoints)
        self._has_compared_lengths = False
        self._check_endpoints()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Complete requests; see :class:`~recbole_gacllm.llm.generator.TextGenerator`."""
        jobs = map(self._job, requests)
        n_open = 0
        odd: list[Completion] = []  # since the last good one; held back until there is one again
        with asyncio.Runner() as runner:
            endpoints = Endpoints(*self._options)
            try:
                while True:
                    new = list(islice(jobs, self._window - n_open))
                    n_open += len(new)
                    if not n_open:
                        break
                    job, completion = runner.run(endpoints.next_answer(new))
                    n_open -= 1
                    if completion.problem:
                        odd.append(completion)
                        _check_odd(odd)
                    else:
                        self._compare_lengths(job, completion)
                        yield completion
                        yield from odd
                        odd = []
                yield from odd
            finally:
                runner.run(endpoints.close())

    def close(self) -> None:
        """Nothing stays open between calls of :meth:`generate`."""

    def _job(self, request: Request) -> Job:
        n_prompt_tokens = len(self._chat.encode_request(request, self._max_model_len))
        return Job(request.id, chat_body(request, self._chat, self._served_model), n_prompt_tokens)

    def _compare_lengths(self, job: Job, completion: Completion) -> None:
        if not self._has_compared_lengths and completion.n_prompt_tokens != job.n_prompt_tokens:
            logger.warning(
                "The endpoints count %d tokens in a prompt that has %d by the tokenizer of "
                "llm_model: they serve another model or chat template, or do not go on with an "
                "answer that is begun (continue_final_message). Token budgets are not kept.",
                completion.n_prompt_tokens,
                job.n_prompt_tokens,
            )
        self._has_compared_lengths = True

    def _check_endpoints(self) -> None:
        """One endpoint must answer, and those that do must serve the model."""
        errors = []
        answers = asyncio.run(Endpoints(*self._options).models())
        for url, answer in zip(self._urls, answers, strict=True):
            try:
                if isinstance(answer, BaseException):
                    raise answer
                if answer is None:
                    continue
                served = [str(model["id"]) for model in answer["data"]]
            except (EndpointError, LookupError, TypeError) as error:
                errors.append(f"{url}: {redact(str(error))}")
                continue
            if self._served_model not in served:
                raise ValueError(
                    f"llm_endpoints: {redact(url)} serves {', '.join(served)[:1000]}, not "
                    f"{self._served_model!r}. Start it with --served-model-name (or "
                    "--lora-modules), or name what it serves in llm_served_model."
                )
        if len(errors) == len(self._urls):
            raise GenerationError(
                f"no endpoint of llm_endpoints answers: {'; '.join(errors)}. Start the servers "
                f"(such as `vllm serve {self._served_model}`) and start again."
            )
        for text in errors:
            logger.warning("an endpoint does not answer, the others start: %s", redact(text))


def _check_odd(odd: Sequence[Completion]) -> None:
    """End the run when it is not single requests that get no answer."""
    if len(odd) >= _MAX_ODD_IN_A_ROW:
        raise GenerationError(
            f"{len(odd)} requests in a row got an answer that is none, the last one "
            f"{odd[-1].problem}. llm_endpoints: name the base URLs of OpenAI-compatible servers, "
            "such as http://host:8000/v1, and look into their logs."
        )
