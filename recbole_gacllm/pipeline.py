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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_gacllm import artifacts
from recbole_gacllm.config import GaCLLMConfig, shipped_path
from recbole_gacllm.descriptions import text
from recbole_gacllm.descriptions.layers import SIDES, Layer, Side
from recbole_gacllm.descriptions.names import item_names
from recbole_gacllm.descriptions.neighbors import TrainGraph
from recbole_gacllm.descriptions.prompts import PromptTemplates
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.llm import weights

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
    raw, names = raw_descriptions(options, data)
    root = Path(options.artifact_dir).resolve() / data.dataset
    folders = {"inputs": _write_inputs(root, data.graph, raw, names)}
    layer_files = [folders["inputs"] / "layer_0.parquet"]
    if options.text_source != "raw":
        model = _LanguageModel.resolve(options)
        adapter = None
        if options.llm_adapter is not None:
            adapter = Path(options.llm_adapter).resolve()
            weights.check_adapter(model.folder, adapter)
        elif options.sft:
            folders["sft"] = _finetune(root, folders["inputs"], options, data, model)
            adapter = folders["sft"] / "adapter"
        if adapter is not None and options.llm_merge_adapter:
            folders["merged"] = _merge(root, adapter, options, data, model)
        folders["descriptions"] = _describe(root, folders, adapter, options, data, model)
        layer_files += [
            folders["descriptions"] / f"layer_{layer}.parquet"
            for layer in range(1, options.llm_n_layers + 1)
        ]
    folders["embeddings"] = _encode(root, layer_files, options, data)
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
            options.text_value_names or {},
            options.text_max_chars,
            options.text_allow_ids,
        )
        for side in SIDES
    }
    names = item_names(tokens["item"], features["item"], options.text_item_name_field)
    return Layer.raw(tokens, texts), names


@dataclass(frozen=True)
class _LanguageModel:
    """The base LLM: what the user called it, its folder, the fingerprint of its weights."""

    name: str
    folder: Path
    fingerprint: str

    @classmethod
    def resolve(cls, options: GaCLLMConfig) -> _LanguageModel:
        folder = weights.resolve_llm(options.llm_model)
        return cls(options.llm_model, folder, weights.fingerprint(folder))


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
    key = {"graph": graph.fingerprint(), "texts": raw.digest(), "names": names}
    folder = root / f"inputs-{artifacts.fingerprint(key)[:16]}"
    with artifacts.stage_lock(folder):
        if artifacts.read_manifest(folder) is None:
            graph.save(folder / "graph.npz")
            raw.write(folder / "layer_0.parquet")
            artifacts.write_atomic(folder / "item_names.json", json.dumps(names).encode())
            counts = {f"n_{side}s": len(raw.tokens[side]) for side in SIDES}
            artifacts.write_manifest(
                folder, {"stage": "inputs", "n_edges": graph.n_edges, **counts}
            )
    return folder


def _run(root: Path, stage: str, key: dict[str, Any], job: dict[str, Any]) -> Path:
    """Run a stage in its folder, or reuse what it finished before.

    Args:
        root: Folder of the data set's artefacts.
        stage: Name of the stage in ``stage.py``.
        key: All that determines the stage's results; names the folder.
        job: What the child process needs besides.
    """
    folder = root / f"{stage}-{artifacts.fingerprint(key)[:16]}"
    with artifacts.stage_lock(folder):
        manifest = artifacts.read_manifest(folder)
        if manifest is None:
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
        "dtype": options.llm_dtype,
        "seed": data.seed,
        **_options_with(options, "sft"),
    }
    return _run(root, "sft", key, _job(options, data, inputs, model))


def _merge(
    root: Path, adapter: Path, options: GaCLLMConfig, data: TrainingData, model: _LanguageModel
) -> Path:
    key = {"model": model.fingerprint, "adapter": weights.fingerprint(adapter)}
    job = {"model_dir": str(model.folder), "adapter_dir": str(adapter)}
    return _run(root, "merged", key, job)


def _describe(
    root: Path,
    folders: dict[str, Path],
    adapter: Path | None,
    options: GaCLLMConfig,
    data: TrainingData,
    model: _LanguageModel,
) -> Path:
    templates = _templates(options)
    merged = "merged" in folders
    adapter_key = weights.fingerprint(adapter) if adapter else None
    key = {
        "inputs": folders["inputs"].name,
        "model": model.fingerprint,
        "adapter": adapter_key,
        "merged": merged,
        "prompts": templates.version,
        "seed": data.seed,
        "neighbor_rule": options.neighbor_rule,
        "n_neighbors": options.n_neighbors,
        "n_layers": options.llm_n_layers,
        "dtype": options.llm_dtype,
        **_options_with(options, "llm_max_", "llm_temperature", "llm_repetition_penalty"),
    }
    job = _job(options, data, folders["inputs"], model)
    job["generator_dir"] = str(folders["merged"] / "model") if merged else str(model.folder)
    job["adapter_dir"] = str(adapter) if adapter and not merged else None
    # What is generated is addressed by the weights that generate it.
    job["generator_key"] = {
        "model": model.fingerprint,
        "adapter": adapter_key,
        "merged": merged,
        "dtype": options.llm_dtype,
    }
    job["store"] = str(Path(options.artifact_dir).resolve() / "store.sqlite")
    return _run(root, "descriptions", key, job)


def _job(
    options: GaCLLMConfig, data: TrainingData, inputs: Path, model: _LanguageModel
) -> dict[str, Any]:
    return {
        "options": dataclasses.asdict(options),
        "inputs": str(inputs),
        "model_name": model.name,
        "model_dir": str(model.folder),
        "prompts_dir": str(_prompts_dir(options)),
        "seed": data.seed,
        "show_progress": data.show_progress,
    }


def _encode(root: Path, layer_files: list[Path], options: GaCLLMConfig, data: TrainingData) -> Path:
    encoder = weights.resolve_encoder(options.encoder_model)
    key = {
        "texts": [Layer.read(file).digest() for file in layer_files],
        "encoder": weights.fingerprint(encoder),
        "dtype": options.encoder_dtype,
        # Not in the digests: rows follow the order of the nodes.
        "order": layer_files[0].parent.name,
    }
    job = {
        "layer_files": [str(file) for file in layer_files],
        "encoder_name": options.encoder_model,
        "encoder_dir": str(encoder),
        "options": dataclasses.asdict(options),
        "show_progress": data.show_progress,
    }
    return _run(root, "embeddings", key, job)


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
