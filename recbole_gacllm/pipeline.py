"""The preprocessing hook: features -> SFT -> description convolution -> encoding, each stage once.

``GaCLLM.__init__`` calls :func:`prepare` with RecBole's training split. Every stage writes one
folder under ``artifact_dir/<dataset>/``, named by a fingerprint of all that determines it, with a
``manifest.json`` written last: a stage whose manifest is there is skipped, a half-written one goes
on where it was. The stages run in child processes (``stage.py``), so that GPU memory is free when
RecBole trains, and a crash of an engine cannot take the run down.

    inputs-…/        graph.npz (training edges), layer_0.parquet (raw descriptions), item_names.json
    sft-…/           adapter/ (peft, safetensors)
    merged-…/        model/ (the LLM with the adapter in its weights)
    descriptions-…/  layer_1.parquet … layer_L.parquet
    embeddings-…/    layer_0.npy … layer_L.npy
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recbole_gacllm import artifacts
from recbole_gacllm.config import GaCLLMConfig, shipped_path
from recbole_gacllm.descriptions import text
from recbole_gacllm.descriptions.cleaning import CLEANING_VERSION
from recbole_gacllm.descriptions.convolution import RETRY_TEMPERATURE
from recbole_gacllm.descriptions.imported import ImportedTexts
from recbole_gacllm.descriptions.layers import SIDES, Layer, Side
from recbole_gacllm.descriptions.names import item_names
from recbole_gacllm.descriptions.neighbors import TrainGraph, check_rule
from recbole_gacllm.descriptions.prompts import PromptTemplates
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.llm import weights
from recbole_gacllm.llm.engines import choose_backend, resolve_dtype

logger = logging.getLogger(__name__)


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
    encoding: str
    seed: int
    show_progress: bool

    @classmethod
    def from_recbole(cls, config: Any, dataset: Any) -> TrainingData:
        """Take the training split that RecBole hands to a model's constructor."""
        id_fields: dict[Side, str] = {"user": dataset.uid_field, "item": dataset.iid_field}
        tokens = {side: dataset.field2id_token[id_fields[side]][1:] for side in SIDES}
        inter = dataset.inter_feat
        has_time = dataset.time_field is not None and dataset.time_field in inter
        graph = TrainGraph(
            user_tokens=np.asarray(tokens["user"], dtype=str),
            item_tokens=np.asarray(tokens["item"], dtype=str),
            users=inter[dataset.uid_field].numpy() - 1,
            items=inter[dataset.iid_field].numpy() - 1,
            timestamps=inter[dataset.time_field].numpy().astype(np.float64) if has_time else None,
        )
        files = {side: Path(config["data_path"]) / f"{config['dataset']}.{side}" for side in SIDES}
        return cls(
            dataset=config["dataset"],
            graph=graph,
            feature_files={side: files[side] if files[side].is_file() else None for side in SIDES},
            id_fields=id_fields,
            field_separator=config["field_separator"],
            seq_separator=config["seq_separator"],
            encoding=config["encoding"] or "utf-8",
            seed=config["seed"],
            show_progress=bool(config["show_progress"]),
        )


class TextLayers:
    """Constant text embeddings ``x^(0) .. x^(L)`` of all nodes, looked up by RecBole's node ids.

    Kept outside the model's state: they are files on disk, memory-mapped, in half precision.

    Args:
        tables: One array a layer, ``[n_rows, width]``, float16, L2-normalised rows.
        rows: Row of each node, users first with RecBole's internal ids; -1 for padding.
        run_files: Where the artefacts lie: stage -> folder.
    """

    def __init__(self, tables: list[Tensor], rows: Tensor, run_files: dict[str, Path]) -> None:
        self.tables = tables
        self.row_of_node = rows
        self.run_files = run_files
        self.dim = int(tables[0].shape[1])

    def __len__(self) -> int:
        return len(self.tables)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextLayers:
        return self

    def to(self, device: torch.device | str) -> TextLayers:
        """The same embeddings on a device."""
        tables = [table.to(device) for table in self.tables]
        return TextLayers(tables, self.row_of_node.to(device), self.run_files)

    def rows(self, layer: int, nodes: Tensor) -> Tensor:
        """Text embeddings of nodes at a layer; zero for padding.

        Shapes:
            nodes: ``[n]``; result ``[n, width]``, float32.
        """
        rows = self.row_of_node[nodes]
        return self.tables[layer][rows.clamp(min=0)].float() * (rows >= 0)[:, None]


