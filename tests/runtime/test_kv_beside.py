"""Lookups beside writes: they wait for none, follow records that move, and give right bytes or a miss."""

from __future__ import annotations

import random
import threading
import time

from kv_support import (
    assert_hit,
    block_payload,
    checkpoint_payload,
    disk_bytes,
    job,
    look_up,
    open_store,
    prompt,
    put,
    tiny_layout,
)

from runtime.kv.files import Io
from runtime.kv.index import State
from runtime.kv.record import Kind, record_bytes

CHAT_BYTES = 2 * record_bytes(tiny_layout().block_bytes) + record_bytes(tiny_layout().checkpoint_bytes)


def test_a_lookup_does_not_wait_for_a_write(tmp_path):
    writing, go_on, slow = threading.Event(), threading.Event(), threading.Event()

    class SlowIo(Io):
        def fdatasync(self, fd):
            if slow.is_set():
                writing.set()
                assert go_on.wait(30)
            super().fdatasync(fd)

    store = open_store(tmp_path / "kv", io=SlowIo())
    assert put(store, 0, 512).stored
    slow.set()
    thread = threading.Thread(target=put, args=(store, 1, 512))
    thread.start()
    assert writing.wait(30)
    assert_hit(store, 0, 512)  # while the disk is busy
    assert look_up(store, prompt(1, 600))[0].tokens == 0  # not acknowledged yet
    assert store.status().blocks == 2
    go_on.set()
    thread.join()
    assert_hit(store, 1, 512)
    store.close()


def _before_the_read(store, act):
    """``act`` runs once, when a lookup has found its rows and is about to open its files."""
    segments = store._ground.segments
    original = segments.path

    def path(segment):
        segments.path = original
        act()
        return original(segment)

    segments.path = path


def test_records_that_move_meanwhile_are_followed(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512)
    ground = store._ground

    def move():
        ground.seal_open()
        rows = ground.index.rows_of(0)
        ground.drop(0, ground.copy_forward(rows), {}, 0, 0)

    _before_the_read(store, move)
    assert_hit(store, 0, 512)
    assert [f.name for f in (tmp_path / "kv").glob("*.kvs")] == ["0001.kvs"]
    assert store.status().used_bytes == disk_bytes(tmp_path / "kv")
    assert not ground.uses.damaged
    store.close()
    store = open_store(tmp_path / "kv")
    assert_hit(store, 0, 512)
    store.close()


def test_records_that_are_removed_meanwhile_are_a_miss(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512)
    put(store, 0, 256)
    ground = store._ground

    def remove():
        ground.seal_open()
        gone = {row: State.EVICTED for row in ground.index.rows_of(0) if row.kind is Kind.CHECKPOINT}
        ground.drop(0, [], gone, 0, 0)

    _before_the_read(store, remove)
    hit, blocks = look_up(store, prompt(0, 600))
    assert (hit.tokens, hit.reason, blocks) == (0, "evicted", [])
    assert put(store, 0, 512).records == 3
    assert_hit(store, 0, 512)
    store.close()


def test_a_pinned_chain_survives_what_makes_room(tmp_path):
    store = open_store(tmp_path / "kv", max_bytes=8 * CHAT_BYTES)
    assert put(store, 0, 512).stored
    with store.pin("default", prompt(0, 600)):
        for chat in range(1, 30):
            assert put(store, chat, 512).stored
            assert store.status().used_bytes <= 8 * CHAT_BYTES
        assert_hit(store, 0, 512)
    for chat in range(30, 60):
        assert put(store, chat, 512).stored
    assert look_up(store, prompt(0, 600))[0].reason in ("", "evicted")
    assert store.status().reclaimed_bytes > 40 * CHAT_BYTES
    assert store.status().used_bytes == disk_bytes(tmp_path / "kv")
    store.close()


def test_threads_that_put_and_look_up_while_room_is_made(tmp_path):
    """Every hit is bit for bit right, whatever is written, moved or removed meanwhile."""
    store = open_store(tmp_path / "kv", max_bytes=10 * CHAT_BYTES)
    stop, wrong, hits = threading.Event(), [], []

    def read(seed):
        rng = random.Random(seed)
        while not stop.is_set():
            chat = rng.randrange(20)
            hit, blocks = look_up(store, prompt(chat, 600))
            if hit.tokens:
                hits.append(chat)
                want = [block_payload(chat, i) for i in range(2)], checkpoint_payload(chat, 512)
                if (blocks, hit.checkpoint) != want:
                    wrong.append(chat)
            elif hit.reason not in ("no-unit", "evicted"):
                wrong.append(hit.reason)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    rng, until = random.Random(9), time.monotonic() + 2
    while time.monotonic() < until:
        results = store.put_all([job(rng.randrange(20), 512) for _ in range(2)])
        wrong += [result.reason for result in results if not result.stored]
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(hits) > 10
    assert store.status().reclaimed_bytes > 0
    store.close()
