"""Files that are whole or not there, and a disk that fails in words."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recbole_gacllm.errors import GaCLLMError

# How safetensors (the first two) and torch.save tell a full disk.
_DISK_TEXTS = (
    *(os.strerror(errno.ENOSPC), "unexpected pos", "PytorchStreamWriter failed", "iostream error"),
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of ``path``, durably, when all is written.

    At any moment ``path`` holds the old content or all of the new one.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` through :func:`atomic_path`.

    Raises:
        GaCLLMError: If the file cannot be written (full disk, lost folder, permissions).
    """
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; it takes the place of ``folder`` when all is written."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


@contextmanager
def explaining_disk_errors(path: Path) -> Iterator[None]:
    """Tell a full, read-only or failing disk by the path that was written and the next step.

    Raises:
        GaCLLMError: For an error of the disk. safetensors and PyTorch raise their own classes,
            which are known by their text. Any other error passes.
    """
    try:
        yield
    except Exception as error:
        of_disk = isinstance(error, OSError) and error.errno in _DISK_ERRORS
        if of_disk or any(text in str(error) for text in _DISK_TEXTS):
            raise cannot_write(path, error) from error
        raise


def cannot_write(path: Path, error: Exception) -> GaCLLMError:
    """The error to raise: the path, the reason, the next step."""
    return GaCLLMError(
        f"cannot write {path}: {error}. Free space or rights there, or choose another folder "
        "(artifact_dir, checkpoint_dir, --output), and start again: what was finished is kept."
    )


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
