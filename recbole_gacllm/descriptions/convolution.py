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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from recbole_gacllm import artifacts
from recbole_gacllm.descriptions.cleaning import CLEANING_VERSION, CleaningContext, clean
from recbole_gacllm.descriptions.layers import SIDES, Layer, Side
from recbole_gacllm.descriptions.neighbors import NeighborLists, TrainGraph, select_neighbors
from recbole_gacllm.descriptions.neutralize import neutralize
from recbole_gacllm.descriptions.prompts import PromptRenderer, PromptTemplates
from recbole_gacllm.descriptions.store import DescriptionStore, Record
from recbole_gacllm.llm.generator import Completion, Message, Request, Sampling, TextGenerator

logger = logging.getLogger(__name__)

RETRY_TEMPERATURE = 0.7
_CHUNK = 512  # nodes rendered and looked up in the store at once
_BATCH = 32  # finished descriptions a durable write


class Tokenizer(Protocol):
    """What the convolution asks of a model's tokenizer."""

    special_tokens: frozenset[str]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text on its own."""
        ...

    def truncate(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """Each text cut to a number of tokens."""
        ...


def renderer_for(
    templates: PromptTemplates, tokenizer: Tokenizer, max_prompt_tokens: int
) -> PromptRenderer:
    """A renderer that knows what the model's chat template adds to a prompt.

    Raises:
        ValueError: If the token budget is below the instruction.
    """
    probe = templates.messages("user", "", [])
    contents = [message["content"] for message in probe]
    chat_tokens = len(tokenizer.encode_chat(probe)) - sum(tokenizer.count_tokens(contents))
    return PromptRenderer(templates, tokenizer.count_tokens, max(chat_tokens, 0), max_prompt_tokens)


@dataclass(frozen=True)
class ConvolutionOptions:
    """Keys of ``GaCLLM.yaml`` without their ``llm_`` prefix, and RecBole's seed."""

    neighbor_rule: Any
    n_neighbors: int
    max_prompt_tokens: int
    max_neighbor_tokens: int
    sampling: Sampling
    seed: int
    show_progress: bool


@dataclass
class LayerReport:
    """What one layer took. Tokens are those of this layer's records, from the store or new.

    Attributes:
        n_nodes: Nodes of both sides.
        n_generated: Prompts that the LLM answered in this run, retries not counted.
        n_from_store: Nodes whose description an earlier process had made.
        n_duplicates: Nodes whose prompt equals another node's of this layer.
        n_retried: Prompts asked a second time, at another temperature.
        n_failed: Nodes that carry the text of the layer below because no answer was usable.
        n_nothing_known: Nodes without features and neighbours, carried over without a call.
        n_truncated: Good answers that the length limit cut.
        n_prompt_tokens, n_cached_tokens, n_output_tokens: Of answers generated in this run.
        seconds: Wall time.
        failures: Reason -> count, over nodes.
    """

    n_nodes: int = 0
    n_generated: int = 0
    n_from_store: int = 0
    n_duplicates: int = 0
    n_retried: int = 0
    n_failed: int = 0
    n_nothing_known: int = 0
    n_truncated: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_output_tokens: int = 0
    seconds: float = 0.0
    failures: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass
class _Waiting:
    """A prompt under way and the nodes that wait for its description."""

    messages: tuple[Message, ...]
    nodes: list[tuple[Side, int]]


