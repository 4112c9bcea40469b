"""A layer's prompts out to a cluster, and its answers back into the description store.

A request's id is the address under which the run that exported it looks its description up,
whatever ``llm_backend`` the run has. So the run finds answers as if it had made them, and who
answers vouches that the weights are those which ``batch.json`` names.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from recbole_gacllm.artifacts import disk, manifests
from recbole_gacllm.convolution import setup
from recbole_gacllm.convolution.batch import (
    BATCH_FILE,
    Answers,
    answer_files,
    custom_id,
    key_of,
    request_line,
    write_shards,
)
from recbole_gacllm.convolution.cleaning import CleaningContext
from recbole_gacllm.convolution.convolution import Convolution, record_of
from recbole_gacllm.convolution.store import DescriptionStore, Record
from recbole_gacllm.job import Job
from recbole_gacllm.llm.chat_api import chat_body, completion_of, no_completion
from recbole_gacllm.llm.engines import choose_backend
from recbole_gacllm.llm.generator import Request
from recbole_gacllm.redaction import redact

logger = logging.getLogger(__name__)

# What a cluster needs besides the shards, and what it is called there.
_JOB_FILES = {"ray_describe.py": "ray_describe.py", "ray_requirements.txt": "requirements.txt"}
_BATCH = 512  # records a durable write
_MAX_ODD = 20  # answers that are none, if no other one is: then it is not the requests


@dataclass
class LayerAnswers:
    """What an import did for one layer. The first five add up to the prompts that were missing."""

    layer: int
    n_imported: int = 0  # descriptions that are now in the store
    n_failed: int = 0  # prompts whose second answer was none, too: the node keeps its text
    n_to_retry: int = 0  # prompts whose answer was no description; the next export asks again
    n_errors: int = 0  # requests that the batch job reports as failed
    n_unanswered: int = 0  # prompts without any answer
    n_odd: int = 0  # of the answers, those that are no chat completion; they are no description

    @property
    def n_missing(self) -> int:
        """Prompts that the layer still lacks."""
        return self.n_to_retry + self.n_errors + self.n_unanswered


@dataclass
class Imported:
    """What an import did; of the lines, see :class:`Answers`."""

    layers: list[LayerAnswers]  # that were incomplete, from below, up to the first that still is
    complete: bool  # whether all layers of the run are in the store now
    n_lines: int
    n_damaged: int
    n_duplicates: int
    n_known: int  # answers to prompts that the store had before; nothing of it is changed
    n_unknown: int  # answers to no prompt of this run up to its first incomplete layer


def export_batch(job: Job, to: Path, shard_size: int) -> dict[str, Any] | None:
    """Write what the first incomplete layer lacks as request shards, with job and ``batch.json``.

    Returns:
        What ``batch.json`` says; None if the store has all layers.

    Raises:
        ValueError: If the token budget does not fit the model.
        GaCLLMError: If the store or the shards cannot be read or written.
    """
    with manifests.stage_lock(job.folder), DescriptionStore(job.store) as store:
        layers = _Layers(job, store)
        requests = layers.missing()
        if requests is None:
            return None
        maker = layers.convolution.maker
        second = layers.to_retry()
        counts = {"n_requests": 0, "n_second_attempts": 0}

        def lines() -> Iterator[str]:
            for request in requests:
                attempt = 2 if request.id in second else 1
                counts["n_requests"] += 1
                counts["n_second_attempts"] += attempt == 2
                if attempt == 2:
                    request = maker.retry_of(request)
                body = chat_body(request, maker.tokenizer, job.served_model)
                yield request_line(custom_id(request.id, attempt), body)

        shards = write_shards(to, layers.number, lines(), shard_size)
        for name, name_there in _JOB_FILES.items():
            shutil.copy(Path(__file__).with_name(name), to / name_there)
        manifest = {
            "layer": layers.number,
            "n_layers": layers.n_layers,
            **counts,
            "shards": [shard.name for shard in shards],
            "model": job.served_model,
            "model_dir": str(job.model_dir),
            "adapter_dir": job.adapter_dir and str(job.adapter_dir),
            "generator": job.generator_key,
        }
        text = json.dumps(manifest, indent=2) + "\n"
        disk.write_atomic(to / BATCH_FILE, text.encode())
        return manifest


def import_batch(job: Job, paths: list[Path]) -> Imported:
    """Put answers of files and folders into the store, cleaned and judged as the stage does.

    They are looked for layer by layer, up to the first layer that still lacks some.

    Raises:
        ValueError: If there are none, or one cannot be read.
        GaCLLMError: If the store cannot be read or written.
    """
    answers = Answers.read(answer_files(paths))
    reports: list[LayerAnswers] = []
    added: set[str] = set()  # ids of answers that were looked at
    with manifests.stage_lock(job.folder), DescriptionStore(job.store) as store:
        layers = _Layers(job, store)
        second = layers.to_retry()
        while (requests := layers.missing()) is not None:
            report = LayerAnswers(layers.number)
            reports.append(report)
            records: list[Record] = []
            try:
                for request in requests:
                    context = layers.convolution.maker.context_of(request)
                    record = _record(request, context, answers, report, second, added)
                    _check_odd(report)
                    if record is not None:
                        records.append(record)
                    if len(records) == _BATCH:
                        store.put_many(records)
                        records = []
            finally:
                store.put_many(records)  # what is good stays, whatever comes after it
            if report.n_missing:
                break
        layers.write_to_retry(second)
        n_known = n_unknown = 0
        for name in chain(answers, answers.errors):
            if name not in added:
                key = key_of(name)
                is_stored = key is not None and bool(store.get_many([key]))
                n_known += is_stored
                n_unknown += not is_stored
    return Imported(
        layers=reports,
        complete=requests is None,
        n_lines=answers.n_lines,
        n_damaged=answers.n_damaged,
        n_duplicates=answers.n_duplicates,
        n_known=n_known,
        n_unknown=n_unknown,
    )


def _record(
    request: Request,
    context: CleaningContext,
    answers: Answers,
    report: LayerAnswers,
    second: set[str],
    added: set[str],
) -> Record | None:
    """What the store is to hold for a prompt, if an answer settles it."""
    names = {attempt: custom_id(request.id, attempt) for attempt in (1, 2)}
    added.update(names.values())
    error = any(name in answers.errors for name in names.values())
    for attempt, name in names.items():
        if name not in answers:
            continue
        try:
            completion = completion_of(request.id, answers.body(name))
        except ValueError as reason:
            logger.warning("request %s: %s", name, redact(str(reason)))
            completion = no_completion(request.id, str(reason))
            report.n_odd += 1
        record = record_of(completion, context, attempt)
        if record.status == "ok" or attempt == 2:
            report.n_imported += record.status == "ok"
            report.n_failed += record.status == "failed"
            return record
        second.add(request.id)
    if error:
        report.n_errors += 1
    elif request.id in second and names[1] in answers:
        report.n_to_retry += 1
    else:
        report.n_unanswered += 1
    return None


def _check_odd(report: LayerAnswers) -> None:
    """Refuse files of something else, before all prompts have failed by them.

    Raises:
        ValueError: If many answers are none, and no other one is a chat completion.
    """
    n_good = report.n_imported + report.n_failed + report.n_to_retry - report.n_odd
    if report.n_odd >= _MAX_ODD and n_good <= 0:
        raise ValueError(
            f"--import-batch: the first {report.n_odd} answers are no chat completions, see the "
            "log above. Answers are lines of OpenAI's batch format, with choices, finish_reason "
            "and usage; mend what writes them and import again."
        )


class _Layers:
    """The layers of a run, as far as the store has them.

    Attributes:
        number: The first layer that is incomplete, once :meth:`missing` has found it.
        n_layers: Of the run.
    """

    def __init__(self, job: Job, store: DescriptionStore) -> None:
        self._job, self._store = job, store
        self._retry_file = job.folder / "second_attempts.txt"
        self._graph, self._layer = setup.inputs_of(job)
        self._imported = setup.imported_of(job)
        self.number, self.n_layers = 1, job.options.n_text_layers

    def missing(self) -> Iterator[Request] | None:
        """First attempts that the first incomplete layer lacks; None if no layer lacks any."""
        nothing_known = setup.nothing_known_of(self._job.options)
        while self.number <= self.n_layers:
            if self._imported is not None and self.number in self._imported.layers:
                self._layer = self._imported.fill(self.number, self._layer)
            else:
                requests = self.convolution.missing_requests(
                    self._layer, nothing_known, self.number
                )
                if (first := next(requests, None)) is not None:
                    return chain([first], requests)
                self._layer, _ = self.convolution.next_layer(
                    self._layer, nothing_known, self.number
                )
            self.number += 1
        return None

    @cached_property
    def convolution(self) -> Convolution:
        """The run's; it loads no engine, as it is never asked for a layer that lacks something."""
        backend, _ = choose_backend(self._job.options.llm_backend)
        return setup.convolution_of(self._job, self._graph, self._store, backend)

    def to_retry(self) -> set[str]:
        """Addresses whose first attempt gave no usable text."""
        file = self._retry_file
        return set(file.read_text("ascii").split()) if file.is_file() else set()

    def write_to_retry(self, keys: set[str]) -> None:
        """Keep these addresses for the next export."""
        text = "".join(f"{key}\n" for key in sorted(keys))
        disk.write_atomic(self._retry_file, text.encode())
