"""Sparse and cold: what a run keeps of RecBole's split, for every model alike.

``train_share`` keeps a share of the training interactions, ``cold_item_share`` takes all of some
items' interactions away from training, ``cold_user_share`` those of some users, and
``known_users_only`` takes held-out interactions of users who have none in training, as a split at
one point in time leaves them. All act where RecBole splits (``Dataset.build``), so that models,
samplers, texts and audits see only what is left. Without the keys everything is RecBole's own.

Source: ours; RecBole has none of them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recbole_gacllm.config import of_any_model
from recbole_gacllm.plugin.import_hooks import replaces


def check(config: Any) -> None:
    """Refuse shares that cannot be, whatever the model, before any data is loaded.

    Raises:
        ValueError: Names the key, the value, what is allowed and the next step.
    """
    train_share, cold_items, cold_users = shares(config)
    known_only = of_any_model(config, "known_users_only", False)
    if train_share == 1 and cold_items == cold_users == 0 and not known_only:
        return
    is_sequential = config["MODEL_TYPE"].name == "SEQUENTIAL"
    if known_only and is_sequential:
        raise ValueError(
            f"known_users_only: True does not go with the sequential model {config['model']}: "
            "RecBole cuts its sequences at another time than the interactions of general models. "
            "Leave --protocol=temporal out (--protocol=sequential takes both), or choose general "
            "models."
        )
    if is_sequential:
        raise ValueError(
            f"train_share: {train_share:g}, cold_item_share: {cold_items:g}, cold_user_share: "
            f"{cold_users:g} do not go with the sequential model {config['model']}: what is taken "
            "from training would stay in its sequences. Leave the keys out, or choose general "
            "models."
        )
    if cold_items > 0 and cold_users > 0:
        raise ValueError(
            f"cold_user_share: {cold_users:g} does not go with cold_item_share: {cold_items:g}, as "
            "each says what validation and test are. Set one of them to 0."
        )
    if cold_users > 0 and known_only:
        raise ValueError(
            f"cold_user_share: {cold_users:g} does not go with known_users_only: True, which would "
            "leave out all that is held out. Leave one of them out."
        )
    modes = config["eval_args"]["mode"]
    if cold_items + cold_users > 0 and (modes["valid"], modes["test"]) != ("full", "full"):
        what = "item" if cold_items > 0 else "user"
        among = "cold items are ranked among themselves"
        raise ValueError(
            f"cold_{what}_share: {cold_items + cold_users:g} does not go with eval_args mode "
            f"{modes}: {among if what == 'item' else 'all items are ranked'}. Set mode: full."
        )


def shares(config: Any) -> tuple[float, float, float]:
    """``train_share``, ``cold_item_share`` and ``cold_user_share`` of any model's configuration.

    Raises:
        ValueError: If one is not a number of its range.
    """
    defaults = {"train_share": 1, "cold_item_share": 0, "cold_user_share": 0}
    train, cold_items, cold_users = (
        float(of_any_model(config, key, default)) for key, default in defaults.items()
    )
    return train, cold_items, cold_users


# Splitting


def kept_rows(users: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.int64]:
    """Which training interactions stay.

    Each draws a number in [0, 1) and stays if it is below the share; of a user of whom none would
    stay, the one with the lowest number does. So with one seed a smaller share is part of a larger.

    Shapes:
        users: ``[n]``, of the training interactions in RecBole's order; result: sorted rows.
    """
    draws = np.random.default_rng(seed).random(len(users))
    lowest = np.lexsort((draws, users))
    first = np.ones(len(users), dtype=bool)
    first[1:] = users[lowest][1:] != users[lowest][:-1]
    keep = draws < share
    keep[lowest[first]] = True
    return np.flatnonzero(keep)


def cold_nodes(
    nodes: npt.NDArray[np.int64], share: float, seed: int, side: str = "item"
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A share of the nodes of a side that have any interaction: half for validation, half for test.

    Raises:
        ValueError: If there are fewer than two.
    """
    distinct = np.unique(nodes)
    n_cold = round(share * len(distinct))
    if n_cold < 2:
        raise ValueError(
            f"cold_{side}_share: {share:g} of {len(distinct)} {side}s is {n_cold}; validation and "
            "test need one at least. Give a larger share."
        )
    cold = np.random.default_rng(seed).permutation(distinct)[:n_cold]
    return cold[: n_cold // 2], cold[n_cold // 2 :]


def add_to_dataset(module: ModuleType) -> None:
    """Split by item, or take interactions from training, where the keys say so."""

    @replaces(module.Dataset, "build")
    def build_and_take_away(original: Any, self: Any) -> Any:
        train_share, *cold = shares(self.config)
        parts = _cold_split(self, *cold) if any(cold) else original(self)
        if train_share < 1:
            train = parts[0]
            users = train.inter_feat[train.uid_field].numpy()
            rows = kept_rows(users, train_share, self.config["seed"])
            parts[0] = train.copy(train.inter_feat[rows])
        if of_any_model(self.config, "known_users_only", False):
            n_before = sum(len(part.inter_feat) for part in parts)
            parts = [parts[0], *(_of_known_users(part, parts[0]) for part in parts[1:])]
            counts = n_before, sum(len(part.inter_feat) for part in parts)
            self.filter_counts = [
                *getattr(self, "filter_counts", []),
                ("known_users_only", *counts),
            ]
        return parts


def _of_known_users(part: Any, train: Any) -> Any:
    """A held-out part without the users who have no training interaction."""
    users = part.inter_feat[part.uid_field].numpy()
    known = np.isin(users, train.inter_feat[train.uid_field].numpy())
    return part.copy(part.inter_feat[np.flatnonzero(known)])


def _cold_split(dataset: Any, of_items: float, of_users: float) -> list[Any]:
    """Train, valid and test by item or user: a cold one has all it has in one of the latter."""
    dataset._change_feat_format()
    inter = dataset.inter_feat
    side, share = ("item", of_items) if of_items > 0 else ("user", of_users)
    nodes = inter[dataset.iid_field if side == "item" else dataset.uid_field].numpy()
    in_valid, in_test = (
        np.isin(nodes, cold) for cold in cold_nodes(nodes, share, dataset.config["seed"], side)
    )
    masks = (~(in_valid | in_test), in_valid, in_test)
    return [dataset.copy(inter[np.flatnonzero(mask)]) for mask in masks]


# Ranking


def ranks_among(scores: Tensor, candidates: Tensor, generator: torch.Generator) -> Tensor:
    """Scores that rank the candidates as before, ties in random order, and all else last.

    Models without text give all cold items one score. RecBole's ids are in the order in which the
    items first stand in the file, which tells how popular they are; so they must not break ties.

    Shapes:
        scores: ``[n, n_items]``; candidates: ``[c]``; result ``[n, n_items]``.
    """
    order = torch.rand(len(scores), len(candidates), generator=generator).argsort(dim=1)
    columns = candidates[order].to(scores.device)  # [n, c]
    ranked = scores.gather(1, columns).argsort(dim=1, stable=True)  # worst first
    places = torch.arange(len(candidates), dtype=scores.dtype, device=scores.device)
    among = torch.full_like(scores, -torch.inf)
    return among.scatter_(1, columns.gather(1, ranked), places.expand_as(ranked))


def add_to_trainer(module: ModuleType) -> None:
    """Rank the cold items of the evaluated part among themselves; for cold users, all items.

    To most models all cold users are one, and items of one score are in the order of their ids.
    """

    @replaces(module.Trainer, "evaluate")
    def evaluate(original: Any, self: Any, eval_data: Any, *args: Any, **keys: Any) -> Any:
        self.cold_candidates = None
        _, of_items, of_users = shares(self.config)
        if eval_data and of_items + of_users > 0:
            dataset = eval_data._dataset
            items = dataset.inter_feat[dataset.iid_field].unique()
            if of_users > 0:
                items = torch.arange(1, dataset.item_num)
            generator = torch.Generator().manual_seed(self.config["seed"])
            self.cold_candidates = items, generator
        return original(self, eval_data, *args, **keys)

    @replaces(module.Trainer, "_full_sort_batch_eval")
    def _full_sort_batch_eval(original: Any, self: Any, batched_data: Any) -> Any:
        interaction, scores, positive_u, positive_i = original(self, batched_data)
        if self.cold_candidates is not None:
            scores = ranks_among(scores, *self.cold_candidates)
        return interaction, scores, positive_u, positive_i
