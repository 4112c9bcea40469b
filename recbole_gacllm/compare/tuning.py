"""Hyper-parameter search with RecBole's ``HyperTuning``, in runs that are made once.

    OUTPUT/trials/<run>/run.json   a finished trial, as a leaderboard's run
    OUTPUT/trials.csv              all trials so far: parameters, validation metrics, seconds
    OUTPUT/<Model>.yaml            the best parameters, for properties/baselines or --config_files

A search draws from a seed of its own, so that one which is started again proposes the same
parameters, finds the finished trials by what determines them, and goes on.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from recbole.trainer import HyperTuning
from tqdm import tqdm

from recbole_gacllm import __version__
from recbole_gacllm.artifacts import disk
from recbole_gacllm.compare.identity import LATER_KEYS
from recbole_gacllm.compare.job import RUN_FILE
from recbole_gacllm.compare.leaderboard import (
    FAILED_FILE,
    SECONDS_BETWEEN_LOOKS,
    Outcome,
    attempt,
    read_if_there,
    watched,
)
from recbole_gacllm.compare.markdown import csv_text
from recbole_gacllm.compare.plan import FIRST_SEED, PlannedRun, make_plan
from recbole_gacllm.config import shipped_path
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.literals import literal

logger = logging.getLogger(__name__)

ALGORITHMS = ("exhaustive", "random", "bayes")
#: Kind -> parameter -> its values or bounds, as RecBole's ``params_dict``.
Space = dict[str, dict[str, list[Any]]]
# Kind -> how many numbers it takes; choice takes any values.
_N_NUMBERS = {"choice": None, "uniform": 2, "quniform": 3, "loguniform": 2}


@dataclass(frozen=True)
class Trial:
    """One set of parameters and what came of it on the validation part.

    Attributes:
        score: Of the ``valid_metric``; None if the run failed.
    """

    parameters: dict[str, Any]
    score: float | None
    valid: dict[str, float]
    seconds: float | None
    folder: Path


@dataclass
class Search:
    """What is searched, for one model on one data set.

    Attributes:
        protocol: A name of ``properties/protocols``.
        config_files: The user's yaml files, over protocol and tuned hyper-parameters.
        keys: The user's keys, over all files; the searched parameters win over them.
        trials: In the order of the search.
    """

    model: str
    dataset: str
    space: Space
    output: Path
    protocol: str = "general"
    config_files: Sequence[str | Path] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)
    nproc: int = 1
    trials: list[Trial] = field(default_factory=list)

    def run_of(self, parameters: Mapping[str, Any]) -> PlannedRun:
        """The run of one set of parameters."""
        keys = {**self.keys, **parameters}
        plan = make_plan(
            [self.model], [self.dataset], 1, self.protocol, self.config_files, keys, self.nproc
        )
        return plan.runs[0]

    def plain(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What hyperopt drew as Python values; whole numbers of quniform as integers."""
        whole = self.space.get("quniform", {})
        return {
            name: int(value) if name in whole and float(value).is_integer() else value
            for name, value in parameters.items()
        }

    def names(self) -> list[str]:
        """The searched parameters."""
        return [name for values in self.space.values() for name in values]


def tune(
    search: Search,
    algo: str = "exhaustive",
    max_evals: int = 20,
    early_stop: int | None = None,
    show_progress: bool = True,
) -> Path:
    """Search by the validation metric of the protocol; the test part is never looked at.

    Args:
        search: What is searched; its trials are filled.
        algo: ``exhaustive``, ``random`` or ``bayes``, as RecBole has them.
        max_evals: Trials of ``random`` and ``bayes``.
        early_stop: RecBole's: end after so many trials without a better one; None is never.
        show_progress: A bar: trials done, the current one with epoch and score, time left.

    Returns:
        The yaml file of the best parameters.

    Raises:
        ValueError: Bad input, before any trial.
        GaCLLMError: If no trial was finished.
    """
    if algo not in ALGORITHMS:
        raise ValueError(f"algo: {algo!r} is not one of {', '.join(ALGORITHMS)}.")
    if algo == "exhaustive" and set(search.space) != {"choice"}:
        kinds = ", ".join(set(search.space) - {"choice"})
        raise ValueError(
            f"algo: exhaustive tries every value, and {kinds} has no list of them. Give choice "
            "alone, or --algo=random or bayes."
        )
    _check_names(search)
    (search.output / "trials").mkdir(parents=True, exist_ok=True)
    failed_before: dict[Path, bytes | None] = {}
    # hyperopt's own variable; RecBole passes it no generator.
    os.environ["HYPEROPT_FMIN_SEED"] = str(search.keys.get("seed", FIRST_SEED))
    bar: tqdm[Any] = tqdm(unit="trial", disable=not show_progress)

    def objective(parameters: dict[str, Any], _files: Any) -> dict[str, Any]:
        trial, bigger = _make_trial(search, search.plain(parameters), failed_before, bar)
        search.trials.append(trial)
        _write_trials(search)
        bar.update()
        worst = -math.inf if bigger else math.inf
        return {
            "model": search.model,
            "best_valid_score": worst if trial.score is None else trial.score,
            "valid_score_bigger": bigger,
            "best_valid_result": trial.valid,
            "test_result": {},
        }

    hyper = HyperTuning(
        objective,
        params_dict=search.space,
        algo=algo,
        max_evals=max_evals,
        early_stop=sys.maxsize if early_stop is None else early_stop,
    )
    bar.total = int(hyper.max_evals)
    bar.refresh()
    # RecBole prints each trial, hyperopt draws a bar: ours shows both.
    with bar, contextlib.redirect_stdout(io.StringIO()):
        hyper.run()
    if all(trial.score is None for trial in search.trials):
        raise GaCLLMError(
            f"none of {len(search.trials)} trials was finished; their logs lie under "
            f"{search.output / 'trials'}."
        )
    return _write_best(search, hyper, algo)


