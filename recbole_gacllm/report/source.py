"""What a report is made of: a run's record, its texts and its scores, as far as they are there."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gacllm.artifacts.locate import RunFiles
from recbole_gacllm.compare.job import PER_USER_FILE
from recbole_gacllm.compare.results import FinishedRun
from recbole_gacllm.convolution.layers import Side
from recbole_gacllm.convolution.names import names_file_of
from recbole_gacllm.convolution.text import read_features
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inspection.opened import open_run
from recbole_gacllm.inspection.reading import RunDescriptions
from recbole_gacllm.report.scoring import Scored, score

logger = logging.getLogger(__name__)

_CATEGORY_WORDS = ("genre", "class", "categor", "type", "tag")
_MAX_CATEGORIES = 60

Category = tuple[str, dict[str, tuple[str, ...]]]  # field name, and values of each item by token


@dataclass(frozen=True)
class Texts:
    """Descriptions of a run.

    Attributes:
        run: Layers, names of items, training edges and neighbours in the prompts.
        embeddings: One array a layer, users first; fewer than layers if they are gone.
        category: What items are coloured by.
    """

    run: RunDescriptions
    embeddings: list[np.ndarray]
    category: Category | None

    @classmethod
    def read(cls, files: RunFiles) -> Texts:
        """Read the artefacts that a run names.

        Raises:
            ValueError: If they are not there.
            GaCLLMError: If they are damaged.
        """
        folders = files.artifacts()
        if "inputs" not in folders:
            raise ValueError(f"the run of {files.record['model']} used no texts")
        if not (folders["inputs"] / "graph.npz").is_file():
            raise ValueError(
                f"the artefacts are gone: there is no {folders['inputs']}; --artifact_dir says "
                "where they lie now"
            )
        folder = folders.get("descriptions") or folders["inputs"]
        run = RunDescriptions(folder, names_file=names_file_of(folders))
        arrays = [folders["embeddings"] / f"layer_{at}.npy" for at in range(len(run.layers))]
        embeddings = [np.load(file, mmap_mode="r") for file in arrays if file.is_file()]
        return cls(run, embeddings, _category(files))

    def tokens(self, side: Side) -> list[str]:
        """Raw tokens of all nodes."""
        return self.run.layers[0].tokens[side]


@dataclass(frozen=True)
class Source:
    """A run as the report sees it.

    Attributes:
        texts: Its descriptions, or why there are none.
        scored: What its model does for every user, or why that is not known.
        test: Per-user test metrics, from the model or from the leaderboard's file.
    """

    record: dict[str, Any]
    texts: Texts | str
    scored: Scored | str
    test: dict[str, pd.Series[float]]

    @classmethod
    def read(cls, run: Path, artifact_dir: Path | None = None) -> Source:
        """Read a run and load its model once more.

        Args:
            run: A ``run.json``, or the folder of it.
            artifact_dir: Where to look for artefacts that were moved away from the run.

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
        return cls(files.record, texts, scored, test)


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


def _category(files: RunFiles) -> Category | None:
    """Genres of the items, or the first field of few values in the item file."""
    config = files.record["config"]
    file = files.data_path() / f"{config['dataset']}.item"
    if not file.is_file():
        return None
    frame = read_features(
        file,
        config["ITEM_ID_FIELD"],
        config["field_separator"],
        config.get("encoding") or "utf-8",
        config["seq_separator"],
    )
    values = {
        str(field): {
            str(token): (cell,) if isinstance(cell, str) else tuple(cell)
            for token, cell in frame[field].items()
            if cell is not None
        }
        for field in frame.columns
    }
    titled = [field for word in _CATEGORY_WORDS for field in values if word in field.lower()]
    for field in [*titled, *values]:
        n_values = len({value for cell in values[field].values() for value in cell})
        if 2 <= n_values <= _MAX_CATEGORIES:
            return field, values[field]
    return None
