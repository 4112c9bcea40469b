"""Histories of users who were not in training: read from a table, and scored by each model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.interaction import Interaction
from scipy import sparse

from recbole_gacllm.data import numbers
from recbole_gacllm.data.atomic import AtomicFile
from recbole_gacllm.data.tables import Form, open_table
from recbole_gacllm.objective.linear import TextNeighbors

logger = logging.getLogger(__name__)

#: Models that score a user by nothing but the items of the history; besides GaCLLM and sequential
#: models.
ITEM_BASED = ("EASE", "SLIMElastic", "ADMMSLIM", "ItemKNN", "TextKNN")
AUTOENCODERS = ("MultiVAE", "MultiDAE", "MacridVAE", "RecVAE", "RaCT")
_SHOWN = 5
_TIME = ("time", "TIME_FIELD")
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}


@dataclass(frozen=True)
class Histories:
    """Interactions of some users, sorted by user and, where there are times, by time."""

    tokens: list[str]  # raw tokens of the users, in the order of the table; each has an item
    users: np.ndarray  # [n], place in ``tokens`` of each interaction's user
    items: np.ndarray  # [n], RecBole's ids
    times: np.ndarray | None  # [n]

    @classmethod
    def of(cls, table: pd.DataFrame, item_ids: Mapping[str, int]) -> Histories:
        """From a table of :func:`read_histories` and RecBole's ids; what is unknown is named.

        Raises:
            ValueError: If no user has an item that the run knows.
        """
        ids = table["item"].map(item_ids).to_numpy(np.float64, na_value=np.nan)
        is_known = ~np.isnan(ids)
        unknown = table["item"][~is_known].unique()
        if len(unknown):
            logger.warning(
                "--history: %d of %d items are not in the run's data and are left out: %s",
                *(len(unknown), table["item"].nunique(), some(unknown)),
            )
        users, tokens = pd.factorize(table["user"])
        with_items = np.unique(users[is_known])
        without = np.setdiff1d(np.arange(len(tokens)), with_items)
        if len(without):
            logger.warning(
                "--history: %d of %d users have no item that the run knows, and get no list: %s",
                *(len(without), len(tokens), some(tokens[without])),
            )
        if not len(with_items):
            raise ValueError(
                f"--history: none of its {len(unknown)} items is in the run's data "
                f"({some(unknown)}), which has items such as {some(list(item_ids))}. Write raw "
                "tokens, as in the .inter file."
            )
        place = np.full(len(tokens), -1)
        place[with_items] = np.arange(len(with_items))
        rows = place[users[is_known]]
        times = table["time"].to_numpy()[is_known] if "time" in table else None
        order = np.lexsort((rows,) if times is None else (times, rows))
        return cls(
            [str(token) for token in tokens[with_items]],
            rows[order],
            ids[is_known][order].astype(np.int64),
            None if times is None else times[order],
        )

    def counts(self, n_items: int, weights: np.ndarray | None = None) -> sparse.csr_array:
        """What each item counts, 1 or its weight; of an item that repeats the last counts.

        Shapes:
            weights: ``[n]``; result ``[n_users, n_items]``.
        """
        pairs = self.users * n_items + self.items
        last = len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1]
        values = np.ones(len(last)) if weights is None else weights[last]
        places = self.users[last], self.items[last]
        shape = len(self.tokens), n_items
        return sparse.csr_array((values.astype(np.float32), places), shape=shape)

    def sequences(self) -> list[np.ndarray]:
        """Items of each user, the last one last; repeats stay."""
        return np.split(self.items, np.flatnonzero(np.diff(self.users)) + 1)


def read_histories(source: Path | pd.DataFrame, config: Any) -> pd.DataFrame:
    """A table of ``user``, ``item`` and perhaps ``time``, called so or as in the run's data.

    Returns:
        Tokens as text; times as numbers, or in seconds since 1970 (UTC) where they are dates.

    Raises:
        ValueError: If it cannot be read, has no rows or lacks a column; or if a cell is empty.
    """
    name = "history" if isinstance(source, pd.DataFrame) else f"--history={source}"
    table = source if isinstance(source, pd.DataFrame) else _read(source)
    columns = {str(column).partition(":")[0]: table[column] for column in table}
    chosen = {}
    for column, field in (("user", "USER_ID_FIELD"), ("item", "ITEM_ID_FIELD"), _TIME):
        present = [alias for alias in (column, config[field]) if alias in columns]
        if present:
            chosen[column] = columns[present[0]].map(_as_token)
        elif column != "time":
            raise ValueError(
                f"{name} has no column {column!r} or {config[field]!r}; it has "
                f"{', '.join(columns) or 'none'}."
            )
    table = pd.DataFrame(chosen).reset_index(drop=True)
    if table.empty:
        raise ValueError(f"{name} has no rows.")
    empty = (table == "").any(axis=1)
    if empty.any():
        raise ValueError(
            f"{name}: {int(empty.sum())} of {len(table)} rows have an empty cell, the first is row "
            f"{int(np.argmax(empty)) + 1}. Fill the cells or remove the rows."
        )
    if "time" in table:
        table["time"] = _times(table["time"], name)
    return table


def _read(path: Path) -> pd.DataFrame:
    table = open_table(path, Form(separator=_SEPARATORS.get(path.suffix)))
    for note in table.notes:
        logger.warning("--history: %s", note)
    chunks = [*table.chunks(table.names)]
    if table.dropped:
        raise ValueError(f"--history={path}: {dict(table.dropped)}. Mend these rows.")
    return pd.concat(chunks, ignore_index=True) if chunks else table.sample


def _times(column: pd.Series, name: str) -> np.ndarray:
    cells = pd.DataFrame({"time": column.to_list()}, dtype=object)
    return numbers.times(AtomicFile(Path(name), ["time"], ["float"], cells), "time")


def _as_token(value: Any) -> str:
    """A cell as the token it stands for: a whole number without its ``.0``."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.0f}" if value.is_integer() else str(value)
    return "" if value is None else str(value)


