"""What a report is made of: a run's record, its texts and its scores, as far as they are there."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_gacllm.artifacts.locate import RunFiles
from recbole_gacllm.compare.job import PER_USER_FILE
from recbole_gacllm.compare.results import FinishedRun
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inspection.opened import open_run
from recbole_gacllm.report.browser import browser_data, map_data
from recbole_gacllm.report.scoring import Scored, score
from recbole_gacllm.report.texts import Texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A run as the report sees it."""

    record: dict[str, Any]
    texts: Texts | str  # or why there are none
    scored: Scored | str  # or why that is not known
    test: dict[str, pd.Series[float]]  # per user, from the model or from the leaderboard's file
    data: dict[str, Any]  # what the browser and the map show; empty without texts

    @classmethod
    def read(cls, run: Path, artifact_dir: Path | None = None) -> Source:
        """Read a run, as :meth:`.RunFiles.read`, and load its model once more.

        Raises:
            ValueError: If there is no such file.
        """
        files = RunFiles.read(run, artifact_dir)
        files.require_whole()
        try:
            texts: Texts | str = Texts.read(files)
        except (ValueError, GaCLLMError, OSError, KeyError) as error:
            texts = _reason(error)
        scored = scored_again(files)
        test = _stored_metrics(files) if isinstance(scored, str) else scored.test
        data = {}
        if isinstance(texts, Texts):
            data = {"browser": browser_data(texts, scored), "map": map_data(texts)}
        return cls(files.record, texts, scored, test, data)


def main_metric(record: dict[str, Any]) -> str:
    """The metric that chose the epoch, if it was tested; else the first."""
    chosen = str(record["config"].get("valid_metric", "")).lower()
    return chosen if chosen in record["test"] else next(iter(record["test"]))


def scored_again(files: RunFiles) -> Scored | str:
    """What a run's model does, or the reason why it cannot be loaded."""
    try:
        return score(open_run(files))
    except Exception as error:  # whatever RecBole's 90 models raise, the rest of the page stands
        logger.warning("%s cannot be scored again: %s", files.folder, error)
        logger.debug("", exc_info=True)
        return _reason(error)


def _stored_metrics(files: RunFiles) -> dict[str, pd.Series[float]]:
    if not (files.folder / PER_USER_FILE).is_file():
        return {}
    run = FinishedRun(files.folder.name, files.folder, files.record)
    per_user = {metric: run.per_user(metric) for metric in files.record["test"]}
    return {metric: values for metric, values in per_user.items() if values is not None}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
