"""Exact fast paths for RecBole's sequences, data loaders, samplers, evaluation and optimiser.

RecBole's classes stay the interface. Where the key ``fast_paths`` is on, some of their methods do
the same work without loops over users, items or edges: the same batches, the same negatives from
the same draws, the same collected ranks. Without the key every method is RecBole's own.

Not touched, so RecBole's own way: loaders with ``worker`` above 0 (their batches are still
gathered fast), samplers other than ``Sampler`` and ``RepeatableSampler``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler

from recbole_gacllm.plugin.import_hooks import replaces

#: A full-sort batch holds at least this many scores, whatever ``eval_batch_size`` says: 2 MB, which
#: caches hold,
MIN_SCORES = 2**19
#: or 128 MB on another device, which waits for the host in every batch,
MIN_SCORES_OF_DEVICE = 2**25
#: and at least this many users: below, the item embeddings are read again for each few of them.
MIN_USERS = 16
#: Up to this many user-item pairs are looked up in a table of bytes, more by binary search.
MAX_TABLE = 2**25


def _asked(one: Any) -> Any:
    """Whether the configuration of a data set, loader, collector or trainer asks for fast paths."""
    return one.config["fast_paths"]


def _marked(one: Any) -> Any:
    """Whether a sampler or a metric, which have no configuration, was told so."""
    return vars(one).get("fast_paths")


# Sampling


class Membership:
    """Which values each key has used: a vectorised ``value in used_ids[key]``.

    Args:
        used_ids: RecBole's array of sets, one a key.
        n_values: Number of values; all are in ``[0, n_values)``.
    """

    def __init__(self, used_ids: npt.NDArray[np.object_], n_values: int) -> None:
        self.used_ids = used_ids
        self.n_values = n_values
        lengths = np.fromiter(map(len, used_ids), np.int64, count=len(used_ids))
        values = np.fromiter(chain.from_iterable(used_ids), np.int64, lengths.sum())
        pairs = np.repeat(np.arange(len(used_ids)), lengths) * n_values + values
        self.table: npt.NDArray[np.bool_] | None = None
        if len(used_ids) * n_values <= MAX_TABLE:
            self.table = np.zeros(len(used_ids) * n_values, dtype=bool)
            self.table[pairs] = True
        else:
            self.pairs = np.sort(pairs)

    def contains(
        self, keys: npt.NDArray[np.int64], values: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Whether each value is among those its key has used.

        Shapes:
            keys, values, result: ``[n]``.
        """
        pairs = keys * self.n_values + values
        if self.table is not None:
            return np.asarray(self.table[pairs])
        if len(self.pairs) == 0:
            return np.zeros(len(pairs), dtype=bool)
        places = np.searchsorted(self.pairs, pairs).clip(max=len(self.pairs) - 1)
        return np.asarray(self.pairs[places] == pairs)


def add_to_sampler(module: ModuleType) -> None:
    """Draw as RecBole draws, value for value, and test all draws at once."""

    @replaces(module.AbstractSampler, "sample_by_key_ids", _marked)
    def sample_by_key_ids(original: Any, self: Any, key_ids: Any, num: int) -> Tensor:
        keys = np.asarray(key_ids)
        is_general = type(self) is module.Sampler and len(keys) > 0
        if not is_general or keys.min() < 0 or keys.max() >= len(self.used_ids):
            by_recbole: Tensor = original(self, key_ids, num)
            return by_recbole
        member = vars(self).get("_membership")
        if member is None or member.used_ids is not self.used_ids:
            member = self._membership = Membership(self.used_ids, self.item_num)
        return _drawn(self, np.tile(keys, num), member.contains)

    @replaces(module.RepeatableSampler, "sample_by_user_ids", _marked)
    def sample_any_but_the_positive(
        original: Any, self: Any, user_ids: Any, item_ids: Any, num: int
    ) -> Tensor:
        if len(item_ids) == 0:
            by_recbole: Tensor = original(self, user_ids, item_ids, num)
            return by_recbole
        return _drawn(self, np.tile(np.asarray(item_ids), num), np.equal)

    @replaces(module.AbstractSampler, "_pop_sampling", _marked)
    def _pop_sampling(original: Any, self: Any, sample_num: int) -> npt.NDArray[np.int64]:
        if "_alias_table" not in vars(self):
            self._alias_table = (
                np.array(list(self.prob)),
                np.array(list(self.prob.values())),
                np.array([self.alias[key] for key in self.prob]),
            )
        keys, probability, alias = self._alias_table
        place = np.random.randint(0, len(keys), sample_num)
        is_own = probability[place] > np.random.random(sample_num)
        return np.where(is_own, keys[place], alias[place])


def _drawn(
    sampler: Any, keys: npt.NDArray[np.int64], is_used: Callable[[Any, Any], npt.NDArray[np.bool_]]
) -> Tensor:
    """A value for each key, drawn again for as long as the key has used it; ``[n]``."""
    values = sampler.sampling(len(keys))
    again = np.flatnonzero(is_used(keys, values))
    while len(again) > 0:
        values[again] = fresh = sampler.sampling(len(again))
        again = again[is_used(keys[again], fresh)]
    return torch.from_numpy(values.astype(np.int64, copy=False))


