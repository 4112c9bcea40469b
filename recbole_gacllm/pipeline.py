"""The preprocessing hook: features -> SFT -> description convolution -> encoding, each stage once.

``GaCLLM.__init__`` calls :func:`prepare` with RecBole's training split. Every stage writes one
folder under ``artifact_dir/<dataset>/``, named by a fingerprint of all that determines it, with a
``manifest.json`` written last: a stage whose manifest is there is skipped, a half-written one goes
on where it was. The stages run in child processes (``stage.py``), so that GPU memory is free when
RecBole trains, and a crash of an engine cannot take the run down.

    inputs-…/        graph.npz (training edges), layer_0.parquet (raw texts), item_names-….json
    sft-…/           adapter/ (peft, safetensors)
    merged-…/        model/ (the LLM with the adapter in its weights)
    descriptions-…/  layer_1.parquet … layer_L.parquet (one more with a knowledge step, layer 1)
    embeddings-…/    layer_0.npy … layer_L.npy
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.artifacts import children, disk, manifests
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.convolution import setup
from recbole_gacllm.convolution.cleaning import CLEANING_VERSION
from recbole_gacllm.convolution.graph import TrainGraph, check_rule
from recbole_gacllm.convolution.imported import ImportedTexts
from recbole_gacllm.convolution.layers import SIDES, Layer
from recbole_gacllm.convolution.names import NAMES, write_names
from recbole_gacllm.convolution.requests import RETRY_TEMPERATURE
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.estimate import announce_llm
from recbole_gacllm.inputs import TrainingData, imported_texts, raw_descriptions
from recbole_gacllm.job import Job
from recbole_gacllm.llm import weights
from recbole_gacllm.llm.engines import check_engine, choose_backend
from recbole_gacllm.llm.hardware import resolve_dtype, training_dtype
from recbole_gacllm.sft.pairs import told_edges

logger = logging.getLogger(__name__)


#: What gives a model its text embeddings: :func:`prepare`, or what it left.
TextsOf = Callable[[GaCLLMConfig, TrainingData], TextLayers]


def prepare(options: GaCLLMConfig, data: TrainingData) -> TextLayers:
    """Run or reuse every stage and load the text embeddings of layers 0..L.

    Raises:
        ValueError: Bad input (keys, feature files, an adapter that does not fit), before any stage.
        GaCLLMError: A stage failed; what it finished is kept.
    """
    with _own_randomness():
        # Whatever can be wrong is found before the stages that take long.
        encoder = weights.resolve_encoder(options.encoder_model)
        hook = _Hook(options, data)
        layer_files = [hook.inputs / "layer_0.parquet"]
        if hook.descriptions is not None:
            hook.folders["descriptions"] = folder = _run(hook.descriptions)
            layer_files += [folder / name for name in hook.descriptions.outputs]
        hook.folders["embeddings"] = _run(hook.encoding(layer_files, encoder))
        return TextLayers.load(
            *(hook.folders, len(layer_files), options.text_source, data.graph, data.seed),
            options.text_users,
        )


def describe(options: GaCLLMConfig, data: TrainingData) -> Path:
    """Run or reuse the stages up to the descriptions.

    Returns:
        The folder of these.

    Raises:
        ValueError, GaCLLMError: As :func:`prepare`.
    """
    with _own_randomness():
        return _run(_Hook(options, data).required_descriptions())


def description_job(options: GaCLLMConfig, data: TrainingData) -> Job:
    """Run or reuse the stages before the descriptions.

    Returns:
        The job of the descriptions, finished or not.

    Raises:
        ValueError, GaCLLMError: As :func:`prepare`.
    """
    with _own_randomness():
        return _Hook(options, data).required_descriptions()


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


@dataclass(frozen=True)
class _LanguageModel:
    """The base LLM: its folder, the fingerprint of its weights."""

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
        return cls(folder, weights.fingerprint(folder, not only_tokenizer))


class _Hook:
    """The stages of one run: those before the descriptions have run when it is made.

    Attributes:
        inputs: Folder of the training graph and layer 0.
        folders: Stage -> its folder.
        descriptions: The job of layers 1..L; None where layer 0 is all that the run takes.
    """

    def __init__(self, options: GaCLLMConfig, data: TrainingData) -> None:
        check_rule(data.graph, options.neighbor_rule)
        options = _with_absolute_paths(options)
        raw, names = raw_descriptions(options, data)
        imported = imported_texts(options, raw)
        if imported is not None and 0 in imported.layers:
            raw = imported.fill(0, raw)
        self._options, self._data = options, data
        self.folders = _write_inputs(data, Path(options.artifact_dir), raw, names)
        self.inputs = self.folders["inputs"]
        self.descriptions = self._descriptions(raw, imported) if options.is_described else None

    def required_descriptions(self) -> Job:
        """The job of the descriptions.

        Raises:
            ValueError: If the run has none.
        """
        if self.descriptions is None:
            raise ValueError(
                "text_source: raw and item_mean, and llm_n_layers: 0, take the texts of layer 0 as "
                "they are, so there is nothing to describe; set generated and 1 layer or more."
            )
        return self.descriptions

    def _job(self, stage: str, key: dict[str, Any], *outputs: str, **more: Any) -> Job:
        return Job(
            stage=stage,
            key=key,
            outputs=outputs,
            options=self._options,
            seed=self._data.seed,
            show_progress=self._data.show_progress,
            inputs=self.inputs,
            **more,
        )

    def _descriptions(self, raw: Layer, imported: ImportedTexts | None) -> Job:
        """Fine-tuning and merging, if the run has them; then how layers 1..L are made."""
        options, data = self._options, self._data
        layers = range(1, options.n_text_layers + 1)
        key: dict[str, Any] = {
            "inputs": self.inputs.name,
            "n_layers": options.llm_n_layers,
            "seed": data.seed,
            "neighbor_rule": options.neighbor_rule,
            "n_neighbors": options.n_neighbors,
        }
        if options.has_knowledge:
            key["knowledge_tokens"] = options.llm_knowledge_tokens
        generator: dict[str, Any] = {}
        if imported is not None:
            key["imported"] = imported.digest()
        if imported is None or not set(layers) <= set(imported.layers):
            generator = self._generator(raw)
            key |= {
                **generator["generator_key"],
                "prompts": setup.templates_of(options).version(options.llm_n_layers),
                "cleaning": [CLEANING_VERSION, RETRY_TEMPERATURE],
                **_keys_with(options, "llm_max_", "llm_temperature", "llm_repetition_penalty"),
            }
        outputs = [f"layer_{number}.parquet" for number in layers]
        return self._job("descriptions", key, *outputs, **generator)

    def _generator(self, raw: Layer) -> dict[str, Any]:
        """What a job says of the model that generates; it is fine-tuned and merged first."""
        options = self._options
        model = _LanguageModel.resolve(options)
        check_engine(
            options.llm_backend,
            model.folder,
            options.llm_tensor_parallel_size,
            options.llm_pipeline_parallel_size,
        )
        templates = setup.templates_of(options)
        announce_llm(options, self._data, raw, templates, model.folder)
        adapter = None
        if options.llm_adapter is not None:
            from recbole_gacllm.llm.adapter import check_adapter  # loads transformers

            adapter = Path(options.llm_adapter)
            check_adapter(model.folder, adapter)
        elif options.sft and _can_learn(options, self._data.graph, raw):
            self.folders["sft"] = _run(self._finetuning(model))
            adapter = self.folders["sft"] / "adapter"
        # What is generated is addressed by the weights that generate it.
        generator_key = {
            "model": model.fingerprint,
            "adapter": weights.fingerprint(adapter) if adapter else None,
            "merged": adapter is not None and options.llm_merge_adapter,
            "backend": choose_backend(options.llm_backend)[0],
            "dtype": resolve_dtype(options.llm_dtype),
        }
        folder, name = model.folder, options.llm_model
        if adapter is not None and options.llm_merge_adapter:
            merge_key = {"model": model.fingerprint, "adapter": generator_key["adapter"]}
            merging = self._job(
                "merged", merge_key, "model", model_dir=model.folder, adapter_dir=adapter
            )
            self.folders["merged"] = _run(merging)
            folder, adapter = self.folders["merged"] / "model", None
            name = str(folder)
        if options.llm_backend == "server":
            # Nobody checks what servers serve: their texts are theirs alone, and by name.
            generator_key["served_model"] = options.llm_served_model or options.llm_model
        return {
            "generator_key": generator_key,
            "model_dir": folder,
            "adapter_dir": adapter,
            "served_model": options.llm_served_model or name,
        }

    def _finetuning(self, model: _LanguageModel) -> Job:
        options = self._options
        key = {
            "inputs": self.inputs.name,
            "model": model.fingerprint,
            "prompts": setup.templates_of(options).sft_version(),
            "dtype": training_dtype(options.llm_dtype),
            "seed": self._data.seed,
            **_keys_with(options, "sft"),
        }
        del key["sft_checkpoint_steps"]  # how often, not what
        return self._job(
            "sft", key, "adapter", model_dir=model.folder, model_name=options.llm_model
        )

    def encoding(self, layer_files: list[Path], encoder: Path) -> Job:
        """The job that encodes these layers."""
        layers = [Layer.read(file) for file in layer_files]
        key = {
            "texts": [layer.digest() for layer in layers],
            "encoder": weights.fingerprint(encoder),
            "dtype": resolve_dtype(self._options.encoder_dtype),
            "prompt": self._options.encoder_prompt,
            # Not in the digests: rows follow the order of the nodes.
            "order": manifests.fingerprint({side: layers[0].tokens[side] for side in SIDES}),
        }
        outputs = [f"{file.stem}.npy" for file in layer_files]
        return self._job(
            "embeddings", key, *outputs, layer_files=tuple(layer_files), encoder_dir=encoder
        )


def _with_absolute_paths(options: GaCLLMConfig) -> GaCLLMConfig:
    """The same for a child, or one of torchrun's processes, in any working folder."""
    names = ("artifact_dir", "llm_adapter", "llm_prompts_dir", "text_import_file")
    paths = {name: getattr(options, name) for name in names}
    absolute: dict[str, Any] = {
        name: str(Path(path).resolve()) for name, path in paths.items() if path
    }
    return dataclasses.replace(options, **absolute)