def prepare(options: GaCLLMConfig, data: TrainingData) -> TextLayers:
    """Run or reuse every stage and load the text embeddings of layers 0..L.

    Raises:
        ValueError: Bad input (keys, feature files, an adapter that does not fit), before any stage.
        GaCLLMError: A stage failed; what it finished is kept.
    """
    with _own_randomness():
        return _prepare(options, data)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave global random state as it was: a model must start the same, cached stages or not."""
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _prepare(options: GaCLLMConfig, data: TrainingData) -> TextLayers:
    # Whatever can be wrong is found before the stages that take long.
    check_rule(data.graph, options.neighbor_rule)
    encoder = weights.resolve_encoder(options.encoder_model)
    raw, names = raw_descriptions(options, data)
    imported = _imported(options, raw)
    if imported is not None and 0 in imported.layers:
        raw = imported.fill(0, raw)
    root = Path(options.artifact_dir).resolve() / data.dataset
    folders = {"inputs": _write_inputs(root, data.graph, raw, names)}
    layer_files = [folders["inputs"] / "layer_0.parquet"]
    if options.text_source != "raw":
        numbers = range(1, options.llm_n_layers + 1)
        model = adapter = None
        if imported is None or not set(numbers) <= set(imported.layers):
            model = _LanguageModel.resolve(options)
            _templates(options)
            if options.llm_adapter is not None:
                adapter = Path(options.llm_adapter).resolve()
                weights.check_adapter(model.folder, adapter)
            elif options.sft:
                folders["sft"] = _finetune(root, folders["inputs"], options, data, model)
                adapter = folders["sft"] / "adapter"
            if adapter is not None and options.llm_merge_adapter:
                folders["merged"] = _merge(root, adapter, options, data, model)
        folders["descriptions"] = _describe(root, folders, adapter, options, data, model, imported)
        layer_files += [folders["descriptions"] / f"layer_{layer}.parquet" for layer in numbers]
    folders["embeddings"] = _encode(root, layer_files, encoder, options, data)
    return _load(folders, len(layer_files), options, data)


def raw_descriptions(options: GaCLLMConfig, data: TrainingData) -> tuple[Layer, dict[str, str]]:
    """Layer 0, every node's features as a sentence, and the name of every item by token.

    Raises:
        ValueError: If a template names a field that is not there, or no side has any text.
    """
    features = {}
    for side in SIDES:
        file = data.feature_files[side]
        features[side] = (
            None
            if file is None
            else text.read_features(
                file, data.id_fields[side], data.field_separator, data.encoding, data.seq_separator
            )
        )
    text.require_some_text(features["user"], features["item"], options.text_allow_ids)
    value_names = _value_names(options, [frame for frame in features.values() if frame is not None])
    tokens = {side: data.graph.tokens(side).tolist() for side in SIDES}
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
    names = item_names(tokens["item"], features["item"], options.text_item_name_field)
    return Layer.raw(tokens, texts), names


def _imported(options: GaCLLMConfig, raw: Layer) -> ImportedTexts | None:
    """The texts of ``text_import_file``, checked against the data set."""
    if options.text_import_file is None:
        return None
    imported = ImportedTexts.read(Path(options.text_import_file).resolve())
    imported.check(raw.tokens, 0 if options.text_source == "raw" else options.llm_n_layers)
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


@dataclass(frozen=True)
class _LanguageModel:
    """The base LLM: what the user called it, its folder, the fingerprint of its weights."""

    name: str
    folder: Path
    fingerprint: str

    @classmethod
    def resolve(cls, options: GaCLLMConfig) -> _LanguageModel:
        # Servers hold the weights; fine-tuning and merging need them here, too.
        only_tokenizer = (
            options.llm_backend == "server" and not options.sft and options.llm_adapter is None
        )
        resolve = weights.resolve_tokenizer if only_tokenizer else weights.resolve_llm
        folder = resolve(options.llm_model)
        return cls(options.llm_model, folder, weights.fingerprint(folder, not only_tokenizer))


def _prompts_dir(options: GaCLLMConfig) -> Path:
    given = options.llm_prompts_dir
    return Path(given).resolve() if given else shipped_path("properties", "prompts")


def _templates(options: GaCLLMConfig) -> PromptTemplates:
    return PromptTemplates.load(
        _prompts_dir(options), options.text_user_noun, options.text_item_noun
    )


def _options_with(options: GaCLLMConfig, *prefixes: str) -> dict[str, Any]:
    return {
        key: value for key, value in dataclasses.asdict(options).items() if key.startswith(prefixes)
    }


def _write_inputs(root: Path, graph: TrainGraph, raw: Layer, names: dict[str, str]) -> Path:
    """Write the training graph and layer 0, which every stage starts from."""
    key = {"graph": graph.fingerprint(), "texts": raw.digest()}
    folder = root / f"inputs-{artifacts.fingerprint(key)[:16]}"
    with artifacts.stage_lock(folder):
        # Only shown and looked for, never a cause of results: not in the key.
        artifacts.write_atomic(folder / "item_names.json", json.dumps(names).encode())
        if artifacts.read_manifest(folder) is None:
            graph.save(folder / "graph.npz")
            raw.write(folder / "layer_0.parquet")
            counts = {f"n_{side}s": len(raw.tokens[side]) for side in SIDES}
            n_imported = sum(raw.statuses[side].count("imported") for side in SIDES)
            counts |= {"n_edges": graph.n_edges, "n_imported": n_imported}
            artifacts.write_manifest(folder, {"stage": "inputs", **counts})
    return folder


def _run(
    root: Path, stage: str, key: dict[str, Any], job: dict[str, Any], outputs: list[str]
) -> Path:
    """Run a stage in its folder, or reuse what it finished before.

    Args:
        root: Folder of the data set's artefacts.
        stage: Name of the stage in ``stage.py``.
        key: All that determines the stage's results; names the folder.
        job: What the child process needs besides.
        outputs: Files of the folder that a finished stage has; if one is gone it runs again.
    """
    folder = root / f"{stage}-{artifacts.fingerprint(key)[:16]}"
    with artifacts.stage_lock(folder):
        manifest = artifacts.read_manifest(folder)
        if manifest is None or not all((folder / name).is_file() for name in outputs):
            logger.info("stage %s starts in %s", stage, folder)
            text_of_job = json.dumps({**job, "key": key}, indent=2)
            artifacts.write_atomic(folder / "job.json", text_of_job.encode())
            artifacts.run_child(stage, folder)
            manifest = artifacts.read_manifest(folder)
            if manifest is None:
                raise GaCLLMError(f"stage {stage} ended without a manifest in {folder}")
            logger.info("stage %s is done: %s", stage, folder)
        else:
            logger.info("stage %s was done before and is reused: %s", stage, folder)
        logger.info("stage %s: %s", stage, json.dumps(_figures(manifest)))
    return folder


def _figures(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a person wants of a manifest in the log."""
    left_out = ("stage", "key", "train_losses")
    return {name: value for name, value in manifest.items() if name not in left_out}


