"""Tenants: secrets wrapped on disk, noticed by every process, destroyed by a purge; one shared tenant on top."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
from kv_support import (
    MASTER_KEY,
    FaultIo,
    assert_hit,
    assert_miss,
    block_payload,
    blocks_of,
    checkpoint_payload,
    disk_bytes,
    look_up,
    open_store,
    prompt,
    put,
)

from appliance.errors import StoreError
from runtime.kv import tenants as tenants_module
from runtime.kv.files import Io
from runtime.kv.record import Role
from runtime.kv.store import PutJob, Unit
from runtime.kv.tenants import SHARED, Tenants


def test_a_tenant_is_made_once_and_found_again(tmp_path):
    tenants = Tenants(tmp_path, MASTER_KEY, Io())
    assert tenants.find("alice") is None
    assert tenants.all() == []
    made = tenants.create("alice")
    assert tenants.create("alice") is made is tenants.find("alice")
    again = Tenants(tmp_path, MASTER_KEY, Io()).find("alice")
    assert (again.tenant_id, again.chain_key) == (made.tenant_id, made.chain_key)
    files = list((tmp_path / "tenants").iterdir())
    assert [f.name for f in files] == [tenants.path("alice").name]
    assert files[0].stat().st_mode & 0o777 == 0o600
    assert b"alice" not in files[0].read_bytes() + files[0].name.encode()
    tenants.create("bob")
    assert [(info.name, info.damaged) for info in tenants.all()] == [("alice", ""), ("bob", "")]
    assert abs(tenants.all()[0].created_s - time.time()) < 60
    assert tenants.live_ids() == {made.tenant_id, tenants.find("bob").tenant_id}
    assert tenants.keys_of(made.tenant_id).chain_key == made.chain_key
    assert tenants.keys_of(bytes(16)) is None


def test_another_master_key_knows_no_tenant(tmp_path):
    Tenants(tmp_path, MASTER_KEY).create("alice")
    other = Tenants(tmp_path, bytes(32))
    assert other.find("alice") is None
    assert "does not open with keys/kv-master" in other.all()[0].damaged
    assert other.live_ids() == frozenset()


def test_racing_makers_get_one_secret(tmp_path):
    gate, ids = threading.Barrier(8), []

    def make():
        gate.wait()
        ids.append(Tenants(tmp_path, MASTER_KEY).create("alice").tenant_id)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1
    assert len(list((tmp_path / "tenants").iterdir())) == 1


def test_a_purge_overwrites_the_file_before_it_goes(tmp_path):
    written = []

    class Watching(Io):
        def pwrite(self, fd, data, offset):
            super().pwrite(fd, data, offset)
            written.append(bytes(data))

        def fdatasync(self, fd):
            super().fdatasync(fd)
            written.append("synced")

        def unlink(self, path):
            written.append(path.read_bytes())
            super().unlink(path)

    Tenants(tmp_path, MASTER_KEY).create("alice")
    tenants = Tenants(tmp_path, MASTER_KEY, Watching())
    before = tenants.path("alice").read_bytes()
    first = tenants.create("alice").tenant_id
    assert tenants.purge("alice")
    assert written == [bytes(len(before)), "synced", bytes(len(before))]
    assert not tenants.purge("alice")
    assert tenants.find("alice") is None
    assert tenants.keys_of(first) is None
    assert tenants.create("alice").tenant_id != first


@pytest.mark.parametrize(("content", "problem"), [
    (b"", "is no tenant file"), (b"SKVT", "is no tenant file"), (b"x" * 100, "is no tenant file"),
    ("flip", "does not open")])  # fmt: skip
def test_a_damaged_file_is_reported_and_replaced(tmp_path, content, problem):
    tenants = Tenants(tmp_path, MASTER_KEY)
    old = tenants.create("alice").tenant_id
    path = tenants.path("alice")
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]) if content == "flip" else content)
    fresh = Tenants(tmp_path, MASTER_KEY)
    with pytest.raises(StoreError, match=problem):
        fresh.find("alice")
    assert problem in fresh.all()[0].damaged
    assert fresh.create("alice").tenant_id != old
    assert [info.name for info in fresh.all()] == ["alice"]


def test_a_purge_cut_off_after_the_secret_was_gone_counts(tmp_path):
    tenants = Tenants(tmp_path, MASTER_KEY)
    old = tenants.create("alice").tenant_id
    path = tenants.path("alice")
    path.write_bytes(bytes(path.stat().st_size))
    assert tenants.find("alice") is None
    assert tenants.live_ids() == frozenset()
    assert tenants.create("alice").tenant_id != old
    assert path.read_bytes()[:4] == b"SKVT"


def test_drafts_of_a_crash_are_removed(tmp_path):
    open_store(tmp_path / "kv").close()
    folder = tmp_path / "kv" / "tenants"
    folder.mkdir()
    old, young = folder / "a.key.01.new", folder / "b.key.02.new"
    for draft in (old, young):
        draft.write_bytes(b"half a file")
    os.utime(old, (1_000_000, 1_000_000))
    open_store(tmp_path / "kv").close()
    assert list(folder.iterdir()) == [young]
    assert Tenants(tmp_path / "kv", MASTER_KEY).all() == []


def test_a_tenant_swapped_for_another_does_not_open(tmp_path):
    tenants = Tenants(tmp_path, MASTER_KEY)
    tenants.create("alice")
    tenants.create("bob")
    tenants.path("alice").write_bytes(tenants.path("bob").read_bytes())
    with pytest.raises(StoreError, match="does not open"):
        Tenants(tmp_path, MASTER_KEY).find("alice")


def test_a_purge_by_another_process_counts_at_once(tmp_path):
    store = open_store(tmp_path / "kv")
    for tenant in ("alice", "bob"):
        put(store, 0, 512, tenant=tenant)
        assert_hit(store, 0, 512, tenant=tenant)
    code = (
        "import sys, time; from pathlib import Path; from kv_support import *; from runtime.kv.tenants import Tenants\n"
        "begin = time.monotonic(); print(Tenants(Path(sys.argv[1]), MASTER_KEY).purge('alice'))\n"
        "print(time.monotonic() - begin < 1.0)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "kv")]
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == "True\nTrue\n"
    assert_miss(store, 0, 600, "no-unit", tenant="alice")
    assert store.replay_ids("alice", ["x"]) == {}
    assert_hit(store, 0, 512, tenant="bob")
    assert put(store, 0, 512, tenant="alice").records == 3  # another secret, other names: all is written again
    assert_hit(store, 0, 512, tenant="alice")
    store.close()


def test_a_purged_tenant_stays_gone_after_a_restart(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512, tenant="alice")
    old = store._ground.tenants.find("alice")
    store._ground.tenants.purge("alice")
    store.close()
    store = open_store(tmp_path / "kv")
    assert_miss(store, 0, 600, "no-unit", tenant="alice")
    put(store, 1, 256, tenant="alice")
    rows = store._ground.index.connection.execute("SELECT DISTINCT tenant_id FROM record WHERE state = 0").fetchall()
    assert (old.tenant_id,) not in rows  # the first put swept the segments that nobody can read
    store.close()


def test_a_damaged_key_file_is_a_miss_and_no_stack_trace(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512, tenant="alice")
    path = store._ground.tenants.path("alice")
    path.write_bytes(b"SKVT rubbish")
    assert_miss(store, 0, 600, "corrupt", tenant="alice")
    assert store.replay_ids("alice", ["x"]) == {}
    with store.pin("alice", prompt(0, 600)):
        pass
    assert put(store, 0, 512, tenant="alice").stored
    assert_hit(store, 0, 512, tenant="alice")
    store.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_key_file_that_cannot_be_read_now_keeps_its_secret(tmp_path, monkeypatch, code):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512, tenant="alice")
    put(store, 0, 512, tenant="bob")
    store.close()
    path = Tenants(tmp_path / "kv", MASTER_KEY).path("alice")
    read = tenants_module._read

    def refuse(asked):
        if asked == path:
            raise OSError(code, os.strerror(code))
        return read(asked)

    monkeypatch.setattr(tenants_module, "_read", refuse)
    store = open_store(tmp_path / "kv")
    assert not put(store, 1, 512, tenant="alice").stored
    assert put(store, 1, 512, tenant="bob").stored
    monkeypatch.undo()
    assert_hit(store, 0, 512, tenant="alice")
    assert put(store, 1, 512, tenant="alice").stored
    store.close()


@pytest.mark.parametrize("name", ["pwrite", "fdatasync", "sync_directory"])
def test_a_full_disk_while_a_tenant_is_made(tmp_path, name):
    open_store(tmp_path / "kv").close()
    io = FaultIo(0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), only=name)
    store = open_store(tmp_path / "kv", io=io)
    assert put(store, 0, 256).reason == "ENOSPC: No space left on device"
    assert_miss(store, 0, 300, "no-unit")
    store.close()
    store = open_store(tmp_path / "kv")
    assert put(store, 0, 256).stored
    assert disk_bytes(tmp_path / "kv") == store.status().used_bytes
    store.close()


def _hold(directory, ready, go_on):
    """A second process that keeps a tenant's keys in memory."""
    tenants = Tenants(directory, MASTER_KEY)
    ready.send(tenants.create("alice").tenant_id)
    assert go_on.recv() == "purged"
    found = tenants.find("alice")
    ready.send(found.tenant_id if found else None)