# Sequences


def add_to_sequences(module: ModuleType) -> None:
    """Write the sequences before all interactions position by position, not one by one."""

    @replaces(module.SequentialDataset, "data_augmentation", _asked)
    def data_augmentation(original: Any, self: Any) -> None:
        self._aug_presets()
        self._check_field("uid_field", "time_field")
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        inter, longest = self.inter_feat, self.config["MAX_ITEM_LIST_LENGTH"]
        users = inter[self.uid_field]  # sorted
        n_before = torch.arange(len(users)) - torch.searchsorted(users, users)
        (targets,) = at = torch.nonzero(n_before, as_tuple=True)
        length = n_before[targets].clamp(max=longest)
        sequences = {self.item_list_length_field: length}
        for field in inter:
            if field != self.uid_field:
                values = inter[field]
                lists = values.new_zeros(len(targets), longest, *values.shape[1:])
                for place in range(longest):
                    (rows,) = torch.nonzero(length > place, as_tuple=True)
                    lists[rows, place] = values[targets[rows] - length[rows] + place]
                sequences[getattr(self, f"{field}_list_field")] = lists
        self.inter_feat = inter[at]
        self.inter_feat.update(type(inter)(sequences))


# Data loaders


def add_to_loader(module: ModuleType) -> None:
    """Cut the order of an epoch into batches at once instead of index by index."""

    @replaces(module.AbstractDataLoader, "__init__")
    def construct(
        original: Any, self: Any, config: Any, dataset: Any, sampler: Any, shuffle: bool = False
    ) -> None:
        if config["fast_paths"] and sampler is not None:
            sampler.fast_paths = True
        original(self, config, dataset, sampler, shuffle=shuffle)

    @replaces(module.AbstractDataLoader, "__iter__", _asked)
    def iterate(original: Any, self: Any) -> Iterator[Any]:
        if self.num_workers > 0:
            batches: Iterator[Any] = original(self)
            return batches
        # PyTorch's loader draws a base seed for its workers here, even if it has none.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        order, size = _order(self.sampler), self.batch_size
        return (self.collate_fn(order[at : at + size]) for at in range(0, len(order), size))


def _order(sampler: Any) -> npt.NDArray[np.int64]:
    """All indices of an epoch; PyTorch's samplers would hand them out one by one."""
    n = len(sampler)
    if type(sampler) is SequentialSampler:
        return np.arange(n)
    if type(sampler) is RandomSampler and not sampler.replacement:
        order = torch.randperm(n, generator=sampler.generator)
        torch.randperm(n, generator=sampler.generator)  # its own way to draw the zero that are left
        return order.numpy()
    return np.fromiter(sampler, np.int64)  # DistributedSampler has them in a list


def _rows_at(index: Any) -> tuple[Tensor]:
    """An index that RecBole's ``Interaction`` takes as it is, not through a list."""
    return (torch.as_tensor(np.asarray(index)),)


