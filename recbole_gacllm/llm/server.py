"""OpenAI-compatible servers as a text generator: any number of endpoints, each a `vllm serve`.

The endpoints serve what their operator loaded: the same weights everywhere, those of ``llm_model``
or what ``llm_served_model`` names. :mod:`.traffic` brings the requests to them and back.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Final

from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.chat_api import chat_body, completion_of
from recbole_gacllm.llm.endpoints import (
    BusyError,
    Client,
    EndpointError,
    Job,
    OddAnswerError,
    Reply,
    said,
)
from recbole_gacllm.llm.generator import Completion, Request
from recbole_gacllm.llm.traffic import Session
from recbole_gacllm.redaction import RedactingFilter, api_key, redact

logger = logging.getLogger(__name__)

# Worth another try, as is everything from 500 on.
_RETRIED: Final = frozenset({408, 409, 425})
_BUSY: Final = frozenset({429, 503})
_MESSAGE_CHARS: Final = 300
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
        patience_seconds: How long all endpoints may be down at once.
        timeout_seconds: How long one answer may take.

    Raises:
        GenerationError: If no endpoint answers, or one refuses the key.
        ValueError: If an endpoint does not serve the model, the window is too long, or the key
            cannot be one.
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
        self._max_model_len = self._chat.context_window(max_model_len)
        self._key_variable = key_variable
        self._key = api_key(key_variable)
        for name in _HTTP_LOGGERS:
            logging.getLogger(name).addFilter(_redacting)
        self._checked_prompt_length = False
        self._served_model = served_model
        self._client = Client(
            urls=[url.rstrip("/") for url in endpoints],
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            concurrency=concurrency,
            patience_seconds=patience_seconds,
            timeout_seconds=timeout_seconds,
            body=self._body,
            json_of=self._json,
            completion_of=self._completion,
        )
        # As many wait here as are under way: an endpoint is never idle while the caller writes.
        self._window = 2 * concurrency * len(endpoints)
        self._check_endpoints()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Complete requests; see :class:`~recbole_gacllm.llm.generator.TextGenerator`."""
        source = iter(requests)
        n_open = 0
        odd: list[Completion] = []  # since the last good one; held back until there is one again
        session = Session(self._client)
        try:
            while True:
                for request in islice(source, self._window - n_open):
                    ids = self._chat.encode_request(request, self._max_model_len)
                    session.submit(Job(request, len(ids)))
                    n_open += 1
                if not n_open:
                    break
                result = session.results.get()
                if isinstance(result, Exception):
                    raise result
                n_open -= 1
                if result.problem:
                    odd.append(result)
                    _check_odd(odd)
                else:
                    yield result
                    yield from odd
                    odd = []
            yield from odd
        finally:
            session.close()

    def close(self) -> None:
        """Nothing stays open between calls of :meth:`generate`."""

    def _body(self, request: Request) -> dict[str, Any]:
        return chat_body(request, self._chat, self._served_model)

    def _completion(self, job: Job, answer: Any) -> Completion:
        """What an endpoint made of a request.

        Raises:
            OddAnswerError: If it is not a finished completion.
        """
        try:
            completion = completion_of(job.request.id, answer)
        except ValueError as error:
            raise OddAnswerError(str(error)) from None
        n_prompt = completion.n_prompt_tokens
        if not self._checked_prompt_length and n_prompt != job.n_prompt_tokens:
            logger.warning(
                "The endpoints count %d tokens in a prompt that has %d by the tokenizer of "
                "llm_model: they serve another model or chat template, or do not go on with an "
                "answer that is begun (continue_final_message). Token budgets are not kept.",
                n_prompt,
                job.n_prompt_tokens,
            )
        self._checked_prompt_length = True
        return completion

    def _json(self, reply: Reply) -> Any:
        """The JSON of a reply.

        Raises:
            EndpointError: If trying again, here or elsewhere, may help.
            GenerationError: If it cannot.
        """
        if reply.status == 200:
            try:
                return json.loads(reply.body)
            except (ValueError, RecursionError):
                raise OddAnswerError("an answer that is not JSON") from None
        text = redact(reply.body.decode("utf-8", "replace"))[:_MESSAGE_CHARS]
        message = f"status {reply.status}: {text}"
        if reply.status in _BUSY:
            wish = reply.headers.get("Retry-After", "")  # seconds, or a date: then our own pause
            raise BusyError(message, float(wish) if wish.isdecimal() else 0.0)
        if reply.status >= 500 or reply.status in _RETRIED:
            raise EndpointError(message)
        if reply.status in (401, 403):
            state = "was sent" if self._key else "is empty"
            raise GenerationError(
                f"{reply.url} refuses the API key ({message}). The key in the environment variable "
                f"{self._key_variable} {state}; llm_api_key_variable names another one."
            )
        if to := reply.headers.get("Location"):
            raise GenerationError(
                f"{reply.url} sends its requests on to {to}, which is not followed, as keys and "
                "texts are for the servers of llm_endpoints alone; name that address there."
            )
        raise GenerationError(f"{reply.url} refuses a request ({message}).")

    def _check_endpoints(self) -> None:
        """One endpoint must answer, and those that do must serve the model."""
        failures = []
        with ThreadPoolExecutor(1) as pool:  # the caller may have an event loop of its own
            answers = pool.submit(asyncio.run, self._models()).result()
        for url, answer in zip(self._client.urls, answers, strict=True):
            try:
                if isinstance(answer, BaseException):
                    raise answer
                if answer is None:
                    continue
                served = [str(model["id"]) for model in answer["data"]]
            except (EndpointError, LookupError, TypeError) as error:
                failures.append(f"{url}: {said(error)}")
                continue
            if self._served_model not in served:
                raise ValueError(
                    f"llm_endpoints: {redact(url)} serves {', '.join(served)[:1000]}, not "
                    f"{self._served_model!r}. Start it with --served-model-name (or "
                    "--lora-modules), or name what it serves in llm_served_model."
                )
        if len(failures) == len(self._client.urls):
            raise GenerationError(
                f"no endpoint of llm_endpoints answers: {'; '.join(failures)}. Start the servers "
                f"(such as `vllm serve {self._served_model}`) and start again."
            )
        for failure in failures:
            logger.warning("an endpoint does not answer, the others start: %s", redact(failure))

    async def _models(self) -> list[Any]:
        """What each endpoint says it serves, or its error."""
        async with self._client.open() as http:
            asked = (self._client.models(http, url) for url in self._client.urls)
            return await asyncio.gather(*asked, return_exceptions=True)


def _check_odd(odd: Sequence[Completion]) -> None:
    """End the run when it is not single requests that get no answer.

    Raises:
        GenerationError: If too many in a row got none.
    """
    if len(odd) >= _MAX_ODD_IN_A_ROW:
        raise GenerationError(
            f"{len(odd)} requests in a row got an answer that is none, the last one "
            f"{odd[-1].problem}. llm_endpoints: name the base URLs of OpenAI-compatible servers, "
            "such as http://host:8000/v1, and look into their logs."
        )
