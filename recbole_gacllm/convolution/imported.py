"""Descriptions from elsewhere: a Parquet or CSV file that fills layers of a run.

One row a description: ``side`` (user or item), ``token`` (raw, as in the data), ``layer`` (0 is
what the feature files give otherwise), ``text``. Layers that the file holds are taken from it, the
others are generated as ever, from the layer below; other columns are ignored. So the file that
``export-descriptions`` writes comes back in as it is, or as an API model or a curator made it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from recbole_gacllm.artifacts.csv_cells import as_before
from recbole_gacllm.convolution.layers import SIDES, Layer, Side
from recbole_gacllm.convolution.neutralize import one_line

logger = logging.getLogger(__name__)

_COLUMNS = ("side", "token", "layer", "text")
_N_EXAMPLES = 5


@dataclass
class ImportReport:
    """What an imported layer covers."""

    layer: int
    n_imported: int  # nodes of the training graph whose text comes from the file
    n_missing: int  # nodes that the file lacks; they carry the text of the layer below
    n_unknown: int  # rows about nodes that the training graph lacks; they are left out
    missing: list[str]  # some of them, as "side token"
    unknown: list[str]


@dataclass(frozen=True)
class ImportedTexts:
    """The texts of a file: layer -> side -> raw token -> text, one line of visible characters."""

    file: Path
    layers: dict[int, dict[Side, dict[str, str]]]

    @classmethod
    def read(cls, file: Path) -> ImportedTexts:
        """Read and check a file.

        Raises:
            ValueError: If it cannot be read, or names the first row that cannot be used.
        """
        frame = _read(file)
        layers: dict[int, dict[Side, dict[str, str]]] = {}
        rows = zip(*(frame[name].tolist() for name in _COLUMNS), strict=True)
        for number, (side, token, layer, cell) in enumerate(rows, start=1):
            text = one_line(cell) if isinstance(cell, str) else None
            if isinstance(layer, float) and layer.is_integer():  # another row has none
                layer = int(layer)
            problem = _problem(side, token, layer, text)
            if problem is None and text is not None:
                texts = layers.setdefault(int(layer), {"user": {}, "item": {}})[side]
                if token in texts:
                    problem = f"{side} {token} has two texts of layer {layer}"
                texts[token] = text
            if problem is not None:
                raise ValueError(f"{file}, row {number}: {problem}.")
        if not layers:
            raise ValueError(f"{file} holds no row.")
        return cls(file, layers)

    def digest(self) -> str:
        """SHA-256 of all texts, whatever their order in the file."""
        canonical = json.dumps(self.layers, sort_keys=True).encode("ascii")
        return hashlib.sha256(canonical).hexdigest()

    def report(self, number: int, tokens: dict[Side, list[str]]) -> ImportReport:
        """Compare a layer with the nodes of the training graph."""
        texts = self.layers[number]
        nodes = {side: set(tokens[side]) for side in SIDES}
        missing = [f"{s} {token}" for s in SIDES for token in tokens[s] if token not in texts[s]]
        unknown = [f"{s} {token}" for s in SIDES for token in texts[s] if token not in nodes[s]]
        n_nodes = sum(len(tokens[side]) for side in SIDES)
        return ImportReport(
            layer=number,
            n_imported=n_nodes - len(missing),
            n_missing=len(missing),
            n_unknown=len(unknown),
            missing=missing[:_N_EXAMPLES],
            unknown=unknown[:_N_EXAMPLES],
        )

    def check(self, tokens: dict[Side, list[str]], n_layers: int) -> list[ImportReport]:
        """Compare all layers with the nodes of a run, and log what does not fit.

        Raises:
            ValueError: If the file has a layer that the run lacks, or fits no node at all.
        """
        if max(self.layers) > n_layers:
            raise ValueError(
                f"text_import_file: {self.file} has texts of layer {max(self.layers)}, the run "
                f"has layers 0 to {n_layers}. Set llm_n_layers (and n_layers) to as many, and "
                "text_source to generated, or leave these rows out."
            )
        reports = [self.report(number, tokens) for number in sorted(self.layers)]
        for report in reports:
            if report.n_imported == 0:
                raise ValueError(
                    f"text_import_file: no token of layer {report.layer} in {self.file} is a node "
                    f"of the data set; it has {', '.join(report.unknown)}, the data set "
                    f"user {tokens['user'][0]}, item {tokens['item'][0]}."
                )
            logger.info("text_import_file: %s", in_words(report))
        return reports

    def fill(self, number: int, below: Layer) -> Layer:
        """Layer ``number``: the file's texts; a node that it lacks keeps the text it had below.

        At layer 0, ``below`` is what the feature files gave, and such a node stays ``raw``.
        """
        layer = Layer.raw(below.tokens, {side: list(below.texts[side]) for side in SIDES})
        texts = self.layers[number]
        for side in SIDES:
            for node, token in enumerate(layer.tokens[side]):
                if token in texts[side]:
                    layer.texts[side][node] = texts[side][token]
                    layer.statuses[side][node] = "imported"
                elif number > 0:
                    layer.statuses[side][node] = "missing"
                    layer.reasons[side][node] = "not in text_import_file"
        return layer


def in_words(report: ImportReport) -> str:
    """A report in one sentence or three."""
    parts = [f"layer {report.layer}: {report.n_imported} nodes have an imported text"]
    if report.n_missing:
        what = "text of the feature files" if report.layer == 0 else "text of the layer below"
        parts.append(
            f"{report.n_missing} are not in the file and keep the {what} "
            f"({_examples(report.missing, report.n_missing)})"
        )
    if report.n_unknown:
        parts.append(
            f"{report.n_unknown} rows are about nodes that the training graph lacks "
            f"({_examples(report.unknown, report.n_unknown)})"
        )
    return "; ".join(parts)


def _examples(names: list[str], n: int) -> str:
    return ", ".join(names) + (", …" if n > len(names) else "")


def _read(file: Path) -> pd.DataFrame:
    """The table in a file, tokens as strings; what is missing is None or NaN."""
    if file.suffix not in (".parquet", ".csv"):
        raise ValueError(f"{file}: the name of an import must end in .parquet or .csv.")
    try:
        frame = _read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); save it as UTF-8.") from error
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if any(list(frame.columns).count(name) != 1 for name in _COLUMNS):
        raise ValueError(
            f"{file} must have the columns {', '.join(_COLUMNS)}, each once; it has "
            f"{', '.join(map(str, frame.columns)) or 'none'}."
        )
    # Tokens that look like numbers come as numbers from other tools.
    tokens = frame["token"].astype(object)
    frame["token"] = tokens.where(tokens.isna(), tokens.astype(str))
    return frame


def _read_csv(file: Path) -> pd.DataFrame:
    """Every cell as it is: pandas would cut a text at a null byte, and Arrow close a quote."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header = next(reader, [])
        rows = []
        for row in filter(None, reader):
            if len(row) != len(header):
                raise ValueError(
                    f"line {reader.line_num} has {len(row)} fields, the header {len(header)}; "
                    "put texts that hold a comma or a line break between quotation marks"
                )
            rows.append(row)
    frame = pd.DataFrame(rows, columns=header, dtype=object)
    return frame.map(as_before)


def _problem(side: Any, token: Any, layer: Any, text: str | None) -> str | None:
    """Why a row cannot be used, if so."""
    if side not in SIDES:
        return f"side is {side!r}; allowed are user and item"
    if not isinstance(token, str) or not token:
        return "token is empty"
    if not str(layer).isdecimal():
        return f"layer is {layer!r}; allowed are 0, 1, 2, …"
    if not text:
        return f"the text of {side} {token} is {'no text' if text is None else 'empty'}"
    return None
