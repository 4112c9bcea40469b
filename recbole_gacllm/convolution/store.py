"""The description store: what the LLM wrote, addressed by the content that made it.

One SQLite file, one row per key (SHA-256 of rendered prompt, model, adapter, sampling parameters
and template version; the caller makes it). Several processes may read and write it at once. A row
is never changed; one that the disk damaged is found by its checksum and never returned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Self

from filelock import FileLock

from recbole_gacllm.artifacts.disk import sync_folder
from recbole_gacllm.errors import StoreError

logger = logging.getLogger(__name__)

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE descriptions (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    text TEXT NOT NULL,
    status TEXT NOT NULL,
    reason TEXT NOT NULL,
    finish_reason TEXT NOT NULL,
    n_prompt_tokens INTEGER NOT NULL,
    n_cached_tokens INTEGER NOT NULL,
    n_output_tokens INTEGER NOT NULL,
    n_attempts INTEGER NOT NULL,
    created TEXT NOT NULL,
    checksum TEXT NOT NULL
)
"""
_KEYS_A_QUERY = 500  # below every SQLite's limit on variables
_BUSY_SECONDS = 120.0
_SALVAGED = ".salvaged"
_MIN_ROW_BYTES = 128  # a row holds two 64-character hashes: bounds the ids a damaged file can have
_SQLITE_CORRUPT, _SQLITE_NOTADB, _SQLITE_FULL = 11, 26, 13


@dataclass(frozen=True)
class Record:
    """One finished description, good or failed; tokens are of the attempt that counts."""

    key: str  # 64 hexadecimal digits, the hash of everything that made the text
    text: str  # of a failed one, what the last attempt gave, for inspection
    status: Literal["ok", "failed"]
    reason: str  # empty, truncated, echo, loop, or malformed where an answer was none; "" if ok
    finish_reason: str  # the engine's, of the last attempt: stop or length
    n_prompt_tokens: int
    n_cached_tokens: int  # of those, from the engine's prefix cache
    n_output_tokens: int
    n_attempts: int  # 1, or 2 after a retry
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


_NAMES = tuple(f.name for f in fields(Record))
_COLUMNS = ", ".join(_NAMES)
_values: Callable[[Record], tuple[Any, ...]] = attrgetter(*_NAMES)
_SELECT = f"SELECT id, {_COLUMNS}, checksum FROM descriptions"
_INSERT = (
    f"INSERT INTO descriptions ({_COLUMNS}, checksum) VALUES ({'?, ' * len(_NAMES)}?) "
    "ON CONFLICT (key) DO NOTHING"
)


