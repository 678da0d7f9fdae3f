"""A record changed on disk, or a damaged index, is a miss with its reason: never other bytes, never a part."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3

import pytest
from kv_support import (
    MASTER_KEY,
    FaultIo,
    assert_hit,
    assert_miss,
    block_payload,
    checkpoint_payload,
    disk_bytes,
    look_up,
    open_store,
    prompt,
    put,
    reason,
    tiny_layout,
)

from runtime.kv.index_file import INDEX_NAME
from runtime.kv.keys import derive_master
from runtime.kv.record import HEADER_BYTES, TAG_BYTES, record_bytes
from runtime.kv.verify import verify

BLOCK = record_bytes(tiny_layout().block_bytes)
CHECKPOINT = record_bytes(tiny_layout().checkpoint_bytes)


def _stored(tmp_path):
    """Chat 0 stored at 256 and 512 in one segment: block 0, checkpoint 256, block 1, checkpoint 512."""
    store = open_store(tmp_path / "kv", segment_bytes=1 << 20)
    put(store, 0, 256)
    put(store, 0, 512)
    store.close()
    return tmp_path / "kv" / "0000.kvs"


def _change(path, offset, data=None, flip=0x01):
    raw = bytearray(path.read_bytes())
    if data is None:
        raw[offset] ^= flip
    else:
        raw[offset : offset + len(data)] = data
    path.write_bytes(raw)


@pytest.mark.parametrize("flip", [0x01, 0x80])
@pytest.mark.parametrize("within", [0, 4, 6, 7, 8, 24, 40, 72, 80, 88, 96, 104, 108, 112, 120, 121, 127])
def test_a_changed_header_is_a_corrupt_miss(tmp_path, within, flip):
    segment = _stored(tmp_path)
    _change(segment, BLOCK + CHECKPOINT + within, flip=flip)  # block 1: the boundary 512 is gone, 256 is not
    store = open_store(tmp_path / "kv")
    hit, blocks = look_up(store, prompt(0, 600))
    assert (hit.tokens, hit.reason) == (256, "corrupt")
    assert blocks == [block_payload(0, 0)]
    assert hit.checkpoint == checkpoint_payload(0, 256)
    store.close()


@pytest.mark.parametrize("region", ["first payload byte", "last payload byte", "first tag byte", "last tag byte"])
@pytest.mark.parametrize(("record", "left"), [(0, 0), (1, 512), (2, 256), (3, 256)])
def test_a_changed_payload_or_tag_is_a_corrupt_miss(tmp_path, region, record, left):
    payload = tiny_layout().checkpoint_bytes if record % 2 else tiny_layout().block_bytes
    start = [0, BLOCK, BLOCK + CHECKPOINT, 2 * BLOCK + CHECKPOINT][record] + HEADER_BYTES
    at = {"first payload byte": 0, "last payload byte": payload - 1, "first tag byte": payload,
          "last tag byte": payload + TAG_BYTES - 1}[region]  # fmt: skip
    segment = _stored(tmp_path)
    _change(segment, start + at)
    store = open_store(tmp_path / "kv")
    if left == 512:  # the checkpoint at 256 is not needed for 512, but it is for 256
        assert_hit(store, 0, 512)
        assert reason(store, prompt(0, 300)) == "corrupt"
    else:
        hit, _ = look_up(store, prompt(0, 600))
        assert (hit.tokens, hit.reason) == (left, "corrupt")
    assert store.status().miss_reasons == {"corrupt": 1}
    store.close()
    for _ in range(2):  # set aside, so that the reason stays, until the prefix is written again
        store = open_store(tmp_path / "kv")
        reasons = {reason(store, prompt(0, n)) for n in (300, 600)}
        assert "corrupt" in reasons
        store.close()
    store = open_store(tmp_path / "kv")
    for tokens in (256, 512):
        assert put(store, 0, tokens).stored
        assert_hit(store, 0, tokens)
    assert store.status().used_bytes == disk_bytes(tmp_path / "kv")
    store.close()


def test_a_changed_padding_byte_is_harmless(tmp_path):
    """Bytes between tag and the next record are zeros that nothing reads: outside the authenticated range."""
    segment = _stored(tmp_path)
    _change(segment, HEADER_BYTES + tiny_layout().block_bytes + TAG_BYTES)
    _change(segment, BLOCK - 1)
    store = open_store(tmp_path / "kv")
    assert_hit(store, 0, 512)
    store.close()


def test_swapped_records(tmp_path):
    segment = _stored(tmp_path)
    raw = segment.read_bytes()
    first, second = raw[:BLOCK], raw[BLOCK + CHECKPOINT : 2 * BLOCK + CHECKPOINT]
    _change(segment, 0, second)
    _change(segment, BLOCK + CHECKPOINT, first)
    store = open_store(tmp_path / "kv")
    assert_miss(store, 0, 600, "corrupt")
    store.close()


def test_swapped_rows_of_the_index(tmp_path):
    _stored(tmp_path)
    with sqlite3.connect(tmp_path / "kv" / INDEX_NAME) as db:
        rows = db.execute("SELECT chain, offset, epoch FROM record WHERE kind = 1").fetchall()
        for (chain, _, _), (_, offset, epoch) in zip(rows, reversed(rows), strict=True):
            db.execute("UPDATE record SET offset = ?, epoch = ? WHERE chain = ? AND kind = 1", (offset, epoch, chain))
    db.close()
    store = open_store(tmp_path / "kv")
    assert_miss(store, 0, 600, "corrupt")
    store.close()


def test_a_replayed_older_record(tmp_path):
    """The place was written twice: the record of the first writer is authentic, but not the one the index names."""
    segment = _stored(tmp_path)
    old = segment.read_bytes()
    shutil.rmtree(tmp_path / "kv")
    _stored(tmp_path)
    assert segment.read_bytes() != old
    _change(segment, 0, old[:BLOCK])
    store = open_store(tmp_path / "kv")
    assert_miss(store, 0, 600, "corrupt")
    store.close()


@pytest.mark.parametrize("other", [{"tenant": "bob"}, {"threads": "intra=1"}])
def test_a_record_of_another_tenant_or_fingerprint(tmp_path, other):
    segment = _stored(tmp_path)
    tenant = other.pop("tenant", "default")
    store = open_store(tmp_path / "other", segment_bytes=1 << 20, **other)
    put(store, 0, 512, tenant=tenant)
    store.close()
    _change(segment, 0, (tmp_path / "other" / "0000.kvs").read_bytes()[:BLOCK])
    store = open_store(tmp_path / "kv")
    assert_miss(store, 0, 600, "corrupt")
    store.close()


@pytest.mark.parametrize(("keep", "left"), [
    (0, 0), (100, 0), (BLOCK, 0), (BLOCK + CHECKPOINT, 256), (BLOCK + CHECKPOINT + 4097, 256),
    (2 * BLOCK + 2 * CHECKPOINT - 1, 256)])  # fmt: skip
def test_a_truncated_segment(tmp_path, keep, left):
    segment = _stored(tmp_path)
    os.truncate(segment, keep)
    store = open_store(tmp_path / "kv")
    hit, _ = look_up(store, prompt(0, 600))
    assert (hit.tokens, hit.reason) == (left, "corrupt")
    assert store.status().used_bytes == disk_bytes(tmp_path / "kv")
    assert put(store, 0, 512).stored
    assert_hit(store, 0, 512)
    store.close()
    store = open_store(tmp_path / "kv")
    assert_hit(store, 0, 512)
    store.close()


def test_a_damaged_block_rules_out_every_longer_boundary_at_once(tmp_path, caplog):
    store = open_store(tmp_path / "kv", segment_bytes=1 << 20)
    for tokens in (256, 512, 768, 1024):
        put(store, 0, tokens)
    store.close()
    _change(tmp_path / "kv" / "0000.kvs", HEADER_BYTES)  # block 0
    io = FaultIo(only="preadv")
    store = open_store(tmp_path / "kv", io=io)
    assert_miss(store, 0, 1100, "corrupt")
    assert len(io.calls) <= 5  # of 1,024: a checkpoint and four blocks; nothing shorter is tried
    assert [record.message for record in caplog.records if "set aside" in record.message] == [
        "KV record set aside in segment 0000: KV record at 0 is not authentic"]  # fmt: skip
    store.close()


def test_a_row_that_is_gone_is_a_plain_miss(tmp_path):
    _stored(tmp_path)
    db = sqlite3.connect(tmp_path / "kv" / INDEX_NAME)
    with db:
        db.execute("DELETE FROM record WHERE kind = 1 AND end_token = 512")
    db.close()
    store = open_store(tmp_path / "kv")
    hit, _ = look_up(store, prompt(0, 600))
    assert (hit.tokens, hit.reason) == (256, "evicted")  # a checkpoint is stored after its blocks: one went
    assert put(store, 0, 512).records == 1  # only the block is missing
    assert_hit(store, 0, 512)
    store.close()


def test_a_segment_that_disappears_while_running(tmp_path):
    segment = _stored(tmp_path)
    store = open_store(tmp_path / "kv")
    segment.unlink()
    assert_miss(store, 0, 600, "corrupt")
    store.close()


def test_a_reading_error_is_a_miss(tmp_path):
    _stored(tmp_path)
    store = open_store(tmp_path / "kv", io=FaultIo(1, OSError(errno.EIO, "bad sector"), only="preadv"))
    assert_miss(store, 0, 600, "corrupt")
    assert store.status().writing
    store.close()


def test_bytes_beyond_the_index_are_cut_off(tmp_path):
    segment = _stored(tmp_path)
    size = segment.stat().st_size
    with segment.open("ab") as file:
        file.write(b"x" * 10_000)
    (tmp_path / "kv" / "0001.kvs").write_bytes(b"never committed")
    (tmp_path / "kv" / "notes.kvs").write_bytes(b"not ours")
    store = open_store(tmp_path / "kv")
    assert [f.name for f in (tmp_path / "kv").glob("*.kvs")] == ["0000.kvs"]
    assert store.status().used_bytes == segment.stat().st_size == size
    assert_hit(store, 0, 512)
    store.close()


# -- a damaged index (one that cannot be read at all: test_kv_rebuild.py)

@pytest.mark.parametrize(("column", "value"), [
    ("epoch", "text"), ("epoch", b"short"), ("offset", -4096), ("offset", 1 << 60), ("offset", "x"), ("segment", 77),
    ("size_bytes", 1), ("end_token", -1), ("end_token", "x"), ("created_s", -1), ("key_generation", 1 << 40),
    ("kind", 9), ("role", 9), ("state", 9), ("hits", "x"), ("tenant_id", b"x"), ("fingerprint_id", b"x")])  # fmt: skip
def test_a_hostile_row_never_breaks_a_lookup(tmp_path, column, value):
    _stored(tmp_path)
    db = sqlite3.connect(tmp_path / "kv" / INDEX_NAME)
    with db:
        db.execute(f"UPDATE record SET {column} = ? WHERE kind = 1 AND end_token = 512", (value,))  # noqa: S608
    db.close()
    store = open_store(tmp_path / "kv")
    hit, blocks = look_up(store, prompt(0, 600))
    assert hit.tokens in (0, 256, 512)
    assert blocks == [block_payload(0, i) for i in range(hit.tokens // 256)]
    assert not hit.tokens or hit.checkpoint == checkpoint_payload(0, hit.tokens)
    assert hit.reason == ("" if hit.tokens == 512 else "corrupt")
    mended = (tmp_path / "kv" / f"{INDEX_NAME}.damaged").exists()  # a wrong type: made again from the segments
    assert mended == (isinstance(value, str) or value == 9)
    not_read_back = column in ("size_bytes", "tenant_id", "fingerprint_id")
    assert (hit.tokens == 512) == (mended or not_read_back)
    store.close()


@pytest.mark.parametrize(("column", "value"), [("size_bytes", 1 << 50), ("size_bytes", -4096), ("offset", -4096)])
def test_a_place_that_cannot_be_is_damage_and_costs_no_memory(tmp_path, column, value):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512)
    store._ground.index.connection.execute(f"UPDATE record SET {column} = ? WHERE kind = 2", (value,))  # noqa: S608
    keys = store._ground.tenants.find("default")
    found = verify(tmp_path / "kv", store._reader, {keys.tenant_id: keys}, derive_master(MASTER_KEY), lambda _: None)
    assert (found.records, ["impossible" in finding.problem for finding in found.damaged]) == (3, [True])
    store.close()