def some(tokens: Any) -> str:
    """The first few of many, for a message."""
    shown = ", ".join(map(str, tokens[:_SHOWN]))
    return f"{shown}, …" if len(tokens) > _SHOWN else shown


# How a model is asked about users whom it does not know.


def require_rule(model: Any, name: str) -> None:
    """Refuse a model that has no rule for users who were not in training.

    Raises:
        ValueError: Names the models that have one.
    """
    is_user_knn = name == "ItemKNN" and model.method == "user"
    if is_user_knn or not (
        name in ("GaCLLM", *ITEM_BASED, *AUTOENCODERS) or hasattr(model, "ITEM_SEQ")
    ):
        raise no_rule(name, "scores users by what it learnt of each of them")
    if name == "GaCLLM" and not model.options.n_layers and model.linear is None:
        raise no_rule(name, "with n_layers: 0 and linear_weight: 0 learns nothing of neighbours")


def no_rule(name: str, why: str) -> ValueError:
    """The error for a model that cannot score users who were not in training."""
    models = ", ".join(("GaCLLM", *ITEM_BASED, *AUTOENCODERS))
    return ValueError(
        f"--history: {name} {why}. Models that know a user by the history alone: {models}, and "
        "sequential models that read items only, such as SASRec and GRU4Rec."
    )


def asking_about(model: Any, name: str, counts: sparse.csr_array) -> Interaction:
    """Let histories take the place of the training users'; what to ask the model then.

    RecBole's models of these two kinds look up a user's items in a matrix, by the user's id.

    Shapes:
        counts: ``[B, n_items]``, ones.
    """
    n_users = counts.shape[0]
    histories = sparse.csr_matrix(counts)  # what RecBole's models know
    if name == "TextKNN":
        users = np.repeat(np.arange(n_users), np.diff(histories.indptr))
        neighbors = TextNeighbors(users, histories.indices, n_users, model.neighbors._texts)
        model.neighbors = neighbors
    elif name == "ItemKNN":
        model.pred_mat = histories @ model.w
    elif name in ITEM_BASED:
        model.interaction_matrix = histories
    else:
        lists = np.split(histories.indices, histories.indptr[1:-1])
        ids, _ = padded(lists, max(map(len, lists)))
        model.history_item_id = ids.to(model.device)
        model.history_item_value = (ids > 0).float().to(model.device)
    return Interaction({model.USER_ID: torch.arange(n_users)})


def padded(sequences: list[np.ndarray], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last items of each sequence, zeros behind them, and how many there are.

    Shapes:
        result: ``[B, length]``, ``[B]``.
    """
    ids = np.zeros((len(sequences), length), dtype=np.int64)
    lengths = np.array([min(len(sequence), length) for sequence in sequences])
    for row, sequence in enumerate(sequences):
        ids[row, : lengths[row]] = sequence[-length:]
    return torch.from_numpy(ids), torch.from_numpy(lengths)
