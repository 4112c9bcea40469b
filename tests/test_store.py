import hashlib
import os
import re
import signal
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_gacllm.convolution.store import DescriptionStore, Record
from recbole_gacllm.errors import StoreError

WRITER = """
import hashlib, sys
from pathlib import Path
from recbole_gacllm.convolution.store import DescriptionStore, Record

def record(n):
    key = hashlib.sha256(str(n).encode()).hexdigest()
    return Record(key, f"description {n} " * 20, "ok", "", "stop", 1, 0, 2, 1, "2026-01-01")

path, start, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with DescriptionStore(path) as store:
    for n in range(start, stop, 5):
        store.put_many([record(i) for i in range(n, n + 5)])
        print(n + 5, flush=True)  # acknowledged: everything below is durable
"""


def key_of(n):
    return hashlib.sha256(str(n).encode()).hexdigest()


def record_of(n, text=None):
    body = f"description {n} " * 20 if text is None else text
    return Record(key_of(n), body, "ok", "", "stop", 1, 0, 2, 1, "2026-01-01")


def start_writer(path, start, stop):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(start), str(stop)],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite"


def fill(path, n):
    with DescriptionStore(path) as store:
        store.put_many([record_of(i) for i in range(n)])


def test_records_come_back_as_they_were_put(path):
    failed = Record(key_of("f"), "", "failed", "echo", "length", 10, 4, 6, 2)
    with DescriptionStore(path) as store:
        store.put_many([record_of(1), failed])
    with DescriptionStore(path) as store:
        found = store.get_many([key_of(1), key_of("f"), key_of("absent")])
        assert len(store) == 2
    assert found == {key_of(1): record_of(1), key_of("f"): failed}


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(tmp_path_factory, text):
    with DescriptionStore(tmp_path_factory.mktemp("store") / "store.sqlite") as store:
        store.put_many([record_of(1, text)])
        assert store.get_many([key_of(1)])[key_of(1)].text == text


def test_more_keys_than_sqlite_allows_variables_are_read(path):
    n = 40_000
    with DescriptionStore(path) as store:
        store.put_many([record_of(i, "x") for i in range(n)])
        assert len(store.get_many([key_of(i) for i in range(n)])) == n


def test_a_finished_description_is_never_changed(path):
    with DescriptionStore(path) as store:
        store.put_many([record_of(1, "first")])
        store.put_many([record_of(1, "second"), record_of(2, "other")])
        found = store.get_many([key_of(1), key_of(2)])
    assert [found[key_of(n)].text for n in (1, 2)] == ["first", "other"]


@pytest.mark.parametrize("n_acknowledged", [5, 100, 400])
def test_what_a_killed_writer_had_acknowledged_is_all_there(path, n_acknowledged):
    writer = start_writer(path, 0, 1_000_000)
    assert writer.stdout is not None
    acknowledged = 0
    while acknowledged < n_acknowledged:
        acknowledged = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    acknowledged = max([acknowledged, *map(int, re.findall(r"\d+\n", writer.stdout.read()))])
    assert writer.wait() == -signal.SIGKILL
    with DescriptionStore(path) as store:
        found = store.get_many([key_of(n) for n in range(acknowledged + 5)])
        assert len(found) == len(store) >= acknowledged
    assert all(found[key_of(n)] == record_of(n) for n in range(acknowledged))
    assert len(found) % 5 == 0, "a transaction is there as a whole or not at all"


def test_what_is_acknowledged_survives_a_loss_of_power(path):
    """SQLite waits for the disk at each commit; no test here can pull the plug."""
    for _ in ("made", "opened again"):
        with DescriptionStore(path) as store:
            assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
            assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_two_processes_create_and_write_one_store_at_once(path):
    writers = [start_writer(path, start, start + 500) for start in (0, 400)]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    with DescriptionStore(path) as store:
        found = store.get_many([key_of(n) for n in range(900)])
    assert found == {key_of(n): record_of(n) for n in range(900)}


def test_a_damaged_row_is_reported_deleted_and_can_be_made_again(path, caplog):
    fill(path, 3)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE descriptions SET text = text || '!' WHERE key = ?", (key_of(1),))
        db.execute("UPDATE descriptions SET text = CAST(X'FF' AS TEXT) WHERE key = ?", (key_of(2),))
    db.close()
    keys = [key_of(n) for n in range(3)]
    with DescriptionStore(path) as store:
        assert store.get_many(keys) == {key_of(0): record_of(0)}
        assert key_of(1) in caplog.text
        assert key_of(2) in caplog.text
        assert len(store) == 1
        store.put_many([record_of(1)])
        assert store.get_many(keys)[key_of(1)] == record_of(1)


def damage_page_of(path, text):
    content = bytearray(path.read_bytes())
    size = 4096
    page = content.index(text.encode()) // size
    content[page * size : (page + 1) * size] = b"\x5a" * size
    path.write_bytes(content)


