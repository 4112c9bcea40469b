"""SHA-256 of files, remembered for large ones, and the cache folder where that is kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Final

from filelock import FileLock

from recbole_gacllm.artifacts import disk
from recbole_gacllm.errors import GaCLLMError

logger = logging.getLogger(__name__)

# Smaller files are hashed each time; remembering them would save nothing.
_REMEMBER_BYTES: Final = 1 << 20


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/recbole_gacllm``, by default ``~/.cache/recbole_gacllm``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "recbole_gacllm"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none or it was cut short."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def sha256(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_file(file: Path) -> str:
    """:func:`sha256`, remembered for large files that have not changed since.

    Size and modification time do not tell: ``cp -p``, ``touch -r`` and archives set the time. A
    change sets ``ctime``, which no program can choose, and another file in its place has another
    inode.
    """
    stat = file.stat()
    if stat.st_size < _REMEMBER_BYTES:
        return sha256(file)
    key = str(file.resolve())
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    memory = cache_dir() / "hashes.json"
    remembered = read_json(memory).get(key)
    if remembered and remembered[:-1] == stamp:
        return str(remembered[-1])
    value = sha256(file)
    # A file written a moment ago could change again within the clock's resolution.
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2_000_000_000:
        try:
            with FileLock(memory.with_suffix(".lock")):
                content = {**read_json(memory), key: [*stamp, value]}
                disk.write_atomic(memory, json.dumps(content, indent=1).encode())
        except (OSError, GaCLLMError) as error:  # nothing is lost but time
            logger.warning("The hash of %s cannot be remembered in %s: %s", file, memory, error)
    return value
