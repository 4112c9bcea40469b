"""Chat requests to several HTTP endpoints: whole answers, in time, of bounded size; failover.

A request belongs to no endpoint: one that fails goes back into the queue, and whichever endpoint
has room takes it. So an endpoint that dies loses nothing, its share moves on, and one that comes
back joins in again. Differently from a :mod:`.fleet`, nothing here is ours to start or to end.

An endpoint that has too much to do says so (429, 503). That is no fault of the request; the
endpoint gets a pause and half as many requests at once, one more again for each full round of
answers. Of an answer that is none, such as a 200 that is no chat completion, the request may be the
reason: asked a few times, it comes back as a completion with a problem, and the others go on.

Certificates are checked and redirects are not followed: keys and texts are for the endpoints alone.
No error shows a key.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
import traceback
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx

from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm.chat_api import completion_of, no_completion
from recbole_gacllm.llm.generator import Completion
from recbole_gacllm.redaction import redact

logger = logging.getLogger(__name__)

_MAX_BYTES: Final = 1 << 23  # of an answer; the longest completions take some hundred kilobytes
_MAX_ERROR_BYTES: Final = 1 << 16  # what is read of a refusal
_MESSAGE_CHARS: Final = 300  # what is shown of it
_CHECK_SECONDS: Final = 10.0  # whether an endpoint is there
# A request that fails so often is at fault itself: it may be what kills the servers.
_MAX_FAILURES: Final = 8
_MAX_ODD: Final = 3  # answers to a request that are none; then it has no answer
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before an endpoint that failed is tried again
_LONGEST_WISH: Final = 60.0  # seconds that an endpoint may ask for (Retry-After)
_RETRIED: Final = frozenset({408, 409, 425})  # worth another try, as is everything from 500 on
_BUSY: Final = frozenset({429, 503})


class EndpointError(Exception):
    """An endpoint failed in a way that another try may mend; shows no key, see ``redaction``."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class OddAnswerError(EndpointError):
    """An endpoint answered, but not with what answers a request."""


