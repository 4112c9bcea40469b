"""Where a run writes: folders found writable before it starts, and a name that no other run has.

A run is named ``<data set>-<model>-<time>``; of those that start in the same second the later ones
are numbered (``…_15-19-14-2``). RecBole's log, TensorBoard folder and checkpoint take their time
from it, so that they are this run's alone, too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import recbole.trainer.trainer
import recbole.utils.logger
import torch.distributed
from filelock import FileLock

from recbole_gacllm.artifacts import disk
from recbole_gacllm.errors import GaCLLMError

RUN_FILE = "run.json"
_OF_RECBOLE = ("log", "log_tensorboard")  # under the working folder
_TAKE_THE_TIME = (recbole.utils.logger, recbole.trainer.trainer)


def require_writable(checkpoint_dir: str) -> Path:
    """The folder of all runs' records; it and RecBole's own can be written.

    Raises:
        ValueError: Names the folder that cannot.
    """
    runs = Path(checkpoint_dir).resolve() / "runs"
    for folder in (runs, *map(Path, _OF_RECBOLE)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            disk.write_atomic(folder / ".writable", b"")
            (folder / ".writable").unlink(missing_ok=True)
        except (OSError, GaCLLMError) as error:
            raise ValueError(
                f"checkpoint_dir: {checkpoint_dir!r} cannot be written ({error}). Give a folder "
                "that this user may write."
                if folder is runs
                else f"{folder.resolve()} cannot be written ({error}), and RecBole writes log/ and "
                "log_tensorboard/ into the working folder. Start in one that this user may write."
            ) from error
    return runs


@contextmanager
def claimed(runs: Path, dataset: str, model: str) -> Iterator[Path]:
    """The folder of this run, made for it; removed again if the run leaves nothing there.

    RecBole names checkpoints by the model, whatever the data set, and so are runs numbered.
    """
    begun = time.strftime("%b-%d-%Y_%H-%M-%S")  # as RecBole writes times
    with FileLock(runs / ".lock"):
        for number in itertools.count(1):
            name = f"{model}-{begun}" if number == 1 else f"{model}-{begun}-{number}"
            is_taken = (runs.parent / f"{name}.pth").exists() or any(runs.glob(f"*-{name}"))
            if not is_taken:
                break
        folder = runs / f"{dataset}-{name}"
        folder.mkdir()
    try:
        yield folder
    finally:
        with suppress(OSError):  # it holds the record
            folder.rmdir()


def time_of(folder: Path | None, dataset: str, model: str) -> str:
    """The time in the name of a run's folder; a DDP process without one takes the first one's."""
    names = [folder.name if folder else ""]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(names, src=0)
    return names[0].removeprefix(f"{dataset}-{model}-")


@contextmanager
def recbole_at(moment: str) -> Iterator[None]:
    """Let RecBole name its files by this time."""
    before = [module.get_local_time for module in _TAKE_THE_TIME]
    for module in _TAKE_THE_TIME:
        module.get_local_time = lambda: moment
    try:
        yield
    finally:
        for module, function in zip(_TAKE_THE_TIME, before, strict=True):
            module.get_local_time = function
