"""The preprocessing hook: features -> SFT -> description convolution -> encoding, each stage once.

``GaCLLM.__init__`` calls :func:`prepare` with RecBole's training split. Every stage writes one
folder under ``artifact_dir/<dataset>/``, named by a fingerprint of all that determines it, with a
``manifest.json`` written last: a stage whose manifest is there is skipped, a half-written one goes
on where it was. The stages run in child processes (``stage.py``), so that GPU memory is free when
RecBole trains, and a crash of an engine cannot take the run down.

    inputs-…/        graph.npz (training edges), layer_0.parquet (raw texts), item_names-….json
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
import torch

from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.artifacts import children, disk, manifests
from recbole_gacllm.artifacts.locate import store_of
from recbole_gacllm.config import GaCLLMConfig, shipped_path
from recbole_gacllm.convolution.cleaning import CLEANING_VERSION
from recbole_gacllm.convolution.graph import TrainGraph, check_rule
from recbole_gacllm.convolution.imported import ImportedTexts
from recbole_gacllm.convolution.layers import SIDES, Layer
from recbole_gacllm.convolution.names import NAMES, write_names
from recbole_gacllm.convolution.prompts import PromptTemplates
from recbole_gacllm.convolution.requests import RETRY_TEMPERATURE
from recbole_gacllm.convolution.text import nothing_known_of
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inputs import TrainingData, imported_texts, raw_descriptions
from recbole_gacllm.llm import weights
from recbole_gacllm.llm.engines import check_engine, choose_backend
from recbole_gacllm.llm.hardware import resolve_dtype, training_dtype
from recbole_gacllm.sft.pairs import told_edges

logger = logging.getLogger(__name__)

# Key, job and outputs of the stage that makes the descriptions, as _run takes them.
_StageOfTexts = tuple[dict[str, Any], dict[str, Any], list[str]]


def prepare(options: GaCLLMConfig, data: TrainingData) -> TextLayers:
    """Run or reuse every stage and load the text embeddings of layers 0..L.

    Raises:
        ValueError: Bad input (keys, feature files, an adapter that does not fit), before any stage.
        GaCLLMError: A stage failed; what it finished is kept.
    """
    with _own_randomness():
        return _prepare(options, data)


def describe(options: GaCLLMConfig, data: TrainingData) -> Path:
    """Run or reuse the stages up to the descriptions.

    Returns:
        The folder of these.

    Raises:
        ValueError, GaCLLMError: As :func:`prepare`.
    """
    with _own_randomness():
        root, _, descriptions = _before_descriptions(options, data)
        return _run(root, "descriptions", *_some(descriptions))


def description_job(options: GaCLLMConfig, data: TrainingData) -> tuple[Path, dict[str, Any]]:
    """Run or reuse the stages before the descriptions.

    Returns:
        The folder of the descriptions, finished or not, and the job of their stage.

    Raises:
        ValueError, GaCLLMError: As :func:`prepare`.
    """
    with _own_randomness():
        root, _, descriptions = _before_descriptions(options, data)
        key, job, _ = _some(descriptions)
        return _folder(root, "descriptions", key), job


def _some(descriptions: _StageOfTexts | None) -> _StageOfTexts:
    if descriptions is None:
        raise ValueError(
            "text_source: raw and item_mean, and llm_n_layers: 0, take the texts of layer 0 as "
            "they are, so there is nothing to describe; set generated and 1 layer or more."
        )
    return descriptions


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
    encoder = weights.resolve_encoder(options.encoder_model)
    root, folders, descriptions = _before_descriptions(options, data)
    layer_files = [folders["inputs"] / "layer_0.parquet"]
    if descriptions is not None:
        folders["descriptions"] = _run(root, "descriptions", *descriptions)
        layer_files += [folders["descriptions"] / name for name in descriptions[2]]
    folders["embeddings"] = _encode(root, layer_files, encoder, options, data)
    return TextLayers.load(folders, len(layer_files), options.text_source, data.graph, data.seed)


def _before_descriptions(
    options: GaCLLMConfig, data: TrainingData
) -> tuple[Path, dict[str, Path], _StageOfTexts | None]:
    """Root and folders of all stages before the descriptions, and what that stage needs.

    The last is None where the texts of layer 0 are all that the run takes.
    """
    check_rule(data.graph, options.neighbor_rule)
    raw, names = raw_descriptions(options, data)
    imported = imported_texts(options, raw)
    if imported is not None and 0 in imported.layers:
        raw = imported.fill(0, raw)
    root = Path(options.artifact_dir).resolve() / data.dataset
    folders = _write_inputs(root, data.graph, raw, names)
    if not options.is_described:
        return root, folders, None
    model = adapter = None
    if imported is None or not set(range(1, options.llm_n_layers + 1)) <= set(imported.layers):
        model = _LanguageModel.resolve(options)
        check_engine(
            options.llm_backend,
            model.folder,
            options.llm_tensor_parallel_size,
            options.llm_pipeline_parallel_size,
        )
        _templates(options)
        if options.llm_adapter is not None:
            from recbole_gacllm.llm.adapter import check_adapter  # loads transformers

            adapter = Path(options.llm_adapter).resolve()
            check_adapter(model.folder, adapter)
        elif options.sft and _can_learn(options, data.graph, raw):
            folders["sft"] = _finetune(root, folders["inputs"], options, data, model)
            adapter = folders["sft"] / "adapter"
        if adapter is not None and options.llm_merge_adapter:
            folders["merged"] = _merge(root, adapter, options, data, model)
    return root, folders, _describe(folders, adapter, options, data, model, imported)


def _can_learn(options: GaCLLMConfig, graph: TrainGraph, raw: Layer) -> bool:
    """Whether there are pairs to fine-tune on; without a file of users, say, there are none."""
    nothing_known = nothing_known_of(options.text_user_noun, options.text_item_noun)
    n_told = len(told_edges(graph, raw, nothing_known))
    if n_told < 2:
        logger.warning(
            "sft: left out, as %d of %d training edges have a text on both sides; the LLM "
            "describes without fine-tuning",
            n_told,
            graph.n_edges,
        )
    return n_told >= 2


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


def _write_inputs(
    root: Path, graph: TrainGraph, raw: Layer, names: dict[str, str]
) -> dict[str, Path]:
    """Write the training graph, layer 0, which every stage starts from, and names of items."""
    key = {"graph": graph.fingerprint(), "texts": raw.digest()}
    outputs = ["graph.npz", "layer_0.parquet"]
    folder = root / f"inputs-{manifests.fingerprint(key)[:16]}"
    with manifests.stage_lock(folder), disk.explaining_disk_errors(folder):
        # Only shown and looked for, never a cause of results: not in the key.
        names_file = write_names(folder, names)
        if not manifests.finished(folder, key, outputs):
            manifests.discard_damaged(folder, outputs)
            graph.save(folder / "graph.npz")
            raw.write(folder / "layer_0.parquet")
            manifest: dict[str, Any] = {f"n_{side}s": len(raw.tokens[side]) for side in SIDES}
            n_imported = sum(raw.statuses[side].count("imported") for side in SIDES)
            manifest |= {"n_edges": graph.n_edges, "n_imported": n_imported}
            manifest |= {"stage": "inputs", "key": key}
            manifest["files"] = manifests.digests(folder, outputs)
            manifests.write_manifest(folder, manifest)
    return {"inputs": folder, NAMES: names_file}


def _run(
    root: Path, stage: str, key: dict[str, Any], job: dict[str, Any], outputs: list[str]
) -> Path:
    """Run a stage in its folder, or reuse what it finished before.

    Args:
        root: Folder of the data set's artefacts.
        stage: Name of the stage in ``stage.py``.
        key: All that determines the stage's results; names the folder.
        job: What the child process needs besides.
        outputs: Files and folders that the stage makes; if one is gone or changed it runs again.
    """
    folder = _folder(root, stage, key)
    with manifests.stage_lock(folder):
        if manifests.finished(folder, key, outputs):
            logger.info("stage %s was done before and is reused: %s", stage, folder)
        else:
            logger.info("stage %s starts in %s", stage, folder)
            manifests.discard_damaged(folder, outputs)
            text_of_job = json.dumps({**job, "key": key, "outputs": outputs}, indent=2)
            disk.write_atomic(folder / manifests.JOB_FILE, text_of_job.encode())
            children.run_child(stage, folder)
            logger.info("stage %s is done: %s", stage, folder)
        manifest = manifests.read_manifest(folder)
        if manifest is None:
            raise GaCLLMError(f"stage {stage} ended without a manifest in {folder}")
        logger.info("stage %s: %s", stage, json.dumps(_figures(manifest)))
    return folder


def _folder(root: Path, stage: str, key: dict[str, Any]) -> Path:
    return root / f"{stage}-{manifests.fingerprint(key)[:16]}"


def _figures(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a person wants of a manifest in the log."""
    left_out = ("stage", "key", "files", "train_losses")
    return {name: value for name, value in manifest.items() if name not in left_out}


