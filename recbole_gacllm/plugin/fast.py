"""Exact fast paths for RecBole's data loaders, samplers, evaluation, graph models and NeuMF.

RecBole's classes stay the interface. Where the key ``fast_paths`` is on, some of their methods do
the same work without loops over users, items or edges: the same batches, the same negatives from
the same draws, the same collected ranks. ``registration.py`` calls :func:`add_to` for each module
of RecBole in :data:`FAST_PATHS` after its import; without the key every method is RecBole's own.

Not touched, so RecBole's own way: loaders with ``worker`` above 0 (their batches are still
gathered fast), sequential models' full-sort loader, samplers other than ``Sampler``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler

from recbole_gacllm.plugin.fast_graph import (
    dgcf_products,
    ncl_paths,
    neumf_scores,
    normalised_adjacency,
    sgl_paths,
)
from recbole_gacllm.plugin.fast_metrics import add_to_metrics

#: A full-sort batch holds at least this many scores, whatever ``eval_batch_size`` says: 2 MB, which
#: caches hold,
MIN_SCORES = 2**19
#: or 128 MB on another device, which waits for the host in every batch,
MIN_SCORES_OF_DEVICE = 2**25
#: and at least this many users: below, the item embeddings are read again for each few of them.
MIN_USERS = 16
#: Up to this many user-item pairs are looked up in a table of bytes, more by binary search.
MAX_TABLE = 2**25


def add_to(module: ModuleType) -> None:
    """Add the fast paths of one of RecBole's modules to its classes."""
    FAST_PATHS[module.__name__](module)


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


def _add_to_sampler(module: ModuleType) -> None:
    """Draw as RecBole draws, value for value, and test all draws at once."""
    abstract, sampler_class = module.AbstractSampler, module.Sampler
    sample, pop_sampling = abstract.sample_by_key_ids, abstract._pop_sampling

    @functools.wraps(sample)
    def sample_by_key_ids(self: Any, key_ids: Any, num: int) -> Tensor:
        keys = np.asarray(key_ids)
        fast = vars(self).get("fast_paths") and type(self) is sampler_class
        if not fast or len(keys) == 0 or keys.min() < 0 or keys.max() >= len(self.used_ids):
            drawn: Tensor = sample(self, key_ids, num)
            return drawn
        member = vars(self).get("_membership")
        if member is None or member.used_ids is not self.used_ids:
            member = self._membership = Membership(self.used_ids, self.item_num)
        keys = np.tile(keys, num)
        values = self.sampling(len(keys))
        again = np.flatnonzero(member.contains(keys, values))
        while len(again) > 0:
            values[again] = fresh = self.sampling(len(again))
            again = again[member.contains(keys[again], fresh)]
        return torch.from_numpy(values.astype(np.int64, copy=False))

    @functools.wraps(pop_sampling)
    def _pop_sampling(self: Any, sample_num: int) -> npt.NDArray[np.int64]:
        if not vars(self).get("fast_paths"):
            return np.asarray(pop_sampling(self, sample_num))
        if "_alias_table" not in vars(self):
            self._alias_table = (
                np.array(list(self.prob)),
                np.array(list(self.prob.values())),
                np.array([self.alias[key] for key in self.prob]),
            )
        keys, probability, alias = self._alias_table
        place = np.random.randint(0, len(keys), sample_num)
        kept = probability[place] > np.random.random(sample_num)
        return np.where(kept, keys[place], alias[place])

    abstract.sample_by_key_ids, abstract._pop_sampling = sample_by_key_ids, _pop_sampling


# Data loaders


def _add_to_loader(module: ModuleType) -> None:
    """Cut the order of an epoch into batches at once instead of index by index."""
    loader_class = module.AbstractDataLoader
    init, iterate = loader_class.__init__, loader_class.__iter__

    @functools.wraps(init)
    def construct(
        self: Any, config: Any, dataset: Any, sampler: Any, shuffle: bool = False
    ) -> None:
        if config["fast_paths"] and sampler is not None:
            sampler.fast_paths = True
        init(self, config, dataset, sampler, shuffle=shuffle)

    @functools.wraps(iterate)
    def __iter__(self: Any) -> Iterator[Any]:  # noqa: N807
        if not self.config["fast_paths"] or self.num_workers > 0:
            batches: Iterator[Any] = iterate(self)
            return batches
        # PyTorch's loader draws a base seed for its workers here, even if it has none.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        return _batches(self)

    loader_class.__init__, loader_class.__iter__ = construct, __iter__


def _batches(loader: Any) -> Iterator[Any]:
    order = _order(loader.sampler)
    for start in range(0, len(order), loader.batch_size):
        yield loader.collate_fn(order[start : start + loader.batch_size])


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


