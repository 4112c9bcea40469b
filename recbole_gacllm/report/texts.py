"""The texts of a run, as far as its artefacts are there, and what items are coloured by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recbole_gacllm.artifacts.locate import RunFiles
from recbole_gacllm.convolution.layers import Side
from recbole_gacllm.convolution.names import NAMES
from recbole_gacllm.convolution.text import read_features
from recbole_gacllm.inspection.reading import RunDescriptions

_CATEGORY_WORDS = ("genre", "class", "categor", "type", "tag")
_MAX_CATEGORIES = 60

Category = tuple[str, dict[str, tuple[str, ...]]]  # field name, and values of each item by token


@dataclass(frozen=True)
class Texts:
    """Descriptions of a run."""

    run: RunDescriptions
    embeddings: list[np.ndarray]  # one array a layer, users first; fewer if they are gone
    category: Category | None  # what items are coloured by

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
        run = RunDescriptions(folder, names_file=folders.get(NAMES))
        arrays = [folders["embeddings"] / f"layer_{at}.npy" for at in range(len(run.layers))]
        embeddings = [np.load(file, mmap_mode="r") for file in arrays if file.is_file()]
        return cls(run, embeddings, _category(files))

    def tokens(self, side: Side) -> list[str]:
        """Raw tokens of all nodes."""
        return self.run.layers[0].tokens[side]


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
    likely = [field for word in _CATEGORY_WORDS for field in values if word in field.lower()]
    for field in [*likely, *values]:
        n_values = len({value for cell in values[field].values() for value in cell})
        if 2 <= n_values <= _MAX_CATEGORIES:
            return field, values[field]
    return None
