"""Requests on their way to several HTTP endpoints, from a thread of their own.

An event loop keeps a bounded number of requests under way at each endpoint. A request belongs to no
endpoint: one that fails goes back into the queue, and whichever endpoint is free takes it. So an
endpoint that dies loses nothing, its share moves on, and one that comes back joins in again.

An endpoint that has too much to do says so (429, 503). That is no fault of the request; the
endpoint gets a pause and half as many requests at once, one more again for each full round of
answers.

Of an answer that is none, such as a 200 that is no chat completion, the request may be the reason:
tried a few times, it comes back as a completion with a problem, and the others go on.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import httpx

from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm.chat_api import no_completion
from recbole_gacllm.llm.endpoints import (
    BusyError,
    Client,
    EndpointError,
    Job,
    OddAnswerError,
    fetch,
    said,
)
from recbole_gacllm.llm.generator import Completion
from recbole_gacllm.redaction import redact

logger = logging.getLogger(__name__)

# A request that fails so often is at fault itself: it may be what kills the servers.
_MAX_ATTEMPTS: Final = 8
_MAX_ODD: Final = 3  # answers to a request that are none; then it has no answer
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before an endpoint that failed is tried again
_LONGEST_WISH: Final = 60.0  # seconds that an endpoint may ask for (Retry-After)


@dataclass
class _Endpoint:
    """Whether an endpoint works, as far as is known, and how much it takes at once."""

    url: str
    limit: int  # requests under way at once, at most the concurrency
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    n_open: int = 0
    n_answered: int = 0  # since the limit changed
    busy_since: float | None = None  # until it answers again
    wish_seconds: float = 0.0
    up: asyncio.Event = field(default_factory=asyncio.Event)
    down: asyncio.Event = field(default_factory=asyncio.Event)
    n_failures: int = 0
    down_since: float = 0.0
    last_error: str = ""


class Session:
    """One call of ``generate``: the event loop, its thread, the requests under way."""

    def __init__(self, client: Client) -> None:
        self.results: queue.SimpleQueue[Completion | Exception] = queue.SimpleQueue()
        self._client = client
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()
        self._endpoints = [_Endpoint(url, client.concurrency) for url in client.urls]
        for endpoint in self._endpoints:
            endpoint.up.set()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._work())
        self._thread = threading.Thread(target=self._run, name="llm_endpoints", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand a request over; its completion, or an error, comes out of ``results``."""
        self._loop.call_soon_threadsafe(self._jobs.put_nowait, job)

    def close(self) -> None:
        """Drop what is under way; the servers notice the closed connections."""
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            return
        except Exception as error:
            logger.error("%s", redact("".join(traceback.format_exception(error))))
            self.results.put(GenerationError(f"the client of llm_endpoints failed: {error!r}"))

    async def _work(self) -> None:
        async with self._client.open() as http, asyncio.TaskGroup() as group:
            for endpoint in self._endpoints:
                group.create_task(self._watch(http, endpoint))
                for number in range(self._client.concurrency):
                    group.create_task(self._serve(http, endpoint, number))

    async def _serve(self, http: httpx.AsyncClient, endpoint: _Endpoint, number: int) -> None:
        """Bring one request after another to an endpoint, as long as it is up and has room."""
        while True:
            while number >= endpoint.limit:
                endpoint.grown.clear()
                await endpoint.grown.wait()
            await endpoint.up.wait()
            job = await self._jobs.get()
            if not endpoint.up.is_set() or number >= endpoint.limit:  # since we waited
                self._jobs.put_nowait(job)  # another one's work
            elif not await self._try(http, endpoint, job):
                return

    async def _try(self, http: httpx.AsyncClient, endpoint: _Endpoint, job: Job) -> bool:
        """Bring a request to an endpoint; False if the run is to end."""
        try:
            endpoint.n_open += 1
            try:
                reply = await fetch(
                    http,
                    "POST",
                    f"{endpoint.url}/chat/completions",
                    self._client.timeout_seconds,
                    self._client.body(job.request),
                )
            finally:
                endpoint.n_open -= 1
            completion = self._client.completion_of(job, self._client.json_of(reply))
        except GenerationError as error:
            self.results.put(error)
            return False
        except BusyError as error:
            self._jobs.put_nowait(job)
            _mark_busy(endpoint, error)
            self._give_up_if_all_are_busy()
        except OddAnswerError as error:
            job.n_odd += 1
            if job.n_odd == _MAX_ODD:
                logger.warning("request %s has no answer: %s", job.request.id, said(error))
                self.results.put(no_completion(job.request.id, said(error)))
            else:
                self._jobs.put_nowait(job)
                _mark_down(endpoint, error)
        except EndpointError as error:
            job.n_failures += 1
            if job.n_failures == _MAX_ATTEMPTS:
                self.results.put(
                    GenerationError(
                        f"request {job.request.id!r} failed {_MAX_ATTEMPTS} times, the last "
                        f"time at {endpoint.url}: {said(error)}. Look into that server's log."
                    )
                )
                return False
            self._jobs.put_nowait(job)
            _mark_down(endpoint, error)
        else:
            _mark_good(endpoint, self._client.concurrency)
            self.results.put(completion)
        return True

    async def _watch(self, http: httpx.AsyncClient, endpoint: _Endpoint) -> None:
        """Try an endpoint that failed, less and less often, until it is up again."""
        while True:
            await endpoint.down.wait()
            n_doublings = min(endpoint.n_failures - 1, 16)  # an endpoint may be down for days
            pause = min(_FIRST_PAUSE * 2**n_doublings, _LONGEST_PAUSE) * random.uniform(0.7, 1.0)
            await asyncio.sleep(max(pause, endpoint.wish_seconds))
            endpoint.wish_seconds = 0.0
            try:
                await self._client.models(http, endpoint.url)
            except (EndpointError, GenerationError) as error:
                endpoint.n_failures += 1
                endpoint.last_error = said(error)
                self._give_up_if_all_are_down()
            else:
                logger.warning("%s answers again", endpoint.url)
                endpoint.down.clear()
                endpoint.up.set()

    def _give_up_if_all_are_down(self) -> None:
        if all(endpoint.down.is_set() for endpoint in self._endpoints):
            since = [endpoint.down_since for endpoint in self._endpoints]
            self._give_up("answered", since, "start the servers and start again")

    def _give_up_if_all_are_busy(self) -> None:
        """End the run when nobody has taken a request for long, and none is under way."""
        since = [
            e.busy_since or (e.down_since if e.down.is_set() else None) for e in self._endpoints
        ]
        known = [start for start in since if start is not None]
        if len(known) == len(since) and not any(e.n_open for e in self._endpoints):
            self._give_up("taken a request", known, "start again when they have less to do")

    def _give_up(self, what: str, since: Sequence[float], cure: str) -> None:
        """End the run if even the last endpoint that did it has not for all our patience."""
        patience = self._client.patience_seconds
        if time.monotonic() - max(since) < patience:
            return
        states = "; ".join(f"{e.url}: {e.last_error}" for e in self._endpoints)
        self.results.put(
            GenerationError(
                f"no endpoint of llm_endpoints has {what} for {patience:.0f} s: {states}. "
                f"Completions handed out before are good; {cure}."
            )
        )


