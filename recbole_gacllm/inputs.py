"""What the preprocessing hook takes from a RecBole run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.convolution import text
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.imported import ImportedTexts
from recbole_gacllm.convolution.layers import SIDES, Layer, Side
from recbole_gacllm.convolution.names import item_names, names_of_people

logger = logging.getLogger(__name__)

_SHOWN = 3  # texts of a side, in the log and by `check`


@dataclass(frozen=True)
class TrainingData:
    """All that the stages see of a RecBole run: its training edges and where its features lie.

    Attributes:
        dataset: Name of the data set.
        graph: Training edges between raw tokens; index v here is RecBole's internal id v + 1.
        feature_files: RecBole's feature file of each side, if there is one.
        id_fields: Name of the id column of each side.
        field_separator, seq_separator, encoding: How RecBole reads these files.
        seed: RecBole's seed.
        show_progress: RecBole's switch for progress bars.
    """

    dataset: str
    graph: TrainGraph
    feature_files: dict[Side, Path | None]
    id_fields: dict[Side, str]
    field_separator: str
    seq_separator: str
    encoding: str | None
    seed: int
    show_progress: bool

    @classmethod
    def from_recbole(cls, config: Any, dataset: Any) -> TrainingData:
        """Take the training split that RecBole hands to a model's constructor."""
        id_fields: dict[Side, str] = {"user": dataset.uid_field, "item": dataset.iid_field}
        tokens = {side: dataset.field2id_token[id_fields[side]][1:] for side in SIDES}
        users, items, times = _training_edges(dataset)
        graph = TrainGraph(
            user_tokens=np.asarray(tokens["user"], dtype=str),
            item_tokens=np.asarray(tokens["item"], dtype=str),
            users=users - 1,
            items=items - 1,
            timestamps=None if times is None else times.astype(np.float64),
        )
        files = {side: Path(config["data_path"]) / f"{config['dataset']}.{side}" for side in SIDES}
        return cls(
            dataset=config["dataset"],
            graph=graph,
            feature_files={side: files[side] if files[side].is_file() else None for side in SIDES},
            id_fields=id_fields,
            field_separator=config["field_separator"],
            seq_separator=config["seq_separator"],
            encoding=config["encoding"],
            seed=config["seed"],
            show_progress=bool(config["show_progress"]),
        )


def _training_edges(dataset: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """User, item and time (None without) of every training interaction, RecBole's ids.

    A sequential split has a row for each target, with what came before in lists: what no row has
    as its target stands in the shortest list of each user.
    """
    inter, time = dataset.inter_feat, dataset.time_field
    names = [dataset.uid_field, dataset.iid_field]
    names += [time] if time is not None and time in inter else []
    columns = [inter[name].numpy() for name in names]
    lists = [getattr(dataset, f"{name}_list_field", None) for name in names[1:]]
    if lists[0] is not None and lists[0] in inter:
        lengths = inter[dataset.item_list_length_field].numpy()
        order = np.lexsort((lengths, columns[0]))
        users = columns[0][order]
        shortest = order[np.append(True, users[1:] != users[:-1])] if len(users) else order
        filled = np.arange(int(lengths.max(initial=0))) < lengths[shortest][:, None]
        before = [np.repeat(columns[0][shortest], lengths[shortest])]
        before += [inter[name].numpy()[shortest, : filled.shape[1]][filled] for name in lists]
        columns = [np.concatenate(both) for both in zip(columns, before, strict=True)]
    return columns[0], columns[1], columns[2] if len(columns) > 2 else None


def raw_descriptions(options: GaCLLMConfig, data: TrainingData) -> tuple[Layer, dict[str, str]]:
    """Layer 0, every node's features as a sentence, and the name of every item by token.

    Raises:
        ValueError: If a template names a field that is not there, or no node has any text.
    """
    tokens = {side: data.graph.tokens(side).tolist() for side in SIDES}
    features: dict[Side, pd.DataFrame | None] = {"user": None, "item": None}
    for side in SIDES:
        if (file := data.feature_files[side]) is not None:
            features[side] = text.read_features(
                file,
                data.id_fields[side],
                data.field_separator,
                data.encoding,
                data.seq_separator,
                frozenset(tokens[side]),
            )
    value_names = _value_names(options, [frame for frame in features.values() if frame is not None])
    wording = {
        "user": (options.text_user_template, options.text_user_noun),
        "item": (options.text_item_template, options.text_item_noun),
    }
    texts = {
        side: text.render_descriptions(
            tokens[side],
            features[side],
            *wording[side],
            value_names,
            options.text_max_chars,
            options.text_allow_ids,
        )
        for side in SIDES
    }
    nothing = {
        side: text.cut_at_word(text.nothing_known(wording[side][1]), options.text_max_chars)
        for side in SIDES
    }
    if not options.text_allow_ids and all(set(texts[side]) == {nothing[side]} for side in SIDES):
        raise ValueError(
            f"the data set has no text, nothing is known of any user or item of {data.dataset}: it "
            "has no .user or .item file beside the .inter file, or their fields are empty, or ids "
            "and codes, which a sentence leaves out. Add or fill fields, name some in "
            "text_item_template, set text_allow_ids: True to describe nodes of a data set without "
            "fields by their ids, or use_text: False to go without text"
        )
    for side, texts_of_side in samples(texts, data.seed).items():
        for text_of_node in texts_of_side:
            logger.info("%s as a language model sees it: %s", side, text_of_node)
    names = item_names(tokens["item"], features["item"], options.text_item_name_field)
    return Layer.raw(tokens, texts), names


def samples(texts: Mapping[Side, Sequence[str]], seed: int) -> dict[Side, list[str]]:
    """Side -> some of its texts, drawn by the seed, each told once."""
    rng = np.random.default_rng(seed)
    rows = {side: rng.permutation(len(texts[side]))[:_SHOWN].tolist() for side in texts}
    return {side: list(dict.fromkeys(texts[side][row] for row in rows[side])) for side in rows}


def user_names(config: Any) -> dict[str, str]:
    """Names of users by raw token, as their feature file has them, for the leakage audit."""
    file = Path(config["data_path"]) / f"{config['dataset']}.user"
    if not file.is_file():
        return {}
    reading = (config["field_separator"], config["encoding"], config["seq_separator"])
    return names_of_people(text.read_features(file, config["USER_ID_FIELD"], *reading))


def imported_texts(options: GaCLLMConfig, raw: Layer) -> ImportedTexts | None:
    """The texts of ``text_import_file``, checked against the data set."""
    if options.text_import_file is None:
        return None
    imported = ImportedTexts.read(Path(options.text_import_file).resolve())
    imported.check(raw.tokens, options.n_text_layers if options.is_described else 0)
    return imported


def _value_names(options: GaCLLMConfig, features: list[pd.DataFrame]) -> dict[str, dict[str, str]]:
    """``text_value_names`` with words and values as text: yaml reads ``1`` and ``no`` as others."""
    fields = [str(name) for frame in features for name in frame.columns]
    names = options.text_value_names or {}
    for field in names:
        if field not in fields:
            raise ValueError(
                f"text_value_names: {field!r} is not a field of the feature files, which have "
                f"{', '.join(fields) or 'none'}."
            )
    return {
        field: {str(value): str(words) for value, words in words_of.items()}
        for field, words_of in names.items()
    }