class BusyError(EndpointError):
    """An endpoint has too much to do; it may say how many seconds to wait."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass
class Job:
    """A request, its length by our tokenizer, and how often it failed, or got an odd answer."""

    id: str
    body: dict[str, Any]
    n_prompt_tokens: int
    n_failures: int = 0
    n_odd: int = 0


@dataclass(eq=False)
class _Endpoint:
    """How much an endpoint takes at once, and since when it has not answered."""

    url: str
    limit: int
    n_open: int = 0
    n_answered: int = 0  # since the limit changed
    n_failures: int = 0  # since the last answer
    is_up: bool = True
    silent_since: float | None = None  # the first failure since the last answer
    wish_seconds: float = 0.0
    last_error: str = ""


class Endpoints:
    """All endpoints of one event loop.

    Args:
        urls: Base URLs.
        key: Sent with each request, if it is not empty.
        key_variable: Where the key comes from, for messages.
        concurrency: Requests under way at one endpoint.
        patience_seconds: How long none may answer.
        timeout_seconds: How long one answer may take, from the request to its last byte.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str,
        key_variable: str,
        concurrency: int,
        patience_seconds: float,
        timeout_seconds: float,
    ) -> None:
        self._endpoints = [_Endpoint(url, concurrency) for url in urls]
        self._key_place = f"{key_variable} {'was sent' if key else 'is empty'}"
        self._concurrency = concurrency
        self._patience, self._timeout = patience_seconds, timeout_seconds
        self._waiting: deque[Job] = deque()
        self._answers: asyncio.Queue[tuple[Job, Completion] | BaseException] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_seconds, connect=10.0, pool=None),
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=concurrency * len(urls),
                keepalive_expiry=60.0,
            ),
        )

    async def models(self) -> list[Any]:
        """What each endpoint says it serves, or its error; None of one that does not say."""
        requests = (self._fetch("GET", f"{e.url}/models", _CHECK_SECONDS) for e in self._endpoints)
        answers = await asyncio.gather(*requests, return_exceptions=True)
        await self._http.aclose()
        return answers

    async def next_answer(self, jobs: Iterable[Job]) -> tuple[Job, Completion]:
        """Take more requests; wait for the next completion of any.

        Raises:
            GenerationError: If there will be none.
        """
        self._waiting.extend(jobs)
        self._hand_out()
        answer = await self._answers.get()
        if isinstance(answer, GenerationError):
            raise answer
        if isinstance(answer, BaseException):
            logger.error("%s", redact("".join(traceback.format_exception(answer))))
            raise GenerationError(f"the client of llm_endpoints failed: {answer!r}")
        return answer

    async def close(self) -> None:
        """Drop what is under way; the servers notice the closed connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()

    def _hand_out(self) -> None:
        """Bring requests to the least busy endpoint, until none is left or all have enough."""
        while self._waiting:
            free = [e for e in self._endpoints if e.is_up and e.n_open < e.limit]
            if not free:
                return
            endpoint = min(free, key=lambda e: e.n_open)
            endpoint.n_open += 1
            self._begin(self._ask(endpoint, self._waiting.popleft()))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Start work whose failure, which is no endpoint's, ends the run."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._tell_failure)

    def _tell_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._answers.put_nowait(error)

    async def _ask(self, endpoint: _Endpoint, job: Job) -> None:
        url = f"{endpoint.url}/chat/completions"
        try:
            completion = _completion(job, await self._fetch("POST", url, self._timeout, job.body))
        except EndpointError as error:
            endpoint.n_open -= 1
            match error:
                case BusyError():
                    wish = min(error.seconds, _LONGEST_WISH)
                    endpoint.wish_seconds = max(endpoint.wish_seconds, wish)
                    if endpoint.is_up:  # of many refusals at one time the first counts
                        endpoint.limit = max(1, endpoint.limit // 2)
                        endpoint.n_answered = 0
                case OddAnswerError():
                    job.n_odd += 1
                case _:
                    job.n_failures += 1
            if job.n_failures == _MAX_FAILURES:
                raise GenerationError(
                    f"request {job.id!r} failed {_MAX_FAILURES} times, the last time at "
                    f"{endpoint.url}: {error}. Look into that server's log."
                ) from None
            if job.n_odd == _MAX_ODD:
                logger.warning("request %s has no answer: %s", job.id, error)
                self._answers.put_nowait((job, no_completion(job.id, str(error))))
            else:
                self._waiting.append(job)
                self._rest(endpoint, error)
        else:
            endpoint.n_open -= 1
            endpoint.n_failures, endpoint.silent_since = 0, None
            endpoint.n_answered += 1
            if endpoint.limit < self._concurrency and endpoint.n_answered >= endpoint.limit:
                endpoint.limit += 1
                endpoint.n_answered = 0
            self._answers.put_nowait((job, completion))
        self._hand_out()

    def _rest(self, endpoint: _Endpoint, error: EndpointError) -> None:
        """Bring no requests to an endpoint for a while; of many failures the first counts."""
        endpoint.last_error = str(error)
        if endpoint.silent_since is None:
            endpoint.silent_since = time.monotonic()
        if endpoint.is_up:
            logger.warning("%s fails, its share moves on: %s", endpoint.url, error)
            endpoint.is_up = False
            endpoint.n_failures += 1
            self._begin(self._wake(endpoint))

    async def _wake(self, endpoint: _Endpoint) -> None:
        """Try an endpoint that failed, less and less often, until it is up again."""
        while not endpoint.is_up:
            self._check_patience()
            n_doublings = min(endpoint.n_failures - 1, 16)  # an endpoint may be down for days
            pause = min(_FIRST_PAUSE * 2**n_doublings, _LONGEST_PAUSE) * random.uniform(0.7, 1.0)
            await asyncio.sleep(max(pause, endpoint.wish_seconds))
            endpoint.wish_seconds = 0.0
            try:
                await self._fetch("GET", f"{endpoint.url}/models", _CHECK_SECONDS)
            except (EndpointError, GenerationError) as error:
                endpoint.n_failures += 1
                endpoint.last_error = str(error)
            else:
                logger.warning("%s answers again", endpoint.url)
                endpoint.is_up = True
        self._hand_out()

    def _check_patience(self) -> None:
        """End the run when none has answered a request for long, and none is under way."""
        since = [e.silent_since for e in self._endpoints if e.silent_since is not None]
        if (
            len(since) < len(self._endpoints)
            or any(e.n_open for e in self._endpoints)
            or time.monotonic() - max(since) < self._patience
        ):
            return
        states = "; ".join(f"{e.url}: {e.last_error}" for e in self._endpoints)
        raise GenerationError(
            f"no endpoint of llm_endpoints has answered a request for {self._patience:.0f} s: "
            f"{states}. Completions handed out before are good; start again when one does."
        )

    async def _fetch(self, method: str, url: str, seconds: float, content: Any = None) -> Any:
        """Send a request and read the JSON of the answer, for so many seconds in all.

        None of an address that an endpoint does not have; a gateway need not have ``/models``.

        Raises:
            EndpointError: If trying again, here or elsewhere, may help.
            GenerationError: If it cannot.
        """
        body = bytearray()
        try:
            async with (
                asyncio.timeout(seconds),
                self._http.stream(method, url, json=content) as response,
            ):
                is_good = response.status_code == 200
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > _MAX_BYTES and is_good:
                        raise OddAnswerError(f"an answer of more than {_MAX_BYTES >> 20} MiB")
                    if len(body) > _MAX_ERROR_BYTES and not is_good:
                        break
        except TimeoutError:
            raise EndpointError(f"no whole answer within {seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:  # some without any words
            kind = OddAnswerError if isinstance(error, httpx.DecodingError) else EndpointError
            raise kind(str(error) or type(error).__name__) from None
        if response.status_code == 404 and method == "GET":
            return None
        if not is_good:
            raise self._refusal(url, response, body.decode("utf-8", "replace"))
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise OddAnswerError("an answer that is not JSON") from None

    def _refusal(
        self, url: str, response: httpx.Response, text: str
    ) -> EndpointError | GenerationError:
        status = response.status_code
        message = f"status {status}: {redact(text)[:_MESSAGE_CHARS]}"
        if status in _BUSY:
            wish = response.headers.get("Retry-After", "")  # or a date: then our own pause
            return BusyError(message, float(wish) if wish.isdecimal() else 0.0)
        if status >= 500 or status in _RETRIED:
            return EndpointError(message)
        if status in (401, 403):
            return GenerationError(
                f"{url} refuses the API key ({message}). The key in the environment variable "
                f"{self._key_place}; llm_api_key_variable names another one."
            )
        if to := response.headers.get("Location"):
            return GenerationError(
                f"{url} sends its requests on to {to}, which is not followed, as keys and "
                "texts are for the servers of llm_endpoints alone; name that address there."
            )
        return GenerationError(f"{url} refuses a request ({message}).")


def _completion(job: Job, answer: Any) -> Completion:
    try:
        return completion_of(job.id, answer)
    except ValueError as error:
        raise OddAnswerError(str(error)) from None
