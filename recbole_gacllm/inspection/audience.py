"""Who gets lists: users of a run, or users with a history of their own; and all their scores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from scipy import sparse
from torch import Tensor

from recbole_gacllm.inspection.histories import Histories, asking_about, no_rule, padded, some
from recbole_gacllm.inspection.opened import OpenRun, trainer_of
from recbole_gacllm.inspection.parts import Parts, ScoreParts
from recbole_gacllm.objective.linear import matrix_of, recency_weights

logger = logging.getLogger(__name__)

#: A block of users holds at most this many scores: 128 MB.
MAX_SCORES = 2**25
_MAX_USERS = 1024  # of a block of users outside of training


@dataclass(frozen=True)
class Block:
    """Some users' scores."""

    rows: np.ndarray  # [B], their places among all who get lists
    scores: Tensor  # [B, n_items]; -inf for padding
    parts: Parts  # what the scores are the sum of; empty where that was not asked for


class Audience:
    """Users who get lists.

    ``known`` is what the model knows of them, ``[n_users, n_items]``, an entry for each item;
    ``left_out``, shaped alike, what a list leaves out unless asked to keep it.
    """

    def __init__(
        self,
        run: OpenRun,
        tokens: list[str],
        known: sparse.csr_array,
        left_out: sparse.csr_array,
        parts: ScoreParts | None,
    ) -> None:
        self.run, self.tokens, self.known, self.left_out = run, tokens, known, left_out
        self.parts = parts
        self.n_items = run.test._dataset.item_num
        self.is_sequential = run.config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self._trainer = trainer_of(run)
        self._trainer.cold_candidates = None  # lists are of all items
        self._trainer.tot_item_num = self.n_items
        self._trainer.item_tensor = run.test._dataset.get_item_feature().to(run.config["device"])

    def evaluated(self, interaction: Interaction) -> Tensor:
        """Scores of all items by RecBole's evaluation: ``[B, n_items]``.

        Raises:
            ValueError: If the model reads what is not known of an item that nobody has chosen yet.
        """
        try:
            scores: Tensor = self._trainer._full_sort_batch_eval((interaction, None, None, None))[1]
        except KeyError as error:
            raise self.refusal(str(error)) from error
        return scores

    def refusal(self, field: str) -> ValueError:
        """The error where the model asks for a field that nobody has."""
        return ValueError(
            f"{self.run.config['model']} reads {field} of each interaction, and a recommended item "
            "has none yet. Train it without that column: leave it out of load_col's inter."
        )

    def blocks(self) -> Iterator[Block]:
        """Everybody's scores."""
        raise NotImplementedError


