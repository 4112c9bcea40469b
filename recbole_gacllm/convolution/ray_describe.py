"""Answer an exported layer on a Ray cluster: ``describe --export-batch``'s shards in, answers out.

    python ray_describe.py --input batch --output answers --model MODEL_FOLDER --workers 1 8
    python ray_describe.py --input batch --output answers --endpoint http://host:8000/v1

This file is all that the job needs, in an environment with ``ray[llm]`` (``requirements.txt``
beside it); recbole_gacllm is not imported. With ``--model`` alone, Ray Data runs a vLLM engine on
each worker's GPUs; with ``--endpoint``, its workers ask servers. Ray splits the requests among
the workers, adds and removes these between the two numbers of ``--workers``, and gives the share
of one that dies to another. A request that fails is a line with an error and stops nothing.

Answers are written batch by batch, each file whole or not at all. Started again, the job asks only
what has no answer yet in ``--output``, wherever it was stopped. Both folders must be seen by all
machines. API key: environment variable OPENAI_API_KEY of the workers.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import hashlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

_KEY_VARIABLE = "OPENAI_API_KEY"
_TRIES = 8  # of a request, at any endpoint
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries
_SICK_SECONDS = 10.0  # how long an endpoint that failed is asked only if there is no other
_TIMEOUT_SECONDS = 600.0  # of a request, to the last byte of its answer
_MAX_BYTES = 1 << 23  # of an answer
_ERROR_CHARS = 300
# Another number than that of the tasks before, so that Ray does not fuse them into one, whose rows
# it would hand on in one piece.
_OWN_TASKS = {"num_cpus": 0.25}
_RETRIED = frozenset({408, 409, 425, 429})  # and everything from 500 on
_ASKED_AGAIN = (TimeoutError, ValueError, AttributeError, RecursionError)  # no answer, or no JSON
# Of a request's body, what vLLM's SamplingParams knows.
_SAMPLING = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "stop_token_ids"),
)


def request_files(folder: Path) -> list[Path]:
    """The shards of an export, in order."""
    files = sorted(folder.glob("layer-*.jsonl"))
    if not files:
        raise ValueError(
            f"--input {folder}: no layer-….jsonl lies there; write them with "
            "`python -m recbole_gacllm describe … --export-batch`."
        )
    return files


def answered_in(folder: Path) -> set[str]:
    """Ids that have an answer in any file of an output folder; errors and broken lines are none."""
    ids: set[str] = set()
    for file in folder.glob("*.jsonl"):
        with open(file, "rb") as lines:
            for line in lines:
                with suppress(ValueError, KeyError, TypeError, RecursionError):
                    answer = json.loads(line)
                    if answer["error"] is None and answer["response"]["status_code"] == 200:
                        ids.add(answer["custom_id"])
    return ids


def api_key() -> str:
    """The key of the endpoints, without the line end that a file may have given it.

    Raises:
        ValueError: If it cannot stand in a header. The message has no part of it.
    """
    key = os.environ.get(_KEY_VARIABLE, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(f"{_KEY_VARIABLE} holds no key: a key is one line of printable ASCII.")
    return key


def redact(text: str) -> str:
    """A message without the key, and without user names and passwords in addresses."""
    if key := os.environ.get(_KEY_VARIABLE, "").strip():
        text = text.replace(key, "***")
    return re.sub(r"(?<=://)[^\s/'\"<>]+(?=@)", "***", text)


def parse_request(line: str) -> dict[str, str]:
    """A row of the job; the body stays text, as tables have no room for changing fields."""
    request = json.loads(line)
    return {"custom_id": request["custom_id"], "body": json.dumps(request["body"])}


def answer_line(custom_id: str, body: Any = None, error: str = "") -> str:
    """A line of an output file, as vLLM's ``run-batch`` and OpenAI's Batch API write it."""
    response = None if error else {"status_code": 200, "body": body}
    failure = {"message": redact(error)[:_ERROR_CHARS]} if error else None
    return json.dumps({"custom_id": custom_id, "response": response, "error": failure})


def write_answers(rows: Iterable[dict[str, Any]], folder: Path) -> tuple[int, int]:
    """Write a batch's answers to a file, whole or not at all; how many answers and errors.

    The file is named by its ids: a batch that is done twice, since its worker died, leaves one.
    """
    lines, n_errors = {}, 0
    for row in rows:
        error = row.get("__inference_error__")
        line = answer_line(row["custom_id"], error=str(error)) if error else row["line"]
        lines[row["custom_id"]] = line
        n_errors += json.loads(line)["error"] is not None
    name = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="ascii") as file:
        file.writelines(f"{line}\n" for line in lines.values())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / f"answers-{name}.jsonl")
    return len(lines) - n_errors, n_errors


class Endpoints:
    """What Ray's HTTP stage calls for each batch, and uses as it would an aiohttp session.

    Ray's own waits for one request before it sends the next, and a failure ends the job. Here each
    request goes to the endpoint with least to do; one that fails is left alone for a while, and
    its requests go to the others.
    """

    def __init__(self, urls: list[str], in_flight: int) -> None:
        self.urls, self.in_flight = urls, in_flight
        self.n_open = dict.fromkeys(urls, 0)
        self.sick_until = dict.fromkeys(urls, 0.0)

    def __call__(self) -> Self:
        """A session for a batch; what is known of the endpoints is all batches'."""
        return copy.copy(self)

    async def __aenter__(self) -> Self:
        import aiohttp

        key = api_key()
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS),
            connector=aiohttp.TCPConnector(limit=0),
        )
        self._free = asyncio.Semaphore(self.in_flight)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.close()

    def post(self, url: str, headers: object, data: str) -> asyncio.Task[_Answer]:
        """Send a request at once; ``data`` is a row's custom_id and body, as JSON."""
        return asyncio.ensure_future(self._answer(**json.loads(data)))

    async def _answer(self, custom_id: str, body: str) -> _Answer:
        async with self._free:
            for attempt in range(_TRIES):
                if attempt:
                    await asyncio.sleep(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))
                now = time.monotonic()
                healthy = [url for url in self.urls if self.sick_until[url] <= now]
                url = min(healthy or self.urls, key=lambda url: self.n_open[url])
                self.n_open[url] += 1
                status, answer, error = await self._ask(url, body)
                self.n_open[url] -= 1
                if not error:
                    return _Answer(answer_line(custom_id, answer))
                if status and status < 500 and status not in _RETRIED:
                    break
                self.sick_until[url] = time.monotonic() + _SICK_SECONDS
            return _Answer(answer_line(custom_id, error=f"{url}: {error}"))

    async def _ask(self, url: str, body: str) -> tuple[int, Any, str]:
        """Status (0 without a response), answer, and what went wrong."""
        import aiohttp

        content = b""
        try:
            async with self._http.post(
                f"{url}/chat/completions",
                data=body.encode(),
                headers={"Content-Type": "application/json"},
                allow_redirects=False,  # keys and texts are for the endpoints alone
            ) as response:
                async for part in response.content.iter_any():
                    content += part
                    if len(content) > _MAX_BYTES:
                        raise ValueError(f"an answer of more than {_MAX_BYTES} bytes")
                if response.status != 200:
                    text = content.decode("utf-8", "replace")
                    return response.status, None, f"status {response.status}: {text}"
                answer = json.loads(content)
                return 200, answer, "" if answer.get("choices") else f"no choices: {answer}"
        except (aiohttp.ClientError, *_ASKED_AGAIN) as error:
            return 0, None, f"{type(error).__name__}: {error}"


