"""One run of a leaderboard, in a process of its own: ``python -m recbole_gacllm.compare.job``.

Started by :mod:`recbole_gacllm.compare.leaderboard`, never by hand. Reads ``FOLDER/job.json``,
writes ``log.txt``, ``per_user.npz`` and ``degrees.npz``, and ``run.json`` last and atomically.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recbole_gacllm import console
from recbole_gacllm.artifacts import children, disk, hashing
from recbole_gacllm.compare.degrees import (
    DEGREES_FILE,
    Degrees,
    ItemHits,
    count_degrees,
    npz,
    to_npz,
)
from recbole_gacllm.data.checks import interactions, targets
from recbole_gacllm.errors import GaCLLMError

RUN_FILE = "run.json"
PER_USER_FILE = "per_user.npz"
LOG_FILE = "log.txt"


def training_pairs(dataset: Any) -> set[tuple[str, str]]:
    """(user token, item token) of each interaction of a training part.

    A sequential part has a row for each target, with what came before in a list: the first
    interaction of a user stands in lists only.
    """
    pairs = set(targets(dataset))
    list_field = getattr(dataset, f"{dataset.iid_field}_list_field", None)
    if list_field is None or list_field not in dataset.inter_feat:
        return pairs
    users = dataset.id2token(dataset.uid_field, dataset.inter_feat[dataset.uid_field])
    lists = dataset.inter_feat[list_field].numpy()
    tokens = dataset.field2id_token[dataset.iid_field]
    return pairs | {
        (user, str(tokens[item]))
        for user, history in zip(users.tolist(), lists, strict=True)
        for item in history[history > 0]
    }


def split_hashes(train: Any, valid: Any, test: Any) -> dict[str, Any]:
    """SHA-256 of the sorted (user token, item token) pairs of each part, and how many there are."""
    hashes: dict[str, Any] = {}
    for part, dataset in (("train", train), ("valid", valid), ("test", test)):
        pairs = training_pairs(dataset) if part == "train" else set(targets(dataset))
        lines = "".join(sorted(f"{user}\t{item}\n" for user, item in pairs))
        hashes[part] = hashlib.sha256(lines.encode()).hexdigest()
        hashes[f"n_{part}"] = len(pairs)
    return hashes


class Recorder:
    """Observes a run: the hashes of its split, and every user's metrics at the last evaluation.

    RecBole's top-k metrics hand one value for each user and cut-off to ``topk_result``, which
    averages them; it is wrapped on the metric objects of this trainer, so the stored values are
    those averaged. The test is the last evaluation of a run.

    Args:
        expected: Name and split hashes of a finished run that must have had the same split.
    """

    def __init__(self, expected: dict[str, Any] | None = None) -> None:
        self._expected = expected
        self._test_data: Any = None
        self.split: dict[str, Any] = {}
        self.statistics: dict[str, int] = {}
        self.values: dict[str, np.ndarray[Any, Any]] = {}
        self.degrees: Degrees = {}
        self.hits: ItemHits | None = None

    def on_split(self, train_data: Any, valid_data: Any, test_data: Any) -> None:
        """Hash the split; refuse one that differs from the other runs' before any training.

        Raises:
            GaCLLMError: If it differs.
        """
        self._test_data = test_data
        train = train_data._dataset
        self.degrees = count_degrees(training_pairs(train))
        self.split = split_hashes(train, valid_data._dataset, test_data._dataset)
        rows = interactions(part._dataset for part in (train_data, valid_data, test_data))
        n_users, n_items = train.user_num - 1, train.item_num - 1
        self.statistics = {"n_users": n_users, "n_items": n_items, "n_interactions": len(rows)}
        if n_repeats := len(rows) - len(np.unique(rows)):
            self.statistics["n_repeats"] = n_repeats
        if self._expected is not None and self._expected["split"] != self.split:
            raise GaCLLMError(
                f"this run's split differs from that of {self._expected['run']}: {self.split} "
                f"against {self._expected['split']}. Models can only be compared on one split."
            )

    def on_trainer(self, trainer: Any) -> None:
        """Capture what the metrics average."""
        for metric in trainer.evaluator.metric_class.values():
            if hasattr(metric, "topk_result"):
                metric.topk_result = functools.partial(self._capture, metric.topk_result)
        evaluate, collect = trainer.evaluate, trainer.eval_collector.eval_batch_collect
        n_items, k = self._test_data._dataset.item_num, max(trainer.config["topk"])

        @functools.wraps(evaluate)
        def evaluate_counting(eval_data: Any, *args: Any, **keys: Any) -> Any:
            self.hits = ItemHits(n_items, k) if eval_data is self._test_data else None
            return evaluate(eval_data, *args, **keys)

        @functools.wraps(collect)
        def collect_counting(scores: Any, interaction: Any, users: Any, items: Any) -> None:
            if self.hits is not None:
                self.hits.add(scores, users, items)
            collect(scores, interaction, users, items)

        trainer.evaluate = evaluate_counting
        trainer.eval_collector.eval_batch_collect = collect_counting

    def _capture(
        self,
        topk_result: Callable[[str, Any], dict[str, float]],
        name: str,
        value: np.ndarray[Any, Any],
    ) -> dict[str, float]:
        result = topk_result(name, value)
        for key in result:  # such as ndcg@10: column 9
            self.values[key] = value[:, int(key.rpartition("@")[2]) - 1].astype(np.float64)
        return result

    def users(self) -> list[str]:
        """Raw token of each row of the test evaluation."""
        dataset = self._test_data._dataset
        rows = getattr(self._test_data, "uid_list", None)
        if rows is None:
            rows = dataset.inter_feat[dataset.uid_field]
        return [str(token) for token in dataset.id2token(dataset.uid_field, np.asarray(rows))]

    def per_user(self, test: dict[str, float], decimal_place: int) -> bytes:
        """An npz file: ``users``, and one array for each metric.

        Raises:
            GaCLLMError: If the mean over users is not the number that RecBole reported.
        """
        users = self.users()
        for name, values in self.values.items():
            if len(values) != len(users) or round(values.mean(), decimal_place) != test[name]:
                raise GaCLLMError(
                    f"{name}: {len(values)} users' values with mean {values.mean()} do not give "
                    f"RecBole's {test[name]} over {len(users)} users"
                )
        return npz({"users": np.asarray(users, dtype=str), **self.values})

    def by_degree(self) -> bytes:
        """An npz file: degrees of users and items, and how often each test item was found."""
        dataset = self._test_data._dataset
        items = [str(token) for token in dataset.field2id_token[dataset.iid_field][1:]]
        assert self.hits is not None
        return to_npz(self.degrees, self.users(), items, self.hits)


def _work(folder: Path) -> None:
    from recbole_gacllm import run as runner
    from recbole_gacllm.compare.plan import code_version

    job = json.loads((folder / "job.json").read_text("utf-8"))
    recorder = Recorder(job["expected"])
    keys = {**job["config_dict"], "checkpoint_dir": str(folder / "saved"), "show_progress": False}
    model = job["model"].partition(":")[0]  # a variant is named Model:key=value
    if job["nproc"] == 1:
        files = job["config_files"]
        record = runner.run(model, job["dataset"], files, keys, observer=recorder).record
    else:
        record = _run_distributed(model, job, keys, recorder)
    _require_the_same_inputs(record["config"], job["key"])
    content = recorder.per_user(record["test"], record["config"]["metric_decimal_place"])
    disk.write_atomic(folder / PER_USER_FILE, content)
    disk.write_atomic(folder / DEGREES_FILE, recorder.by_degree())
    record |= {
        "model": job["model"],
        "split": recorder.split,
        "statistics": recorder.statistics,
        "code": code_version(),
        "key": job["key"],
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    disk.write_atomic(folder / RUN_FILE, text.encode())


def _require_the_same_inputs(config: dict[str, Any], key: dict[str, Any]) -> None:
    """Refuse a result whose inputs, or the code, changed after the leaderboard was started."""
    from recbole_gacllm.compare import identity

    now = identity.of(config, hashing.sha256)
    changed = [part for part in ("data", "read", "code") if now.get(part) != key.get(part)]
    if changed:
        raise GaCLLMError(
            f"what this run reads has changed since the command was started ({', '.join(changed)}: "
            f"{[now.get(part) for part in changed]} now). Its result is not kept; start again."
        )


def _run_distributed(
    model: str, job: dict[str, Any], keys: dict[str, Any], recorder: Recorder
) -> dict[str, Any]:
    """Train with RecBole's DDP; test the best checkpoint in this process.

    DDP gives every process the same number of users and repeats some for it, so that its test
    metrics are not exact and no user's are known.
    """
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    from recbole_gacllm.run import run_distributed
    from recbole_gacllm.run_config import build_config

    config = build_config(model, job["dataset"], job["config_files"], dict(keys))
    init_seed(config["seed"], config["reproducibility"])
    train_data, valid_data, test_data = data_preparation(config, create_dataset(config))
    recorder.on_split(train_data, valid_data, test_data)
    run_file = run_distributed(model, job["dataset"], job["config_files"], job["nproc"], keys)
    record: dict[str, Any] = json.loads(run_file.read_text("utf-8"))
    recommender = get_model(model)(config, train_data._dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, recommender)
    recorder.on_trainer(trainer)
    trainer.eval_collector.data_collect(train_data)  # what some metrics count; RecBole: in fit
    result = trainer.evaluate(test_data, model_file=record["checkpoint"])
    return record | {"test": dict(result)}


def main(folder: Path) -> None:
    """Make the run of one folder; all output goes to its log."""
    children.die_with_parent()
    with open(folder / LOG_FILE, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    console.prepare()
    with children.reporting_errors(folder):
        try:
            _work(folder)
        except (ValueError, GaCLLMError):
            traceback.print_exc()  # the parent tells the text only; RecBole raises ValueError too
            raise


if __name__ == "__main__":
    main(Path(sys.argv[2]).resolve())
