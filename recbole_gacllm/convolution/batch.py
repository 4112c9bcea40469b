"""The prompts of a layer as files that any cluster answers, and the files of its answers.

Requests are in the batch format of OpenAI and of vLLM's ``run-batch``, one JSON object a line, in
shards; ``custom_id`` is the address of the description in the store. Answers come back in the
format's other half, in any order, in parts and more than once: they are matched on ``custom_id``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from recbole_gacllm.artifacts import disk
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.redaction import redact

logger = logging.getLogger(__name__)

BATCH_FILE = "batch.json"
_SECOND = "-2"  # after the address: the second attempt, at another temperature
_ID = re.compile(r"([0-9a-f]{64})(-2)?")
_SHARD = re.compile(r"layer-\d+-\d{5,}\.jsonl")


def custom_id(key: str, attempt: int) -> str:
    """The name of a request: the address of its description, and which attempt it is."""
    return key + _SECOND if attempt == 2 else key


def request_line(name: str, body: dict[str, Any]) -> str:
    """One request of a batch file."""
    line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line) + "\n"


def write_shards(folder: Path, layer: int, lines: Iterable[str], shard_size: int) -> list[Path]:
    """Write request lines as ``layer-1-00000.jsonl``, … in place of an earlier export's shards.

    Each file is there whole or not at all; one line is in memory at a time.

    Raises:
        GaCLLMError: If a file cannot be written.
    """
    shards: list[Path] = []
    lines = iter(lines)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BATCH_FILE).unlink(missing_ok=True)
        for old in folder.iterdir():
            if _SHARD.fullmatch(old.name):
                old.unlink()
        while (first := next(lines, None)) is not None:
            path = folder / f"layer-{layer}-{len(shards):05d}.jsonl"
            with disk.atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as file:
                file.writelines(chain([first], islice(lines, shard_size - 1)))
            shards.append(path)
    except OSError as error:
        raise GaCLLMError(
            f"--export-batch {folder}: cannot be written ({error}). Free space or rights there, "
            "or give another folder, and start again."
        ) from error
    return shards


def answer_files(paths: Iterable[Path]) -> list[Path]:
    """Files of answers: those named, and all ``.jsonl`` and ``.json`` files in folders named.

    Request shards and manifests of an export are left out, so that answers may lie beside them.

    Raises:
        ValueError: If a path is not there, or no file is found.
    """
    files: list[Path] = []
    paths = list(paths)
    for path in paths:
        if path.is_dir():
            inside = [file for pattern in ("*.jsonl", "*.json") for file in path.rglob(pattern)]
            files += sorted(
                file
                for file in inside
                if not _SHARD.fullmatch(file.name)
                and file.name != BATCH_FILE
                and not file.name.startswith(".")
            )
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"--import-batch {path}: there is no such file or folder.")
    if not files:
        raise ValueError(
            f"--import-batch {', '.join(map(str, paths))}: no .jsonl or .json file of answers lies "
            "there. Give the folder or the files that the batch job wrote."
        )
    return files


@dataclass
class Answers:
    """What files of answers hold, by id; the texts stay on disk."""

    files: list[Path]
    n_lines: int = 0  # that are not blank
    n_damaged: int = 0  # lines that cannot be read, such as the last one of a job that was killed
    n_duplicates: int = 0  # good answers to a request that has one already; the first counts
    errors: dict[str, str] = field(default_factory=dict)  # why a request without any answer failed
    _place: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, files: list[Path]) -> Answers:
        """Index files of answers; a ValueError names one that cannot be read."""
        answers = cls(files)
        for number, file in enumerate(files):
            try:
                answers._index(number, file)
            except OSError as error:
                raise ValueError(f"--import-batch {file} cannot be read: {error}") from error
        return answers

    def _index(self, number: int, file: Path) -> None:
        n_damaged = 0
        with open(file, "rb") as lines:
            offset = 0
            for line in lines:
                here, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                self.n_lines += 1
                try:
                    name, _, reason = _read_line(line)
                except (ValueError, RecursionError):
                    n_damaged += 1
                    continue
                if reason:
                    if name not in self._place:
                        self.errors[name] = reason
                elif name in self._place:
                    self.n_duplicates += 1
                else:
                    self._place[name] = number, here
                    self.errors.pop(name, None)
        if n_damaged:
            logger.warning("%s: %d lines cannot be read and are left out", file, n_damaged)
        self.n_damaged += n_damaged

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def __iter__(self) -> Iterator[str]:
        """Ids that have an answer."""
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def body(self, name: str) -> Any:
        """What answers a request: a chat completion, or whatever else stands in its place."""
        number, offset = self._place[name]
        with open(self.files[number], "rb") as file:
            file.seek(offset)
            return _read_line(file.readline())[1]


def key_of(name: str) -> str | None:
    """The address in an id, or None if the id is not one of ours."""
    match = _ID.fullmatch(name)
    return match[1] if match else None


def _read_line(line: bytes) -> tuple[str, Any, str]:
    """The id and the body of a line; of a failed request, the reason.

    Raises:
        ValueError: If the line is not an answer.
    """
    answer = json.loads(line)
    if not isinstance(answer, dict) or not isinstance(answer.get("custom_id"), str):
        raise ValueError("no custom_id")
    if "response" not in answer and "error" not in answer:
        raise ValueError("neither response nor error: a request?")
    response = answer.get("response") or {}
    if not isinstance(response, dict):
        raise ValueError("the response is not an object")
    status, body = response.get("status_code"), response.get("body")
    if not answer.get("error") and status == 200:
        return answer["custom_id"], body, ""
    reason = redact(str(answer.get("error") or f"status {status}: {body}"))
    return answer["custom_id"], None, reason[:300]
