"""Every user's metrics and recommendations, from a finished run's model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from torch import Tensor

from recbole_gacllm.artifacts.checkpoint import no_pickles
from recbole_gacllm.compare.degrees import Degrees, count_degrees
from recbole_gacllm.compare.job import Recorder, training_pairs
from recbole_gacllm.data.checks import targets
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inspection.opened import OpenRun, trainer_of

N_RECOMMENDED = 10
# Other machines and PyTorch versions move a rank here and there, no more.
_TOLERANCE = 0.005

Scores = dict[str, "pd.Series[float]"]  # metric -> value of each user, by raw token


@dataclass(frozen=True)
class Scored:
    """What a run's model does for every user, by raw token."""

    valid: Scores
    test: Scores
    top: dict[str, list[str]]  # recommended items, as RecBole ranks them; empty for sampled ranking
    heldout: dict[str, list[str]]  # items of the test split
    degrees: Degrees  # training interactions by side


def score(run: OpenRun) -> Scored:
    """Rank all items for a run's validation and test users.

    Raises:
        GaCLLMError: If the model no longer gives the run's metrics.
    """
    trainer = trainer_of(run)
    with no_pickles():
        trainer.eval_collector.data_collect(run.train)  # what some metrics count; in fit otherwise
        valid, _, _ = _evaluate(trainer, run, run.valid)
        rows = _collect_top(trainer)
        test, users, result = _evaluate(trainer, run, run.test)
    for name, value in run.files.record["test"].items():
        if abs(result[name] - value) > _TOLERANCE:
            raise GaCLLMError(
                f"the checkpoint gives {name} {result[name]}, the run had {value}: data, code or "
                "packages have changed since"
            )
    dataset, top = run.test._dataset, {}
    if isinstance(run.test, FullSortEvalDataLoader):
        items = dataset.field2id_token[dataset.iid_field][torch.cat(rows).numpy()]
        top = dict(zip(users, items.tolist(), strict=True))
    heldout: dict[str, list[str]] = {}
    for user, item in sorted(set(targets(dataset))):
        heldout.setdefault(user, []).append(item)
    degrees = count_degrees(training_pairs(run.train._dataset))
    return Scored(valid, test, top, heldout, degrees)


def _evaluate(trainer: Any, run: OpenRun, part: Any) -> tuple[Scores, list[str], dict[str, float]]:
    """Each metric by user, the user of each evaluated row, and RecBole's means."""
    recorder = Recorder()
    recorder.on_split(run.train, run.valid, part)
    recorder.on_trainer(trainer)
    result = trainer.evaluate(part, load_best_model=False, show_progress=False)
    users = recorder.users()
    scores = {
        # A user may have several rows, of sequential models.
        name: pd.Series(values, index=users).groupby(level=0, sort=True).mean()
        for name, values in recorder.values.items()
    }
    return scores, users, dict(result)


def _collect_top(trainer: Any) -> list[Tensor]:
    """The best items of each evaluated row, filled while the trainer evaluates."""
    collected: list[Tensor] = []
    collect = trainer.eval_collector.eval_batch_collect

    def collecting(scores: Tensor, *others: Any) -> None:
        collected.append(scores.topk(min(N_RECOMMENDED, scores.shape[1] - 1)).indices.cpu())
        collect(scores, *others)

    trainer.eval_collector.eval_batch_collect = collecting
    return collected
