"""Top-k lists of a finished run, for its users and for others: ``recbole_gacllm.recommend``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from recbole_gacllm.artifacts.locate import RunFiles
from recbole_gacllm.inspection.audience import Audience, Block, NewUsers, RunUsers
from recbole_gacllm.inspection.explained import Explained, intent_scores, names_of_items
from recbole_gacllm.inspection.histories import Histories, read_histories, require_rule, some
from recbole_gacllm.inspection.opened import OpenRun, open_run
from recbole_gacllm.inspection.parts import ScoreParts

logger = logging.getLogger(__name__)


@torch.no_grad()
def recommend(
    run: str | Path,
    users: Sequence[str] | None = None,
    k: int = 20,
    *,
    history: str | Path | pd.DataFrame | None = None,
    intent: str | None = None,
    intent_weight: float = 1.0,
    explain: bool = False,
    keep_history: bool = False,
    artifact_dir: str | Path | None = None,
    show_progress: bool = False,
) -> pd.DataFrame:
    """The best ``k`` items of each user, by a finished run's model.

    The ranking is that of RecBole's test evaluation: made by its code, in its blocks of users (in
    smaller ones where a block would hold more than ``audience.MAX_SCORES`` scores). A block takes
    about four times its scores, with ``explain`` or GaCLLM and ``history`` eight times.

    Left out are the items of a user's history, as RecBole's evaluation leaves them out: those of
    training and validation, but those that are in the test, too. Where its key ``repeatable`` is
    True, as it is for sequential models, RecBole leaves out nothing: its ranking is that of
    ``keep_history``. A sequential model is asked what comes after training and validation (a user's
    first test row; of a user without one, after the last interaction).

    Nothing of the run's folder is executed.

    Args:
        run: A ``run.json``, or the folder of it; of a leaderboard's run, too.
        users: Raw tokens; None is all. With ``history``, of those.
        k: Items of a list; a list is shorter where there are no more.
        history: Users by these interactions alone, in the place of the run's: a file, or a table of
            ``user``, ``item`` and perhaps ``time``. ``docs/recommend.md`` has each model's rule.
        intent: A sentence. The cosines of its embedding with the items' raw texts, standardised,
            are added to each user's standardised scores.
        intent_weight: What these cosines count.
        explain: Adds ``description`` and ``because`` (:class:`.Explained`), and what the score is
            the sum of: ``from_graph``, ``from_text``, ``from_linear``, ``from_intent``.
        keep_history: Rank the items of the history, too.
        artifact_dir: Where to look for artefacts that were moved away from the run.
        show_progress: Show a progress bar.

    Returns:
        Columns ``user``, ``rank`` (from 1), ``item``, ``title``, ``score``; users as given, or in
        the order of the data.

    Raises:
        ValueError: If a user, an item or a wish does not fit the run.
        GaCLLMError: If the run's data, weights or texts are gone.
    """
    if k < 1:
        raise ValueError(f"--k: {k} is not allowed; give at least 1.")
    opened = open_run(RunFiles.read(Path(run), Path(artifact_dir) if artifact_dir else None))
    opened.model.eval()
    name = opened.config["model"]
    if explain and not hasattr(opened.model, "texts"):
        raise ValueError(
            f"--explain: {name} has scores only; runs of GaCLLM and TextKNN have more."
        )
    is_gacllm = name == "GaCLLM"
    parts = ScoreParts(opened.model) if is_gacllm and explain else None
    audience = (
        RunUsers(opened, users, parts)
        if history is None
        else NewUsers(opened, _histories(opened, history, users), parts)
    )
    wish = None if intent is None else intent_weight * intent_scores(opened, intent)
    explained = Explained(opened, parts) if explain else None
    lists = _Lists(audience, k, names_of_items(opened), explained)
    bar = tqdm(total=len(audience.tokens), desc="recommend", unit="user", disable=not show_progress)
    with bar:
        for block in audience.blocks():
            if explain and not block.parts:  # of TextKNN, which has texts alone
                block = Block(block.rows, block.scores, {"text": block.scores.clone()})
            lists.add(block if wish is None else _mixed(block, wish), keep_history)
            bar.update(len(block.rows))
    return lists.frame()


def _histories(
    opened: OpenRun, history: str | Path | pd.DataFrame, users: Sequence[str] | None
) -> Histories:
    require_rule(opened.model, opened.config["model"])
    source = history if isinstance(history, pd.DataFrame) else Path(history)
    table = read_histories(source, opened.config)
    if users is not None:
        missing = sorted(set(users) - set(table["user"]))
        if missing:
            raise ValueError(f"--users: {some(missing)}: not among the users of --history.")
        table = table[table["user"].isin(set(users))]
    dataset = opened.test._dataset
    ids = dict(dataset.field2token_id[dataset.iid_field])
    ids.pop("[PAD]")
    return Histories.of(table, ids)


def _mixed(block: Block, wish: torch.Tensor) -> Block:
    """Scores, and what they are the sum of, standardised over the items, plus what is wished."""
    scores = block.scores[:, 1:]
    mean, deviation = scores.mean(1, keepdim=True), scores.std(1, keepdim=True).clamp(min=1e-12)
    wish = wish.to(scores)
    mixed = torch.full_like(block.scores, -torch.inf)
    mixed[:, 1:] = (scores - mean) / deviation + wish[1:]
    parts = {
        name: (part - part[:, 1:].mean(1, keepdim=True)) / deviation
        for name, part in block.parts.items()
    }
    return Block(block.rows, mixed, parts | {"intent": wish.expand_as(mixed)})


class _Lists:
    """The best items of each user, as blocks of scores come in."""

    def __init__(
        self, audience: Audience, k: int, names: np.ndarray, explained: Explained | None
    ) -> None:
        self._audience, self._names, self._explained = audience, names, explained
        config, n_items = audience.run.config, audience.n_items
        self._k = min(k, n_items - 1)
        # Of equal scores, PyTorch's order depends on how many are asked for: RecBole's is taken.
        self._n_sorted = min(max(k, *config["topk"]), n_items - 1)
        shape = len(audience.tokens), self._k
        self._items = np.zeros(shape, dtype=np.int32)
        self._scores = np.full(shape, -np.inf, dtype=np.float32)
        self._parts: dict[str, np.ndarray] = {}
        self._because = np.full(shape, "", dtype=object) if explained else None

    def add(self, block: Block, keep_history: bool) -> None:
        """Rank the items of some users."""
        scores, rows, audience = block.scores, block.rows, self._audience
        if not keep_history:
            out = audience.left_out[rows]
            of_row = np.repeat(np.arange(len(rows)), np.diff(out.indptr))
            scores[torch.from_numpy(of_row), torch.from_numpy(out.indices).long()] = -torch.inf
        values, items = scores.topk(self._n_sorted, dim=1)
        values, items = values[:, : self._k], items[:, : self._k]
        self._items[rows], self._scores[rows] = items.cpu().numpy(), values.cpu().numpy()
        if self._explained is None:
            return
        for name, part in block.parts.items():
            table = self._parts.setdefault(name, np.zeros(self._items.shape, dtype=np.float32))
            table[rows] = part.gather(1, items.to(part.device)).cpu().numpy()
        assert self._because is not None
        known = audience.known[rows]
        for number, row in enumerate(rows):
            history = known.indices[known.indptr[number] : known.indptr[number + 1]]
            near = self._explained.nearest(history, self._items[row])
            self._because[row] = ["; ".join(self._names[items]) for items in near]

    def frame(self) -> pd.DataFrame:
        """One row for each item of each list."""
        is_there = np.isfinite(self._scores)
        short = int((is_there.sum(1) < self._k).sum())
        if short:
            logger.warning("%d lists have fewer than %d items: no more are left", short, self._k)
        dataset = self._audience.run.test._dataset
        rows, places = np.nonzero(is_there)
        items = self._items[is_there]
        users = np.array(self._audience.tokens, dtype=object)
        columns = {
            "user": users[rows],
            "rank": places + 1,
            "item": dataset.field2id_token[dataset.iid_field].astype(object)[items],
            "title": self._names[items],
            "score": self._scores[is_there],
        }
        columns |= {f"from_{name}": table[is_there] for name, table in self._parts.items()}
        if self._explained is not None:
            assert self._because is not None
            is_run_user = isinstance(self._audience, RunUsers)
            texts = self._explained.descriptions if is_run_user else {}
            columns["because"] = self._because[is_there]
            columns["description"] = np.array([texts.get(user, "") for user in users], object)[rows]
        return pd.DataFrame(columns)
