"""Requests on their way to several HTTP endpoints, from a thread of their own.

An event loop keeps a bounded number of requests under way at each endpoint. A request belongs to no
endpoint: one that fails goes back into the queue, and whichever endpoint is free takes it. So an
endpoint that dies loses nothing, its share moves on, and one that comes back joins in again.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm.generator import Completion, Request

logger = logging.getLogger(__name__)

# A request that fails so often is at fault itself: it may be what kills the servers.
_MAX_ATTEMPTS: Final = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before an endpoint that failed is tried again


class EndpointError(Exception):
    """An endpoint failed in a way that another try may mend."""


@dataclass
class Job:
    """A request, its length by our tokenizer, and how often it failed."""

    request: Request
    n_prompt_tokens: int
    n_failures: int = 0


@dataclass(frozen=True)
class Client:
    """How endpoints are spoken to.

    Attributes:
        urls: Base URLs.
        headers: Of every request.
        concurrency: Requests under way at one endpoint.
        patience_seconds: How long all endpoints may be down at once.
        timeout_seconds: How long one answer may take.
        body: What to post for a request.
        json_of: The JSON of a response; raises EndpointError or GenerationError.
        completion_of: The completion in that JSON; raises EndpointError.
    """

    urls: Sequence[str]
    headers: dict[str, str] = field(repr=False)
    concurrency: int
    patience_seconds: float
    timeout_seconds: float
    body: Callable[[Request], dict[str, Any]]
    json_of: Callable[[httpx.Response], Any]
    completion_of: Callable[[Job, Any], Completion]


@dataclass
class _Endpoint:
    """Whether an endpoint works, as far as is known."""

    url: str
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
        self._endpoints = [_Endpoint(url) for url in client.urls]
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
            failure = GenerationError(f"the client of llm_endpoints failed: {error!r}")
            failure.__cause__ = error
            self.results.put(failure)

    async def _work(self) -> None:
        n_connections = self._client.concurrency * len(self._endpoints)
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=n_connections, keepalive_expiry=60.0
        )
        timeout = httpx.Timeout(self._client.timeout_seconds, connect=10.0, pool=None)
        async with (
            httpx.AsyncClient(headers=self._client.headers, timeout=timeout, limits=limits) as http,
            asyncio.TaskGroup() as group,
        ):
            for endpoint in self._endpoints:
                group.create_task(self._watch(http, endpoint))
                for _ in range(self._client.concurrency):
                    group.create_task(self._serve(http, endpoint))

    async def _serve(self, http: httpx.AsyncClient, endpoint: _Endpoint) -> None:
        """Bring one request after another to an endpoint, as long as it is up."""
        while True:
            await endpoint.up.wait()
            job = await self._jobs.get()
            if not endpoint.up.is_set():  # it went down while we waited: another one's work
                self._jobs.put_nowait(job)
                continue
            try:
                response = await http.post(
                    f"{endpoint.url}/chat/completions", json=self._client.body(job.request)
                )
                completion = self._client.completion_of(job, self._client.json_of(response))
            except GenerationError as error:
                self.results.put(error)
                return
            except (EndpointError, httpx.TransportError) as error:
                job.n_failures += 1
                if job.n_failures == _MAX_ATTEMPTS:
                    self.results.put(
                        GenerationError(
                            f"request {job.request.id!r} failed {_MAX_ATTEMPTS} times, the last "
                            f"time at {endpoint.url}: {said(error)}. Look into that server's log."
                        )
                    )
                    return
                self._jobs.put_nowait(job)
                _mark_down(endpoint, error)
            else:
                endpoint.n_failures = 0
                self.results.put(completion)

    async def _watch(self, http: httpx.AsyncClient, endpoint: _Endpoint) -> None:
        """Try an endpoint that failed, less and less often, until it is up again."""
        while True:
            await endpoint.down.wait()
            n_doublings = min(endpoint.n_failures - 1, 16)  # an endpoint may be down for days
            pause = min(_FIRST_PAUSE * 2**n_doublings, _LONGEST_PAUSE)
            await asyncio.sleep(pause * random.uniform(0.7, 1.0))
            try:
                response = await http.get(f"{endpoint.url}/models", timeout=10.0)
                if response.status_code != 404:
                    self._client.json_of(response)
            except (EndpointError, GenerationError, httpx.TransportError) as error:
                endpoint.n_failures += 1
                endpoint.last_error = said(error)
                self._give_up_if_all_are_down()
            else:
                logger.warning("%s answers again", endpoint.url)
                endpoint.down.clear()
                endpoint.up.set()

    def _give_up_if_all_are_down(self) -> None:
        if all(endpoint.down.is_set() for endpoint in self._endpoints):
            last = max(endpoint.down_since for endpoint in self._endpoints)
            if time.monotonic() - last >= self._client.patience_seconds:
                states = "; ".join(f"{e.url}: {e.last_error}" for e in self._endpoints)
                self.results.put(
                    GenerationError(
                        f"no endpoint of llm_endpoints has answered for "
                        f"{self._client.patience_seconds:.0f} s: {states}. Completions handed out "
                        "before are good; start the servers and start again."
                    )
                )


def _mark_down(endpoint: _Endpoint, error: Exception) -> None:
    """Stop bringing requests to an endpoint; of many failures at one time the first counts."""
    endpoint.last_error = said(error)
    if not endpoint.down.is_set():
        logger.warning("%s fails, its share moves on: %s", endpoint.url, endpoint.last_error)
        endpoint.n_failures += 1
        endpoint.down_since = time.monotonic()
        endpoint.up.clear()
        endpoint.down.set()


def said(error: Exception) -> str:
    """An error in words; httpx leaves some without any."""
    return str(error) or type(error).__name__