def test_keys_in_memory_are_not_used_after_a_purge_elsewhere(tmp_path):
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, there, there))
    process.start()
    try:
        old = here.recv()
        mine = Tenants(tmp_path, MASTER_KEY)
        assert mine.purge("alice")
        new = mine.create("alice").tenant_id
        here.send("purged")
        assert here.recv() == new != old
    finally:
        process.join(30)
    assert process.exitcode == 0


# -- the shared tenant


def _share(store, chat, tokens, tenant="default"):
    units = [Unit(tokens, Role.ANCHOR, checkpoint_payload(chat, tokens))]
    return store.put(PutJob(tenant, prompt(chat, tokens), blocks_of(chat, tokens), units, shared_tokens=tokens))


def test_a_shared_prefix_serves_every_tenant_that_asks_for_it(tmp_path):
    store = open_store(tmp_path / "kv")
    assert _share(store, 0, 512, "alice").records == 3
    assert_miss(store, 0, 600, "no-unit", tenant="bob")  # it was not said that the prompt begins with a shared part
    for tenant in ("alice", "bob"):
        hit, blocks = look_up(store, prompt(0, 600), tenant, shared_tokens=512)
        assert (hit.tokens, hit.reason, blocks) == (512, "", [block_payload(0, i) for i in range(2)])
    longer = [*prompt(0, 512), *prompt(7, 512)]
    blocks = {**blocks_of(0, 512), 2: block_payload(7, 0), 3: block_payload(7, 1)}
    unit = Unit(1024, Role.PROMPT, checkpoint_payload(7, 1024))
    result = store.put(PutJob("bob", longer, blocks, [unit], shared_tokens=512))
    assert result.records == 3  # two blocks of bob's and his checkpoint; the shared ones are there
    hit, got = look_up(store, [*longer, 1], "bob", shared_tokens=512)
    assert (hit.tokens, got) == (1024, [blocks[i] for i in range(4)])
    hit, _ = look_up(store, [*longer, 1], "alice", shared_tokens=512)
    assert (hit.tokens, hit.reason, hit.common_tokens) == (512, "no-unit", 512)  # bob's own part is bob's
    hit, _ = look_up(store, [*longer, 1], "bob")
    assert (hit.tokens, hit.common_tokens) == (0, 0)
    store.close()