class RunUsers(Audience):
    """Users of the run's data, all or some, in the blocks of RecBole's test evaluation.

    Raises:
        ValueError: If the data has no such user.
    """

    def __init__(
        self, run: OpenRun, tokens: Sequence[str] | None, parts: ScoreParts | None
    ) -> None:
        dataset = run.test._dataset
        names = dataset.field2id_token[dataset.uid_field]
        if tokens is None:
            ids = np.arange(1, dataset.user_num)
        else:
            id_of = dataset.field2token_id[dataset.uid_field]
            unknown = [token for token in dict.fromkeys(tokens) if token not in id_of]
            if unknown:
                raise ValueError(
                    f"--users: {len(unknown)} of {len(tokens)} are no users of the run's data: "
                    f"{some(unknown)}; it has users such as {some(names[1:])}. Users with a "
                    "history of their own come by --history."
                )
            ids = np.array([id_of[token] for token in dict.fromkeys(tokens)])
        self._first_test_row = _first_rows(dataset)
        trained = interactions(run.train._dataset, lists=True)
        before = trained + interactions(run.valid._dataset, lists=True)
        heldout = interactions(dataset, lists=False)
        self._sequences: dict[int, np.ndarray] = {}
        if run.config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            for part in (run.train, run.valid):
                self._sequences |= _last_sequences(part._dataset)
            has_sequence = np.array(
                [self._first_test_row[user] >= 0 or user in self._sequences for user in ids]
            )
            if not has_sequence.all():
                logger.warning(
                    "%d of %d users have one interaction, which a sequential model of RecBole does "
                    "not see, and get no list: %s",
                    *(int((~has_sequence).sum()), len(ids), some(names[ids[~has_sequence]])),
                )
            ids = ids[has_sequence]
        self.ids = ids
        left_out = (before - before.multiply(heldout.astype(bool)))[ids]
        left_out.eliminate_zeros()
        super().__init__(run, names[ids].tolist(), trained[ids], left_out, parts)

    def blocks(self) -> Iterator[Block]:
        """As the test evaluation goes through its users; then those who are not in the test."""
        config, dataset = self.run.config, self.run.test._dataset
        n = config["eval_batch_size"]
        if not self.is_sequential:
            is_full_sort = isinstance(self.run.test, FullSortEvalDataLoader)
            n = self.run.test.step if is_full_sort else n // self.n_items
        n = max(min(n, MAX_SCORES // self.n_items), 1)
        places = self._first_test_row[self.ids]
        tested, others = np.flatnonzero(places >= 0), np.flatnonzero(places < 0)
        order = places if self.is_sequential else self.ids
        tested = tested[np.argsort(order[tested], kind="stable")]
        for rows in (*_split(tested, n), *_split(others, n)):
            users = torch.from_numpy(self.ids[rows])
            if not self.is_sequential:
                interaction = dataset.join(Interaction({dataset.uid_field: users}))
            elif places[rows[0]] >= 0:
                interaction = self.run.test.transform(dataset, dataset[places[rows]])
            else:
                interaction = _sequences_of(
                    self.run.model, [self._sequences[user] for user in self.ids[rows]]
                )
                interaction.update(Interaction({dataset.uid_field: users}))
            parts = self.parts.of_users(users) if self.parts is not None else {}
            yield Block(rows, self.evaluated(interaction), parts)


class NewUsers(Audience):
    """Users who are known by their histories alone, whoever the run calls by their names."""

    def __init__(self, run: OpenRun, histories: Histories, parts: ScoreParts | None) -> None:
        self._name, self._histories = run.config["model"], histories
        items = histories.counts(run.test._dataset.item_num)
        super().__init__(run, histories.tokens, items, items, parts)
        if self._name == "GaCLLM" and parts is None:
            self.parts = ScoreParts(run.model)

    def blocks(self) -> Iterator[Block]:
        """In the order of the histories."""
        n = max(min(_MAX_USERS, MAX_SCORES // self.n_items), 1)
        counts, sequences = self._counts(), self._histories.sequences()
        for rows in _split(np.arange(len(self.tokens)), n):
            if self.parts is not None:
                parts = self.parts.of_histories(counts[rows])
                scores = torch.stack(list(parts.values())).sum(0)
                scores[:, 0] = -torch.inf
                yield Block(rows, scores, parts)
            elif self.is_sequential:
                interaction = _sequences_of(self.run.model, [sequences[row] for row in rows])
                yield Block(rows, self.evaluated(interaction), {})
            else:
                interaction = asking_about(self.run.model, self._name, counts[rows])
                yield Block(rows, self.evaluated(interaction), {})

    def refusal(self, field: str) -> ValueError:
        """A sequential model that reads more than items."""
        return no_rule(self._name, f"reads {field}, too")

    def _counts(self) -> sparse.csr_array:
        """What the items count: those of GaCLLM's linear model by how recent they are."""
        if self._name != "GaCLLM" or self.run.model.linear is None:
            return self.known
        recency, times = self.run.model.options.linear_recency, self._histories.times
        if recency == 0 or self.run.config["eval_args"]["order"] != "TO":
            return self.known
        if times is None:
            logger.warning("--history has no times: linear_recency counts all items alike")
            return self.known
        weights = recency_weights(self._histories.users, times, recency)
        return self._histories.counts(self.n_items, weights)


def interactions(dataset: Any, lists: bool) -> sparse.csr_array:
    """The interactions of one part of a split, as ones: ``[n_users, n_items]``, with padding.

    With ``lists`` those in the first item list of a sequential part's users count, too: what came
    after is the target of another row.
    """
    inter = dataset.inter_feat
    users, items = (inter[name].numpy() for name in (dataset.uid_field, dataset.iid_field))
    list_field = getattr(dataset, f"{dataset.iid_field}_list_field", None)
    if lists and list_field in inter:
        owners, rows = np.unique(users, return_index=True)
        before = inter[list_field][rows].numpy()  # [n_users, length]
        users = np.append(users, np.repeat(owners, before.shape[1]))
        items = np.append(items, before.ravel())
    sizes = dataset.user_num, dataset.item_num
    return matrix_of(users[items > 0], items[items > 0], *sizes)


def _first_rows(dataset: Any) -> np.ndarray:
    """The first row of each user in one part of a split, -1 where there is none: ``[n_users]``."""
    first = np.full(dataset.user_num, -1)
    users, rows = np.unique(dataset.inter_feat[dataset.uid_field].numpy(), return_index=True)
    first[users] = rows
    return first


def _last_sequences(dataset: Any) -> dict[int, np.ndarray]:
    """Of each user of a sequential part the items of the last row, its target last."""
    inter = dataset.inter_feat
    users, targets = (inter[name].numpy() for name in (dataset.uid_field, dataset.iid_field))
    lists = inter[getattr(dataset, f"{dataset.iid_field}_list_field")].numpy()
    found, rows = np.unique(users[::-1], return_index=True)
    rows = len(users) - 1 - rows
    return {
        int(user): np.append(lists[row][lists[row] > 0], targets[row])
        for user, row in zip(found, rows, strict=True)
    }


def _sequences_of(model: Any, sequences: list[np.ndarray]) -> Interaction:
    """What a sequential model reads of users: their last items, and how many there are."""
    ids, lengths = padded(sequences, model.max_seq_length)
    return Interaction({model.ITEM_SEQ: ids, model.ITEM_SEQ_LEN: lengths})


def _split(rows: np.ndarray, n: int) -> list[np.ndarray]:
    """Rows, ``n`` at a time."""
    return [rows[start : start + n] for start in range(0, len(rows), n)]
