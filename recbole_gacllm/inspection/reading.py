"""Reading the descriptions of a finished run: one node's page, or all of them as a table.

Nothing is written here: the folders may be somebody else's, or of a run that goes on.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_gacllm.artifacts import locate, manifests
from recbole_gacllm.convolution.graph import NeighborLists, TrainGraph, select_neighbors
from recbole_gacllm.convolution.layers import SIDES, Layer, Side, layer_files
from recbole_gacllm.convolution.names import names_file_of, read_names


@dataclass(frozen=True)
class NodePage:
    """All that was written about one node.

    Attributes:
        name: Name of an item; empty for a user.
        degree: Training interactions.
        texts: (status, text) of layers 0..L.
        neighbors: (token, name, layer-0 text) of the neighbours that its prompts show, best first;
            the token budget may have left out the last ones.
    """

    name: str
    degree: int
    texts: list[tuple[str, str]]
    neighbors: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Unfinished:
    """How far a stage is that goes on, or was killed.

    Attributes:
        number: The layer that is not finished.
        n_layers: Of the run.
        n_nodes: Descriptions of a layer; prompts are fewer where some are equal or in the store.
    """

    number: int
    n_layers: int
    n_nodes: int


class RunDescriptions:
    """The descriptions of one run.

    Args:
        folder: A ``descriptions-…`` folder with a manifest; or the ``inputs-…`` of a run whose
            texts no LLM has touched, which has layer 0 alone and no prompts.
        unfinished: Take one without, too, as far as it is.
        names_file: The run's own names of items; None takes those that were written last.

    Attributes:
        layers: Those that are finished, the raw one first.
        unfinished: None if the stage is finished.

    Raises:
        ValueError: If there are none there.
        GaCLLMError: If the folder is damaged or holds symbolic links.
    """

    def __init__(
        self, folder: Path, unfinished: bool = False, names_file: Path | None = None
    ) -> None:
        if not folder.is_dir():
            raise ValueError(
                f"there is no {folder}: the artefacts were moved or deleted. Give --artifact_dir, "
                "where they lie now, or start the run again."
            )
        locate.require_no_links(folder)
        manifest = manifests.read_manifest(folder)
        if manifest is None and unfinished and folder.name.startswith("descriptions-"):
            started = (folder / manifests.JOB_FILE).is_file()
            manifest = {"stage": "descriptions"} if started else None
        else:
            unfinished = False
        if manifest is None:
            started = (folder / manifests.JOB_FILE).is_file()
            state = "are not finished yet" if started else "are not there"
            raise ValueError(
                f"the descriptions of {folder} {state}: start the run, or start it again, and it "
                "goes on with what is missing."
            )
        if manifest.get("stage") not in ("descriptions", "inputs"):
            raise ValueError(
                f"{folder} is the folder of the stage {manifest.get('stage')}; descriptions lie in "
                "descriptions-… beside it."
            )
        self.folder = folder
        self.manifest = manifest
        self._job: dict[str, Any] = {}
        self._inputs = folder
        if manifest["stage"] == "descriptions":
            self._job = read_job(folder, "inputs", "options", "seed")
            if not {"neighbor_rule", "n_neighbors"} <= set(self._job["options"]):
                file = folder / manifests.JOB_FILE
                raise ValueError(f"{file} is not what a run wrote: no options.")
            self._inputs = locate.beside(folder, self._job["inputs"])
            locate.require_no_links(self._inputs)
        files = layer_files(folder) if self._job else []
        if unfinished:  # a layer below may have been lost and is made again
            wanted = [folder / f"layer_{number}.parquet" for number in range(1, len(files) + 1)]
            files = list(takewhile(Path.is_file, wanted))
        self.layers = [Layer.read(file) for file in (self._inputs / "layer_0.parquet", *files)]
        self.unfinished = self._progress() if unfinished else None
        self.names = read_names(self._inputs, names_file)

    @classmethod
    def newest(cls, artifact_dir: Path, dataset: str) -> RunDescriptions:
        """The descriptions that were finished last for a data set; without any, its layer 0.

        Raises:
            ValueError: If there is neither.
        """

        def last(stage: str) -> Path | None:
            manifests = (artifact_dir / dataset).glob(f"{stage}-*/manifest.json")
            return max(manifests, key=lambda file: file.stat().st_mtime, default=None)

        newest = last("descriptions")
        if newest is None and not any((artifact_dir / dataset).glob("descriptions-*")):
            newest = last("inputs")
        if newest is None:
            raise ValueError(
                f"no finished descriptions of {dataset!r} under {artifact_dir}. Run GaCLLM on it "
                "first, or give the artifact_dir of the run."
            )
        return cls(newest.parent)

    @classmethod
    def of_run(
        cls, run: Path, unfinished: bool = False, artifact_dir: Path | None = None
    ) -> RunDescriptions:
        """The descriptions of a run.

        Args:
            run: Its ``run.json``, the folder of it, or a ``descriptions-…`` folder. Of a run on raw
                texts, layer 0.
            unfinished: Take a folder whose stage has not finished, too.
            artifact_dir: Where to look for artefacts that were moved away from the run.

        Raises:
            ValueError: If there is no such file, or the run had none.
        """
        if any((run / name).is_file() for name in (manifests.MANIFEST_FILE, manifests.JOB_FILE)):
            return cls(run, unfinished)
        folders = folders_of_run(run, ("descriptions", "inputs"), "texts", artifact_dir)
        folder = folders.get("descriptions") or folders["inputs"]
        return cls(folder, unfinished, names_file_of(folders))

    def _progress(self) -> Unfinished:
        """How far the stage is."""
        n_nodes = sum(map(len, self.layers[0].tokens.values()))
        return Unfinished(len(self.layers), self._job["options"]["llm_n_layers"], n_nodes)

    def page(self, side: Side, token: str) -> NodePage:
        """Everything about one node.

        Raises:
            ValueError: If the data set has no such node; names near tokens.
        """
        tokens = self.layers[0].tokens
        if token not in tokens[side]:
            near = difflib.get_close_matches(token, tokens[side], n=3)
            hint = f" Near ones: {', '.join(near)}." if near else ""
            raise ValueError(f"--{side}={token}: no such {side} in the training graph.{hint}")
        node = tokens[side].index(token)
        other: Side = "item" if side == "user" else "user"
        around: Iterable[int] = self.neighbor_lists(side).of(node) if self._job else ()
        raw = self.layers[0].texts[other]
        return NodePage(
            name=self.names[token] if side == "item" else "",
            degree=int(self._graph().degrees(side)[node]),
            texts=[(layer.statuses[side][node], layer.texts[side][node]) for layer in self.layers],
            neighbors=[
                (tokens[other][n], self.names[tokens[other][n]] if other == "item" else "", raw[n])
                for n in around
            ],
        )

    def neighbor_lists(self, side: Side) -> NeighborLists:
        """The neighbours chosen for the prompts of a side."""
        options = self._job["options"]
        return select_neighbors(
            self._graph(),
            side,
            options["neighbor_rule"],
            options["n_neighbors"],
            self._job["seed"],
        )

    def _graph(self) -> TrainGraph:
        return TrainGraph.load(self._inputs / "graph.npz")

    def frame(self) -> pd.DataFrame:
        """All layers, one row for each node and layer."""
        return pd.DataFrame(
            [
                {
                    "side": side,
                    "token": token,
                    "layer": number,
                    "text": layer.texts[side][node],
                    "status": layer.statuses[side][node],
                    "reason": layer.reasons[side][node],
                    "n_prompt_tokens": int(layer.n_prompt_tokens[side][node]),
                    "n_output_tokens": int(layer.n_output_tokens[side][node]),
                }
                for number, layer in enumerate(self.layers)
                for side in SIDES
                for node, token in enumerate(layer.tokens[side])
            ]
        )


def read_job(folder: Path, *names: str) -> dict[str, Any]:
    """What a stage was told to do, with the entries that the caller needs.

    Raises:
        ValueError: If the file is not what a run wrote.
    """
    file = folder / manifests.JOB_FILE
    try:
        job = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from error
    if not isinstance(job, dict) or not set(names) <= set(job):
        raise ValueError(f"{file} is not what a run wrote: it must have {', '.join(names)}.")
    return job


def folders_of_run(
    run: Path, stages: Sequence[str], what: str, artifact_dir: Path | None = None
) -> dict[str, Path]:
    """The artefacts that a run recorded, where they lie now.

    Args:
        run: A ``run.json``, or its folder.
        stages: Names of stages in ``run.json``, one of which must be among them.
        what: What they make, for the message.
        artifact_dir: Where to look for artefacts that were moved away from the run.

    Raises:
        ValueError: If there is no such file, it is no run's, or the run had none of the stages.
    """
    file = run / "run.json" if run.is_dir() else run
    if not file.is_file():
        raise ValueError(f"{file} is not a file; a run's last line of output names it.")
    try:
        record = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(
            f"{file} is not what a run wrote; a run's last line of output names its run.json."
        )
    folders = locate.artifacts_of(record, file.parent, artifact_dir)
    if not set(stages) & set(folders):
        raise ValueError(f"the run of {file} had no {what}.")
    return folders
