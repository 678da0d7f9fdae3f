"""A disk that is full or failing stops the writing, never the serving, and no nonce is used twice."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import time

import pytest
from kv_support import (
    FaultIo,
    assert_hit,
    assert_miss,
    block_payload,
    disk_bytes,
    job,
    open_store,
    prompt,
    put,
    tiny_layout,
)

from runtime.kv import tenants
from runtime.kv.record import record_bytes
from runtime.kv.store import Note, PutJob

BLOCK = record_bytes(tiny_layout().block_bytes)
CHECKPOINT = record_bytes(tiny_layout().checkpoint_bytes)


def test_one_byte_short_of_the_quota_writes_nothing(tmp_path):
    store = open_store(tmp_path / "kv", max_bytes=BLOCK + CHECKPOINT - 1)
    assert not put(store, 0, 256).stored
    assert disk_bytes(tmp_path / "kv") == 0
    store.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(("name", "at"), [
    ("pwrite", 0), ("pwrite", 1), ("pwrite", 2), ("fdatasync", 0), ("sync_directory", 0), ("commit", 0)])  # fmt: skip
def test_a_failing_call_leaves_nothing_half_visible(tmp_path, code, name, at):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512)
    before = store.status().used_bytes
    store.close()
    io = FaultIo(at, OSError(code, os.strerror(code)), only=name)
    store = open_store(tmp_path / "kv", io=io, segment_bytes=1)  # a new segment, so that its directory is synced
    result = put(store, 1, 512)
    assert (result.stored, result.reason) == (False, f"{errno.errorcode[code]}: {os.strerror(code)}")
    status = store.status()
    assert (status.writing, status.reason, status.used_bytes) == (False, result.reason, before)
    assert disk_bytes(tmp_path / "kv") == before
    calls = len(io.calls)
    assert put(store, 2, 256).reason == result.reason
    assert len(io.calls) == calls  # stopped: the disk is not asked again
    assert_hit(store, 0, 512)
    assert_miss(store, 1, 600, "no-unit")
    store.close()
    store = open_store(tmp_path / "kv")
    assert store.status().writing
    assert store.status().used_bytes == before == disk_bytes(tmp_path / "kv")
    assert put(store, 1, 512).stored
    assert_hit(store, 1, 512)
    assert_hit(store, 0, 512)
    store.close()


@pytest.mark.parametrize(("code", "again"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_a_full_disk_is_tried_again_after_a_minute(tmp_path, code, again):
    now = [1_000_000.0]
    open_store(tmp_path / "kv").close()
    io = FaultIo(1, OSError(code, os.strerror(code)), only="pwrite")  # the first is the tenant's file
    store = open_store(tmp_path / "kv", io=io, clock=lambda: now[0])
    refused = put(store, 0, 256)
    assert not refused.stored
    io.at = 1 << 60  # from now on the disk is well
    calls = len(io.calls)
    note = dataclasses.replace(job(0, 256), blocks={}, units=(), note=Note(1.0, 256, 0, 0, "no-unit"))
    assert store.put(note).stored  # nothing of it needs the disk, and it is left alone
    kept = store.put(dataclasses.replace(note, replays={"call:1": [1]}))
    assert (kept.stored, kept.reason) == (False, refused.reason)
    assert len(io.calls) == calls
    now[0] += 61
    assert put(store, 0, 256).stored == again
    assert store.status().writing == again
    store.close()


def test_a_full_index_stops_writing(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 256)
    store._ground.index.connection.execute("PRAGMA max_page_count = 1")  # SQLite's own SQLITE_FULL
    stored = 0
    while stored < 200 and put(store, 1 + stored, 256).stored:
        stored += 1
    assert store.status().reason == "index: database or disk is full"
    assert_hit(store, 0, 256)
    if stored:
        assert_hit(store, stored, 256)
    assert_miss(store, 1 + stored, 300, "no-unit")
    assert store.status().used_bytes == disk_bytes(tmp_path / "kv") == sum(
        row.end_bytes for row in store._ground.index.segments())
    store.close()


def test_the_kernels_own_refusal(tmp_path):
    """A file-size limit of the process: the kernel writes a part of a record, then refuses with EFBIG."""
    code = (
        "import resource, sys; from pathlib import Path; from kv_support import *\n"
        "store = open_store(Path(sys.argv[1]), segment_bytes=1 << 20)\n"
        "assert put(store, 0, 256).stored\n"
        "limit = store.status().used_bytes + 50_000\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "print(put(store, 1, 512).reason); assert_hit(store, 0, 256)\n"
        "print(disk_bytes(Path(sys.argv[1])) == store.status().used_bytes); store.close()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "kv")]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.stdout == "EFBIG: File too large\nTrue\n"
    assert ended.stderr == "KV cache stops writing: EFBIG: File too large\n"
    store = open_store(tmp_path / "kv")
    assert_hit(store, 0, 256)
    store.close()


class NonceIo(FaultIo):
    """Notes (tenant id, nonce) of everything that reaches the disk, whether it is accepted later or not."""

    written: list[bytes]

    def pwrite(self, fd, data, offset):
        if data[:4] == b"SKVR":  # records; tenants' files are written by the same call
            self.written.append(bytes(data[24:40] + data[96:108]))
        super().pwrite(fd, data, offset)


def test_no_nonce_comes_twice(tmp_path):
    """Places are written again after failures, restarts and cuts; the epoch in the nonce never is."""
    written = []
    for chat in range(8):
        io = NonceIo(1 if chat % 2 else 99, OSError(errno.ENOSPC, "full"), only="pwrite")
        io.written = written
        store = open_store(tmp_path / "kv", io=io)
        put(store, chat, 512)
        if not chat % 2:
            wrong = PutJob("default", prompt(50, 512), {0: block_payload(50, 0), 1: b""})
            assert store.put_all([job(60 + chat, 256), wrong])[0].stored
        put(store, 100 + chat, 256)
        store.close()
        if chat == 4:
            os.truncate(tmp_path / "kv" / "0000.kvs", BLOCK)
    assert len(written) == len(set(written)) > 20


@pytest.mark.parametrize("name", ["pwrite", "fdatasync", "commit"])
def test_no_nonce_comes_twice_where_a_full_disk_cut_a_group_off(tmp_path, name):
    """The same store goes on at the same places: what it had written there was under another epoch."""
    now = [1_000_000.0]
    io = NonceIo(error=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), only=name)
    io.written = []
    store = open_store(tmp_path / "kv", io=io, clock=lambda: now[0])
    put(store, 0, 512)
    for chat in range(1, 4):
        before = disk_bytes(tmp_path / "kv")
        io.at = len(io.calls) + (name == "pwrite")  # its second record is torn
        assert not put(store, chat, 256).stored
        io.at = 1 << 60
        assert disk_bytes(tmp_path / "kv") == before
        now[0] += 61
        assert put(store, 10 + chat, 256).stored
    assert_hit(store, 13, 256)
    assert len(io.written) == len(set(io.written)) > 10
    store.close()


@pytest.mark.parametrize(("code", "lost"), [(errno.EMFILE, False), (errno.ENOMEM, False), (errno.EIO, True)])
def test_want_of_files_or_memory_is_no_damage(tmp_path, code, lost):
    io = FaultIo(error=OSError(code, os.strerror(code)), only="preadv")
    store = open_store(tmp_path / "kv", io=io)
    put(store, 0, 512)
    io.at = 0
    assert_miss(store, 0, 600, "corrupt")
    io.at = 1 << 60
    for _ in range(2):  # and after a restart
        if lost:
            assert_miss(store, 0, 600, "corrupt")
        else:
            assert_hit(store, 0, 512)
        store.close()
        store = open_store(tmp_path / "kv")
    store.close()


def _no_files(now, tmp_path, only):
    io = FaultIo(error=OSError(errno.EMFILE, os.strerror(errno.EMFILE)), only=only)
    return io, open_store(tmp_path / "kv", io=io, max_bytes=2 << 20, segment_bytes=512 << 10, clock=lambda: now[0])


@pytest.mark.parametrize("only", ["pwrite", "sync_directory"])
def test_want_of_files_stops_the_writing_for_a_minute(tmp_path, only):
    now = [time.time()]
    io, store = _no_files(now, tmp_path, only)
    put(store, 0, 256)
    io.at = 0
    assert put(store, 1, 5120).reason.startswith("EMFILE")
    io.at = 1 << 60
    assert not put(store, 1, 5120).stored
    now[0] += 61
    assert put(store, 1, 5120).stored
    store.close()


def test_want_of_files_while_room_is_made_gives_nothing_up(tmp_path):
    """What cannot be read for a moment is not dropped with the segment it was to be moved out of."""
    now = [time.time()]
    io, store = _no_files(now, tmp_path, "preadv")
    for chat in range(50):
        put(store, chat, 256)
    assert store.status().reclaimed_bytes
    with store.pin("default", prompt(48, 257)):
        io.at = 0
        stored = [put(store, 100 + n, 256) for n in range(50)]
        io.at = 1 << 60
    assert any(result.reason.startswith("EMFILE") for result in stored)
    assert_hit(store, 48, 256)
    store.close()


def test_a_key_that_cannot_be_read_for_want_of_files_gives_nothing_up(tmp_path, monkeypatch):
    now = [time.time()]
    _, store = _no_files(now, tmp_path, "preadv")
    for chat in range(50):
        put(store, chat, 256)
    put(store, 0, 256, tenant="b")
    key, real = store._ground.tenants.path("b"), tenants._read

    def refusing(path):
        if path == key:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return real(path)

    with store.pin("b", prompt(0, 257)), monkeypatch.context() as patch:
        store._ground.tenants._known.pop(key)
        patch.setattr(tenants, "_read", refusing)
        stored = [put(store, 100 + n, 256) for n in range(50)]
    assert stored[0].stored  # in the open segment
    assert any(result.reason.startswith("EMFILE") for result in stored)
    assert_hit(store, 0, 256, tenant="b")
    store.close()


def test_a_clock_that_is_set_back_does_not_lengthen_the_minute(tmp_path):
    now = [1_000_000.0]
    io = FaultIo(error=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), only="pwrite")
    store = open_store(tmp_path / "kv", io=io, clock=lambda: now[0])
    put(store, 0, 256)
    io.at = 0
    assert not put(store, 1, 256).stored
    io.at = 1 << 60
    now[0] -= 86_400
    assert put(store, 1, 256).stored
    store.close()


def test_a_failed_disk_is_not_tried_again_because_it_is_full_too(tmp_path):
    now = [1_000_000.0]
    io = FaultIo(error=OSError(errno.EIO, os.strerror(errno.EIO)), only="pwrite")
    store = open_store(tmp_path / "kv", io=io, clock=lambda: now[0])
    put(store, 0, 256)
    io.at = 0
    failed = put(store, 1, 256)
    io.error, calls = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), len(io.calls)
    assert put(store, 1, 256, tenant="new") == failed  # its file would have been the first
    assert len(io.calls) == calls
    io.at = 1 << 60
    now[0] += 61
    assert put(store, 1, 256) == failed
    store.close()
