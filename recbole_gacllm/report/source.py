"""What a report is made of: a run's record, its texts and its scores, as far as they are there."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gacllm.artifacts import locate
from recbole_gacllm.compare.job import PER_USER_FILE, RUN_FILE
from recbole_gacllm.compare.results import FinishedRun
from recbole_gacllm.convolution.graph import NeighborLists, TrainGraph
from recbole_gacllm.convolution.layers import SIDES, Layer, Side
from recbole_gacllm.convolution.names import names_file_of, read_names
from recbole_gacllm.convolution.text import read_features
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inspection.reading import RunDescriptions

logger = logging.getLogger(__name__)

_CATEGORY_WORDS = ("genre", "class", "categor", "type", "tag")
_MAX_CATEGORIES = 60
_OF_CONFIG = {"model", "dataset", "data_path", "ITEM_ID_FIELD"}


@dataclass(frozen=True)
class Texts:
    """Descriptions of a run.

    Attributes:
        layers: Layers 0..L.
        names: Name of each item, by token.
        degrees: Training interactions of each node, by side, in the order of the tokens.
        neighbors: Neighbours in the prompts, by side; empty if nothing was generated.
        embeddings: One array a layer, users first; fewer than layers if they are gone.
        category: What items are coloured by: field name, and values of each item.
    """

    layers: list[Layer]
    names: dict[str, str]
    degrees: dict[Side, np.ndarray]
    neighbors: dict[Side, NeighborLists]
    embeddings: list[np.ndarray]
    category: tuple[str, dict[str, tuple[str, ...]]] | None

    @classmethod
    def read(
        cls, record: dict[str, Any], run_folder: Path, artifact_dir: Path | None = None
    ) -> Texts:
        """Read the artefacts that a run names.

        Raises:
            ValueError: If they are not there.
        """
        folders = locate.artifacts_of(record, run_folder, artifact_dir)
        if "inputs" not in folders:
            raise ValueError(f"the run of {record['model']} used no texts")
        inputs = folders["inputs"]
        if not (inputs / "graph.npz").is_file():
            raise ValueError(
                f"the artefacts are gone: there is no {inputs}; --artifact_dir says where they "
                "lie now"
            )
        graph = TrainGraph.load(inputs / "graph.npz")
        layers, neighbors = [Layer.read(inputs / "layer_0.parquet")], {}
        if "descriptions" in folders:
            found = RunDescriptions(folders["descriptions"], names_file=names_file_of(folders))
            layers = found.layers
            neighbors = {side: found.neighbor_lists(side) for side in SIDES}
        files = [folders["embeddings"] / f"layer_{number}.npy" for number in range(len(layers))]
        return cls(
            layers=layers,
            names=read_names(inputs, names_file_of(folders)),
            degrees={side: graph.degrees(side) for side in SIDES},
            neighbors=neighbors,
            embeddings=[np.load(file, mmap_mode="r") for file in files if file.is_file()],
            category=_category(record["config"], data_path_of(record, run_folder)),
        )


@dataclass(frozen=True)
class Source:
    """A run as the report sees it.

    Attributes:
        record: Its ``run.json``.
        texts: Its descriptions, or why there are none.
        scored: What its model does for every user, or why that is not known.
        test: Per-user test metrics, from the model or from the leaderboard's file.
    """

    record: dict[str, Any]
    folder: Path
    texts: Texts | str
    scored: Any
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
        file = run / RUN_FILE if run.is_dir() else run
        if not file.is_file():
            raise ValueError(
                f"{run} is neither a run (a folder with {RUN_FILE}) nor the folder of a "
                "leaderboard; a run's last line of output names it."
            )
        record = _record_of(file)
        try:
            texts: Texts | str = Texts.read(record, file.parent, artifact_dir)
        except (ValueError, GaCLLMError, OSError, KeyError) as error:
            texts = _reason(error)
        scored = scored_again(record, file.parent, artifact_dir)
        return cls(record, file.parent, texts, scored, _per_user(record, file.parent, scored))

    @property
    def main_metric(self) -> str:
        """The metric that chose the epoch."""
        return main_metric(self.record)


def _record_of(file: Path) -> dict[str, Any]:
    """A ``run.json`` with what every run has.

    Raises:
        ValueError: If something is missing.
    """
    try:
        record = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not the record of a run: it is no JSON ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is not the record of a run: it is no JSON object.")
    config = record.get("config")
    missing = {"model", "dataset", "seed", "test", "config", "versions", "device"} - set(record)
    missing |= _OF_CONFIG - set(config if isinstance(config, dict) else {})
    if missing or not isinstance(record["test"], dict) or not record["test"]:
        what = ", ".join(sorted(missing)) or "metrics in 'test'"
        raise ValueError(f"{file} is not the record of a run: it has no {what}.")
    return record


def main_metric(record: dict[str, Any]) -> str:
    """The metric that chose the epoch, if it was tested; else the first."""
    chosen = str(record["config"].get("valid_metric", "")).lower()
    return chosen if chosen in record["test"] else next(iter(record["test"]))


def scored_again(record: dict[str, Any], folder: Path, artifact_dir: Path | None = None) -> Any:
    """The run's :class:`.scoring.Scored`, or the reason why its model cannot be loaded."""
    if record.get("checkpoint") is None:
        return "the run kept no checkpoint"
    checkpoint = locate.find(str(record["checkpoint"]), folder)
    if not checkpoint.is_file():
        return f"the checkpoint is gone: there is no {record['checkpoint']}"
    from recbole_gacllm.report.scoring import score  # starts RecBole

    try:
        folders = locate.artifacts_of(record, folder, artifact_dir)
        return score(record, checkpoint, folders, data_path_of(record, folder))
    except Exception as error:  # whatever RecBole's 90 models raise, the rest of the page stands
        logger.warning("%s cannot be scored again: %s", checkpoint, error)
        logger.debug("", exc_info=True)
        return _reason(error)


def _per_user(record: dict[str, Any], folder: Path, scored: Any) -> dict[str, pd.Series[float]]:
    if not isinstance(scored, str):
        return dict(scored.test)
    if not (folder / PER_USER_FILE).is_file():
        return {}
    run = FinishedRun(folder.name, folder, record)
    found = {metric: run.per_user(metric) for metric in record["test"]}
    return {metric: values for metric, values in found.items() if values is not None}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def data_path_of(record: dict[str, Any], folder: Path) -> Path:
    """The folder of a run's data set, where it lies now; ml-100k comes with RecBole."""
    config = record["config"]
    path = locate.find(str(config["data_path"]), folder)
    recbole = find_spec("recbole")  # its import would take seconds
    if config["dataset"] == "ml-100k" and not path.is_dir() and recbole and recbole.origin:
        return Path(recbole.origin).parent / "dataset_example" / "ml-100k"
    return path


def _category(
    config: dict[str, Any], data_path: Path
) -> tuple[str, dict[str, tuple[str, ...]]] | None:
    """Genres of the items, or the first field of few values in the item file."""
    file = data_path / f"{config['dataset']}.item"
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
    named = [field for word in _CATEGORY_WORDS for field in values if word in field.lower()]
    for field in [*named, *values]:
        if (
            2
            <= len({value for cell in values[field].values() for value in cell})
            <= _MAX_CATEGORIES
        ):
            return field, values[field]
    return None