def _keys_with(options: GaCLLMConfig, *prefixes: str) -> dict[str, Any]:
    return {
        key: value for key, value in dataclasses.asdict(options).items() if key.startswith(prefixes)
    }


def _can_learn(options: GaCLLMConfig, graph: TrainGraph, raw: Layer) -> bool:
    """Whether there are pairs to fine-tune on; without a file of users, say, there are none."""
    n_told = len(told_edges(graph, raw, setup.nothing_known_of(options)))
    if n_told < 2:
        logger.warning(
            "sft: left out, as %d of %d training edges have a text on both sides; the LLM "
            "describes without fine-tuning",
            n_told,
            graph.n_edges,
        )
    return n_told >= 2


def _write_inputs(
    data: TrainingData, artifact_dir: Path, raw: Layer, names: dict[str, str]
) -> dict[str, Path]:
    """Write the training graph, layer 0, which every stage starts from, and names of items."""
    key = {"graph": data.graph.fingerprint(), "texts": raw.digest()}
    outputs = ["graph.npz", "layer_0.parquet"]
    folder = artifact_dir / data.dataset / f"inputs-{manifests.fingerprint(key)[:16]}"
    with manifests.stage_lock(folder), disk.explaining_disk_errors(folder):
        # Only shown and looked for, never a cause of results: not in the key.
        names_file = write_names(folder, names)
        if not manifests.finished(folder, key, outputs):
            manifests.discard_damaged(folder, outputs)
            data.graph.save(folder / "graph.npz")
            raw.write(folder / "layer_0.parquet")
            manifest: dict[str, Any] = {f"n_{side}s": len(raw.tokens[side]) for side in SIDES}
            n_imported = sum(raw.statuses[side].count("imported") for side in SIDES)
            manifest |= {"n_edges": data.graph.n_edges, "n_imported": n_imported}
            manifest |= {"stage": "inputs", "key": key}
            manifest["files"] = manifests.digests(folder, outputs)
            manifests.write_manifest(folder, manifest)
    return {"inputs": folder, NAMES: names_file}


def _run(job: Job) -> Path:
    """Run a stage in its folder, or reuse what it finished before."""
    folder, stage = job.folder, job.stage
    with manifests.stage_lock(folder):
        if manifests.finished(folder, job.key, job.outputs):
            logger.info("stage %s was done before and is reused: %s", stage, folder)
        else:
            logger.info("stage %s starts in %s", stage, folder)
            manifests.discard_damaged(folder, job.outputs)
            job.write(folder)
            children.run_child(stage, folder)
            logger.info("stage %s is done: %s", stage, folder)
        manifest = manifests.read_manifest(folder)
        if manifest is None:
            raise GaCLLMError(f"stage {stage} ended without a manifest in {folder}")
        figures = {
            name: value
            for name, value in manifest.items()
            if name not in ("stage", "key", "files", "train_losses")
        }
        logger.info("stage %s: %s", stage, json.dumps(figures))
    return folder