class _Answer:
    """Stands where Ray's HTTP stage expects a response."""

    status, reason = 200, "OK"

    def __init__(self, line: str) -> None:
        self._line = line

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        return None

    async def json(self) -> dict[str, str]:
        """What the row gets."""
        return {"line": self._line}


def http_row(row: dict[str, Any], model: str | None) -> dict[str, Any]:
    """What the HTTP stage sends of a row."""
    body = row["body"]
    if model is not None:
        body = json.dumps({**json.loads(body), "model": model})
    return {"payload": {"custom_id": row["custom_id"], "body": body}}


def engine_row(row: dict[str, Any]) -> dict[str, Any]:
    """What the engine stage takes of a row."""
    body = json.loads(row["body"])
    sampling = {name: body[name] for name in _SAMPLING if name in body}
    return {"messages": body["messages"], "sampling_params": sampling}


def engine_answer(row: dict[str, Any]) -> dict[str, str]:
    """A row of the engine stage as an answer, which Ray gives without its finish reason."""
    body, ids = json.loads(row["body"]), list(row["generated_tokens"])
    ended = bool(ids) and ids[-1] in body.get("stop_token_ids", [])
    finish = "stop" if ended or len(ids) < body["max_tokens"] else "length"
    message = {"role": "assistant", "content": row["generated_text"]}
    answer = {
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": int(row["num_input_tokens"]), "completion_tokens": len(ids)},
    }
    return {"custom_id": row["custom_id"], "line": answer_line(row["custom_id"], answer)}


