"""A layer of descriptions: one text for every node, users first, and the file that holds it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recbole_gacllm.artifacts import disk
from recbole_gacllm.errors import GaCLLMError

Side = Literal["user", "item"]
SIDES: tuple[Side, Side] = ("user", "item")

# How a layer is made: raw texts, from the node's own text alone, or from its neighbours', too.
Kind = Literal["raw", "knowledge", "convolution"]

# What a text is: raw (layer 0), generated, imported, or the text of the layer below carried over
# because generation failed, there was nothing to tell the LLM, or an import lacked the node.
Status = Literal["raw", "generated", "failed", "nothing_known", "imported", "missing"]

# Of a layer's file, and the field that each holds.
_COLUMNS = {"token": "tokens", "text": "texts", "status": "statuses", "reason": "reasons"}
_COLUMNS |= {name: name for name in ("n_prompt_tokens", "n_output_tokens")}


@dataclass
class Layer:
    """Texts of all nodes at one layer, by side, in the order of ``tokens``."""

    tokens: dict[Side, list[str]]  # RecBole's raw tokens
    texts: dict[Side, list[str]]
    statuses: dict[Side, list[str]]  # what each text is, see Status
    reasons: dict[Side, list[str]]  # why a text was carried over; empty otherwise
    n_prompt_tokens: dict[Side, np.ndarray]  # that its generation took; 0 for raw texts
    n_output_tokens: dict[Side, np.ndarray]

    @classmethod
    def raw(cls, tokens: dict[Side, list[str]], texts: dict[Side, list[str]]) -> Layer:
        """Layer 0."""
        return cls(
            tokens=tokens,
            texts=texts,
            statuses={side: ["raw"] * len(tokens[side]) for side in SIDES},
            reasons={side: [""] * len(tokens[side]) for side in SIDES},
            n_prompt_tokens={side: np.zeros(len(tokens[side]), np.int64) for side in SIDES},
            n_output_tokens={side: np.zeros(len(tokens[side]), np.int64) for side in SIDES},
        )

    def digest(self) -> str:
        """SHA-256 of all sides, tokens and texts, whatever the order of the nodes."""
        total = hashlib.sha256()
        for side in SIDES:
            for token, text in sorted(zip(self.tokens[side], self.texts[side], strict=True)):
                for part in (side, token, text):
                    total.update(f"{len(part)}:{part}".encode("utf-8", "surrogatepass"))
        return total.hexdigest()

    def write(self, path: Path) -> None:
        """Write as Parquet, one row a node, whole or not at all."""
        columns = {"side": [side for side in SIDES for _ in self.tokens[side]]}
        for name, field in _COLUMNS.items():
            columns[name] = [value for side in SIDES for value in getattr(self, field)[side]]
        with disk.atomic_path(path) as temporary:
            pq.write_table(
                pa.table(columns), temporary, compression="zstd", write_page_checksum=True
            )

    @classmethod
    def read(cls, path: Path) -> Layer:
        """Read what :meth:`write` wrote.

        Raises:
            GaCLLMError: If the file is damaged.
        """
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            sides = np.asarray(table["side"].to_pylist(), dtype=object)
            rows = {side: np.flatnonzero(sides == side) for side in SIDES}
            fields: dict[str, Any] = {}
            for name, field in _COLUMNS.items():
                if name.startswith("n_"):
                    counts = table[name].to_numpy()
                    fields[field] = {side: counts[rows[side]] for side in SIDES}
                else:
                    values = table[name].to_pylist()
                    fields[field] = {side: [values[row] for row in rows[side]] for side in SIDES}
            return cls(**fields)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise GaCLLMError(
                f"{path} is damaged: {error}. Delete it and start again: its texts are in the "
                "description store and nothing is generated twice."
            ) from error


def kind_of(number: int, has_knowledge: bool) -> Kind:
    """What layer ``number`` of a run is; with a knowledge step layer 1 is that."""
    if number == 0:
        return "raw"
    return "knowledge" if has_knowledge and number == 1 else "convolution"


def layer_name(number: int, kind: str | None) -> str:
    """A layer in words."""
    return f"layer {number}, knowledge" if kind == "knowledge" else f"layer {number}"


def layer_files(folder: Path) -> list[Path]:
    """The files of generated layers in a folder, by number: ``layer_10`` after ``layer_9``."""
    return sorted(folder.glob("layer_*.parquet"), key=lambda file: int(file.stem[len("layer_") :]))