def _add_to_general_loaders(module: ModuleType) -> None:
    """Gather batches by tensor; evaluate many users at once."""
    train, full_sort = module.TrainDataLoader, module.FullSortEvalDataLoader
    collate_train, collate_full = train.collate_fn, full_sort.collate_fn
    init_batch = full_sort._init_batch_size_and_step

    @functools.wraps(collate_train)
    def collate_train_fast(self: Any, index: Any) -> Any:
        if not self.config["fast_paths"]:
            return collate_train(self, index)
        data = self._dataset[_rows_at(index)]
        return self._neg_sampling(self.transform(self._dataset, data))

    @functools.wraps(init_batch)
    def init_large_batch(self: Any) -> None:
        init_batch(self)
        if self.config["fast_paths"] and not self.is_sequential:
            n_items = self._dataset.item_num
            on_cpu = torch.device(self.config["device"]).type == "cpu"
            n_scores = MIN_SCORES if on_cpu else MIN_SCORES_OF_DEVICE
            self.step = max(self.step, MIN_USERS, n_scores // n_items)
            self.set_batch_size(self.step * n_items)

    @functools.wraps(collate_full)
    def collate_full_fast(self: Any, index: Any) -> Any:
        if not self.config["fast_paths"] or self.is_sequential:
            return collate_full(self, index)
        if "_item_lists" not in vars(self):
            users = self.uid_list
            self._item_lists = (
                ItemLists(self.uid2history_item[users]),
                ItemLists(self.uid2positive_item[users]),
            )
        (rows,) = at = _rows_at(index)
        history, positive = self._item_lists
        return self.user_df[at], history.of(rows), *positive.of(rows)

    train.collate_fn = collate_train_fast
    full_sort._init_batch_size_and_step = init_large_batch
    full_sort.collate_fn = collate_full_fast


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


def _add_to_collector(module: ModuleType) -> None:
    """Look for the positive items among the top k only, and find the top k once."""
    collector = module.Collector
    collect = collector.eval_batch_collect

    @functools.wraps(collect)
    def eval_batch_collect(
        self: Any, scores: Tensor, interaction: Any, positive_u: Tensor, positive_i: Tensor
    ) -> None:
        need = self.register.need
        others = ("rec.meanrank", "rec.score", "data.label")
        if not (self.config["fast_paths"] and need("rec.topk")) or any(map(need, others)):
            collect(self, scores, interaction, positive_u, positive_i)
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

    collector.eval_batch_collect = eval_batch_collect


# Optimiser


def _add_to_trainer(module: ModuleType) -> None:
    """Let Adam update a parameter in one pass over it instead of eight."""
    trainer = module.Trainer
    build = trainer._build_optimizer

    @functools.wraps(build)
    def _build_optimizer(self: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = build(self, **kwargs)
        plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        if self.config["fast_paths"] and plain and self.device.type == "cpu":
            for group in optimizer.param_groups:
                group["fused"] = True
        return optimizer

    trainer._build_optimizer = _build_optimizer


# Models


def _add_to_model(name: str, change: Callable[[Any], None]) -> Callable[[ModuleType], None]:
    """A step that lets a model's class remember the key before its constructor runs."""

    def add(module: ModuleType) -> None:
        model_class = getattr(module, name)
        init = model_class.__init__

        @functools.wraps(init)
        def construct(self: Any, config: Any, dataset: Any) -> None:
            # Past nn.Module's __setattr__, which wants its own constructor first.
            vars(self)["fast_paths"] = bool(config["fast_paths"])
            init(self, config, dataset)

        model_class.__init__ = construct
        change(model_class)

    return add


_MODELS = "recbole.model.general_recommender"

#: Module of RecBole (``registration.FAST_MODULES``) -> what adds the fast paths to it.
FAST_PATHS: dict[str, Callable[[ModuleType], None]] = {
    "recbole.sampler.sampler": _add_to_sampler,
    "recbole.data.dataloader.abstract_dataloader": _add_to_loader,
    "recbole.data.dataloader.general_dataloader": _add_to_general_loaders,
    "recbole.evaluator.collector": _add_to_collector,
    "recbole.evaluator.metrics": add_to_metrics,
    "recbole.trainer.trainer": _add_to_trainer,
    f"{_MODELS}.lightgcn": _add_to_model("LightGCN", normalised_adjacency),
    f"{_MODELS}.ngcf": _add_to_model("NGCF", normalised_adjacency),
    f"{_MODELS}.ncl": _add_to_model("NCL", ncl_paths),
    f"{_MODELS}.sgl": _add_to_model("SGL", sgl_paths),
    f"{_MODELS}.dgcf": _add_to_model("DGCF", dgcf_products),
    f"{_MODELS}.neumf": _add_to_model("NeuMF", neumf_scores),
}