@pytest.mark.parametrize("damaged", [250, 499], ids=["in the middle", "the last"])
def test_a_damaged_page_costs_its_own_rows_only(path, caplog, damaged):
    fill(path, 500)
    damage_page_of(path, f"description {damaged} ")
    keys = [key_of(n) for n in range(500)]
    with (
        pytest.raises(StoreError, match=r"store\.sqlite was damaged .* Start again"),
        DescriptionStore(path) as store,
    ):
        store.get_many(keys)
    assert "store.sqlite.damaged-1" in caplog.text
    assert (path.parent / "store.sqlite.damaged-1").exists()
    with DescriptionStore(path) as store:
        found = store.get_many(keys)
        assert f"{len(store)} intact descriptions saved" in caplog.text
    assert 480 <= len(found) < 500
    assert key_of(damaged) not in found
    assert all(record == record_of(keys.index(key)) for key, record in found.items())


@pytest.mark.parametrize("junk", [bytes([0x01]), b"\xf3\x11\xc8\x07" * 4, b"\xff" * 64])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_a_damaged_head_of_the_last_row_does_not_hide_the_others(path, junk, offset):
    fill(path, 200)
    content = bytearray(path.read_bytes())
    # Before the key: how long the row is, its id, the types of its columns.
    head = content.index((key_of(199) + "description 199 ").encode()) - 18 + offset
    content[head : head + len(junk)] = junk
    path.write_bytes(content)
    keys = [key_of(n) for n in range(200)]
    try:
        with DescriptionStore(path) as store:
            found = store.get_many(keys)
    except StoreError:
        with DescriptionStore(path) as store:
            found = store.get_many(keys)
    assert len(found) >= 198
    assert all(record == record_of(keys.index(key)) for key, record in found.items())


def test_a_file_that_is_no_database_is_kept_aside(path):
    for n in (1, 2):
        path.write_bytes(b"no database at all, " * 500)
        with pytest.raises(StoreError, match=rf"{re.escape(str(path))}.*damaged-{n}"):
            DescriptionStore(path)
        assert path.with_name(f"store.sqlite.damaged-{n}").read_bytes().startswith(b"no database")
        with DescriptionStore(path) as store:
            assert len(store) == 0


def test_rows_still_in_the_log_of_a_killed_writer_are_salvaged(path):
    fill(path, 500)
    writer = start_writer(path, 500, 10_000)
    assert writer.stdout is not None
    for _ in range(20):
        writer.stdout.readline()
    writer.kill()
    writer.communicate()
    assert path.with_name("store.sqlite-wal").stat().st_size > 0
    damage_page_of(path, "description 250 ")
    with pytest.raises(StoreError, match="damaged"), DescriptionStore(path) as store:
        store.get_many([key_of(n) for n in range(500)])
    with DescriptionStore(path) as store:
        assert len(store.get_many([key_of(n) for n in range(500, 600)])) == 100


def test_a_kill_between_the_renames_of_a_salvage_loses_nothing(path):
    fill(path, 7)
    path.rename(path.with_name("store.sqlite.salvaged"))
    with DescriptionStore(path) as store:
        assert len(store) == 7


def test_a_second_process_does_not_salvage_what_the_first_has_salvaged(path):
    fill(path, 500)
    damage_page_of(path, "description 250 ")
    keys = [key_of(n) for n in range(500)]
    first, second = DescriptionStore(path), DescriptionStore(path)
    with pytest.raises(StoreError, match="intact descriptions saved"):
        first.get_many(keys)
    with pytest.raises(StoreError, match="another process has saved"):
        second.get_many(keys)
    assert not path.with_name("store.sqlite.damaged-2").exists()


def test_another_schema_version_is_refused_with_the_next_step(path):
    fill(path, 1)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match=r"version 99; this release reads 1.*move the file away"):
        DescriptionStore(path)


def test_a_full_disk_is_named_and_loses_nothing_that_was_stored(path):
    with DescriptionStore(path) as store:
        store.put_many([record_of(0)])
        n_pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {n_pages + 2}")
        with pytest.raises(StoreError, match=rf"{re.escape(str(path))}.*disk is full"):
            store.put_many([record_of(n) for n in range(1, 200)])
        assert len(store) == 1
        store.put_many([record_of(1)])
        assert set(store.get_many([key_of(0), key_of(1)])) == {key_of(0), key_of(1)}


def test_a_folder_that_cannot_hold_the_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file.store\.sqlite.*artifact_dir"):
        DescriptionStore(tmp_path / "file" / "store.sqlite")


def test_a_store_that_turns_read_only_is_named(path):
    with DescriptionStore(path) as store:
        store._db.execute("PRAGMA query_only = ON")
        with pytest.raises(StoreError, match=rf"{re.escape(str(path))}.*readonly.*artifact_dir"):
            store.put_many([record_of(1)])


def test_finished_writes_leave_one_plain_file(path):
    fill(path, 3)
    assert sorted(os.listdir(path.parent)) == ["store.sqlite", "store.sqlite.lock"]
