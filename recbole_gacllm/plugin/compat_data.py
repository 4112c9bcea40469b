"""Repairs of how RecBole 1.2.1 reads a data set: its files, and the order of its times."""

from __future__ import annotations

import builtins
import io
from pathlib import Path
from types import ModuleType
from typing import Any

from recbole_gacllm.plugin.import_hooks import Overlay, replaces


def atomic_files(module: Any) -> None:
    """Let RecBole's ``Dataset`` read its files through :mod:`recbole_gacllm.data.atomic`.

    Cause: pandas' quoting swallows the lines after a lone quote; a byte order mark becomes part of
    a column's name; a file of another kind ends in a traceback that names neither line nor key;
    dates in ``timestamp:token`` are numbered as they appear. Files that RecBole reads right give
    the same frames.
    """
    # The file that is being read, its data set, and its times or why they cannot be read.
    reading: list[tuple[Any, Any, Any]] = []

    @replaces(module.Dataset, "_load_feat")
    def _load_feat(original: Any, self: Any, filepath: Any, source: Any) -> Any:
        from recbole_gacllm.data.atomic import read_atomic
        from recbole_gacllm.data.checks import note_columns

        if self._get_load_and_unload_col(source)[0] == set():
            return original(self, filepath, source)
        name = getattr(source, "value", source)
        id_field = {"user": self.uid_field, "item": self.iid_field}.get(name)
        inter = getattr(self, "inter_feat", None)
        ids = None
        if id_field is not None and inter is not None and id_field in inter:
            ids = frozenset(inter[id_field].dropna().unique())
        keys = self.config
        file = read_atomic(Path(filepath), keys["field_separator"], keys["encoding"], id_field, ids)
        moments = None
        if name == "inter":
            moments = note_columns(self, file)
            if self.time_field in file.names:
                file.types[file.names.index(self.time_field)] = "float"
        reading.append((file, self, moments))
        try:
            return original(self, filepath, source)
        finally:
            reading.pop()

    def open_header(path: Any, *args: Any, **keys: Any) -> Any:
        """RecBole opens a file to read its header."""
        if not reading or Path(path) != reading[-1][0].path:
            return builtins.open(path, *args, **keys)
        file, dataset, _ = reading[-1]
        pairs = (f"{name}:{kind}" for name, kind in zip(file.names, file.types, strict=True))
        return io.StringIO(dataset.config["field_separator"].join(pairs) + "\n")

    def read_csv(path: Any, *args: Any, **keys: Any) -> Any:
        """RecBole reads the columns ``usecols`` of a file, called ``name:type``."""
        import pandas as pd

        from recbole_gacllm.data.numbers import numbers

        if not reading or Path(path) != reading[-1][0].path:
            return pd.read_csv(path, *args, **keys)
        file, dataset, moments = reading[-1]
        columns = {}
        for column in keys["usecols"]:
            name, _, kind = column.rpartition(":")
            if moments is not None and name == dataset.time_field:
                if isinstance(moments, ValueError):
                    raise moments
                columns[column] = moments
            else:
                columns[column] = numbers(file, name) if kind == "float" else file.cells[name]
        return pd.DataFrame(columns)

    module.open = open_header
    module.pd = Overlay(module.pd, read_csv=read_csv)


def exact_times(module: ModuleType) -> None:
    """Order interactions by the times in the file, not by their float32.

    Cause: RecBole turns times into float32 before it sorts them, where seconds since 1970 lie 128
    apart. Rows are ordered in float64 before, and its stable sort keeps that. Our own models, whose
    ``recent`` and ``linear_recency`` read the times themselves, have them in float64.
    """

    @replaces(module.Dataset, "_change_feat_format")
    def _change_feat_format(original: Any, self: Any) -> None:
        from recbole_gacllm.config import MODELS

        inter, time = self.inter_feat, self.time_field
        is_frame = hasattr(inter, "sort_values") and time is not None and time in inter
        is_ordered = self.config["eval_args"]["order"] == "TO" and not self.benchmark_filename_list
        plain = is_frame and time not in self.config["numerical_features"]
        if plain and is_ordered:
            inter = inter.sort_values(time, kind="stable", ignore_index=True)
            self.inter_feat = inter
        exact = inter[time].to_numpy("float64") if plain else None
        original(self)
        reads_times = self.config["model"] in MODELS or self.config["text_init"]
        if exact is not None and reads_times:
            import torch

            self.inter_feat.interaction[time] = torch.from_numpy(exact.copy())
