"""The door for data: what a run has read, said in a few lines, and refused where it cannot serve.

:func:`inspect` looks at the data set and its split, for any model, before anything expensive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gacllm.config import reads_text
from recbole_gacllm.data.atomic import AtomicFile, read_atomic
from recbole_gacllm.data.numbers import times

# Below this share of nodes with a row in their file something is likely to be wrong.
_FEW = 0.9
_SHOWN = 3


@dataclass
class DataReport:
    """What was read.

    Attributes:
        n_users, n_items: With interactions, after filtering.
        n_interactions: Rows of all parts of the split.
        parts: Rows of training, validation and test.
        n_repeats: Rows whose user and item stand in an earlier row.
        times: First and last time in the file, or None without times.
        filters: What took rows away: name, rows before, rows after.
        covered: Side -> share of its nodes that have a row in their file; without a file none.
        notes: How the feature files were read, where that is not row by row.
        warnings: What a person should know before trusting the numbers.
    """

    n_users: int
    n_items: int
    n_interactions: int
    parts: tuple[int, int, int]
    n_repeats: int
    times: tuple[float, float] | None
    filters: list[tuple[str, int, int]]
    covered: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the log of a run and for ``check``."""
        of = "training, validation, test"
        lines = [
            f"{self.n_users} users, {self.n_items} items, {self.n_interactions} interactions "
            f"({of}: {', '.join(map(str, self.parts))})"
        ]
        if self.times is not None:
            lines.append(f"times from {_day(self.times[0])} to {_day(self.times[1])}")
        for name, before, after in self.filters:
            if after < before:
                lines.append(f"{name}: {before} -> {after} interactions")
        for side, share in self.covered.items():
            lines.append(f"{share:.0%} of the {side}s have a row in the .{side} file")
        return lines + self.notes


def _day(time: float) -> str:
    """A date where the number is one in seconds or milliseconds, else the number."""
    for unit in (1, 1000):
        if 1e8 <= time / unit < 4e9:
            return str(pd.Timestamp(time / unit, unit="s").date())
    return f"{time:.12g}"


def inspect(config: Any, dataset: Any, parts: Iterable[Any]) -> DataReport:
    """Look at what RecBole has read and split.

    Args:
        config: RecBole's configuration.
        dataset: What ``create_dataset`` gave, after the split.
        parts: Data sets of training, validation and test.

    Raises:
        ValueError: If a part that is needed is empty, the ranking is longer than the catalogue, or
            no node has a row in the feature file that a text model reads.
    """
    parts = list(parts)
    n_items = dataset.item_num - 1
    n_rows = [len(part.inter_feat) for part in parts]
    _check_parts(config, n_rows)
    if "full" in config["eval_args"]["mode"].values() and max(config["topk"]) > n_items:
        raise ValueError(
            f"topk: {max(config['topk'])} is more than the {n_items} items of the data set. Set "
            f"--topk={min(10, n_items - 1)} and --valid_metric=MRR@{min(10, n_items - 1)}, or "
            "loosen the filters."
        )
    pairs = interactions(parts)
    _check_negatives(config, dataset, pairs)
    report = DataReport(
        n_users=dataset.user_num - 1,
        n_items=n_items,
        n_interactions=len(pairs),
        parts=(n_rows[0], n_rows[1], n_rows[2]),
        n_repeats=len(pairs) - len(np.unique(pairs)),
        times=getattr(dataset, "time_range", None),
        filters=list(getattr(dataset, "filter_counts", [])),
    )
    _warn_of_repeats(report, config)
    _warn_of_labels(report, config, dataset)
    if fault := getattr(dataset, "time_fault", None):
        report.warnings.append(
            f"times cannot be read, and a run in order of time will end: {fault}"
        )
    if reads_text(config.final_config_dict):
        for side, id_field in (("user", dataset.uid_field), ("item", dataset.iid_field)):
            file = Path(config["data_path"], f"{config['dataset']}.{side}")
            if file.is_file():
                _look_at_features(report, config, side, file, id_field, dataset)
    return report


def note_columns(dataset: Any, file: AtomicFile) -> np.ndarray | ValueError | None:
    """Keep what a report tells of a file of interactions, whether its columns are loaded or not.

    Returns:
        The times; why they cannot be read, which ends a run that loads them; or None without any.
    """
    moments: np.ndarray | ValueError | None = None
    if dataset.time_field in file.names:
        try:
            moments = times(file, dataset.time_field)
        except ValueError as error:
            moments = error
            dataset.time_fault = str(error)
        else:
            ends = np.append(moments[~np.isnan(moments)], getattr(dataset, "time_range", ()))
            if len(ends):  # of all parts of a ready split
                dataset.time_range = float(ends.min()), float(ends.max())
    of_labels = {
        name
        for name in file.names
        if name not in (dataset.uid_field, dataset.iid_field, dataset.time_field)
        and {cell.removesuffix(".0") for cell in file.cells[name].dropna().unique()} == {"0", "1"}
    }
    dataset.label_columns = getattr(dataset, "label_columns", set()) | of_labels
    return moments


