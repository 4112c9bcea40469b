"""What a layer asks of the LLM: every node's prompt, its address, and how the answer is drawn.

Nothing here grows with the number of prompts: texts are made safe, measured and cut a few hundred
nodes at a time, each when a prompt first needs it, and a prompt is rendered when it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.convolution.cleaning import CLEANING_VERSION, CleaningContext
from recbole_gacllm.convolution.graph import NeighborLists, TrainGraph, select_neighbors
from recbole_gacllm.convolution.layers import SIDES, Layer, Side
from recbole_gacllm.convolution.neutralize import neutralize
from recbole_gacllm.convolution.prompts import PromptRenderer, PromptTemplates
from recbole_gacllm.llm.generator import Message, Request, Sampling

if TYPE_CHECKING:  # it loads transformers
    from recbole_gacllm.llm.chat import ChatTokenizer

RETRY_TEMPERATURE = 0.7
# A completion is read up to so many characters a token: prose has about four, its longest words
# about twenty. A server that keeps no limit could send any amount.
_CHARS_A_TOKEN = 32
_DRAWS = 5  # part of a draw's seed: what it was when texts were first drawn, so that they stay
CHUNK = 512  # nodes rendered and looked up in the store at once

Messages = tuple[Message, ...]


class RequestMaker:
    """Renders the prompts of a layer and turns them into requests.

    ``generator_key`` identifies the weights that generate, by fingerprints; the graph's order of
    nodes is that of every layer.

    Raises:
        ValueError: If the token budget is below the instruction, or the rule does not fit the data.
    """

    def __init__(
        self,
        graph: TrainGraph,
        templates: PromptTemplates,
        tokenizer: ChatTokenizer,
        generator_key: dict[str, Any],
        options: GaCLLMConfig,
        seed: int,
    ) -> None:
        self.tokenizer, self._max_neighbor_tokens = tokenizer, options.llm_max_neighbor_tokens
        self._n_knowledge = int(options.has_knowledge)  # layers below those of the convolution
        knowledge, described = (
            Sampling(n_tokens, options.llm_temperature, options.llm_repetition_penalty)
            for n_tokens in (options.llm_knowledge_tokens, options.llm_max_new_tokens)
        )
        self._sampling_of = {True: knowledge, False: described}  # of the knowledge step?
        self._own_lines = templates.own_lines()
        self.renderer = PromptRenderer(templates, tokenizer, options.llm_max_prompt_tokens)
        self.neighbors: dict[Side, NeighborLists] = {
            side: select_neighbors(graph, side, options.neighbor_rule, options.n_neighbors, seed)
            for side in SIDES
        }
        self._seed = {"seed": seed} if options.llm_temperature > 0 else {}
        self._key_of_all = {
            "generator": generator_key,
            "prompts": templates.version(),
            "cleaning": CLEANING_VERSION,
        }
        # How an answer is cleaned does not change how it is drawn.
        self._draw_of_all = {**self._key_of_all, "cleaning": _DRAWS}

    def prompts(
        self, below: Layer, nothing_known: dict[Side, str], number: int
    ) -> Iterator[tuple[Side, int, Messages | None]]:
        """Every node's prompt, users first, for layer ``number``, from 1.

        None where there is nothing to ask about: no neighbours, and no features.
        """
        pieces = {
            side: _Pieces(below.texts[side], self.tokenizer, self._max_neighbor_tokens)
            for side in SIDES
        }
        for side in SIDES:
            other: Side = "item" if side == "user" else "user"
            for start in range(0, len(below.texts[side]), CHUNK):
                chats = self._chats(side, start, pieces[side], pieces[other], number)
                texts = below.texts[side][start : start + CHUNK]
                for row, (text, (chat, n_around)) in enumerate(zip(texts, chats, strict=True)):
                    is_empty = n_around == 0 and text == nothing_known[side]
                    yield side, start + row, None if is_empty else chat

    def _chats(
        self, side: Side, start: int, own: _Pieces, others: _Pieces, number: int
    ) -> Iterator[tuple[Messages, int]]:
        """Prompts of the nodes from ``start`` on, one chunk, and how many neighbours each has."""
        indptr = self.neighbors[side].indptr[start : start + CHUNK + 1]
        around = self.neighbors[side].indices[indptr[0] : indptr[-1]]
        layer = number - self._n_knowledge  # of the convolution
        if layer == 0:  # each node from its own text alone
            indptr, around = np.zeros_like(indptr), around[:0]
        nodes = np.arange(start, start + len(indptr) - 1)
        own.prepare(nodes)
        others.prepare(np.unique(around))
        texts, counts = own.fitting(nodes, self.renderer.own_text_limit(side, layer))
        neighbors = [others.short[neighbor] for neighbor in around.tolist()]
        neighbor_counts = others.n_short[around].tolist()
        bounds = (indptr - indptr[0]).tolist()
        for row in range(len(nodes)):
            here = slice(bounds[row], bounds[row + 1])
            chat = self.renderer.render(
                side, texts[row], counts[row], neighbors[here], neighbor_counts[here], layer
            )
            yield chat, bounds[row + 1] - bounds[row]

    def request(self, messages: Messages, number: int | None = None) -> Request:
        """The first attempt, drawn with a seed of the prompt's own: order does not matter.

        Args:
            messages: The prompt.
            number: Of the layer that is made; None is one of the convolution.
        """
        is_knowledge = number is not None and number <= self._n_knowledge
        sampling = self._sampling_of[is_knowledge]
        address = self._address(self._key_of_all, messages, sampling)
        seed = self._seeds(messages, sampling)[0]
        return Request(address, messages, dataclasses.replace(sampling, seed=seed))

    def retry_of(self, request: Request) -> Request:
        """The second attempt at a request."""
        first = dataclasses.replace(request.sampling, seed=0)
        sampling = dataclasses.replace(
            first,
            temperature=max(RETRY_TEMPERATURE, first.temperature),
            seed=self._seeds(request.messages, first)[1],
        )
        return dataclasses.replace(request, sampling=sampling)

    def _address(self, of_all: dict[str, Any], messages: Messages, sampling: Sampling) -> str:
        drawn = dataclasses.asdict(sampling) | self._seed
        return manifests.fingerprint({**of_all, "sampling": drawn, "messages": messages})

    def _seeds(self, messages: Messages, sampling: Sampling) -> tuple[int, int]:
        """Of the first and the second attempt at a prompt."""
        digest = self._address(self._draw_of_all, messages, sampling)
        return int(digest[:8], 16), int(digest[8:16], 16)

    def context_of(self, request: Request) -> CleaningContext:
        """What an answer to a request is held against: the prompt, and its words of request."""
        begun = request.messages[-1]["role"] == "assistant"
        asked = request.messages[:-1] if begun else request.messages
        prompt = "\n".join(message["content"] for message in asked)
        own = [line for line in prompt.split("\n") if line.strip() in self._own_lines]
        beginning = request.messages[-1]["content"] if begun else ""
        max_chars = _CHARS_A_TOKEN * request.sampling.max_new_tokens
        return CleaningContext(prompt, "\n".join(own), beginning, max_chars)


class _Pieces:
    """The texts of one side as parts of prompts: harmless, measured, cut; each when needed."""

    def __init__(self, texts: list[str], tokenizer: ChatTokenizer, max_tokens: int) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._whole = list(texts)  # the same strings
        self.short = self._whole.copy()  # each as a neighbour's, once it is prepared
        self._n_whole = np.full(len(texts), -1, dtype=np.int32)
        self.n_short = self._n_whole.copy()  # its tokens, [n_nodes]

    def prepare(self, nodes: npt.NDArray[Any]) -> None:
        """Make and measure the pieces of nodes, each named once."""
        unknown = nodes[self._n_whole[nodes] < 0].tolist()
        for start in range(0, len(unknown), CHUNK):
            part = unknown[start : start + CHUNK]
            for node in part:
                harmless = neutralize(self._whole[node], self._tokenizer.special_tokens)
                if harmless != self._whole[node]:  # else keep the string that the layer holds
                    self._whole[node] = harmless
            self._n_whole[part] = self._tokenizer.count_tokens([self._whole[n] for n in part])
            texts, counts = self.fitting(np.asarray(part), self._max_tokens)
            self.n_short[part] = counts
            for node, text in zip(part, texts, strict=True):
                self.short[node] = text

    def fitting(self, nodes: npt.NDArray[Any], max_tokens: int) -> tuple[list[str], list[int]]:
        """Prepared texts of nodes, cut to so many tokens, and their counts."""
        texts = [self._whole[node] for node in nodes.tolist()]
        counts: list[int] = self._n_whole[nodes].tolist()
        long = [row for row, count in enumerate(counts) if count > max_tokens]
        if long:
            cut = self._tokenizer.truncate([texts[row] for row in long], max_tokens)
            for row, text, count in zip(long, cut, self._tokenizer.count_tokens(cut), strict=True):
                texts[row], counts[row] = text, count
        return texts, counts