def _check_names(search: Search) -> None:
    """Refuse a parameter that the model does not read, which RecBole would ignore."""
    names = search.run_of({}).key["config"] | LATER_KEYS
    for name in search.names():
        if name not in names:
            near = ", ".join(difflib.get_close_matches(name, names, n=3)) or "none"
            raise ValueError(
                f"space: {name!r} is no key that a result of {search.model} depends on; near "
                f"names: {near}."
            )


def _make_trial(
    search: Search,
    parameters: dict[str, Any],
    failed_before: dict[Path, bytes | None],
    bar: tqdm[Any],
) -> tuple[Trial, bool]:
    """Make or find one run; also whether a larger score is better."""
    run = search.run_of(parameters)
    folder = search.output / "trials" / run.name
    before = failed_before.setdefault(folder, read_if_there(folder / FAILED_FILE))
    bigger = bool(run.key["config"]["valid_metric_bigger"])
    label = ", ".join(f"{name} {value}" for name, value in parameters.items())
    same_split = [trial.folder for trial in search.trials]
    with watched(bar, label, folder):
        while (outcome := attempt(run, folder, before, same_split)) is Outcome.BUSY:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if outcome is Outcome.FAILED:
        return Trial(parameters, None, {}, None, folder), bigger
    shutil.rmtree(folder / "saved", ignore_errors=True)  # checkpoints; the parameters make it again
    record = json.loads((folder / RUN_FILE).read_text("utf-8"))
    valid = record["valid"]
    score = valid[record["config"]["valid_metric"].lower()]
    return Trial(parameters, score, valid, record["seconds"]["total"], folder), bigger


def _write_trials(search: Search) -> None:
    metrics = next((list(trial.valid) for trial in search.trials if trial.valid), [])
    rows = [
        {
            "trial": number,
            **{name: trial.parameters[name] for name in search.names()},
            **{f"valid {name}": trial.valid.get(name, "failed") for name in metrics},
            "seconds": trial.seconds,
            "run": trial.folder.name,
        }
        for number, trial in enumerate(search.trials, 1)
    ]
    disk.write_atomic(search.output / "trials.csv", csv_text(rows).encode())


def _write_best(search: Search, hyper: HyperTuning, algo: str) -> Path:
    best = {name: _literal(value) for name, value in search.plain(hyper.best_params).items()}
    trials = [trial for trial in search.trials if trial.score is not None]
    config = json.loads((trials[0].folder / RUN_FILE).read_text("utf-8"))["config"]
    keys = " ".join(f"{key}={value}" for key, value in search.keys.items())
    ranges = "; ".join(
        f"{name} {kind} {values}"
        for kind, parameters in search.space.items()
        for name, values in parameters.items()
    )
    text = (
        f"# Source: tune of recbole_gacllm {__version__} on {search.dataset}, {search.protocol} "
        f"protocol, seed {config['seed']}, {algo}, {len(trials)} trials,\n"
        f"# by validation {config['valid_metric']}: {hyper.best_score:.4f}. Given: "
        f"{keys or 'nothing'}.\n# Best of: {ranges}.\n"
    )
    file = search.output / f"{search.model}.yaml"
    disk.write_atomic(file, (text + yaml.safe_dump(best, sort_keys=False)).encode())
    return file


def _literal(value: Any) -> Any:
    """``'[128,64]'``, as RecBole's spaces write a list, as the list."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return literal(value)
    return value


def read_space(file: Path) -> Space:
    """Read RecBole's ``.hyper`` file.

    Raises:
        ValueError: Names the line that is not as RecBole has it.
    """
    if not file.is_file():
        shipped = sorted(path.stem for path in shipped_path("properties", "spaces").glob("*.hyper"))
        raise ValueError(
            f"space: {file} is not a file. Spaces are shipped for {', '.join(shipped)}; for "
            "another model give --space=FILE."
        )
    try:
        content = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"space: {file} is not UTF-8 text ({error}); save it as UTF-8.") from error
    space: Space = {}
    for where, name, kind, values in _of_lines(file, content):
        if kind not in _N_NUMBERS:
            raise ValueError(f"{where}: {kind!r} is not one of {', '.join(_N_NUMBERS)}.")
        n_numbers = _N_NUMBERS[kind]
        allowed = "a list of values" if n_numbers is None else f"{n_numbers} numbers"
        fits = isinstance(values, list) and len(values) > 0
        if fits and n_numbers is not None:
            numbers = [value for value in values if isinstance(value, (int, float))]
            fits = len(numbers) == len(values) == n_numbers
        if not fits:
            raise ValueError(f"{where}: {kind} takes {allowed}, not {values!r}.")
        space.setdefault(kind, {})[name] = values
    if not space:
        raise ValueError(f"{file} names no parameter to search.")
    return space


def _of_lines(file: Path, content: str) -> Iterator[tuple[str, str, str, Any]]:
    """Where it stands, name, kind and values of each parameter."""
    for number, text in enumerate(content.splitlines(), 1):
        words = text.partition("#")[0].split(maxsplit=2)
        if not words:
            continue
        where = f"{file}, line {number}"
        if len(words) < 3:
            raise ValueError(f"{where}: {text!r} is not 'name kind values'.")
        try:
            # RecBole writes bounds without brackets.
            values = literal(words[2] if "[" in words[2] else f"[{words[2]}]")
        except ValueError as error:
            raise ValueError(f"{where}: {words[2]!r} is not a list of values.") from error
        yield where, words[0], words[1], values
