"""The tokenizer's side of a chat model: prompts as ids, token counts, cuts, special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from recbole_gacllm.llm.generator import Message, Request

# For base models, which come without a chat template: "System: …", "User: …", "Assistant:".
PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class ChatTokenizer:
    """The tokenizer of a model folder, with the model's chat template.

    A model without a chat template gets :data:`PLAIN_TEMPLATE`. A template that refuses a system
    message (Gemma's, for one) gets it as the first paragraph of the user message that follows.
    Models that can think before they answer are told not to.

    Attributes:
        special_tokens: Every special or added token's string, whitespace left out: what a text
            must not hold when it goes into a prompt.
        stop_token_ids: Ids that end a completion: the end tokens of tokenizer, model config and
            generation config, which differ for some chat models.
        pad_token_id: Filler of a batch; any id, as it is masked.
        max_length: The model's context window, in tokens.

    Raises:
        ValueError: If the folder holds no tokenizer, none with offsets, or no context window.
    """

    def __init__(self, folder: Path) -> None:
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} has no config or tokenizer that transformers can read: {error}. Save "
                "both beside the weights (tokenizer.save_pretrained)."
            ) from error
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"{folder} has no tokenizer.json, so texts cannot be cut at token boundaries. "
                "Convert its tokenizer to the fast kind and save it there."
            )
        if not self._tokenizer.chat_template:
            self._tokenizer.chat_template = PLAIN_TEMPLATE
        text_config = config.get_text_config()
        self.max_length = int(
            getattr(text_config, "max_position_embeddings", None)
            or min(self._tokenizer.model_max_length, 1 << 30)
        )
        if self.max_length == 1 << 30:
            raise ValueError(
                f"{folder} does not say how long its context window is: config.json has no "
                "max_position_embeddings and tokenizer_config.json no model_max_length. Add one."
            )
        added = self._tokenizer.added_tokens_decoder.values()
        names = {str(token) for token in added} | set(self._tokenizer.all_special_tokens)
        self.special_tokens = frozenset(name for name in names if name.strip())
        self.stop_token_ids = frozenset(_stop_tokens(folder, self._tokenizer, text_config))
        self.pad_token_id = int(self._tokenizer.pad_token_id or min(self.stop_token_ids, default=0))
        self._takes_system = True
        try:
            self._render([{"role": "system", "content": "a"}, {"role": "user", "content": "a"}])
        except TemplateError:
            self._takes_system = False

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, up to where the assistant's answer begins or goes on.

        A last message of the assistant is the beginning of its answer: its turn stays open.

        Raises:
            ValueError: If the model's chat template refuses the messages, or leaves out an answer
                that is begun.
        """
        try:
            prompt = self._render(self.adapted(messages))
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"The model's chat template refuses messages of roles {roles}: {error}."
            ) from error
        ids: list[int] = self._encode([prompt])[0].ids
        return ids

    def adapted(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in roles that the chat template takes."""
        chat = list(messages)
        if not self._takes_system and len(chat) > 1 and chat[0]["role"] == "system":
            text = f"{chat[0]['content']}\n\n{chat[1]['content']}"
            chat[:2] = [{"role": chat[1]["role"], "content": text}]
        return chat

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text on its own, without special tokens around it."""
        return [len(encoding) for encoding in self._encode(texts)]

    def truncate(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """Each text's longest beginning that ends with a token and has at most ``max_tokens``.

        The result is counted again: :meth:`count_tokens` of it is at most ``max_tokens``. A
        character of several tokens is kept or dropped whole.
        """
        beginnings = list(texts)
        limits = dict.fromkeys(range(len(beginnings)), max_tokens)
        while limits:
            rows = list(limits)
            encoded = self._tokenizer(
                [beginnings[i] for i in rows],
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            for i, offsets in zip(rows, encoded["offset_mapping"], strict=True):
                if len(offsets) <= max_tokens:
                    del limits[i]  # fits
                    continue
                n_tokens = limits[i]
                end = offsets[n_tokens - 1][1] if n_tokens > 0 else 0
                beginnings[i] = beginnings[i][:end]
                # Too long still if the last token is a part of a character, or if the beginning
                # on its own splits otherwise: one token less the next time.
                limits[i] = n_tokens - 1
        return beginnings

    def encode_request(self, request: Request, max_model_len: int) -> list[int]:
        """Token ids of a request's prompt, checked against the context window.

        Raises:
            ValueError: If prompt and completion together are longer than ``max_model_len``.
        """
        ids = self.encode_chat(request.messages)
        n_new = request.sampling.max_new_tokens
        if len(ids) + n_new > max_model_len:
            raise ValueError(
                f"Request {request.id!r} does not fit the context window: {len(ids)} prompt tokens "
                f"+ {n_new} new tokens > {max_model_len}. Lower llm_max_prompt_tokens or "
                "llm_max_new_tokens, or use a model with a longer window."
            )
        return ids

    def decode(self, ids: Sequence[int], prompt: Sequence[int]) -> str:
        """The text of token ids that follow a prompt, special tokens left out, blanks as they are.

        Some tokenizers drop a text's first blank; so a piece of the prompt is decoded with it.
        """
        piece = list(prompt[-4:])
        before, whole = (
            self._tokenizer.decode(
                part, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for part in (piece, [*piece, *ids])
        )
        return str(whole)[len(before) :]

    def _encode(self, texts: Sequence[str]) -> Any:
        """Encodings of texts as they are, by the Rust library itself: half the time."""
        return self._tokenizer.backend_tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=False
        )

    def _render(self, chat: list[Message]) -> str:
        is_begun = chat[-1]["role"] == "assistant"
        return str(
            self._tokenizer.apply_chat_template(
                chat,
                tokenize=False,
                add_generation_prompt=not is_begun,
                continue_final_message=is_begun,
                enable_thinking=False,
            )
        )


def _stop_tokens(folder: Path, tokenizer: Any, config: Any) -> set[int]:
    """End tokens named by tokenizer, config and generation config."""
    named = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    if (folder / "generation_config.json").is_file():
        named.append(GenerationConfig.from_pretrained(folder).eos_token_id)
    lists = (value if isinstance(value, list) else [value] for value in named)
    return {token for tokens in lists for token in tokens if token is not None}