def test_a_shared_part_ends_where_it_is_said_to(tmp_path):
    store = open_store(tmp_path / "kv")
    _share(store, 0, 1024, "alice")
    hit, _ = look_up(store, prompt(0, 1100), "bob", shared_tokens=512)
    assert (hit.tokens, hit.common_tokens) == (0, 512)  # two blocks, and no checkpoint there
    hit, _ = look_up(store, prompt(0, 1100), "bob", shared_tokens=1024)
    assert hit.tokens == 1024
    store.close()


def test_a_purge_of_the_shared_tenant_leaves_the_others(tmp_path):
    store = open_store(tmp_path / "kv")
    _share(store, 0, 512, "alice")
    put(store, 1, 512, tenant="alice")
    assert store._ground.tenants.purge(SHARED)
    hit, _ = look_up(store, prompt(0, 600), "alice", shared_tokens=512)
    assert (hit.tokens, hit.reason) == (0, "no-unit")
    assert_hit(store, 1, 512, tenant="alice")
    store.close()


def test_a_tenants_own_blocks_complete_a_shared_prefix(tmp_path):
    """Stored by alice before the prompt was approved: her blocks still count for her."""
    store = open_store(tmp_path / "kv")
    put(store, 0, 512, tenant="alice")
    hit, _ = look_up(store, prompt(0, 600), "alice", shared_tokens=512)
    assert hit.tokens == 512
    assert _share(store, 0, 512, "alice").records == 3
    hit, _ = look_up(store, prompt(0, 600), "bob", shared_tokens=512)
    assert hit.tokens == 512
    store.close()
