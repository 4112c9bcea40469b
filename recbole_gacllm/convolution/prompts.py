"""Prompts: text files with placeholders, rendered within a token budget.

The shipped files have the instruction in front, the node's own text and its neighbours after it:
what all nodes of a side share comes first, for the engine's prefix cache. What stands after a line
of three hyphens is the beginning of the answer: the LLM goes on from there, so that every answer
has the form that was asked for, whatever stands in the texts before it.

Inserted texts are single lines (:func:`.neutralize.neutralize`); they are substituted once and
never read again as a template, so a ``$neighbors`` in a title stays what it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Literal

from recbole_gacllm.convolution.layers import SIDES, Side
from recbole_gacllm.llm.generator import Message

if TYPE_CHECKING:  # it loads transformers
    from recbole_gacllm.llm.chat import ChatTokenizer

Direction = Literal["user_to_item", "item_to_user"]

_NOUNS = frozenset({"user_noun", "item_noun"})
# What each file must hold besides its words; the nouns may stand in any of them.
_PLACEHOLDERS: dict[str, frozenset[str]] = {
    "system": frozenset(),
    "user": frozenset({"text", "neighbors"}),
    "item": frozenset({"text", "neighbors"}),
    "user_isolated": frozenset({"text"}),
    "item_isolated": frozenset({"text"}),
    "user_deeper": frozenset({"text", "neighbors"}),
    "item_deeper": frozenset({"text", "neighbors"}),
    "user_knowledge": frozenset({"text"}),
    "item_knowledge": frozenset({"text"}),
    "sft_user_to_item": frozenset({"text"}),
    "sft_item_to_user": frozenset({"text"}),
}
_BULLET = "- "
_ANSWER = re.compile(r"^---[^\S\n]*$", re.MULTILINE)  # before the beginning of the answer
# Less than this of a node's own text says nothing.
_MIN_TEXT_TOKENS = 8


@dataclass(frozen=True)
class PromptTemplates:
    """The prompt files of one folder, with the words for user and item filled in."""

    #: By name without ``.txt``; only ``$text`` and ``$neighbors`` are left in it.
    texts: Mapping[str, str]

    @classmethod
    def load(
        cls, folder: Path, user_noun: str, item_noun: str, knowledge: bool = False
    ) -> PromptTemplates:
        """Read and check the prompt files; those of the knowledge step where a run has it.

        An empty ``system.txt`` means no system message, for models whose chat template has none.

        Raises:
            ValueError: If a file is missing, lacks a placeholder, or has an unknown one.
        """
        nouns = {"user_noun": user_noun, "item_noun": item_noun}
        texts = {}
        for name, placeholders in _PLACEHOLDERS.items():
            if name.endswith("_knowledge") and not knowledge:
                continue
            template = _read_template(folder / f"{name}.txt", placeholders)
            # `$$` must stay escaped until the last substitution.
            texts[name] = Template(template.replace("$$", "$$$$")).substitute(
                {key: noun.replace("$", "$$") for key, noun in nouns.items()},
                **{placeholder: f"${{{placeholder}}}" for placeholder in placeholders},
            )
        return cls(texts)

    @property
    def wordings(self) -> tuple[int, ...]:
        """Layers with words of their own: the knowledge step (0), layer 1, and all deeper (2)."""
        return (0, 1, 2) if "item_knowledge" in self.texts else (1, 2)

    def version(self, n_layers: int = 1) -> str:
        """Hash of the wordings that a description of this many layers may go back to.

        Those of fine-tuning are among them: stored descriptions are addressed so.
        """
        return self._hash(
            name for name in self.texts if n_layers > 1 or not name.endswith("_deeper")
        )

    def sft_version(self) -> str:
        """Hash of the wordings that fine-tuning uses: other words, other hash."""
        return self._hash(name for name in self.texts if name.startswith(("system", "sft_")))

    def _hash(self, names: Iterable[str]) -> str:
        whole = "\0".join(f"{name}\0{self.texts[name]}" for name in sorted(names))
        return hashlib.sha256(whole.encode("utf-8")).hexdigest()

    def messages(
        self, side: Side, text: str, neighbors: Sequence[str], layer: int = 1
    ) -> tuple[Message, ...]:
        """The chat that asks for a node's next description: ``PROMPT_side(text, neighbors)``.

        Layers are those of the convolution; 0 is the knowledge step, from the text alone.

        From layer 2 on a node's own text is an answer to the first wording; asked in the same
        words again, a small model repeats it. So deeper layers have a wording of their own, and so
        has a node without neighbours.
        """
        if layer == 0:
            name = f"{side}_knowledge"
        else:
            name = f"{side}_isolated" if not neighbors else side if layer == 1 else f"{side}_deeper"
        lines = "\n".join(_BULLET + neighbor for neighbor in neighbors)
        return self._chat(name, {"text": text, "neighbors": lines})

    def own_lines(self) -> frozenset[str]:
        """Lines of a request that hold no inserted text: instructions, headings, questions."""
        return frozenset(
            Template(line).substitute().strip()
            for text in self.texts.values()
            for line in _ANSWER.split(text)[0].split("\n")
            if line.strip() and not Template(line).get_identifiers()
        )

    def sft_messages(self, direction: Direction, text: str) -> tuple[Message, ...]:
        """The chat of a fine-tuning pair; its completion is the other node's description."""
        return self._chat(f"sft_{direction}", {"text": text})

    def _chat(self, name: str, values: Mapping[str, str]) -> tuple[Message, ...]:
        request, *beginning = _ANSWER.split(self.texts[name])
        roles: tuple[tuple[Literal["system", "user", "assistant"], str], ...] = (
            ("system", self.texts["system"]),
            ("user", request.strip()),
            ("assistant", "".join(beginning).strip()),
        )
        return tuple(
            Message(role=role, content=Template(text).substitute(values))
            for role, text in roles
            if text
        )