class Convolution:
    """Makes layer l+1 from layer l.

    Args:
        graph: Training edges; its order of nodes is that of every layer.
        templates: Prompt files.
        tokenizer: Of the model that generates.
        store: Finished descriptions of all runs.
        generator_key: What identifies the weights that generate: fingerprints, not names.
        open_generator: Loads the engine; called only when there is something to generate.
        options: See :class:`ConvolutionOptions`.

    Raises:
        ValueError: If the token budget is below the instruction, or the rule does not fit the data.
    """

    def __init__(
        self,
        graph: TrainGraph,
        templates: PromptTemplates,
        tokenizer: Tokenizer,
        store: DescriptionStore,
        generator_key: dict[str, Any],
        open_generator: Callable[[], TextGenerator],
        options: ConvolutionOptions,
    ) -> None:
        self.graph, self.templates, self.tokenizer = graph, templates, tokenizer
        self.store, self.options = store, options
        self.open_generator = open_generator
        self._generator: TextGenerator | None = None
        self.renderer = renderer_for(templates, tokenizer, options.max_prompt_tokens)
        self.neighbors: dict[Side, NeighborLists] = {
            side: select_neighbors(
                graph, side, options.neighbor_rule, options.n_neighbors, options.seed
            )
            for side in SIDES
        }
        self._key_of_all = {
            "generator": generator_key,
            "prompts": templates.version(),
            "cleaning": CLEANING_VERSION,
        }

    def close(self) -> None:
        """Free the engine, if one was loaded."""
        if self._generator is not None:
            self._generator.close()
            self._generator = None

    def next_layer(
        self, below: Layer, nothing_known: dict[Side, str], number: int
    ) -> tuple[Layer, LayerReport]:
        """Rewrite every node's description from its own and its neighbours'.

        Args:
            below: Layer l.
            nothing_known: Text of a node without features; such a node without neighbours is
                carried over, as there is nothing to ask the LLM about.
            number: Of the layer that is made, from 1.

        Raises:
            GenerationError: If the engine fails; finished descriptions are in the store.
            StoreError: If they cannot be stored.
        """
        started = time.perf_counter()
        report = LayerReport(n_nodes=sum(len(below.tokens[side]) for side in SIDES))
        above = Layer.raw(below.tokens, {side: list(below.texts[side]) for side in SIDES})
        above.statuses = {side: ["nothing_known"] * len(below.tokens[side]) for side in SIDES}
        waiting: dict[str, _Waiting] = {}
        done: set[str] = set()
        bar = tqdm(
            total=report.n_nodes,
            desc=f"layer {number}",
            unit="desc",
            smoothing=0.05,
            disable=not self.options.show_progress,
        )

        def settle(record: Record, nodes: list[tuple[Side, int]]) -> None:
            for side, node in nodes:
                _settle(above, side, node, record)
            if record.status == "failed":
                report.n_failed += len(nodes)
                report.failures[record.reason] = report.failures.get(record.reason, 0) + len(nodes)
            elif record.finish_reason == "length":
                report.n_truncated += len(nodes)
            bar.update(len(nodes))

        def requests() -> Iterator[Request]:
            """Prompts that are not in the store, each once; what is in it settles at once."""
            prompts = self._prompts(below, nothing_known, number, report, bar)
            while chunk := list(islice(prompts, _CHUNK)):
                keys = [self._key(messages) for _, _, messages in chunk]
                records = self.store.get_many(keys)
                for key, (side, node, messages) in zip(keys, chunk, strict=True):
                    if key in waiting:
                        waiting[key].nodes.append((side, node))
                        report.n_duplicates += 1
                    elif key in records or key in done:
                        record = records.get(key) or self.store.get_many([key])[key]
                        report.n_duplicates += key in done
                        report.n_from_store += key not in done
                        settle(record, [(side, node)])
                    else:
                        waiting[key] = _Waiting(messages, [(side, node)])
                        yield Request(key, messages, self._sampling(key))

        finished: list[Record] = []

        def write() -> None:
            """Durable first, then settled: nothing counts before it is on disk."""
            self.store.put_many(finished)
            for record in finished:
                done.add(record.key)
                settle(record, waiting.pop(record.key).nodes)
            finished.clear()

        to_retry: deque[str] = deque()
        retried: set[str] = set()

        def feed(first_attempts: Iterator[Request]) -> Iterator[Request]:
            """First attempts, and retries among them as soon as one is called for."""
            for request in chain(first_attempts, [None]):
                while to_retry:
                    key = to_retry.popleft()
                    yield Request(key, waiting[key].messages, self._retry_sampling(key))
                if request is not None:
                    yield request

        def take(completion: Completion) -> None:
            key = completion.id
            report.n_prompt_tokens += completion.n_prompt_tokens
            report.n_cached_tokens += completion.n_cached_tokens
            report.n_output_tokens += completion.n_output_tokens
            seconds = max(time.perf_counter() - started, 1e-9)
            bar.set_postfix_str(f"{report.n_output_tokens / seconds:.0f} tokens/s", False)
            record = self._record(completion, waiting[key].messages, 1 + (key in retried))
            report.n_generated += record.n_attempts == 1
            if record.status == "failed" and record.n_attempts == 1:
                retried.add(key)
                to_retry.append(key)
                return
            finished.append(record)
            if len(finished) >= _BATCH:
                write()

        first_attempts = requests()
        try:
            for completion in self._stream(feed(first_attempts)):
                take(completion)
            # What failed while the last answers came; rarely more than a few.
            for completion in self._stream(feed(first_attempts)):
                take(completion)
        finally:
            write()
        report.n_retried = len(retried)
        bar.close()
        assert not waiting, f"{len(waiting)} prompts were never answered"
        report.seconds = round(time.perf_counter() - started, 2)
        return above, report

    def _prompts(
        self,
        below: Layer,
        nothing_known: dict[Side, str],
        number: int,
        report: LayerReport,
        bar: Any,
    ) -> Iterator[tuple[Side, int, tuple[Message, ...]]]:
        """Every node's prompt, rendered when it is asked for."""
        special = self.tokenizer.special_tokens
        limit = self.options.max_neighbor_tokens
        safe = {side: [neutralize(text, special) for text in below.texts[side]] for side in SIDES}
        as_neighbor = {side: self.tokenizer.truncate(safe[side], limit) for side in SIDES}
        neighbor_counts = {
            side: np.asarray(self.tokenizer.count_tokens(as_neighbor[side])) for side in SIDES
        }
        for side in SIDES:
            other: Side = "item" if side == "user" else "user"
            own = self.tokenizer.truncate(safe[side], self.renderer.own_text_limit(side, number))
            own_counts = self.tokenizer.count_tokens(own)
            for node in range(len(own)):
                around = self.neighbors[side].of(node)
                if len(around) == 0 and below.texts[side][node] == nothing_known[side]:
                    report.n_nothing_known += 1
                    bar.update(1)
                    continue
                yield (
                    side,
                    node,
                    self.renderer.render(
                        side,
                        own[node],
                        own_counts[node],
                        [as_neighbor[other][neighbor] for neighbor in around],
                        neighbor_counts[other][around].tolist(),
                        number,
                    ),
                )

    def _stream(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions of all requests; the engine is loaded when the first request comes."""
        requests = iter(requests)
        first = next(requests, None)
        if first is None:
            return
        if self._generator is None:
            self._generator = self.open_generator()
        yield from self._generator.generate(chain([first], requests))

    def _key(self, messages: tuple[Message, ...]) -> str:
        """Address of the description that this prompt gives."""
        sampling = dataclasses.asdict(self.options.sampling)
        if sampling["temperature"] > 0:
            sampling["seed"] = self.options.seed
        return artifacts.fingerprint(
            {**self._key_of_all, "sampling": sampling, "messages": [dict(m) for m in messages]}
        )

    def _sampling(self, key: str) -> Sampling:
        """Drawn with a seed of the prompt's own, so that order does not matter."""
        return dataclasses.replace(self.options.sampling, seed=int(key[:8], 16))

    def _retry_sampling(self, key: str) -> Sampling:
        return dataclasses.replace(
            self._sampling(key),
            temperature=max(RETRY_TEMPERATURE, self.options.sampling.temperature),
            seed=int(key[8:16], 16),
        )

    def _record(
        self, completion: Completion, messages: tuple[Message, ...], attempt: int
    ) -> Record:
        prompt = "\n".join(message["content"] for message in messages)
        cleaned = clean(completion.text, completion.finish_reason, CleaningContext(prompt))
        return Record(
            key=completion.id,
            text=cleaned.text,
            status="failed" if cleaned.problem else "ok",
            reason=cleaned.problem or "",
            finish_reason=completion.finish_reason,
            n_prompt_tokens=completion.n_prompt_tokens,
            n_cached_tokens=completion.n_cached_tokens,
            n_output_tokens=completion.n_output_tokens,
            n_attempts=attempt,
        )


def _settle(above: Layer, side: Side, node: int, record: Record) -> None:
    """Give a node its new description, or leave it the one of the layer below."""
    if record.status == "ok":
        above.texts[side][node] = record.text
        above.statuses[side][node] = "generated"
    else:
        above.statuses[side][node] = "failed"
        above.reasons[side][node] = record.reason
    above.n_prompt_tokens[side][node] = record.n_prompt_tokens
    above.n_output_tokens[side][node] = record.n_output_tokens
