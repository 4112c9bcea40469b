"""One ranking for general and sequential models: without the items of a user's history.

RecBole's general models never rank the items of a user's training part, nor at test time those of
validation; its sequential models rank them all. With the key ``mask_history`` they leave out the
items of the user that come before the evaluated one, those beyond ``MAX_ITEM_LIST_LENGTH`` too, as
``-inf`` among their scores. General models stay as they are. Without the key everything is
RecBole's own.

Source: ours; RecBole has none of it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from recbole_gacllm.config import of_any_model
from recbole_gacllm.plugin.import_hooks import replaces


def check(config: Any) -> None:
    """Refuse ``mask_history`` where it cannot hold, before any data is loaded.

    Raises:
        ValueError: Names the key, the value, what is allowed and the next step.
    """
    if not _is_on(config):
        return
    is_sequential = config["MODEL_TYPE"].name == "SEQUENTIAL"
    if config.external_config_dict.get("repeatable"):
        raise ValueError(
            "mask_history: True does not go with repeatable: True, which asks to rank the items of "
            "the history. Leave one of them out."
        )
    modes = config["eval_args"]["mode"]
    if is_sequential and (modes["valid"], modes["test"]) != ("full", "full"):
        raise ValueError(
            f"mask_history: True does not go with eval_args mode {modes} and the sequential model "
            f"{config['model']}: RecBole draws the items to rank from the history, too. Set mode: "
            "full, or leave mask_history out."
        )
    if is_sequential and config["benchmark_filename"] is not None:
        raise ValueError(
            "mask_history: True does not go with benchmark_filename and the sequential model "
            f"{config['model']}: each row of its files has a history of its own, which may be cut. "
            "Leave one of them out."
        )


def _is_on(config: Any) -> bool:
    return bool(of_any_model(config, "mask_history", False))


def add_to_dataset(module: ModuleType) -> None:
    """Note the history of each held-out row where RecBole splits: ``item_histories`` of a part."""

    @replaces(module.Dataset, "build")
    def build_and_note(original: Any, self: Any) -> Any:
        parts = original(self)
        if _is_on(self.config) and self.config["MODEL_TYPE"].name == "SEQUENTIAL":
            _note_histories(parts)
        return parts


def _note_histories(parts: list[Any]) -> None:
    """For each row of validation and test, all items of the user before the row's own.

    A row is an interaction with the sequence before it. A user's rows stand in order of time; the
    first one's sequence is the user's first item.

    Raises:
        ValueError: If an evaluated item is in its user's history.
    """
    histories: dict[int, list[int]] = {}
    n_rows = n_repeats = 0
    for phase, part in enumerate(parts):
        inter, item = part.inter_feat, part.iid_field
        first = inter[getattr(part, f"{item}_list_field")][:, 0].tolist()
        rows = zip(inter[part.uid_field].tolist(), inter[item].tolist(), first, strict=True)
        of_part = np.empty(len(inter), dtype=object)
        for row, (user, target, first_item) in enumerate(rows):
            history = histories.setdefault(user, [first_item])
            if phase > 0:
                of_part[row] = torch.tensor(history)
                n_rows, n_repeats = n_rows + 1, n_repeats + (target in history)
            history.append(target)
        part.item_histories = of_part
    if n_repeats > 0:
        raise ValueError(
            f"mask_history: True does not go with repeats: {n_repeats} of {n_rows} held-out "
            "interactions are with an item of the user's history, which would not be ranked. Leave "
            "mask_history out, or set rm_dup_inter: first."
        )


def add_to_loaders(module: ModuleType) -> None:
    """Hand the histories to RecBole's trainer as the loader of general models does."""

    @replaces(
        module.FullSortEvalDataLoader,
        "collate_fn",
        lambda loader: loader.is_sequential and _is_on(loader.config),
    )
    def collate_full_sort(original: Any, self: Any, index: Any) -> Any:
        batch = original(self, index)
        histories = self._dataset.item_histories[np.asarray(index)]
        users = torch.repeat_interleave(torch.tensor([len(items) for items in histories]))
        return batch[0], (users, torch.cat(list(histories))), *batch[2:]