def _finetune(
    root: Path, inputs: Path, options: GaCLLMConfig, data: TrainingData, model: _LanguageModel
) -> Path:
    templates = _templates(options)
    key = {
        "inputs": inputs.name,
        "model": model.fingerprint,
        "prompts": templates.version,
        "dtype": resolve_dtype(options.llm_dtype),
        "seed": data.seed,
        **_options_with(options, "sft"),
    }
    del key["sft_checkpoint_steps"]  # how often, not what
    job = _job(options, data, inputs, model)
    return _run(root, "sft", key, job, ["adapter/adapter_model.safetensors"])


def _merge(
    root: Path, adapter: Path, options: GaCLLMConfig, data: TrainingData, model: _LanguageModel
) -> Path:
    key = {"model": model.fingerprint, "adapter": weights.fingerprint(adapter)}
    job = {"model_dir": str(model.folder), "adapter_dir": str(adapter)}
    return _run(root, "merged", key, job, ["model/config.json"])


def _describe(
    root: Path,
    folders: dict[str, Path],
    adapter: Path | None,
    options: GaCLLMConfig,
    data: TrainingData,
    model: _LanguageModel | None,
    imported: ImportedTexts | None,
) -> Path:
    """Generate or import layers 1..L; ``model`` is None if all are imported."""
    key: dict[str, Any] = {
        "inputs": folders["inputs"].name,
        "n_layers": options.llm_n_layers,
        "seed": data.seed,
        "neighbor_rule": options.neighbor_rule,
        "n_neighbors": options.n_neighbors,
    }
    job = _job(options, data, folders["inputs"], model)
    job["import_file"] = str(imported.file) if imported else None
    if imported is not None:
        key["imported"] = imported.digest()
    if model is not None:
        merged = "merged" in folders
        # What is generated is addressed by the weights that generate it.
        job["generator_key"] = {
            "model": model.fingerprint,
            "adapter": weights.fingerprint(adapter) if adapter else None,
            "merged": merged,
            "backend": choose_backend(options.llm_backend)[0],
            "dtype": resolve_dtype(options.llm_dtype),
        }
        if options.llm_backend == "server":
            # Nobody checks what servers serve: their texts are theirs alone, and by name.
            job["generator_key"]["served_model"] = options.llm_served_model or model.name
        key |= {
            **job["generator_key"],
            "prompts": _templates(options).version,
            "cleaning": [CLEANING_VERSION, RETRY_TEMPERATURE],
            **_options_with(options, "llm_max_", "llm_temperature", "llm_repetition_penalty"),
        }
        job["generator_dir"] = str(folders["merged"] / "model") if merged else str(model.folder)
        job["adapter_dir"] = str(adapter) if adapter and not merged else None
        name = job["generator_dir"] if merged else model.name
        job["served_model"] = options.llm_served_model or name
    job["store"] = str(Path(options.artifact_dir).resolve() / "store.sqlite")
    outputs = [f"layer_{number}.parquet" for number in range(1, options.llm_n_layers + 1)]
    return _run(root, "descriptions", key, job, outputs)