def _look_at_features(
    report: DataReport, config: Any, side: str, file: Path, id_field: str, dataset: Any
) -> None:
    ids = dataset.field2id_token[id_field][1:].tolist()
    rows = read_atomic(
        file, config["field_separator"], config["encoding"], id_field, frozenset(ids)
    )
    if id_field not in rows.names:
        return
    row_ids = rows.cells[id_field].dropna()
    report.covered[side], warning = match_ids(side, file, ids, row_ids)
    report.warnings += [warning] if warning else []
    counts = {
        "rows stand over several lines, by quotes": rows.n_spanning,
        "rows have the id of an earlier one, which counts": len(row_ids) - row_ids.nunique(),
        "lines fit no reading and are left out": len(rows.dropped),
    }
    report.notes += [f"{file.name}: {n} {what}" for what, n in counts.items() if n]


def _check_parts(config: Any, n_rows: list[int]) -> None:
    split = config["eval_args"]["split"]
    valid_only = split.get("LS") == "valid_only" and not config["benchmark_filename"]
    for name, part in (("training", 0), ("validation", 1) if valid_only else ("test", 2)):
        if n_rows[part] == 0:
            raise ValueError(
                f"the {name} part has no interactions (training, validation, test: "
                f"{', '.join(map(str, n_rows))}): "
                f"split {split} leaves none, for instance since users have one interaction each. "
                'Filter users with user_inter_num_interval: "[3,inf)", or choose another split.'
            )


def _check_negatives(config: Any, dataset: Any, pairs: np.ndarray) -> None:
    """A user of all items has no negative one to draw."""
    if config["train_neg_sample_args"]["distribution"] == "none":
        return
    users, n_items_of = np.unique(np.unique(pairs) // dataset.item_num, return_counts=True)
    full = users[n_items_of >= dataset.item_num - 1]
    if len(full) > 0:
        tokens = _examples(dataset.field2id_token[dataset.uid_field][full].tolist())
        raise ValueError(
            f"{len(full)} users ({tokens}) have interacted with all {dataset.item_num - 1} items, "
            "so there is no negative item to draw for them. Filter them with "
            f'user_inter_num_interval: "[1,{dataset.item_num - 2}]", or choose a model that draws '
            "none (GaCLLM with loss_type: SSM, EASE)."
        )


def interactions(parts: Iterable[Any]) -> np.ndarray:
    """Each interaction of a split as one number of user and item, repeats and all.

    Args:
        parts: RecBole's data sets of training, validation and test.

    Shapes:
        result: ``[n_interactions]``.
    """
    pairs = []
    for number, part in enumerate(parts):
        inter = part.inter_feat
        users = inter[part.uid_field].numpy().astype(np.int64)
        items = inter[part.iid_field].numpy()
        pairs.append(users * part.item_num + items)
        lists = getattr(part, f"{part.iid_field}_list_field", None)
        if number == 0 and lists is not None and lists in inter:
            # A sequence's first item is no row of its own: it begins the shortest list.
            first = inter[part.item_list_length_field].numpy() == 1
            pairs.append(users[first] * part.item_num + inter[lists][:, 0].numpy()[first])
    return np.concatenate(pairs)


def targets(part: Any) -> list[tuple[str, str]]:
    """(user token, item token) of each row of one part of a split."""
    fields = part.uid_field, part.iid_field
    tokens = (part.id2token(name, part.inter_feat[name]).tolist() for name in fields)
    return list(zip(*tokens, strict=True))


def _warn_of_repeats(report: DataReport, config: Any) -> None:
    if report.n_repeats == 0:
        return
    advice = (
        ", and repeatable is on: known items are ranked and count as hits. rm_dup_inter: first "
        "asks for new items only."
        if config["repeatable"]
        else ". Of held-out ones the model has seen the answer in training, so metrics are too "
        "high. Set rm_dup_inter: first to ask for new items only, or repeatable: True where "
        "repeats are what you predict."
    )
    report.warnings.append(
        f"repeats: {report.n_repeats} of {report.n_interactions} interactions "
        f"({report.n_repeats / report.n_interactions:.0%}) are of a user and an item that stand in "
        f"an earlier one{advice}"
    )


def _warn_of_labels(report: DataReport, config: Any, dataset: Any) -> None:
    if config["MODEL_TYPE"].name in ("CONTEXT", "DECISIONTREE"):
        return
    if "labeled" in config["eval_args"]["mode"].values():
        return
    if config["threshold"]:
        report.warnings.append(
            f"threshold: {config['threshold']} makes labels, which {config['model']} does not "
            "read: every interaction counts as liked. To keep the good ones set val_interval, such "
            "as {rating: '[4,inf)'}."
        )
        return
    columns = set(getattr(dataset, "label_columns", ()))
    load_col = (config["load_col"] or {}).get("inter", ())
    if load_col != "*" and config["LABEL_FIELD"] in load_col:
        columns.add(config["LABEL_FIELD"])
    for name in sorted(columns - set(config["val_interval"] or {})):
        report.warnings.append(
            f"labels: {config['model']} does not read the column {name!r}: every interaction "
            "counts as liked. If it says which ones are, keep these with "
            f"val_interval: {{{name}: '[1,1]'}}."
        )


def match_ids(
    side: str, file: Path, ids: Iterable[str], rows: Iterable[str]
) -> tuple[float, str | None]:
    """How many nodes have a row in their feature file.

    Args:
        side: Whose ids they are.
        file: The feature file.
        ids: Raw tokens with interactions.
        rows: Ids of the file's rows.

    Returns:
        The share, and a warning where it is low.

    Raises:
        ValueError: If none has; shows ids of both and what would make them meet.
    """
    ids, row_ids = list(ids), set(rows)
    missing = [token for token in ids if token not in row_ids]
    n = len(ids) - len(missing)
    share = n / max(len(ids), 1)
    if share >= _FEW:
        return share, None
    message = (
        f"{file}: {n} of {len(ids)} {side}s with interactions have a row there. Without one: "
        f"{_examples(missing)}; the file has {_examples(row_ids)}"
    )
    hint = _way_to_meet(missing, row_ids)
    if n == 0:
        raise ValueError(
            f"{message}. {hint or 'Write the ids of both files alike'}; or remove the file to go "
            "without its texts."
        )
    return share, f"{message}.{f' {hint}.' if hint else ''}"


def _examples(ids: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(ids)[:_SHOWN]))


