"""What fine-tuning reads and minimises: tokenised pairs, batches, completion loss, perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers import AutoTokenizer

from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.generator import Message, SFTPair

IGNORED = -100  # label of a token that is not learned, as in transformers


@dataclass(frozen=True)
class Example:
    """A tokenised pair: prompt ids, then ``n_completion`` ids to learn."""

    input_ids: tuple[int, ...]
    n_completion: int


def encode_pairs(model_dir: Path, pairs: Sequence[SFTPair], max_tokens: int) -> list[Example]:
    """Tokenise pairs; those longer than ``max_tokens`` are left out.

    Prompt and completion are tokenised apart, so that generation sees the prompt ids seen here.
    """
    chat = ChatTokenizer(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    end = end_of_turn_id(chat)
    examples = []
    for pair in pairs:
        prompt = chat.encode_chat(pair.messages)
        completion = [*tokenizer.encode(pair.completion, add_special_tokens=False), end]
        if len(prompt) + len(completion) <= max_tokens:
            examples.append(Example((*prompt, *completion), len(completion)))
    return examples


def end_of_turn_id(chat: ChatTokenizer) -> int:
    """The token with which the chat template ends an assistant message; often not the EOS token.

    It is the first stop token that an answer and a second question add to a chat. A template
    without one (a base model's) gets the model's own stop token.
    """
    prompt = Message(role="user", content="a")
    answer = Message(role="assistant", content="b")
    in_prompt, in_chat = (
        [token for token in chat.encode_chat(messages) if token in chat.stop_token_ids]
        for messages in ((prompt,), (prompt, answer, prompt))
    )
    added = in_chat[len(in_prompt) :]
    return added[0] if added else min(chat.stop_token_ids)


def pad_left(examples: Sequence[Example]) -> dict[str, Any]:
    """Make a batch in which all completions end in the last column.

    The language model head then runs on the last ``logits_to_keep`` columns only.

    Shapes:
        input_ids, attention_mask, position_ids, labels: ``[batch, longest example]``.
    """
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.long)  # padding: any id, it is masked
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids)
        input_ids[row, width - len(ids) :] = ids
        attention_mask[row, width - len(ids) :] = 1
        labels[row, width - example.n_completion :] = ids[-example.n_completion :]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp_(min=0),
        "labels": labels,
        # one more: the logits that predict the first token of the longest completion
        "logits_to_keep": max(example.n_completion for example in examples) + 1,
    }


def completion_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Summed NLL of completion tokens over ``num_items_in_batch``, their number in the update.

    Shapes:
        logits: ``[batch, k, vocabulary]``, those of the last k columns of ``labels``.
    """
    logits = outputs["logits"]
    targets = labels[:, labels.shape[1] - logits.shape[1] + 1 :]  # [batch, k - 1]
    nll = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return nll / (1 if num_items_in_batch is None else num_items_in_batch)


@torch.no_grad()
def perplexity(model: nn.Module, examples: Sequence[Example], batch_size: int) -> float | None:
    """``exp(summed NLL / n)`` over all completion tokens of ``examples``; None without examples.

    Several processes share the batches, and each gets the figure of all.
    """
    if not examples:
        return None
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    together = distributed.is_initialized()
    rank, n_ranks = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(ordered), batch_size)[rank::n_ranks]:
        batch = pad_left(ordered[start : start + batch_size])
        labels = batch.pop("labels").to(device)
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        total += completion_loss(model(**inputs), labels)
    model.train(was_training)
    if together:
        distributed.all_reduce(total)
    return math.exp(total.item() / sum(example.n_completion for example in examples))
