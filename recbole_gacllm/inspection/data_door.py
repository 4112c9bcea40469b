"""Reading a data set without a run: for ``check``, and before the first of many runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recbole.data import create_dataset
from recbole.utils import init_seed

from recbole_gacllm.config import MODELS, GaCLLMConfig, reads_text
from recbole_gacllm.convolution.layers import Side
from recbole_gacllm.data.checks import DataReport
from recbole_gacllm.inputs import TrainingData, raw_descriptions, samples
from recbole_gacllm.run_config import build_config

logger = logging.getLogger(__name__)


def read_and_inspect(
    model: str, dataset: str, config_files: Sequence[str], config_dict: dict[str, Any]
) -> tuple[Any, Any, DataReport]:
    """Read and split a data set as a run does: RecBole's configuration, training part, report.

    Raises:
        ValueError: As :func:`.run_config.build_config` and :func:`.data.checks.inspect`.
    """
    config = build_config(model, dataset, config_files, config_dict)
    init_seed(config["seed"], config["reproducibility"])
    whole = create_dataset(config)
    train = whole.build()[0]
    return config, train, whole.data_report


def sample_texts(
    config: Any, train: Any, dataset: str, config_files: Sequence[str], config_dict: dict[str, Any]
) -> dict[Side, list[str]]:
    """Side -> texts of layer 0 of some of its nodes, drawn by the seed."""
    if config["model"] not in MODELS and not config["text_init"]:  # the words are GaCLLM's
        config = build_config("GaCLLM", dataset, config_files, config_dict)
    options = GaCLLMConfig.of_hook(config.final_config_dict)
    raw, _ = raw_descriptions(options, TrainingData.from_recbole(config, train))
    return samples(raw.texts, config["seed"])


def check_plan(jobs: Iterable[tuple[str, str, Sequence[str], Mapping[str, Any]]]) -> None:
    """Read the data of planned runs: what cannot serve ends here, warnings are told once.

    Of each data set one run with text is looked at if there is one, and one of each kind: those
    that draw negative items and those that do not.

    Raises:
        ValueError: As :func:`read_and_inspect` and :func:`sample_texts`.
    """
    job_of_kind: dict[tuple[str, bool], tuple[bool, Any]] = {}
    for model, dataset, files, keys in jobs:
        config = build_config(model, dataset, files, dict(keys))
        with_text = reads_text(config.final_config_dict)
        kind = dataset, config["train_neg_sample_args"]["distribution"] != "none"
        if kind not in job_of_kind or with_text > job_of_kind[kind][0]:
            job_of_kind[kind] = with_text, (model, dataset, files, dict(keys))
    warnings: set[str] = set()
    for with_text, job in job_of_kind.values():
        config, train, report = read_and_inspect(*job)
        for warning in dict.fromkeys(report.warnings):
            if warning not in warnings:
                logger.warning("%s: %s", job[1], warning)
        warnings.update(report.warnings)
        if with_text:
            sample_texts(config, train, *job[1:])
