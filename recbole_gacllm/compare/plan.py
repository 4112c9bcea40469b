"""What a leaderboard will run: models x data sets x seeds, each run with all that determines it."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole.data import create_dataset
from recbole.evaluator.register import smaller_metrics
from recbole.utils import ModelType

from recbole_gacllm.artifacts import hashing, manifests
from recbole_gacllm.compare import identity
from recbole_gacllm.config import MODEL, PEERS, SPLIT_KEYS, keys_of, load_yaml, shipped_path
from recbole_gacllm.run_config import build_config

FIRST_SEED = 2020  # RecBole's
# Keys on which no result depends: where and how it is computed, and what is shown meanwhile.
_NOT_DETERMINING = frozenset(
    {
        *("artifact_dir", "checkpoint_dir", "data_path", "dataset_save_path", "dataset", "model"),
        *("dataloaders_save_path", "save_dataset", "save_dataloaders", "show_progress", "state"),
        *("device", "gpu_id", "use_gpu", "worker", "local_rank", "single_spec", "nproc", "seed"),
        *("log_wandb", "wandb_project", "llm_gpu_memory_utilization", "n_threads"),
    }
)

# What all rows of a table must share; the split is compared by its hash besides.
_SHARED_KEYS = frozenset({"seed", "eval_args", "metrics", "topk", "valid_metric", *SPLIT_KEYS})
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_BEFORE_A_QUOTE = "=,:[({ "  # elsewhere it is an apostrophe


@dataclass(frozen=True)
class PlannedRun:
    """One run of a leaderboard.

    Attributes:
        model: As the tables name it: a model, or a variant such as ``GaCLLM:use_text=False``.
        config_files: Later ones win: protocol, tuned hyper-parameters, the user's.
        config_dict: The user's keys, and the seed; they win over the files.
        key: All that determines the result: the resolved configuration, digests of data and code.
    """

    model: str
    dataset: str
    seed: int
    config_files: tuple[str, ...]
    config_dict: Mapping[str, Any]
    key: Mapping[str, Any]
    nproc: int = 1

    @property
    def name(self) -> str:
        """Folder of the run: readable, and different for everything that determines it."""
        model = re.sub(r"[^\w.=-]+", "_", self.model)[:80]
        return f"{self.dataset}-{model}-{self.seed}-{manifests.fingerprint(self.key)[:12]}"

    @property
    def arguments(self) -> tuple[str, str, tuple[str, ...], dict[str, Any]]:
        """What :func:`.run_config.build_config` takes: model, data set, files and keys."""
        return split_variant(self.model)[0], self.dataset, self.config_files, dict(self.config_dict)


@dataclass(frozen=True)
class Plan:
    """Every run of a leaderboard, and what its pages say about it."""

    runs: tuple[PlannedRun, ...]
    summary: Mapping[str, Any]


def protocol_names() -> list[str]:
    """Names that ``--protocol`` takes."""
    return sorted(path.stem for path in shipped_path("properties", "protocols").glob("*.yaml"))


def baseline_files(model: str, dataset: str) -> list[Path]:
    """Committed hyper-parameters of a model: those for any data set, then those for this one."""
    folder = shipped_path("properties", "baselines")
    files = (folder / f"{model}.yaml", folder / dataset / f"{model}.yaml")
    return [file for file in files if file.is_file()]


def make_plan(
    models: Sequence[str],
    datasets: Sequence[str],
    n_seeds: int,
    protocol: str = "general",
    config_files: Sequence[str | Path] = (),
    config_dict: Mapping[str, Any] | None = None,
    nproc: int = 1,
) -> Plan:
    """Resolve every run's configuration, so that bad input ends here and not after hours.

    Args:
        models: GaCLLM, models of RecBole and variants of them, in the order of the tables;
            ``NeuMF:seeds=5`` has the first five seeds only.
        datasets: Names of data sets.
        n_seeds: Seeds ``s, s + 1, …`` with s the key ``seed`` (2020). A seed is RecBole's: it moves
            the random split of the general protocol, and initialisation in both.
        protocol: A name of ``properties/protocols``.
        config_files: The user's yaml files, over protocol and tuned hyper-parameters.
        config_dict: The user's keys, over all files; strings as on the command line. A variant's
            own keys win over them.
        nproc: Processes of each run, by RecBole's DDP.

    Raises:
        ValueError: Unknown name or bad key, two rows that are the same run, or a sequential model
            on a split that is not by time.
    """
    if protocol not in protocol_names():
        raise ValueError(f"protocol: {protocol!r} is not one of {', '.join(protocol_names())}.")
    for name, number in (("seeds", n_seeds), ("nproc", nproc)):
        if number < 1:
            raise ValueError(f"{name}: {number} is not allowed; give at least 1.")
    rows = [split_seeds(row, n_seeds) for row in models]
    labels = [label for label, _ in rows]
    for name, names in (("models", labels), ("datasets", datasets)):
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"{name}: {','.join(names)!r} must name each at least and at most once."
            )
    user_keys = dict(config_dict or {})
    first_seed = int(user_keys.pop("seed", FIRST_SEED))
    runs: list[PlannedRun] = []
    sources: dict[str, dict[str, Any]] = {}
    properties: dict[str, dict[str, Any]] = {}
    sha256 = functools.cache(hashing.sha256)  # each file once
    for dataset in datasets:
        row_of: dict[str, str] = {}
        for row, n_own in rows:
            model, own_keys = split_variant(row)
            tuned = baseline_files(model, dataset)
            files = (shipped_path("properties", "protocols", f"{protocol}.yaml"), *tuned)
            paths = tuple(str(file) for file in (*files, *config_files))
            given = user_keys
            if model in PEERS:
                foreign = keys_of(MODEL) - keys_of(model)
                given = {k: v for k, v in user_keys.items() if k not in foreign}
            keys = {**given, **own_keys}
            config = build_config(model, dataset, paths, {**keys, "seed": first_seed})
            if foreign := _foreign(given, config):
                keys = {k: v for k, v in given.items() if k not in foreign} | own_keys
                config = build_config(model, dataset, paths, {**keys, "seed": first_seed})
            _check_order(model, config)
            if not Path(config["data_path"]).is_dir():
                create_dataset(config)  # RecBole fetches it where it can
            # Enums and the like become their names.
            resolved = json.loads(json.dumps(config.final_config_dict, default=str))
            if "text_layers" in resolved and not identity.has_layers(resolved):
                resolved["text_layers"] = "hops"  # of one layer all ways are the same
            key: dict[str, Any] = {
                "model": model,
                "dataset": dataset,
                "config": {k: v for k, v in resolved.items() if _determines(k, v)},
                "recbole": importlib.metadata.version("recbole"),
                **identity.of(resolved, sha256),
            }
            if nproc > 1:  # the batches of DDP are others
                key["nproc"] = nproc
            same = row_of.setdefault(manifests.fingerprint(key), row)
            if same != row:
                raise ValueError(f"models: {same!r} and {row!r} are the same run; leave one out.")
            key["model"] = row
            if model == MODEL:
                tuned = [shipped_path("properties", "presets", f"{config['preset']}.yaml"), *tuned]
            sources[f"{dataset}/{row}"] = {
                "files": {_short(path): _head_comment(path) for path in tuned},
                "values": {k: resolved[k] for path in tuned for k in load_yaml(path)},
                "given": {k: v for k, v in keys.items() if k in key["config"]},
            }
            properties.setdefault(dataset, key["config"])
            for seed in range(first_seed, first_seed + n_own):
                own = {**keys, "seed": seed}, {**key, "seed": seed}
                runs.append(PlannedRun(row, dataset, seed, paths, *own, nproc))
    runs.sort(key=lambda run: (datasets.index(run.dataset), run.seed, labels.index(run.model)))
    summary = {
        "models": labels,
        "n_seeds": dict(rows),
        "datasets": list(datasets),
        "seeds": list(range(first_seed, first_seed + n_seeds)),
        "protocol": protocol,
        "given": user_keys,
        "config_files": [str(file) for file in config_files],
        "nproc": nproc,
        "tuned": sources,
        "properties": properties,
        "smaller_is_better": list(smaller_metrics),
        "runs": [run.name for run in runs],
        "code": code_version(),
    }
    return Plan(tuple(runs), summary)


def _determines(key: str, value: Any) -> bool:
    """Whether a key of a configuration belongs to a run's identity."""
    return key not in _NOT_DETERMINING and (
        key not in identity.LATER_KEYS or identity.LATER_KEYS[key] != value
    )


