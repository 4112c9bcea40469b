"""How every stage writes its folder: fingerprint, lock, and a manifest that is written last.

A stage folder is complete when its ``manifest.json`` is there. A folder without one is half-written
and is resumed by the stage that owns it. A manifest records the SHA-256 of every output (``files``)
and the settings (``key``). Both are checked whenever the folder is used again, so that damage, an
edit by hand or a copied folder is found before anything is made from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recbole_gacllm.artifacts import disk
from recbole_gacllm.artifacts.hashing import hash_file, sha256
from recbole_gacllm.artifacts.locate import require_no_links
from recbole_gacllm.errors import GaCLLMError

logger = logging.getLogger(__name__)
MANIFEST_FILE = "manifest.json"
JOB_FILE = "job.json"


def fingerprint(obj: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a mapping: keys sorted, no blanks, ASCII, exact numbers.

    Lists and tuples are the same array; ``1``, ``1.0`` and ``True`` are three different values.

    Raises:
        TypeError, ValueError: If a value is not JSON (a path, a set; NaN).
    """
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a stage folder, or None if the stage has not finished there.

    Raises:
        GaCLLMError: If the file is there but is not a JSON object, or cannot be read.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged_manifest(path, str(error)) from error
    if not isinstance(manifest, dict):
        raise _damaged_manifest(path, f"a JSON object expected, {type(manifest).__name__} found")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Declare a stage folder complete; call it last.

    Raises:
        TypeError, ValueError: As :func:`fingerprint`.
        GaCLLMError: If it cannot be written.
    """
    text = json.dumps(manifest, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    disk.write_atomic(folder / MANIFEST_FILE, f"{text}\n".encode("utf-8", "backslashreplace"))


@contextmanager
def stage_lock(folder: Path) -> Iterator[None]:
    """Hold a stage folder, made if need be; others wait here. A killed holder's lock is free.

    Raises:
        ValueError: If the folder cannot be made or written.
        GaCLLMError: If it holds symbolic links, through which a stage would write elsewhere.
    """
    require_no_links(folder)
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that works on %s", folder)
            lock.acquire()
    except OSError as error:
        raise ValueError(
            f"artifact_dir: {folder} cannot be written ({error}). Set artifact_dir to a folder "
            "that this user may write."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _damaged_manifest(path: Path, reason: str) -> GaCLLMError:
    return GaCLLMError(
        f"{path} is damaged: {reason}. Delete this file and start again: the stage then checks and "
        "completes the folder."
    )


def digests(folder: Path, outputs: Sequence[str]) -> dict[str, str]:
    """SHA-256 of every output by its path in the folder; a folder stands for all files in it."""
    return {  # weights are large: their hashes are remembered
        file.relative_to(folder).as_posix(): (
            hash_file(file) if file.suffix == ".safetensors" else sha256(file)
        )
        for output in outputs
        for file in sorted(_files(folder / output))
    }


def finished(folder: Path, key: Mapping[str, Any], outputs: Sequence[str]) -> bool:
    """Whether a stage has finished here and its outputs are what it wrote; changes nothing.

    An output that is gone or changed is logged. A manifest without digests counts as not finished.
    The caller holds the lock.

    Raises:
        GaCLLMError: If the folder was made with other settings, or its manifest is damaged.
    """
    manifest = read_manifest(folder)
    for name in (JOB_FILE, MANIFEST_FILE):
        _require_own(folder / name, key)
    if manifest is None or not isinstance(manifest.get("files"), dict):
        return False
    wrong = _wrong(folder, manifest["files"], outputs)
    if wrong:
        logger.warning(
            "%s in %s: gone, or not what the stage wrote; made again",
            ", ".join(sorted(wrong)),
            folder,
        )
    return not wrong


def discard_damaged(folder: Path, outputs: Sequence[str]) -> None:
    """Remove what :func:`finished` found gone or changed, manifest first: it is made again now.

    Only what the stage itself makes is removed, whatever the manifest names. The caller holds the
    lock. A folder without a manifest is half-written, and all in it stays.
    """
    manifest = read_manifest(folder)
    if manifest is None or not isinstance(manifest.get("files"), dict):
        return
    wrong = _wrong(folder, manifest["files"], outputs)
    (folder / MANIFEST_FILE).unlink()
    for output in outputs:
        if any(file == output or file.startswith(f"{output}/") for file in wrong):
            if (folder / output).is_dir():
                shutil.rmtree(folder / output)
            else:
                (folder / output).unlink(missing_ok=True)


def _wrong(folder: Path, recorded: Mapping[str, Any], outputs: Sequence[str]) -> set[str]:
    """Outputs that are gone, changed, or not of the stage."""
    made = digests(folder, outputs)
    wrong = {file for file in {*made, *recorded} if made.get(file) != recorded.get(file)}
    return wrong | {output for output in outputs if not (folder / output).exists()}


def _files(output: Path) -> Iterator[Path]:
    if output.is_dir():
        yield from (file for file in output.rglob("*") if file.is_file())
    elif output.is_file():
        yield output


def _require_own(file: Path, key: Mapping[str, Any]) -> None:
    """Refuse a folder that was copied from another configuration, or edited."""
    try:
        of_file = json.loads(file.read_bytes()).get("key")
    except (FileNotFoundError, ValueError, AttributeError):
        return  # nothing there, or of an unfinished stage and written anew
    if not isinstance(of_file, dict) or fingerprint(of_file) == fingerprint(key):
        return
    wanted = json.loads(json.dumps(key))
    names = sorted(name for name in {*of_file, *wanted} if of_file.get(name) != wanted.get(name))
    differing = "; ".join(
        f"{name} is {_short(of_file.get(name))}, not {_short(wanted.get(name))}" for name in names
    )
    raise GaCLLMError(
        f"{file} is of another configuration ({differing}): the folder was copied, or the file "
        f"edited. Move {file.parent} away or delete it, and start again: it is then made anew."
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
