"""The repairs of RecBole's evaluation; ``compat.py`` says when they act."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def plain_metrics(evaluator: ModuleType) -> None:
    """Make metrics Python floats, so that a result reads ``0.1234``, not ``np.float64(0.1234)``.

    Cause: NumPy 2 shows the type of its scalars; RecBole logs results by their ``repr``.
    Upstream: none reported. End: a RecBole release that runs on NumPy 2.
    """
    evaluate = evaluator.Evaluator.evaluate

    @functools.wraps(evaluate)
    def evaluate_plainly(self: Any, dataobject: Any) -> Any:
        result = evaluate(self, dataobject)
        for metric, value in result.items():
            result[metric] = float(value)
        return result

    evaluator.Evaluator.evaluate = evaluate_plainly


def counts_beside_tensors(collector: ModuleType) -> None:
    """Let ItemCoverage, GiniIndex, AveragePopularity and TailPercentage be evaluated.

    Cause: they need numbers of the training data, an ``int`` or a ``Counter``, and
    ``Collector.get_data_struct`` of RecBole 1.2.1 calls ``.cpu()`` on all that was collected: every
    run with one of them ends after its first epoch with ``'int' object has no attribute 'cpu'``.
    Here the numbers stand aside while RecBole's method moves the tensors.
    Upstream: issues 2131, 2194. End: a RecBole release that closes them.
    """
    get = collector.Collector.get_data_struct

    @functools.wraps(get)
    def get_data_struct(self: Any) -> Any:
        collected = self.data_struct._data_dict
        counts = {key: value for key, value in collected.items() if not hasattr(value, "cpu")}
        for key in counts:
            del collected[key]
        struct = get(self)
        collected.update(counts)
        struct._data_dict.update(counts)
        return struct

    collector.Collector.get_data_struct = get_data_struct


def validation_of_one_epoch(trainer: ModuleType) -> None:
    """Validate, and so save, models without training under ``eval_step: 2`` or more.

    Cause: ``Trainer.__init__`` bounds ``eval_step`` by ``epochs``, then ``TraditionalTrainer`` sets
    ``epochs`` to 1: EASE, ItemKNN, Pop, Random and the like are never validated, no checkpoint is
    saved, and the test ends with ``FileNotFoundError``.
    Upstream: none reported. End: a RecBole release that bounds it afterwards.
    """
    init = trainer.TraditionalTrainer.__init__

    @functools.wraps(init)
    def init_and_bound(self: Any, config: Any, model: Any) -> None:
        init(self, config, model)
        self.eval_step = min(self.eval_step, self.epochs)

    trainer.TraditionalTrainer.__init__ = init_and_bound


@contextmanager
def anomaly_mode_kept() -> Iterator[None]:
    """Leave autograd's anomaly detection as it was before ``SINE`` is imported.

    Cause: the module says ``torch.autograd.set_detect_anomaly(True)`` at its head, a leftover of
    debugging, and RecBole imports it with every sequential model: from then on each backward pass
    of the process checks all gradients for NaN and records a traceback an operation, which doubles
    the time of an epoch of GaCLLM. No result changes.
    Upstream: none reported. End: a RecBole release without that line.
    """
    import torch

    before, check_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(before, check_nan)
