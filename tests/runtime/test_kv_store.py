"""What is stored is found again, exactly; what is not stored is a miss that says why."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading

import pytest
from kv_support import (
    MASTER_KEY,
    QUOTA,
    STORY,
    TINY,
    assert_hit,
    assert_miss,
    block_payload,
    blocks_of,
    checkpoint_payload,
    disk_bytes,
    look_up,
    make_fingerprint,
    make_spec,
    open_store,
    prompt,
    put,
    reason,
    tiny_layout,
)

from appliance.errors import BusyError, EngineError, StoreError
from runtime.kv.files import Io
from runtime.kv.footer import footer_bytes
from runtime.kv.layout import KvLayout
from runtime.kv.policy import Policy
from runtime.kv.record import Role, record_bytes
from runtime.kv.segment import SEGMENT_BYTES
from runtime.kv.store import KvStore, PutJob, PutResult, Unit
from runtime.schedule import prompt_boundary


@pytest.mark.parametrize(("tokens", "boundary"), [
    (0, 0), (1, 0), (255, 0), (256, 0), (257, 256), (384, 256), (511, 256), (512, 256), (513, 512),
    (4096, 3840)])  # fmt: skip
def test_usable_boundary(tokens, boundary):
    assert prompt_boundary(tokens) == boundary


def test_hits_at_the_exact_boundary(tmp_path):
    with_restart = []
    store = open_store(tmp_path / "kv")
    assert put(store, 0, 512).stored
    for attempt in range(2):
        if attempt:
            store.close()
            store = open_store(tmp_path / "kv")
        for more in (1, 100, 256):
            assert_hit(store, 0, 512, more)
        assert_hit(store, 0, 512, more=257)  # c(769) = 768 is not stored: the 512 are, and the reason says so
        with_restart.append(store.status().used_bytes)
        assert_miss(store, 0, 512, "no-unit")  # c(512) = 256 has its block but no checkpoint
        assert_miss(store, 0, 257, "no-unit")
        assert_miss(store, 0, 256, "too-short")
        assert_miss(store, 0, 0, "too-short")
        assert_miss(store, 1, 600, "no-unit")
        changed = prompt(0, 600)
        changed[100] += 1
        assert reason(store, changed) == "no-unit"
    store.close()
    assert with_restart[0] == with_restart[1] == disk_bytes(tmp_path / "kv")


def test_the_longest_stored_boundary_wins(tmp_path):
    store = open_store(tmp_path / "kv")
    for tokens in (256, 1024, 768):
        assert put(store, 0, tokens).stored
    assert_hit(store, 0, 1024)
    assert_hit(store, 0, 768)
    assert_hit(store, 0, 256, more=200)
    hit, blocks = look_up(store, [*prompt(0, 900), *prompt(5, 900)])  # leaves the chat inside its fourth block
    assert (hit.tokens, hit.reason, len(blocks), hit.common_tokens) == (768, "no-unit", 3, 768)
    hit, _ = look_up(store, prompt(0, 700))  # c(700) = 512 has its blocks, and no checkpoint
    assert (hit.tokens, hit.reason, hit.common_tokens) == (256, "no-unit", 512)
    store.close()


def test_a_fork_shares_its_blocks(tmp_path):
    store = open_store(tmp_path / "kv")
    first = put(store, 0, 1024)
    fork = [*prompt(0, 768), *prompt(9, 256)]
    blocks = {**blocks_of(0, 768), 3: block_payload(9, 0)}
    unit = Unit(1024, Role.PROMPT, checkpoint_payload(9, 1024))
    second = store.put(PutJob("default", fork, blocks, [unit]))
    assert (first.records, second.records) == (5, 2)
    for again in (PutJob("default", fork, blocks, [unit]), PutJob("default", fork, {}, [unit])):
        assert store.put(again) == PutResult(True, "", 0, 0)
    assert store.status().used_bytes == disk_bytes(tmp_path / "kv")
    sizes = record_bytes(tiny_layout().block_bytes), record_bytes(tiny_layout().checkpoint_bytes)
    assert first.written_bytes + second.written_bytes == 5 * sizes[0] + 2 * sizes[1]
    hit, got = look_up(store, [*fork, 1])
    assert (hit.tokens, got) == (1024, [blocks[i] for i in range(4)])
    store.close()


def test_status_counts_tokens_and_reasons(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512)
    assert_hit(store, 0, 512, more=88)
    assert_miss(store, 1, 300, "no-unit")
    assert_miss(store, 1, 100, "too-short")
    status = store.status()
    assert (status.enabled, status.writing, status.reason) == (True, True, "")
    assert (status.hit_tokens, status.miss_tokens) == (512, 88 + 300 + 100)
    assert status.miss_reasons == {"no-unit": 1, "too-short": 1}
    assert (status.used_bytes, status.max_bytes) == (disk_bytes(tmp_path / "kv"), QUOTA)
    store.close()


def test_switched_off_by_policy(tmp_path):
    store = open_store(tmp_path / "kv", max_bytes=0)
    result = put(store, 0, 256)
    assert (result.stored, result.reason) == (False, "policy: the KV cache is switched off")
    assert_miss(store, 0, 300, "policy")
    assert not store.status().enabled
    assert disk_bytes(tmp_path / "kv") == 0
    store.close()


def test_another_tenant_sees_nothing(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512, tenant="alice")
    assert_hit(store, 0, 512, tenant="alice")
    assert_miss(store, 0, 600, "no-unit", tenant="bob")
    assert put(store, 0, 512, tenant="bob").records == 3  # nothing is shared between tenants
    assert_hit(store, 0, 512, tenant="bob")
    store.close()


def test_another_master_key_sees_nothing(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512)
    store.close()
    store = open_store(tmp_path / "kv", master_key=bytes(32))
    assert_miss(store, 0, 600, "no-unit")
    store.close()


@pytest.mark.parametrize(("change", "field"), [
    ({"objects": ["aa" * 32]}, "objects"), ({"graphs": ["00" * 32]}, "graphs"), ({"profile": "small"}, "profile"),
    ({"tokenizer_sha256": "00" * 32}, "tokenizer"), ({"encoding": "dsv4-0424"}, "encoding"),
    ({"numerics": "kv-f32"}, "numerics"), ({"backend": "torch"}, "arithmetic.backend"),
    ({"ort_version": "1.32.0"}, "arithmetic.ort_version"), ({"kernels": "kernels-1"}, "arithmetic.kernels"),
    ({"isa": "x86_64 avx2"}, "arithmetic.isa"), ({"threads": "intra=1"}, "arithmetic.threads"),
    ({"chunk_tokens": 512}, "arithmetic.chunk_tokens"),
])  # fmt: skip
def test_another_fingerprint_is_named(tmp_path, change, field):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512)
    store.close()
    store = open_store(tmp_path / "kv", **change)
    assert_miss(store, 0, 600, f"fingerprint: {field}")
    assert_miss(store, 1, 600, "no-unit")
    assert store.status().miss_reasons == {"fingerprint": 1, "no-unit": 1}
    assert put(store, 0, 512).records == 3
    assert_hit(store, 0, 512)
    store.close()
    store = open_store(tmp_path / "kv")
    assert_hit(store, 0, 512)  # the old rows are still there for the old fingerprint
    store.close()


def test_another_layout_is_named(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512)
    store.close()
    layout = KvLayout.from_spec(make_spec(dataclasses.replace(TINY, sliding_window=32)))
    store = KvStore.open(tmp_path / "kv", layout=layout, fingerprint=make_fingerprint(layout), master_key=MASTER_KEY,
                         policy=Policy(max_bytes=QUOTA))  # fmt: skip
    assert_miss(store, 0, 600, "fingerprint: layout")
    store.close()
    with pytest.raises(EngineError, match="another layout"):
        KvStore.open(tmp_path / "kv", layout=layout, fingerprint=make_fingerprint(tiny_layout()),
                     master_key=MASTER_KEY, policy=Policy(max_bytes=QUOTA))  # fmt: skip


def test_segments_roll_and_all_of_them_are_read(tmp_path):
    store = open_store(tmp_path / "kv")
    for chat, tokens in STORY:
        assert put(store, chat, tokens).stored
    files = sorted((tmp_path / "kv").glob("*.kvs"))
    assert len(files) > 3
    assert [f.name for f in files] == [f"{i:04d}.kvs" for i in range(len(files))]
    assert all(f.stat().st_size <= 128 * 1024 for f in files)
    for chat, tokens in STORY:
        assert_hit(store, chat, tokens)
    store.close()
    assert SEGMENT_BYTES == 256 * 1024 * 1024


def test_files_are_for_the_owner_only(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 256)
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    everything = [f for f in (tmp_path / "kv").rglob("*") if f.is_file()]
    assert len(everything) > 4
    assert {f.stat().st_mode & 0o777 for f in everything} == {0o600}
    assert (tmp_path / "kv" / "tenants").stat().st_mode & 0o777 == 0o700
    store.close()


def test_nothing_readable_on_disk(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 256, tenant="a-tenant-name")
    store.close()
    everything = b"".join(f.read_bytes() for f in (tmp_path / "kv").rglob("*") if f.is_file())
    assert block_payload(0, 0)[:16] not in everything
    assert b"a-tenant-name" not in everything
    assert b"".join(i.to_bytes(4, "little") for i in prompt(0, 8)) not in everything


def test_one_writer(tmp_path):
    store = open_store(tmp_path / "kv")
    code = f"from pathlib import Path; from kv_support import open_store; open_store(Path({str(tmp_path / 'kv')!r}))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "BusyError" in ended.stderr
    assert "in use by another solocard-serve" in ended.stderr
    with pytest.raises(BusyError):
        open_store(tmp_path / "kv")
    store.close()
    store.close()
    open_store(tmp_path / "kv").close()


def test_status_does_not_wait_for_the_disk(tmp_path):
    writing, go_on = threading.Event(), threading.Event()

    class SlowIo(Io):
        def fdatasync(self, fd):
            writing.set()
            assert go_on.wait(30)
            super().fdatasync(fd)

    store = open_store(tmp_path / "kv", io=SlowIo())
    results = []
    threads = [threading.Thread(target=lambda c=chat: results.append(put(store, c, 256).stored)) for chat in range(3)]
    for thread in threads:
        thread.start()
    assert writing.wait(30)
    assert store.status().used_bytes == 0  # not acknowledged yet, and asked while the disk is busy
    go_on.set()
    for thread in threads:
        thread.join()
    assert results == [True] * 3
    for chat in range(3):
        assert_hit(store, chat, 256)
    store.close()


def test_the_index_is_as_durable_as_promised(tmp_path):
    store = open_store(tmp_path / "kv")
    connection = store._ground.index.connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: every commit is synced
    store.close()


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="needs a directory"):
        open_store(tmp_path / "file" / "kv")
    with pytest.raises(StoreError, match="master key has 5 bytes"):
        open_store(tmp_path / "kv", master_key=b"short")


def test_record_sizes_of_the_real_model():
    assert record_bytes(899_648) == 901_120
    assert record_bytes(3_644_416) == 3_645_440
    assert footer_bytes(297) == 45_056  # of a segment full of blocks
