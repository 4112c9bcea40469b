"""What each layer of a stage has cost so far, over all processes that worked on it.

A table beside the descriptions in the store's file. A row is written in the transaction of the
descriptions that it counts, so a kill at any moment leaves counts of exactly what is stored.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS costs (
    stage TEXT NOT NULL,
    layer INTEGER NOT NULL,
    n_generated INTEGER NOT NULL,
    n_prompt_tokens INTEGER NOT NULL,
    n_cached_tokens INTEGER NOT NULL,
    n_output_tokens INTEGER NOT NULL,
    seconds REAL NOT NULL,
    PRIMARY KEY (stage, layer)
)
"""


@dataclass(frozen=True)
class Cost:
    """What a layer has cost until a durable write.

    Attributes:
        n_generated: Descriptions that its processes stored, failed ones too.
        n_prompt_tokens, n_cached_tokens, n_output_tokens: Of all answers until then, of those that
            were no description and were asked for again, too.
        seconds: Wall time of its processes.
    """

    n_generated: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_output_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class LayerCost:
    """A row: the cost of layer ``number`` of a stage, see :func:`stage_name`."""

    stage: str
    number: int
    cost: Cost


def stage_name(folder: Path) -> str:
    """The name of a stage folder here; it stays when the artefacts are moved together."""
    return f"{folder.parent.name}/{folder.name}"


def read(db: sqlite3.Connection, stage: str, number: int) -> Cost:
    """The cost of a layer until the last durable write; of one that was never begun, zero."""
    names = ", ".join(Cost.__dataclass_fields__)
    query = f"SELECT {names} FROM costs WHERE stage = ? AND layer = ?"
    row = db.execute(query, (stage, number)).fetchone()
    return Cost(*row) if row else Cost()


def read_only(store: Path, stage: str, numbers: range) -> list[Cost]:
    """The costs of layers from a store's file, which is neither made, repaired nor written.

    A store that cannot be read, or of an earlier release, has none.
    """
    # The index of the log (-shm) is there while a run goes on, and after a kill: with it the last
    # writes are seen. Without it SQLite would make one.
    mode = "readonly_shm=1" if Path(f"{store}-shm").exists() else "immutable=1"
    try:
        uri = f"{store.resolve().as_uri()}?mode=ro&{mode}"
        with closing(sqlite3.connect(uri, uri=True)) as db:
            return [read(db, stage, number) for number in numbers]
    except (sqlite3.Error, TypeError):  # of SQLite, or a row of other types
        return [Cost()] * len(numbers)


def write(db: sqlite3.Connection, row: LayerCost) -> None:
    """Replace a layer's cost, within the caller's transaction."""
    values = (row.stage, row.number, *astuple(row.cost))
    db.execute(f"INSERT OR REPLACE INTO costs VALUES ({', '.join('?' * len(values))})", values)


def copy(damaged: sqlite3.Connection, new: sqlite3.Connection) -> None:
    """Save the costs of a damaged store, if they can be read."""
    try:
        rows = damaged.execute("SELECT * FROM costs").fetchall()
    except sqlite3.DatabaseError:
        return
    for stage, number, *values in rows:
        write(new, LayerCost(stage, number, Cost(*values)))
