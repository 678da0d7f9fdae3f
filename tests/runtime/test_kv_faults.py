"""A disk that is full or failing stops the writing, never the serving, and no nonce is used twice."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from kv_support import (
    FaultIo,
    assert_hit,
    assert_miss,
    block_payload,
    disk_bytes,
    open_store,
    prompt,
    put,
    tiny_layout,
)

from runtime.kv.record import record_bytes

BLOCK = record_bytes(tiny_layout().block_bytes)
CHECKPOINT = record_bytes(tiny_layout().checkpoint_bytes)


def test_quota_stops_writing_and_serving_goes_on(tmp_path):
    room = 3 * BLOCK + 2 * CHECKPOINT  # chat 0 with one block, chat 1 with two, exactly
    store = open_store(tmp_path / "kv", max_bytes=room)
    assert put(store, 0, 256).stored
    assert put(store, 1, 512).stored
    assert store.status().writing
    assert store.status().used_bytes == room == disk_bytes(tmp_path / "kv")
    refused = put(store, 2, 256)
    assert (refused.stored, refused.reason) == (False, f"quota: kv.max_bytes = {room} is used up")
    status = store.status()
    assert (status.writing, status.reason, status.used_bytes) == (False, refused.reason, room)
    assert put(store, 1, 512).stored  # what is stored stays acknowledged
    assert_hit(store, 1, 512)
    assert_miss(store, 2, 300, "no-unit")
    store.close()
    store = open_store(tmp_path / "kv", max_bytes=room)  # exact across a restart
    assert (store.status().used_bytes, store.status().writing) == (room, False)
    assert_hit(store, 0, 256)
    assert not put(store, 2, 256).stored
    store.close()
    store = open_store(tmp_path / "kv", max_bytes=2 * room)
    assert store.status().writing
    assert put(store, 2, 256).stored
    store.close()


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


def test_a_full_index_stops_writing(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 256)
    store._index._db.execute("PRAGMA max_page_count = 1")  # SQLite's own SQLITE_FULL
    stored = 0
    while stored < 200 and put(store, 1 + stored, 256).stored:
        stored += 1
    assert store.status().reason == "index: database or disk is full"
    assert_hit(store, 0, 256)
    if stored:
        assert_hit(store, stored, 256)
    assert_miss(store, 1 + stored, 300, "no-unit")
    assert store.status().used_bytes == disk_bytes(tmp_path / "kv") == (1 + stored) * (BLOCK + CHECKPOINT)
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
        self.written.append(data[24:40] + data[96:108])
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
            with pytest.raises(ZeroDivisionError):  # its first block is on the disk when the second one fails
                store.put("default", prompt(50, 512), lambda i: block_payload(50, i) if i == 0 else 1 // 0, b"")
        put(store, 100 + chat, 256)
        store.close()
        if chat == 4:
            os.truncate(tmp_path / "kv" / "0000.kvs", BLOCK)
    assert len(written) == len(set(written)) > 20