def code_version() -> dict[str, Any]:
    """Version, digests of the code that computes, and the commit where this is a git checkout."""
    try:
        installed = importlib.metadata.version("recbole_gacllm")
    except importlib.metadata.PackageNotFoundError:
        installed = None  # a checkout that is run as it is
    concerns = identity.code_digests()
    root, commit = Path(__file__).resolve().parent.parent.parent, None
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    return {
        "version": installed,
        "digest": manifests.fingerprint(concerns),
        "concerns": concerns,
        "commit": commit,
    }


def _foreign(user_keys: Mapping[str, Any], config: Any) -> set[str]:
    """The user's keys of GaCLLM that mean nothing to another model."""
    of_any_model = {"fast_paths", "n_threads", *SPLIT_KEYS}
    return (keys_of(MODEL) & set(user_keys)) - set(config.internal_config_dict) - of_any_model


def _check_order(model: str, config: Any) -> None:
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL and config["eval_args"]["order"] != "TO":
        raise ValueError(
            f"models: {model} is sequential, and RecBole gives sequences in order of time only; a "
            "random split (--protocol=general) has none. Set --protocol=sequential, where general "
            "and sequential models stand side by side, or leave it out."
        )


def _head_comment(path: Path) -> str:
    """What the head of a file of hyper-parameters says of their source and of the values tried."""
    lines = path.read_text("utf-8").splitlines()
    head = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.removeprefix("#").strip() for line in head)