def processor(args: argparse.Namespace) -> Any:
    """Ray Data's pipeline from rows to answers."""
    from ray.data.llm import HttpRequestProcessorConfig, build_processor, vLLMEngineProcessorConfig

    sizes = {"batch_size": args.batch_size, "concurrency": tuple(args.workers)}
    if args.endpoint:
        model = args.model
        return build_processor(
            HttpRequestProcessorConfig(
                url=args.endpoint[0],
                session_factory=Endpoints(args.endpoint, args.in_flight),
                http_request_stage={"num_cpus": 0.25},  # it waits
                **sizes,
            ),
            preprocess=lambda row: http_row(row, model),
            preprocess_map_kwargs=_OWN_TASKS,
            postprocess=lambda row: {
                "custom_id": row["custom_id"],
                "line": row["http_response"]["line"],
            },
        )
    return build_processor(
        vLLMEngineProcessorConfig(
            model_source=args.model,
            engine_kwargs=json.loads(args.engine_kwargs),
            should_continue_on_error=True,
            **sizes,
        ),
        preprocess=engine_row,
        preprocess_map_kwargs=_OWN_TASKS,
        postprocess=engine_answer,
        builder_kwargs={"chat_template_kwargs": {"enable_thinking": False}},
    )


def check_endpoints(urls: list[str]) -> None:
    """One endpoint must answer; a key that is refused is an answer, and its own error line."""
    errors = []
    for url in urls:
        try:
            urllib.request.urlopen(f"{url}/models", timeout=10).close()
            return
        except urllib.error.HTTPError:
            return
        except (OSError, ValueError) as error:
            errors.append(redact(f"{url}: {error}"))
    raise ValueError(f"no endpoint answers: {'; '.join(errors)}")


def run(args: argparse.Namespace) -> tuple[int, int, int]:
    """Ask what has no answer yet; how many requests had one, new answers, new errors."""
    import numpy as np
    import ray

    files = [str(file) for file in request_files(args.input)]
    args.output.mkdir(parents=True, exist_ok=True)
    if args.endpoint:
        api_key()
        check_endpoints(args.endpoint)
    before = answered_in(args.output)
    ray.init(address=args.address, ignore_reinit_error=True)
    done = ray.put(np.array(sorted(before), dtype=np.str_))
    output = args.output.resolve()

    def unanswered(batch: dict[str, Any]) -> dict[str, Any]:
        rows = [parse_request(line) for line in batch["text"]]
        ids = np.array([row["custom_id"] for row in rows], dtype=np.str_)
        is_left = ~np.isin(ids, ray.get(done))
        names = ("custom_id", "body")
        return {n: [row[n] for row, left in zip(rows, is_left, strict=True) if left] for n in names}

    def write(batch: dict[str, Any]) -> dict[str, Any]:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        n_answers, n_errors = write_answers(rows, output) if rows else (0, 0)
        return {"n_answers": [n_answers], "n_errors": [n_errors]}

    requests = (
        ray.data.read_text(files)
        .map_batches(unanswered, batch_size=4096)
        .repartition(target_num_rows_per_block=args.batch_size)
    )
    counts = list(processor(args)(requests).map_batches(write, batch_size=None).iter_rows())
    n_answers, n_errors = (
        sum(int(row[name]) for row in counts) for name in ("n_answers", "n_errors")
    )
    return len(before), n_answers, n_errors


def main() -> None:
    """Read the command line, run the job, say what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, help="folder of --export-batch")
    add("--output", type=Path, required=True, help="folder for --import-batch")
    add("--model", help="folder or name of the weights; with endpoints, their name")
    add("--endpoint", action="append", metavar="URL", help="http://host:8000/v1; may be repeated")
    add("--workers", type=int, nargs=2, default=(1, 1), metavar=("MIN", "MAX"))
    add("--batch-size", type=int, default=128, help="requests a file of answers")
    add("--in-flight", type=int, default=64, help="a worker's, to the endpoints")
    add("--engine-kwargs", default="{}", help="vLLM's engine arguments, as JSON")
    add("--address", help="of the Ray cluster; default RAY_ADDRESS, or a local one")
    args = parser.parse_args()
    if not args.endpoint and args.model is None:
        parser.error("give --model, --endpoint or both")
    try:
        n_before, n_answers, n_errors = run(args)
    except ValueError as error:
        parser.error(str(error))
    print(f"{n_before} answered before, {n_answers} answered now, {n_errors} failed")
    if n_errors:
        sys.exit("start the job again to ask what failed once more")


if __name__ == "__main__":
    main()
