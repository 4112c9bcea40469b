r"""LLM-based graph convolution of descriptions, layer by layer over the training graph.

.. math::
    T_u^{(l+1)} = LLM(PROMPT_{user}(T_u^{(l)}, \{T_i^{(l)} : i \in N(u)\})), \quad
    T_i^{(l+1)} = LLM(PROMPT_{item}(T_i^{(l)}, \{T_u^{(l)} : u \in N(i)\}))

Source: Du et al., arXiv 2402.08859, LLM-based convolutional inference. Both sides read layer
l; layer l+1 starts when layer l is complete.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from tqdm import tqdm

from recbole_gacllm.convolution.cleaning import CleaningContext, clean
from recbole_gacllm.convolution.layers import SIDES, Layer, Side
from recbole_gacllm.convolution.requests import CHUNK, RequestMaker
from recbole_gacllm.convolution.store import DescriptionStore, Record
from recbole_gacllm.llm.generator import Completion, Request, TextGenerator

logger = logging.getLogger(__name__)

# Finished descriptions a durable write: at least so many and so long after the last one, or many.
_BATCH, _BATCH_SECONDS, _FULL_BATCH = 32, 1.0, 1024


@dataclass
class LayerReport:
    """What a layer took; tokens are of the answers that its descriptions are, whenever made."""

    n_nodes: int = 0  # of both sides
    n_generated: int = 0  # prompts that the LLM answered now, retries not counted
    n_from_store: int = 0  # nodes whose description was there, of another run, import or process
    n_duplicates: int = 0  # nodes whose prompt equals another node's of this layer
    n_retried: int = 0  # nodes whose prompt was asked a second time, at another temperature
    n_failed: int = 0  # nodes that carry the text of the layer below: no answer was usable
    n_nothing_known: int = 0  # nodes without features and neighbours, carried over without a call
    n_truncated: int = 0  # good answers that the length limit cut
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_output_tokens: int = 0
    seconds: float = 0.0  # wall time of the process that finished it
    failures: dict[str, int] = dataclasses.field(default_factory=dict)  # reason -> nodes


class Convolution:
    """Makes layer l+1 from layer l.

    ``open_generator`` loads the engine; it is called only when there is something to generate.
    """

    def __init__(
        self,
        maker: RequestMaker,
        store: DescriptionStore,
        open_generator: Callable[[], TextGenerator],
        show_progress: bool,
    ) -> None:
        self.maker, self.store, self.open_generator = maker, store, open_generator
        self._show_progress = show_progress
        self._generator: TextGenerator | None = None

    def close(self) -> None:
        """Free the engine, if one was loaded."""
        if self._generator is not None:
            self._generator.close()
            self._generator = None

    def missing_requests(
        self, below: Layer, nothing_known: dict[Side, str], number: int
    ) -> Iterator[Request]:
        """First attempts at the descriptions of a layer that are not in the store, each once.

        Arguments are those of :meth:`next_layer`. No engine is loaded.
        """
        named: set[str] = set()
        for _, _, request, record in self._looked_up(below, nothing_known, number):
            if request is not None and record is None and request.id not in named:
                named.add(request.id)
                yield request

    def next_layer(
        self, below: Layer, nothing_known: dict[Side, str], number: int
    ) -> tuple[Layer, LayerReport]:
        """Rewrite every node's description from its own and its neighbours': layer ``number``.

        A node without features, whose text is ``nothing_known``, and without neighbours is carried
        over, as there is nothing to ask the LLM about.

        Raises:
            GenerationError: If the engine fails; finished descriptions are in the store.
            StoreError: If they cannot be stored.
        """
        started = time.perf_counter()
        report = LayerReport(n_nodes=sum(len(below.tokens[side]) for side in SIDES))
        above = Layer.raw(below.tokens, {side: list(below.texts[side]) for side in SIDES})
        above.statuses = {side: ["nothing_known"] * len(below.tokens[side]) for side in SIDES}
        waiting: dict[str, tuple[Request, list[tuple[Side, int]]]] = {}  # and its nodes
        done: set[str] = set()
        bar = tqdm(
            total=report.n_nodes,
            desc=f"layer {number}",
            unit="desc",
            smoothing=0.05,
            disable=not self._show_progress,
        )

        def settle(record: Record, nodes: list[tuple[Side, int]]) -> None:
            if record.key not in done:
                done.add(record.key)
                report.n_prompt_tokens += record.n_prompt_tokens
                report.n_cached_tokens += record.n_cached_tokens
                report.n_output_tokens += record.n_output_tokens
            for side, node in nodes:
                if record.status == "ok":
                    above.texts[side][node], above.statuses[side][node] = record.text, "generated"
                else:  # it keeps the text of the layer below
                    above.statuses[side][node] = "failed"
                    above.reasons[side][node] = record.reason
                above.n_prompt_tokens[side][node] = record.n_prompt_tokens
                above.n_output_tokens[side][node] = record.n_output_tokens
            report.n_retried += len(nodes) * (record.n_attempts > 1)
            if record.status == "failed":
                report.n_failed += len(nodes)
                report.failures[record.reason] = report.failures.get(record.reason, 0) + len(nodes)
            elif record.finish_reason == "length":
                report.n_truncated += len(nodes)
            bar.update(len(nodes))

        def requests() -> Iterator[Request]:
            """Prompts that are not in the store, each once; what is in it settles at once."""
            for side, node, request, record in self._looked_up(below, nothing_known, number):
                if request is None:
                    report.n_nothing_known += 1
                    bar.update(1)
                elif request.id in waiting:
                    waiting[request.id][1].append((side, node))
                    report.n_duplicates += 1
                elif request.id in done:  # maybe since it was looked up
                    record = record or self.store.get_many([request.id])[request.id]
                    report.n_duplicates += 1
                    settle(record, [(side, node)])
                elif record is not None:
                    report.n_from_store += 1
                    settle(record, [(side, node)])
                else:
                    waiting[request.id] = request, [(side, node)]
                    yield request

        finished: list[Record] = []
        written, n_new_tokens = started, 0

        def write() -> None:
            """Durable first, then settled: nothing counts before it is on disk."""
            nonlocal written
            self.store.put_many(finished)
            report.n_generated += len(finished)
            # Another run may have stored a key first; then its text is the one that stays.
            stored = self.store.get_many([record.key for record in finished])
            for key, record in stored.items():
                settle(record, waiting.pop(key)[1])
            finished.clear()
            written = time.perf_counter()

        to_retry: deque[str] = deque()
        retried: set[str] = set()

        def feed(first_attempts: Iterator[Request]) -> Iterator[Request]:
            """First attempts, and retries among them as soon as one is called for."""
            for request in chain(first_attempts, [None]):
                while to_retry:
                    yield self.maker.retry_of(waiting[to_retry.popleft()][0])
                if request is not None:
                    yield request

        first_attempts = requests()
        # Twice: what failed while the last answers came; rarely more than a few.
        completions = (self._stream(feed(first_attempts)) for _ in range(2))
        try:
            for completion in chain.from_iterable(completions):
                key = completion.id
                n_new_tokens += completion.n_output_tokens
                now = time.perf_counter()
                rate = n_new_tokens / max(now - started, 1e-9)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", False)
                context = self.maker.context_of(waiting[key][0])
                record = record_of(completion, context, 1 + (key in retried))
                if record.status == "failed" and record.n_attempts == 1:
                    retried.add(key)
                    to_retry.append(key)
                    continue
                finished.append(record)
                is_due = len(finished) >= _BATCH and now - written >= _BATCH_SECONDS
                if is_due or len(finished) >= _FULL_BATCH:
                    write()
        finally:
            write()
        bar.close()
        assert not waiting, f"{len(waiting)} prompts were never answered"
        report.seconds = round(time.perf_counter() - started, 2)
        return above, report

    def _looked_up(
        self, below: Layer, nothing_known: dict[Side, str], number: int
    ) -> Iterator[tuple[Side, int, Request | None, Record | None]]:
        """Every node's request, if there is something to ask, and its record, if it is stored."""
        prompts = self.maker.prompts(below, nothing_known, number)
        while chunk := list(islice(prompts, CHUNK)):
            requests = [
                None if messages is None else self.maker.request(messages, number)
                for _, _, messages in chunk
            ]
            records = self.store.get_many([request.id for request in requests if request])
            for (side, node, _), request in zip(chunk, requests, strict=True):
                yield side, node, request, records.get(request.id) if request else None

    def _stream(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions of all requests; the engine is loaded when the first request comes."""
        requests = iter(requests)
        first = next(requests, None)
        if first is None:
            return
        if self._generator is None:
            self._generator = self.open_generator()
        yield from self._generator.generate(chain([first], requests))


def record_of(completion: Completion, context: CleaningContext, attempt: int) -> Record:
    """A completion cleaned and judged; one that is no answer has failed as ``malformed``.

    Its id is the address of the description; ``attempt`` is 1, or 2 for a retry.
    """
    cleaned = clean(completion.text, completion.finish_reason, context)
    problem = "malformed" if completion.problem else cleaned.problem
    return Record(
        key=completion.id,
        text=cleaned.text,
        status="failed" if problem else "ok",
        reason=problem or "",
        finish_reason=completion.finish_reason,
        n_prompt_tokens=completion.n_prompt_tokens,
        n_cached_tokens=completion.n_cached_tokens,
        n_output_tokens=completion.n_output_tokens,
        n_attempts=attempt,
    )
