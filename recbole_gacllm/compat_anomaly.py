"""The repair of RecBole's switch of anomaly detection; ``compat.py`` says when it acts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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
