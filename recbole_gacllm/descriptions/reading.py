"""Reading the descriptions of a finished run: one node's page, or all of them as a table."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from recbole_gacllm import artifacts
from recbole_gacllm.descriptions.layers import SIDES, Layer, Side, layer_files
from recbole_gacllm.descriptions.neighbors import NeighborLists, TrainGraph, select_neighbors


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


class RunDescriptions:
    """The descriptions of one run.

    Args:
        folder: A ``descriptions-…`` folder with a manifest.

    Raises:
        ValueError: If there are none there.
    """

    def __init__(self, folder: Path) -> None:
        manifest = artifacts.read_manifest(folder)
        if manifest is None:
            started = (folder / artifacts.JOB_FILE).is_file()
            state = "are not finished yet" if started else "are not there"
            raise ValueError(
                f"the descriptions of {folder} {state}: start the run, or start it again, and it "
                "goes on with what is missing."
            )
        if manifest.get("stage") != "descriptions":
            raise ValueError(
                f"{folder} is the folder of the stage {manifest.get('stage')}; descriptions lie in "
                "descriptions-… beside it."
            )
        self.folder = folder
        self.manifest = manifest
        self._job = json.loads((folder / "job.json").read_text())
        self._inputs = Path(self._job["inputs"])
        if not self._inputs.is_dir():  # the artefacts were moved together
            self._inputs = folder.parent / self._inputs.name
        files = [self._inputs / "layer_0.parquet", *layer_files(folder)]
        self.layers = [Layer.read(file) for file in files]
        self.names: dict[str, str] = json.loads(
            (self._inputs / "item_names.json").read_text("utf-8")
        )

    @classmethod
    def newest(cls, artifact_dir: Path, dataset: str) -> RunDescriptions:
        """The descriptions that were finished last for a data set.

        Raises:
            ValueError: If there are none.
        """
        manifests = (artifact_dir / dataset).glob("descriptions-*/manifest.json")
        newest = max(manifests, key=lambda file: file.stat().st_mtime, default=None)
        if newest is None:
            raise ValueError(
                f"no finished descriptions of {dataset!r} under {artifact_dir}. Run GaCLLM on it "
                "first, or give the artifact_dir of the run."
            )
        return cls(newest.parent)

    @classmethod
    def of_run(cls, run: Path) -> RunDescriptions:
        """The descriptions of a run.

        Args:
            run: Its ``run.json``, the folder of it, or a ``descriptions-…`` folder.

        Raises:
            ValueError: If there is no such file, or the run had none.
        """
        if any((run / name).is_file() for name in (artifacts.MANIFEST_FILE, artifacts.JOB_FILE)):
            return cls(run)
        return cls(folder_of_run(run, "descriptions", "generated descriptions"))

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
        around = self.neighbor_lists(side).of(node)
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


def folder_of_run(run: Path, stage: str, what: str) -> Path:
    """The artefact folder of a stage that a run recorded.

    Args:
        run: A ``run.json``, or its folder.
        stage: Name of the stage in ``run.json``.
        what: What the stage makes, for the message.

    Raises:
        ValueError: If there is no such file, it is no run's, or the run had no such stage.
    """
    file = run / "run.json" if run.is_dir() else run
    if not file.is_file():
        raise ValueError(f"{file} is not a file; a run's last line of output names it.")
    try:
        folder = json.loads(file.read_bytes()).get("artifacts", {}).get(stage)
    except (ValueError, AttributeError):
        raise ValueError(
            f"{file} is not what a run wrote; a run's last line of output names its run.json."
        ) from None
    if folder is None:
        raise ValueError(f"the run of {file} had no {what}.")
    return Path(folder)