def _short(path: Path) -> str:
    return path.relative_to(shipped_path("properties").parent).as_posix()


def split_models(text: str) -> list[str]:
    """``BPR,GaCLLM:topk=[5,10]`` -> its rows; a comma in brackets or quotes does not separate."""
    return _split(text, ",")


def split_seeds(row: str, n_seeds: int) -> tuple[str, int]:
    """``NeuMF:seeds=5`` -> ``NeuMF`` and 5; a row without ``seeds`` has all of them."""
    parts = _split(row, ":")
    counts = [part for part in parts if part.startswith("seeds=")]
    if len(counts) > 1:
        raise ValueError(f"models: {row!r} gives seeds twice; give it once.")
    if not counts:
        return row, n_seeds
    value = counts[0].removeprefix("seeds=")
    if not value.isdecimal() or not 1 <= int(value) <= n_seeds:
        raise ValueError(
            f"models: {counts[0]!r} of {row!r} must be a number from 1 to {n_seeds} (--seeds): the "
            "first so many of all seeds."
        )
    return ":".join(part for part in parts if part != counts[0]), int(value)


def split_variant(row: str) -> tuple[str, dict[str, str]]:
    """``GaCLLM:use_text=False:n_layers=1`` -> ``GaCLLM`` and the variant's own keys."""
    model, *parts = _split(row, ":")
    keys = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(
                f"models: {part!r} of {row!r} is not key=value. A variant is written "
                "Model:key=value:key=value; a value that holds ':' outside of brackets and quotes "
                "goes into a config file."
            )
        if key in _SHARED_KEYS:
            raise ValueError(f"models: {key} of {row!r} must be the same for all; give --{key}=….")
        if key in keys:
            raise ValueError(f"models: {row!r} gives {key} twice; give it once.")
        keys[key] = value
    return model, keys


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that stand in no brackets and no quotes."""
    parts, start = [], 0
    open_brackets: list[str] = []  # what closes them
    quote = ""
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote and text[place - 1] != "\\" else quote
        elif sign in "'\"" and place > 0 and text[place - 1] in _BEFORE_A_QUOTE:
            quote = sign
        elif sign in _CLOSING:
            open_brackets.append(_CLOSING[sign])
        elif sign in _CLOSING.values():
            if not open_brackets or open_brackets.pop() != sign:
                raise ValueError(f"models: {text!r} has a {sign!r} that nothing opened; remove it.")
        elif sign == separator and not open_brackets:
            parts.append(text[start:place])
            start = place + 1
    if quote or open_brackets:
        raise ValueError(
            f"models: {text!r} has no {quote or open_brackets[-1]!r} for what was opened; add it, "
            "or put the value into a config file."
        )
    return [*parts, text[start:]]
