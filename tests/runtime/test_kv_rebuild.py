"""The index is lost or damaged: it is made again from the segments, and nothing acknowledged is lost."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import re
import sqlite3
import time

import pytest
from kv_support import (
    STORY,
    FaultIo,
    assert_hit,
    assert_miss,
    block_payload,
    disk_bytes,
    job,
    look_up,
    open_store,
    prompt,
    put,
    put_tail,
    tail_payload,
)

from appliance.errors import StoreError
from runtime.kv import tenants
from runtime.kv.footer import read_footer
from runtime.kv.index import Index
from runtime.kv.index_file import INDEX_NAME
from runtime.kv.keys import derive_master
from runtime.kv.record import ALIGN_BYTES, HEADER_BYTES
from runtime.kv.segment import Io
from runtime.kv.store import Note


def _told(directory, io=None):
    """The story of ``kv_support`` and a tail, over several segments; what the index said at the end."""
    store = open_store(directory, io=io)
    for chat, tokens in STORY:
        assert put(store, chat, tokens).stored
    assert put_tail(store, 1, 1100).stored
    assert put(store, 8, 256).stored
    rows = _rows(store)
    store.close()
    return rows


def _rows(store):
    rows = store._ground.index.connection.execute(
        "SELECT chain, kind, role, end_token, segment, offset, size_bytes, epoch, created_s FROM record ORDER BY 1, 2"
    )
    return rows.fetchall(), store._ground.index.segments()


def _check(store, tail=True):
    for chat, tokens in (*STORY, (8, 256)):
        assert_hit(store, chat, tokens)
    if tail:
        hit, _ = look_up(store, prompt(1, 1101), tails=True)
        assert (hit.tokens, hit.tail) == (1100, tail_payload(1, 1100))
    assert store.status().used_bytes == disk_bytes(store._ground.directory)


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "header", "middle"])
def test_nothing_acknowledged_is_lost(tmp_path, damage, caplog):
    directory = tmp_path / "kv"
    before = _told(directory)
    index = directory / INDEX_NAME
    raw = index.read_bytes()
    for suffix in ("-wal", "-shm"):
        index.with_name(index.name + suffix).unlink(missing_ok=True)
    content = {"empty": b"", "garbage": b"not a database at all" * 500, "header": b"SQLite format 3\0" + b"\xff" * 5000,
               "middle": raw[:8192] + b"\xff" * 4096 + raw[12288:]}  # fmt: skip
    if damage == "missing":
        index.unlink()
    else:
        index.write_bytes(content[damage])
    store = open_store(directory)
    _check(store)
    rows, segments = _rows(store)
    assert rows == before[0]
    assert [dataclasses.replace(s, created_s=0) for s in segments] == [
        dataclasses.replace(s, created_s=0) for s in before[1]]  # fmt: skip
    assert (directory / f"{INDEX_NAME}.damaged").exists()
    assert any("made again" in record.message for record in caplog.records)
    assert put(store, 9, 512).stored
    store.close()
    store = open_store(directory)
    _check(store)
    assert_hit(store, 9, 512)
    store.close()


def test_records_whose_segment_has_no_good_end_are_found_by_walking(tmp_path):
    directory = tmp_path / "kv"
    _told(directory)
    (directory / INDEX_NAME).unlink()
    sealed = [f for f in sorted(directory.glob("*.kvs")) if f.read_bytes()[-ALIGN_BYTES:][:4] == b"SKVT"]
    assert len(sealed) > 3
    os.truncate(sealed[0], sealed[0].stat().st_size - ALIGN_BYTES)  # the trailer is gone
    for file, at in ((sealed[1], -ALIGN_BYTES + 8), (sealed[2], -2 * ALIGN_BYTES + HEADER_BYTES)):
        raw = bytearray(file.read_bytes())
        raw[at] ^= 1  # the trailer points elsewhere; the footer does not open
        file.write_bytes(raw)
    cipher = derive_master(bytes(range(32))).store
    assert all(read_footer(int(f.stem), f, Io(), cipher) is None for f in sealed[:3])
    assert read_footer(int(sealed[3].stem), sealed[3], Io(), cipher)
    store = open_store(directory)
    _check(store)
    store.close()


def test_a_damaged_header_costs_one_record(tmp_path):
    directory = tmp_path / "kv"
    store = open_store(directory, segment_bytes=1 << 20)
    for chat in range(3):
        assert put(store, chat, 256).stored
    store.close()
    (directory / INDEX_NAME).unlink()
    raw = bytearray((directory / "0000.kvs").read_bytes())
    raw[88] ^= 1  # how long the first record is
    (directory / "0000.kvs").write_bytes(raw)
    store = open_store(directory, segment_bytes=1 << 20)
    assert look_up(store, prompt(0, 300))[0].tokens == 0
    for chat in (1, 2):
        assert_hit(store, chat, 256)
    store.close()


def test_what_was_never_acknowledged_and_is_torn_is_dropped(tmp_path):
    directory = tmp_path / "kv"
    store = open_store(directory, segment_bytes=1 << 20)
    assert put(store, 0, 512).stored
    store.close()
    size = disk_bytes(directory)
    whole = (directory / "0000.kvs").read_bytes()
    (directory / "0000.kvs").write_bytes(whole + whole[:ALIGN_BYTES] + bytes(7 * ALIGN_BYTES))  # a header, torn data
    (directory / INDEX_NAME).unlink()
    store = open_store(directory, segment_bytes=1 << 20)
    assert_hit(store, 0, 512)
    assert store.status().used_bytes == disk_bytes(directory) == size
    store.close()


def test_an_index_that_breaks_while_serving_is_made_again(tmp_path):
    directory = tmp_path / "kv"
    _told(directory)
    store = open_store(directory)
    _check(store)
    raw = bytearray((directory / INDEX_NAME).read_bytes())
    raw[4096:] = b"\xff" * (len(raw) - 4096)
    (directory / INDEX_NAME).write_bytes(raw)
    store._ground.index.connection.execute("PRAGMA cache_size = 1")
    _check(store)
    assert put(store, 9, 512).stored
    assert_hit(store, 9, 512)
    store.close()
    store = open_store(directory)
    _check(store)
    store.close()


def test_an_index_that_breaks_under_a_put_is_made_again(tmp_path):
    directory = tmp_path / "kv"
    _told(directory)
    store = open_store(directory)
    raw = bytearray((directory / INDEX_NAME).read_bytes())
    raw[4096:] = b"\xff" * (len(raw) - 4096)
    (directory / INDEX_NAME).write_bytes(raw)
    result = store.put(dataclasses.replace(job(9, 512), note=Note(1.0, 512, 0, 0, "no-unit")))
    assert result.stored, result.reason
    assert_hit(store, 9, 512)
    _check(store)
    store.close()


def _break(directory):
    raw = bytearray((directory / INDEX_NAME).read_bytes())
    raw[4096:] = b"\xff" * (len(raw) - 4096)
    (directory / INDEX_NAME).write_bytes(raw)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("first", ["put", "lookup"])
@pytest.mark.parametrize("name", ["sync_directory", "commit"])
def test_an_index_that_breaks_on_a_disk_that_refuses_is_made_again_a_minute_later(tmp_path, name, first, code):
    now = [time.time()]
    directory = tmp_path / "kv"
    _told(directory)
    io = FaultIo(error=OSError(code, os.strerror(code)), only=name)
    store = open_store(directory, io=io, clock=lambda: now[0])
    _break(directory)
    store._ground.index.connection.execute("PRAGMA cache_size = 1")
    io.at = 0
    for _ in range(2):
        assert_miss(store, 1, 600, "corrupt")
        failed = put(store, 9, 512)
        assert re.match(rf"index: damaged, and .* made again \({errno.errorcode[code]}: ", failed.reason), failed.reason
        assert (store.status().blocks, store.status().writing) == (0, False)
        now[0] += 20
    io.at = 1 << 60
    assert_miss(store, 1, 600, "corrupt")  # the minute is not over
    assert not put(store, 9, 512).stored
    now[0] += 21
    if first == "put":
        assert put(store, 9, 512).stored
    _check(store)
    assert put(store, 9, 512).stored  # at once, however often it was refused meanwhile
    assert_hit(store, 9, 512)
    assert store.status().writing
    assert store.status().blocks > 0
    store.close()
    store = open_store(directory)
    _check(store)
    assert_hit(store, 9, 512)
    store.close()


def test_a_failed_disk_is_not_asked_for_another_index(tmp_path, caplog):
    now = [time.time()]
    _told(tmp_path / "kv")
    io = FaultIo(error=OSError(errno.EIO, os.strerror(errno.EIO)), only="pwrite")
    store = open_store(tmp_path / "kv", io=io, clock=lambda: now[0])
    io.at = 0
    assert put(store, 9, 512).reason.startswith("EIO")
    _break(tmp_path / "kv")
    store._ground.index.connection.execute("PRAGMA cache_size = 1")
    for _ in range(3):
        now[0] += 61
        assert put(store, 9, 512).reason.startswith("EIO")
        look_up(store, prompt(1, 600))
    assert not [record for record in caplog.records if "made again" in record.message]
    store.close()


@pytest.mark.parametrize("first", ["put", "lookup"])
def test_a_new_index_that_cannot_be_read_is_not_written_either(tmp_path, monkeypatch, first):
    now = [time.time()]
    _told(tmp_path / "kv")
    store = open_store(tmp_path / "kv", clock=lambda: now[0])
    _break(tmp_path / "kv")
    store._ground.index.connection.execute("PRAGMA cache_size = 1")
    real = Index.open

    def refusing(*args, **options):
        if options.get("read_only"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "open", refusing)
        assert_miss(store, 1, 600, "corrupt")
        assert not put(store, 9, 512).stored
        assert not store.status().writing
    now[0] += 61
    if first == "put":
        assert put(store, 9, 512).stored
    _check(store)
    store.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_key_that_cannot_be_read_now_costs_its_tenant_nothing(tmp_path, monkeypatch, code):
    """Without its key a tenant's records in the open segment cannot be found: they wait, and are not cut off."""
    store = open_store(tmp_path / "kv", segment_bytes=1 << 20)
    put(store, 0, 512)
    put(store, 0, 512, tenant="b")
    store.close()
    before = disk_bytes(tmp_path / "kv")
    (tmp_path / "kv" / INDEX_NAME).unlink()
    keys = list((tmp_path / "kv").rglob("*.key"))
    real = tenants._read

    def refusing(path):
        if path == keys[-1]:
            raise OSError(code, os.strerror(code), str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(tenants, "_read", refusing)
        with pytest.raises(StoreError, match=r"cannot be opened \(.*\.key"):
            open_store(tmp_path / "kv", segment_bytes=1 << 20)
    assert disk_bytes(tmp_path / "kv") == before
    store = open_store(tmp_path / "kv", segment_bytes=1 << 20)
    assert_hit(store, 0, 512)
    assert_hit(store, 0, 512, tenant="b")
    store.close()


@pytest.mark.parametrize("name", ["sync_directory", "commit", "preadv"])
def test_a_disk_that_fails_meanwhile_is_told_and_the_next_start_succeeds(tmp_path, name):
    directory = tmp_path / "kv"
    _told(directory)
    (directory / INDEX_NAME).write_bytes(b"garbage" * 1000)
    with pytest.raises(StoreError, match="the KV cache cannot be opened"):
        open_store(directory, io=FaultIo(0, OSError(errno.EIO, "bad sector"), only=name))
    store = open_store(directory)
    _check(store)
    store.close()


@pytest.mark.parametrize("change", ["end_bytes = end_bytes - 4096", "number = 90"])
def test_an_index_that_is_wrong_about_a_sealed_segment_cuts_nothing(tmp_path, change):
    _told(tmp_path)
    size_bytes = (tmp_path / "0000.kvs").stat().st_size
    with sqlite3.connect(tmp_path / INDEX_NAME) as db:
        assert db.execute(f"UPDATE segment SET {change} WHERE number = 0 AND sealed").rowcount == 1  # noqa: S608
    db.close()
    store = open_store(tmp_path)
    assert (tmp_path / "0000.kvs").stat().st_size == size_bytes
    _check(store)
    store.close()


def test_another_master_key_deletes_nothing(tmp_path):
    directory = tmp_path / "kv"
    _told(directory)
    (directory / INDEX_NAME).unlink()
    with pytest.raises(StoreError, match="nothing there opens with keys/kv-master; restore that key"):
        open_store(directory, master_key=bytes(32))
    store = open_store(directory)
    _check(store)
    store.close()
    store = open_store(directory, master_key=bytes(32))  # the index is there: misses, and nothing is removed
    assert_miss(store, 0, 300, "no-unit")
    assert put(store, 0, 256).stored
    store.close()
    store = open_store(directory)
    _check(store)
    store.close()


def test_a_record_written_twice_counts_once(tmp_path):
    """Damaged, written again, index lost: both are in the segments, the later one is listed."""
    directory = tmp_path / "kv"
    store = open_store(directory, segment_bytes=1 << 20)
    put(store, 0, 256)
    store.close()
    raw = bytearray((directory / "0000.kvs").read_bytes())
    raw[HEADER_BYTES] ^= 1
    (directory / "0000.kvs").write_bytes(raw)
    store = open_store(directory, segment_bytes=1 << 20)
    assert_miss(store, 0, 300, "corrupt")
    assert put(store, 0, 256).records == 1
    assert_hit(store, 0, 256)
    store.close()
    (directory / INDEX_NAME).unlink()
    store = open_store(directory, segment_bytes=1 << 20)
    assert_hit(store, 0, 256)
    assert look_up(store, prompt(0, 300))[1] == [block_payload(0, 0)]
    store.close()


def test_format_1_is_removed_and_said(tmp_path, caplog):
    directory = tmp_path / "kv"
    directory.mkdir(mode=0o700)
    (directory / "0000.kvs").write_bytes(b"SKVR\1\0" + bytes(8186))
    db = sqlite3.connect(directory / INDEX_NAME)
    db.execute("CREATE TABLE record (chain BLOB)")
    db.execute("PRAGMA user_version = 1")
    db.close()
    with caplog.at_level(logging.WARNING):
        store = open_store(directory)
    assert [r.message for r in caplog.records] == [
        f"{directory} has format 1, this Solocard writes 2: removed, the KV cache starts empty"]  # fmt: skip
    assert disk_bytes(directory) == 0
    assert put(store, 0, 256).stored
    store.close()


def test_a_newer_format_is_refused(tmp_path):
    _told(tmp_path / "kv")
    db = sqlite3.connect(tmp_path / "kv" / INDEX_NAME)
    db.execute("PRAGMA user_version = 3")
    db.close()
    with pytest.raises(StoreError, match="has format 3, this Solocard reads 2; update Solocard, or delete"):
        open_store(tmp_path / "kv")
    assert disk_bytes(tmp_path / "kv") > 0