def add_to_general_loaders(module: ModuleType) -> None:
    """Gather batches by tensor; evaluate many users at once."""
    full_sort = module.FullSortEvalDataLoader

    @replaces(module.TrainDataLoader, "collate_fn", _asked)
    def collate_train(original: Any, self: Any, index: Any) -> Any:
        data = self._dataset[_rows_at(index)]
        return self._neg_sampling(self.transform(self._dataset, data))

    @replaces(full_sort, "_init_batch_size_and_step", _asked)
    def _init_batch_size_and_step(original: Any, self: Any) -> None:
        original(self)
        if not self.is_sequential:
            n_items = self._dataset.item_num
            on_cpu = torch.device(self.config["device"]).type == "cpu"
            n_scores = MIN_SCORES if on_cpu else MIN_SCORES_OF_DEVICE
            self.step = max(self.step, MIN_USERS, n_scores // n_items)
            self.set_batch_size(self.step * n_items)

    @replaces(full_sort, "collate_fn", _asked)
    def collate_full_sort(original: Any, self: Any, index: Any) -> Any:
        if self.is_sequential:
            rows = self.transform(self._dataset, self._dataset[_rows_at(index)])
            return rows, None, torch.arange(len(rows)), rows[self.iid_field]
        if "_item_lists" not in vars(self):
            users = self.uid_list
            self._item_lists = (
                ItemLists(self.uid2history_item[users]),
                ItemLists(self.uid2positive_item[users]),
            )
        (rows,) = at = _rows_at(index)
        history, positive = self._item_lists
        return self.user_df[at], history.of(rows), *positive.of(rows)


class ItemLists:
    """Item ids of each evaluated user, in one flat tensor.

    Args:
        items: One tensor a user, as RecBole's loader keeps them.
    """

    def __init__(self, items: npt.NDArray[np.object_]) -> None:
        self.flat = torch.cat(list(items))
        self.length = torch.from_numpy(np.fromiter(map(torch.numel, items), np.int64, len(items)))
        self.start = self.length.cumsum(0) - self.length

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For each item of each user asked for: the user's place among ``rows``, and the item.

        Shapes:
            rows: ``[n]``; both results ``[sum of the list lengths]``.
        """
        length = self.length[rows]
        place = torch.repeat_interleave(length)  # [m]
        begin = self.start[rows] - (length.cumsum(0) - length)  # [n]
        return place, self.flat[begin[place] + torch.arange(len(place))]


# Evaluation


def add_to_collector(module: ModuleType) -> None:
    """Look for the positive items among the top k only, and find the top k once."""

    @replaces(module.Collector, "eval_batch_collect", _asked)
    def eval_batch_collect(
        original: Any,
        self: Any,
        scores: Tensor,
        interaction: Any,
        positive_u: Tensor,
        positive_i: Tensor,
    ) -> None:
        need = self.register.need
        others = ("rec.meanrank", "rec.score", "data.label")
        if not need("rec.topk") or any(map(need, others)):
            original(self, scores, interaction, positive_u, positive_i)
            return
        top = torch.topk(scores, max(self.topk), dim=-1).indices  # [n, k]
        if need("rec.items"):
            self.data_struct.update_tensor("rec.items", top)
        n, n_items = scores.shape
        first = torch.arange(n, device=scores.device) * n_items  # of each user's pairs
        positive_u, positive_i = positive_u.to(first.device), positive_i.to(first.device)
        positive = torch.unique(positive_u * n_items + positive_i)  # an item counts once
        users = torch.div(positive, n_items, rounding_mode="floor")
        n_positive = torch.bincount(users, minlength=n)[:, None]
        hits = torch.isin(top + first[:, None], positive, assume_unique=True)
        self.data_struct.update_tensor("rec.topk", torch.cat((hits.long(), n_positive), dim=1))


def add_to_metrics(module: ModuleType) -> None:
    """Give MRR, MAP and NDCG one pass over all users: the same numbers, bit for bit.

    Their ``metric_info`` gets, for each user, which of the top k items are positive (``pos_index``)
    and how many positive items there are (``pos_len``), and gives the metric at every cut-off up to
    k.
    """

    @replaces(module.TopkMetric, "__init__")
    def construct(original: Any, self: Any, config: Any) -> None:
        self.fast_paths = bool(config["fast_paths"])
        original(self, config)

    for name, at_once in (
        ("MRR", reciprocal_rank),
        ("MAP", average_precision),
        ("NDCG", discounted_gain),
    ):

        @replaces(getattr(module, name), "metric_info", _marked)
        def metric_info(original: Any, self: Any, *args: Any, at_once: Any = at_once) -> Any:
            return at_once(*args)


def reciprocal_rank(pos_index: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """One over the rank of the first positive item; 0 above it.

    Shapes:
        pos_index, result: ``[n_users, k]``.
    """
    first = pos_index.argmax(axis=1)  # [n_users]
    is_after = np.logical_or.accumulate(pos_index, axis=1)
    return np.where(is_after, 1 / (first + 1)[:, None], 0.0)


def average_precision(
    pos_index: npt.NDArray[np.bool_], pos_len: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Mean precision at the positive items, of at most so many as there are.

    Shapes:
        pos_index, result: ``[n_users, k]``; pos_len: ``[n_users]``.
    """
    ranks = np.arange(1, pos_index.shape[1] + 1)
    precision = pos_index.cumsum(axis=1) / ranks
    total = np.cumsum(precision * pos_index.astype(np.float64), axis=1)
    return np.asarray(total / _capped(ranks, pos_len))


def discounted_gain(
    pos_index: npt.NDArray[np.bool_], pos_len: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Gain discounted by the logarithm of the rank, as a share of the best that is possible.

    Shapes:
        pos_index, result: ``[n_users, k]``; pos_len: ``[n_users]``.
    """
    ranks = np.arange(1, pos_index.shape[1] + 1)
    discount = 1.0 / np.log2(ranks + 1.0)  # [k]
    ideal = np.cumsum(discount)[_capped(ranks, pos_len) - 1]
    return np.asarray(np.cumsum(np.where(pos_index, discount, 0), axis=1) / ideal)


def _capped(ranks: npt.NDArray[np.int64], pos_len: npt.NDArray[np.int64]) -> Any:
    """Ranks, each at most the number of positive items; RecBole takes k where there is none.

    Shapes:
        ranks ``[k]``; pos_len ``[n_users]``; result ``[n_users, k]``.
    """
    n_positive = pos_len[:, None]
    return np.where(n_positive == 0, ranks[-1], np.minimum(ranks, n_positive))


# Optimiser


def add_to_trainer(module: ModuleType) -> None:
    """Let Adam update a parameter in one pass over it instead of eight."""

    @replaces(module.Trainer, "_build_optimizer", _asked)
    def _build_optimizer(original: Any, self: Any, **keys: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = original(self, **keys)
        plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        if plain and self.device.type == "cpu":
            for group in optimizer.param_groups:
                group["fused"] = True
        return optimizer
