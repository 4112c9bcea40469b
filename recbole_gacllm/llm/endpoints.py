"""How endpoints are spoken to over HTTP: whole answers in time and of bounded size, or an error.

Certificates are checked and redirects are not followed: keys and texts are for the endpoints alone.
No error shows a key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from recbole_gacllm.llm.generator import Completion, Request
from recbole_gacllm.redaction import redact

_MAX_BYTES: Final = 1 << 23  # of an answer; the longest completions take some hundred kilobytes
_MAX_ERROR_BYTES: Final = 1 << 16  # what is read of a refusal
_CHECK_SECONDS: Final = 10.0  # whether an endpoint is there


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

    request: Request
    n_prompt_tokens: int
    n_failures: int = 0
    n_odd: int = 0


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered, read to its end; of a refusal, the beginning."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Client:
    """How endpoints are spoken to.

    Attributes:
        urls: Base URLs.
        headers: Of every request.
        concurrency: Requests under way at one endpoint.
        patience_seconds: How long all endpoints may be down at once.
        timeout_seconds: How long one answer may take, from the request to its last byte.
        body: What to post for a request.
        json_of: The JSON of a reply; raises EndpointError or GenerationError.
        completion_of: The completion in that JSON; raises EndpointError.
    """

    urls: Sequence[str]
    headers: dict[str, str] = field(repr=False)
    concurrency: int
    patience_seconds: float
    timeout_seconds: float
    body: Callable[[Request], dict[str, Any]]
    json_of: Callable[[Reply], Any]
    completion_of: Callable[[Job, Any], Completion]

    async def models(self, http: httpx.AsyncClient, url: str) -> Any:
        """What an endpoint says it serves; None of a gateway that does not say."""
        reply = await fetch(http, "GET", f"{url}/models", _CHECK_SECONDS)
        return None if reply.status == 404 else self.json_of(reply)

    def open(self) -> httpx.AsyncClient:
        """A client of all endpoints. It checks certificates and follows no redirects."""
        limits = httpx.Limits(
            max_connections=None,
            max_keepalive_connections=self.concurrency * len(self.urls),
            keepalive_expiry=60.0,
        )
        timeout = httpx.Timeout(self.timeout_seconds, connect=10.0, pool=None)
        return httpx.AsyncClient(headers=self.headers, timeout=timeout, limits=limits)


async def fetch(
    http: httpx.AsyncClient, method: str, url: str, seconds: float, content: Any = None
) -> Reply:
    """Send a request and read the answer, for so many seconds in all.

    Raises:
        EndpointError: If there is none in time.
    """
    body = bytearray()
    try:
        async with (
            asyncio.timeout(seconds),
            http.stream(method, url, json=content) as response,
        ):
            is_good = response.status_code == 200
            async for part in response.aiter_bytes():
                body += part
                if len(body) > _MAX_BYTES and is_good:
                    raise OddAnswerError(f"an answer of more than {_MAX_BYTES >> 20} MiB")
                if len(body) > _MAX_ERROR_BYTES and not is_good:
                    break
            return Reply(url, response.status_code, response.headers, bytes(body))
    except TimeoutError:
        raise EndpointError(f"no whole answer within {seconds:g} s") from None
    except httpx.DecodingError as error:
        raise OddAnswerError(said(error)) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EndpointError(said(error)) from None


def said(error: Exception) -> str:
    """An error in words, without keys; httpx leaves some without any words."""
    return redact(str(error)) or type(error).__name__