def _mark_good(endpoint: _Endpoint, concurrency: int) -> None:
    """After an answer; a limit grows by one with each full round of answers."""
    endpoint.n_failures = 0
    endpoint.busy_since = None
    endpoint.n_answered += 1
    if endpoint.limit < concurrency and endpoint.n_answered >= endpoint.limit:
        endpoint.limit += 1
        endpoint.n_answered = 0
        endpoint.grown.set()


def _mark_busy(endpoint: _Endpoint, error: BusyError) -> None:
    """Halve what an endpoint gets at once; of many refusals at one time the first counts."""
    if endpoint.busy_since is None:
        endpoint.busy_since = time.monotonic()
    endpoint.wish_seconds = max(endpoint.wish_seconds, min(error.seconds, _LONGEST_WISH))
    if not endpoint.down.is_set():
        endpoint.limit = max(1, endpoint.limit // 2)
        endpoint.n_answered = 0
    _mark_down(endpoint, error)


def _mark_down(endpoint: _Endpoint, error: Exception) -> None:
    """Stop bringing requests to an endpoint; of many failures at one time the first counts."""
    endpoint.last_error = said(error)
    if not endpoint.down.is_set():
        logger.warning("%s fails, its share moves on: %s", endpoint.url, endpoint.last_error)
        endpoint.n_failures += 1
        endpoint.down_since = time.monotonic()
        endpoint.up.clear()
        endpoint.down.set()