def _finetune(
    root: Path, inputs: Path, options: GaCLLMConfig, data: TrainingData, model: _LanguageModel
) -> Path:
    key = {
        "inputs": inputs.name,
        "model": model.fingerprint,
        "prompts": _templates(options).sft_version(),
        "dtype": training_dtype(options.llm_dtype),
        "seed": data.seed,
        **_options_with(options, "sft"),
    }
    del key["sft_checkpoint_steps"]  # how often, not what
    job = _job(options, data, inputs, model)
    return _run(root, "sft", key, job, ["adapter"])


def _merge(
    root: Path, adapter: Path, options: GaCLLMConfig, data: TrainingData, model: _LanguageModel
) -> Path:
    key = {"model": model.fingerprint, "adapter": weights.fingerprint(adapter)}
    job = {"model_dir": str(model.folder), "adapter_dir": str(adapter)}
    return _run(root, "merged", key, job, ["model"])


def _describe(
    folders: dict[str, Path],
    adapter: Path | None,
    options: GaCLLMConfig,
    data: TrainingData,
    model: _LanguageModel | None,
    imported: ImportedTexts | None,
) -> _StageOfTexts:
    """To generate or import layers 1..L; ``model`` is None if all are imported."""
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
            "prompts": _templates(options).version(options.llm_n_layers),
            "cleaning": [CLEANING_VERSION, RETRY_TEMPERATURE],
            **_options_with(options, "llm_max_", "llm_temperature", "llm_repetition_penalty"),
        }
        job["generator_dir"] = str(folders["merged"] / "model") if merged else str(model.folder)
        job["adapter_dir"] = str(adapter) if adapter and not merged else None
        name = job["generator_dir"] if merged else model.name
        job["served_model"] = options.llm_served_model or name
    job["store"] = str(store_of(folders["inputs"]))
    return key, job, [f"layer_{number}.parquet" for number in range(1, options.llm_n_layers + 1)]


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
        "dtype": resolve_dtype(options.encoder_dtype, "encoder_dtype"),
        "prompt": options.encoder_prompt,
        # Not in the digests: rows follow the order of the nodes.
        "order": manifests.fingerprint({side: layers[0].tokens[side] for side in SIDES}),
    }
    job = {
        "layer_files": [str(file) for file in layer_files],
        "encoder_name": options.encoder_model,
        "encoder_dir": str(encoder),
        "options": dataclasses.asdict(options),
        "show_progress": data.show_progress,
    }
    return _run(root, "embeddings", key, job, [f"{file.stem}.npy" for file in layer_files])
