"""Whether a finished stage folder still holds what its stage wrote, and for the settings asked for.

A manifest records the SHA-256 of every output (``files``) and the settings (``key``). Both are
checked whenever the folder is used again, so that damage, an edit by hand or a copied folder is
found before anything is made from it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_gacllm.artifacts import JOB_FILE, MANIFEST_FILE, fingerprint, read_manifest
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.llm.embedded import sha256
from recbole_gacllm.llm.weights import hash_file

logger = logging.getLogger(__name__)


def digests(folder: Path, outputs: Sequence[str]) -> dict[str, str]:
    """SHA-256 of every output by its path in the folder; a folder stands for all files in it."""
    return {
        file.relative_to(folder).as_posix(): _digest(file)
        for output in outputs
        for file in sorted(_files(folder / output))
    }


def finished(folder: Path, key: Mapping[str, Any], outputs: Sequence[str]) -> bool:
    """Whether a stage has finished here and its outputs are what it wrote; changes nothing.

    An output that is gone or changed is logged. A manifest without digests, of an earlier release,
    counts as not finished.

    Args:
        folder: Of the stage; the caller holds its lock.
        key: The settings asked for.
        outputs: Names of files or folders that the stage makes.

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


def _digest(file: Path) -> str:
    """Weights are large: their hashes are remembered by path, size and time of change."""
    return hash_file(file) if file.suffix == ".safetensors" else sha256(file)


def _require_own(file: Path, key: Mapping[str, Any]) -> None:
    """Refuse a folder that was copied from another configuration, or edited."""
    try:
        found = json.loads(file.read_bytes()).get("key")
    except (FileNotFoundError, ValueError, AttributeError):
        return  # nothing there, or of an unfinished stage and written anew
    if not isinstance(found, dict) or fingerprint(found) == fingerprint(key):
        return
    wanted = json.loads(json.dumps(key))
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    differing = "; ".join(
        f"{name} is {_short(found.get(name))}, not {_short(wanted.get(name))}" for name in names
    )
    raise GaCLLMError(
        f"{file} is of another configuration ({differing}): the folder was copied, or the file "
        f"edited. Move {file.parent} away or delete it, and start again: it is then made anew."
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
