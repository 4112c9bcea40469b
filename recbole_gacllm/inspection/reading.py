"""Reading the descriptions of a finished run: one node's page, or all of them as a table.

Nothing is written here: the folders may be somebody else's, or of a run that goes on.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_gacllm.artifacts import locate, manifests
from recbole_gacllm.convolution.graph import NeighborLists, TrainGraph, select_neighbors
from recbole_gacllm.convolution.layers import SIDES, Kind, Layer, Side, kind_of, layer_files
from recbole_gacllm.convolution.names import NAMES, read_names


@dataclass(frozen=True)
class NodePage:
    """All that was written about one node.

    Neighbours are those that its prompts show, best first; the token budget may have left out the
    last ones.
    """

    name: str  # of an item; empty for a user
    degree: int  # training interactions
    texts: list[tuple[str, str]]  # (status, text) of layers 0..L
    neighbors: list[tuple[str, str, str]]  # (token, name, text of layer 0)


@dataclass(frozen=True)
class Unfinished:
    """How far a stage is that goes on, or was killed: in layer ``number`` of ``n_layers``."""

    number: int
    n_layers: int
    n_nodes: int  # of a layer; prompts are fewer where some are equal or in the store


class RunDescriptions:
    """The descriptions of one run: its finished ``layers``, the raw one first.

    Args:
        folder: A ``descriptions-…`` folder with a manifest; or the ``inputs-…`` of a run whose
            texts no LLM has touched, which has layer 0 alone and no prompts.
        unfinished: Take one without, too, as far as it is.
        names_file: The run's own names of items; None takes those that were written last.

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
        is_started = (folder / manifests.JOB_FILE).is_file()
        is_unfinished = manifest is None and is_started and folder.name.startswith("descriptions-")
        if is_unfinished and unfinished:
            manifest = {"stage": "descriptions"}
        if manifest is None:
            state = "are not finished yet" if is_started else "are not there"
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
        inputs, files = folder, []
        if manifest["stage"] == "descriptions":
            self._job = read_job(folder, "inputs", "options", "seed")
            if not {"neighbor_rule", "n_neighbors"} <= set(self._job["options"]):
                file = folder / manifests.JOB_FILE
                raise ValueError(f"{file} is not what a run wrote: no options.")
            inputs, files = locate.beside(folder, self._job["inputs"]), layer_files(folder)
        if is_unfinished:  # a layer below may have been lost and is made again
            in_order = [folder / f"layer_{number}.parquet" for number in range(1, len(files) + 1)]
            files = list(takewhile(Path.is_file, in_order))
        self.layers = [Layer.read(file) for file in (inputs / "layer_0.parquet", *files)]
        # Older runs have no such key.
        self._has_knowledge = self._job.get("options", {}).get("llm_knowledge_tokens", 0) > 0
        numbers = range(len(self.layers))
        self.kinds: list[Kind] = [kind_of(number, self._has_knowledge) for number in numbers]
        self.graph = TrainGraph.load(inputs / "graph.npz")
        self.names = read_names(inputs, names_file)
        self.unfinished = self._progress() if is_unfinished else None

    @property
    def has_prompts(self) -> bool:
        """Whether texts were made from those of neighbours."""
        return "convolution" in self.kinds

    @classmethod
    def newest(cls, artifact_dir: Path, dataset: str) -> RunDescriptions:
        """The descriptions that were finished last for a data set; without any, its layer 0.

        Raises:
            ValueError: If there is neither.
        """
        root = artifact_dir / dataset
        stage = "descriptions" if any(root.glob("descriptions-*")) else "inputs"
        files = list(root.glob(f"{stage}-*/{manifests.MANIFEST_FILE}"))
        if not files:
            raise ValueError(
                f"no finished descriptions of {dataset!r} under {artifact_dir}. Run GaCLLM on it "
                "first, or give the artifact_dir of the run."
            )
        return cls(max(files, key=lambda file: file.stat().st_mtime).parent)

    @classmethod
    def of_run(
        cls, run: Path, unfinished: bool = False, artifact_dir: Path | None = None
    ) -> RunDescriptions:
        """The descriptions of a run; of one on raw texts, layer 0.

        Args:
            run: Its ``run.json``, the folder of it, or a ``descriptions-…`` folder.
            unfinished: Take a folder whose stage has not finished, too.
            artifact_dir: Where to look for artefacts that were moved away from the run.

        Raises:
            ValueError: If there is no such file, or the run had none.
        """
        if any((run / name).is_file() for name in (manifests.MANIFEST_FILE, manifests.JOB_FILE)):
            return cls(run, unfinished)
        folders = locate.RunFiles.read(run, artifact_dir).artifacts()
        folder = folders.get("descriptions") or folders.get("inputs")
        if folder is None:
            raise ValueError(f"the run of {run} had no texts.")
        return cls(folder, unfinished, folders.get(NAMES))

    def _progress(self) -> Unfinished:
        """How far the stage is."""
        n_nodes = sum(map(len, self.layers[0].tokens.values()))
        n_layers = self._has_knowledge + self._job["options"]["llm_n_layers"]
        return Unfinished(len(self.layers), n_layers, n_nodes)

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
        names = self.names if other == "item" else dict.fromkeys(tokens["user"], "")
        neighbors: Iterable[int] = self.neighbor_lists(side).of(node) if self.has_prompts else ()
        return NodePage(
            name=self.names[token] if side == "item" else "",
            degree=int(self.graph.degrees(side)[node]),
            texts=[(layer.statuses[side][node], layer.texts[side][node]) for layer in self.layers],
            neighbors=[
                (tokens[other][n], names[tokens[other][n]], self.layers[0].texts[other][n])
                for n in neighbors
            ],
        )

    def neighbor_lists(self, side: Side) -> NeighborLists:
        """The neighbours chosen for the prompts of a side."""
        rule, n_neighbors = (self._job["options"][key] for key in ("neighbor_rule", "n_neighbors"))
        return select_neighbors(self.graph, side, rule, n_neighbors, self._job["seed"])

    def frame(self) -> pd.DataFrame:
        """All layers, one row for each node and layer."""
        tables = (
            pd.DataFrame(
                {
                    "side": side,
                    "token": layer.tokens[side],
                    "layer": number,
                    "kind": self.kinds[number],
                    "text": layer.texts[side],
                    "status": layer.statuses[side],
                    "reason": layer.reasons[side],
                    "n_prompt_tokens": layer.n_prompt_tokens[side],
                    "n_output_tokens": layer.n_output_tokens[side],
                }
            )
            for number, layer in enumerate(self.layers)
            for side in SIDES
        )
        return pd.concat(tables, ignore_index=True)


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