class PromptRenderer:
    """Renders prompts that fit the budget, without counting any token twice.

    Token counts of pieces are added up, as if each were tokenized alone; this is what the whole
    takes, or a little more. Own text and neighbours are cut by the caller, once per text, to
    :meth:`own_text_limit` and ``llm_max_neighbor_tokens``.

    Raises:
        ValueError: If an instruction and the shortest own text do not fit into the budget.
    """

    def __init__(
        self, templates: PromptTemplates, tokenizer: ChatTokenizer, max_prompt_tokens: int
    ) -> None:
        self._templates = templates
        self._line_tokens = tokenizer.count_tokens([f"\n{_BULLET}"])[0]
        words: dict[tuple[Side, int], int] = {}  # tokens, of a side and a wording
        added = 0  # by the model's chat template: roles, separators, generation prompt
        for side, layer in product(SIDES, templates.wordings):
            # The instruction of a node may be either wording: the longer one counts for both.
            for neighbors in ([], [""]):
                chat = templates.messages(side, "", neighbors, layer)
                n = sum(tokenizer.count_tokens([message["content"] for message in chat]))
                words[side, layer] = max(n, words.get((side, layer), 0))
                added = max(added, len(tokenizer.encode_chat(chat)) - n)
        self._fixed = {wording: n + added for wording, n in words.items()}
        least = max(self._fixed.values()) + _MIN_TEXT_TOKENS
        if max_prompt_tokens < least:
            raise ValueError(
                f"llm_max_prompt_tokens is {max_prompt_tokens}, but the instructions alone need "
                f"{least}; raise it to {least} or more, or shorten the prompt files"
            )
        self._max_prompt_tokens = max_prompt_tokens

    def own_text_limit(self, side: Side, layer: int = 1) -> int:
        """Longest own text of a node that fits beside the instruction of a layer, in tokens."""
        return self._max_prompt_tokens - self._fixed[side, min(layer, 2)]

    def render(
        self,
        side: Side,
        text: str,
        text_tokens: int,
        neighbors: Sequence[str],
        neighbor_tokens: Sequence[int],
        layer: int = 1,
    ) -> tuple[Message, ...]:
        """Render a node's prompt with as many of its neighbours, in order, as fit.

        Its own text has at most :meth:`own_text_limit` tokens and is kept whole.
        """
        budget = self.own_text_limit(side, layer) - text_tokens
        lengths = accumulate(count + self._line_tokens for count in neighbor_tokens)
        n_fit = sum(length <= budget for length in lengths)
        return self._templates.messages(side, text, neighbors[:n_fit], layer)


def _read_template(path: Path, wanted: frozenset[str]) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ValueError(
            f"prompt file {path} is missing; llm_prompts_dir must hold "
            f"{', '.join(f'{name}.txt' for name in _PLACEHOLDERS)}: copy the shipped folder"
        ) from None
    template = Template(text)
    allowed = ", ".join(f"${name}" for name in sorted(wanted | _NOUNS))
    if not template.is_valid():
        raise ValueError(f"{path} has a stray '$'; write '$$' for the sign, or one of {allowed}")
    names = [match["named"] or match["braced"] for match in Template.pattern.finditer(text)]
    if unknown := set(filter(None, names)) - wanted - _NOUNS:
        raise ValueError(f"{path} has the placeholder ${min(unknown)}; allowed are {allowed}")
    for name in sorted(wanted):
        if names.count(name) != 1:
            raise ValueError(f"{path} holds ${name} {names.count(name)} times; write it once")
    _, *beginnings = _ANSWER.split(text)
    problem = None
    if beginnings and path.stem.startswith(("sft_", "system")):
        problem = "has a line ---; only files that ask for descriptions begin answers"
    elif len(beginnings) > 1 or not all(map(str.strip, beginnings)):
        problem = "must have one line --- at most, and the beginning of the answer after it"
    elif beginnings and wanted & set(Template(beginnings[0]).get_identifiers()):
        problem = (
            "has a node's text after the line ---; what stands there begins the answer: write "
            "words and nouns only"
        )
    if problem is not None:
        raise ValueError(f"{path} {problem}")
    return text