def _way_to_meet(missing: list[str], row_ids: set[str]) -> str | None:
    """What would make ids meet: tried on the ids themselves."""
    ways = {
        "without blanks around them": str.strip,
        "without leading zeros": lambda token: token.strip().lstrip("0") or "0",
        "as whole numbers, without '.0'": lambda token: token.removesuffix(".0"),
        "in lower case": str.lower,
    }
    for words, change in ways.items():
        changed = {change(token) for token in row_ids}
        if sum(change(token) in changed for token in missing) > len(missing) / 2:
            return f"They meet {words}: write both files so"
    return None


def add_to(module: Any) -> None:
    """Let RecBole's ``Dataset`` count what each filter takes, and be inspected once it is split.

    Every way into RecBole passes there. What was seen is ``dataset.data_report``.
    """
    dataset_class = module.Dataset
    build = dataset_class.build

    @functools.wraps(build)
    def build_and_inspect(self: Any) -> Any:
        parts = build(self)
        self.data_report = inspect(self.config, self, parts)
        return parts

    dataset_class.build = build_and_inspect
    for method, keys in _FILTERS.items():
        setattr(dataset_class, method, _counting(getattr(dataset_class, method), keys))


def _counting(filter_rows: Callable[[Any], None], keys: tuple[str, ...]) -> Callable[[Any], None]:
    @functools.wraps(filter_rows)
    def counting(self: Any) -> None:
        before = len(self.inter_feat)
        if before == 0:
            raise ValueError(f"the .inter file of {self.dataset_name} holds a header and no rows.")
        filter_rows(self)
        after = len(self.inter_feat)
        values = ", ".join(
            f"{key}: {self.config[key]}"
            for key in keys
            if self.config[key] and self.config[key] != "[0,inf)"
        )
        name = values or "interactions without a user or an item"
        self.filter_counts = [*getattr(self, "filter_counts", []), (name, before, after)]
        if after == 0:
            raise ValueError(
                f"{name} leaves none of {before} interactions of {self.dataset_name}. Loosen it, "
                "or check the values of its column."
            )

    return counting


#: Method of RecBole that filters -> the keys it follows.
_FILTERS: dict[str, tuple[str, ...]] = {
    "_filter_nan_user_or_item": (),
    "_remove_duplication": ("rm_dup_inter",),
    "_filter_by_field_value": ("val_interval",),
    "_filter_inter_by_user_or_item": ("filter_inter_by_user_or_item",),
    "_filter_by_inter_num": ("user_inter_num_interval", "item_inter_num_interval"),
}