class DescriptionStore:
    """An open store; a context manager.

    Args:
        path: The SQLite file, made if absent; its folder must exist.

    Raises:
        StoreError: If the file cannot be opened, is of another schema version, or is damaged. A
            damaged file is moved aside and its readable rows are saved in a new store before the
            error is raised, so that the next start goes on with them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._damage: StoreError | None = None
        with self._explained(), FileLock(f"{path}.lock"):
            salvaged = path.with_name(path.name + _SALVAGED)
            if not path.exists() and salvaged.exists():  # killed between the renames of salvage()
                salvaged.rename(path)
            self._db = _open(path)
            self._inode = path.stat().st_ino

    def get_many(self, keys: Sequence[str]) -> dict[str, Record]:
        """The records of those keys that have one. A damaged row is logged, deleted, and absent."""
        records: dict[str, Record] = {}
        damaged: list[tuple[int, str]] = []
        with self._explained():
            for start in range(0, len(keys), _KEYS_A_QUERY):
                chunk = keys[start : start + _KEYS_A_QUERY]
                marks = ", ".join("?" * len(chunk))
                for row in self._db.execute(f"{_SELECT} WHERE key IN ({marks})", chunk):
                    record = _checked(row[1:])
                    if record is not None:
                        records[record.key] = record
                        continue
                    damaged.append((row[0], row[-1]))
                    logger.warning("%s: damaged description %s is deleted", self.path, row[1])
            if damaged:
                with self._transaction():
                    self._db.executemany(
                        "DELETE FROM descriptions WHERE id = ? AND checksum = ?", damaged
                    )
        return records

    def put_many(self, records: Iterable[Record]) -> None:
        """Add records in one transaction; on return they are durable. A key that is there stays.

        Raises:
            StoreError: If the file cannot be written; then none of them is stored.
        """
        rows = [(*_values(record), _checksum(record)) for record in records]
        with self._explained(), self._transaction():
            self._db.executemany(_INSERT, rows)

    def __len__(self) -> int:
        with self._explained():
            return int(self._db.execute("SELECT count(*) FROM descriptions").fetchone()[0])

    def close(self) -> None:
        """Close the file; a closed store is not used again."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._db:  # commits, or rolls back on an error
            self._db.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into ours; on a damaged file, save what is readable first."""
        if self._damage is not None:
            raise self._damage  # closed since; a caller's last write must not tell another story
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be opened: {error}. Set artifact_dir to a folder that this "
                "user may write."
            ) from error
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (_SQLITE_CORRUPT, _SQLITE_NOTADB):
                raise self._salvaged(error) from error
            cure = (
                "The disk is full: free space and start again."
                if code == _SQLITE_FULL
                else "Check that this user may write the file and its folder and that no other "
                "program holds it, or set artifact_dir to another folder; then start again."
            )
            raise StoreError(
                f"{self.path} cannot be read or written: {error}. {cure} "
                "What was finished before is kept."
            ) from error

    def _salvaged(self, error: sqlite3.DatabaseError) -> StoreError:
        if hasattr(self, "_db"):
            self._db.close()
        with FileLock(f"{self.path}.lock"):
            if hasattr(self, "_inode") and self.path.stat().st_ino != self._inode:
                done = "another process has saved what was readable"
            else:
                done = salvage(self.path)
        self._damage = StoreError(
            f"{self.path} was damaged ({error}): {done}. Start again: what is lost is made again."
        )
        return self._damage


def salvage(path: Path) -> str:
    """Move a damaged store aside and put a new one with every intact row in its place.

    Rows are looked up one by one, so that a damaged page costs its own rows only. The new file is
    complete before the damaged one moves. The caller holds the file lock.

    Returns:
        What was done, with the counts; it is logged, too.
    """
    new_path = path.with_name(path.name + _SALVAGED)
    new_path.unlink(missing_ok=True)
    old = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    old.text_factory = _decode
    n_lost: int | str = "an unknown number"
    with suppress(sqlite3.DatabaseError):
        n_lost = int(old.execute("SELECT count(*) FROM descriptions").fetchone()[0])
    # Not max(id): a damaged file can hold any.
    parts = (path, Path(f"{path}-wal"))
    last_id = sum(part.stat().st_size for part in parts if part.exists()) // _MIN_ROW_BYTES
    saved: list[Record] = []
    for row_id in range(1, last_id + 1):
        try:
            row = old.execute(f"{_SELECT} WHERE id = ?", (row_id,)).fetchone()
        except sqlite3.DatabaseError:
            continue  # on a damaged page: one of the lost rows counted below
        if row is not None and (record := _checked(row[1:])) is not None:
            saved.append(record)

    new = _open(new_path)
    with new:
        new.execute("BEGIN IMMEDIATE")
        new.executemany(_INSERT, [(*_values(record), _checksum(record)) for record in saved])
    new.close()
    old.close()
    n = 1
    while (aside := path.with_name(f"{path.name}.damaged-{n}")).exists():
        n += 1
    for suffix in ("-wal", "-shm", ""):
        if (part := Path(f"{path}{suffix}")).exists():
            part.rename(f"{aside}{suffix}")
    new_path.rename(path)
    sync_folder(path.parent)

    n_lost = n_lost - len(saved) if isinstance(n_lost, int) else n_lost
    done = f"{len(saved)} intact descriptions saved in a new store, {n_lost} lost, {aside} kept"
    logger.error("%s was damaged: %s", path, done)
    return done


def _open(path: Path) -> sqlite3.Connection:
    """Open or make the file; the caller holds its file lock, so that one process makes it."""
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    try:
        db.text_factory = _decode
        version = db.execute("PRAGMA user_version").fetchone()[0]
        n_tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version == 0 and n_tables == 0:
            db.execute("PRAGMA journal_mode = WAL")
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.execute(_SCHEMA)
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            sync_folder(path.parent)
        elif version != _SCHEMA_VERSION:
            raise StoreError(
                f"{path} has schema version {version}; this release reads {_SCHEMA_VERSION}. Use "
                "the release of recbole_gacllm that wrote it, or move the file away: the "
                "descriptions are then made again."
            )
        db.execute("PRAGMA synchronous = FULL")
    except BaseException:
        db.close()
        raise
    return db


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")  # a damaged text fails its checksum, not the reader


def _checksum(record: Record) -> str:
    return hashlib.sha256(json.dumps(_values(record)).encode("ascii")).hexdigest()


def _checked(row: Sequence[Any]) -> Record | None:
    """The record of a row of all columns and its checksum, or None if they do not agree."""
    record = Record(*row[:-1])
    try:
        return record if _checksum(record) == row[-1] else None
    except TypeError:  # a column damaged into a blob
        return None