def _job(
    options: GaCLLMConfig, data: TrainingData, inputs: Path, model: _LanguageModel | None
) -> dict[str, Any]:
    return {
        "options": dataclasses.asdict(options),
        "inputs": str(inputs),
        "model_name": model.name if model else None,
        "model_dir": str(model.folder) if model else None,
        "prompts_dir": str(_prompts_dir(options)),
        "seed": data.seed,
        "show_progress": data.show_progress,
    }


def _encode(
    root: Path,
    layer_files: list[Path],
    encoder: Path,
    options: GaCLLMConfig,
    data: TrainingData,
) -> Path:
    layers = [Layer.read(file) for file in layer_files]
    key = {
        "texts": [layer.digest() for layer in layers],
        "encoder": weights.fingerprint(encoder),
        "dtype": resolve_dtype(options.encoder_dtype),
        # Not in the digests: rows follow the order of the nodes.
        "order": artifacts.fingerprint({side: layers[0].tokens[side] for side in SIDES}),
    }
    job = {
        "layer_files": [str(file) for file in layer_files],
        "encoder_name": options.encoder_model,
        "encoder_dir": str(encoder),
        "options": dataclasses.asdict(options),
        "show_progress": data.show_progress,
    }
    return _run(root, "embeddings", key, job, [f"{file.stem}.npy" for file in layer_files])


def _load(
    folders: dict[str, Path], n_layers: int, options: GaCLLMConfig, data: TrainingData
) -> TextLayers:
    """Memory-map the embeddings and find each node's row by its token, not by its id."""
    tokens = Layer.read(folders["inputs"] / "layer_0.parquet").tokens
    rng = np.random.default_rng(data.seed)
    row_of_node, offset = [], 0
    for side in SIDES:
        rows = np.arange(len(tokens[side])) + offset
        if options.text_source == "shuffled":
            rows = rng.permutation(rows)
        row_of_token = dict(zip(tokens[side], rows.tolist(), strict=True))
        row_of_node += [-1, *(row_of_token[token] for token in data.graph.tokens(side).tolist())]
        offset += len(rows)
    tables = [
        # Copy-on-write: torch wants a writable array, nothing is ever written.
        torch.from_numpy(np.load(folders["embeddings"] / f"layer_{layer}.npy", mmap_mode="c"))
        for layer in range(n_layers)
    ]
    return TextLayers(tables, torch.tensor(row_of_node), folders)
