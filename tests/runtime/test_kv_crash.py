"""kill -9 at any point: what was acknowledged is there, bit by bit; everything else is a clean miss.

A child stores the story of ``kv_support`` and is killed at a chosen IO call; what it printed was acknowledged.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import kv_support
import pytest
from kv_support import (
    STORY,
    FaultIo,
    assert_hit,
    block_payload,
    checkpoint_payload,
    disk_bytes,
    open_store,
    prompt,
    put,
    tell_story,
)


def _calls(directory):
    """The IO calls of the story, in order."""
    io = FaultIo()
    tell_story(directory, io)
    return io.calls


def _start(directory, at, when):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, kv_support.__file__, str(directory), str(at), when]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def _acknowledged(output):
    stored = [tuple(int(v) for v in line.split()[1:]) for line in output.splitlines()]
    assert stored == list(STORY[: len(stored)])
    return stored


def _check(directory, stored):
    """Reopen twice; look everything up; then finish the story and look again."""
    for attempt in range(2):
        store = open_store(directory)
        assert store.status().used_bytes == disk_bytes(directory)
        for chat, tokens in stored:
            assert_hit(store, chat, tokens)
        for chat, tokens in STORY[len(stored) :]:
            hit = store.lookup("default", prompt(chat, tokens + 1))
            known = [t for c, t in STORY[: len(stored) + 1] if c == chat]  # at most one more than was printed
            assert hit.tokens == 0 or hit.tokens in known
            assert hit.reason == ("" if hit.tokens == tokens else "no-unit")
            assert hit.blocks == [block_payload(chat, i) for i in range(hit.tokens // 256)]
            assert hit.checkpoint == (checkpoint_payload(chat, hit.tokens) if hit.tokens else None)
        if attempt:
            for chat, tokens in STORY:
                assert put(store, chat, tokens).stored
                assert_hit(store, chat, tokens)
            assert store.status().used_bytes == disk_bytes(directory)
        store.close()


def _kill_at(directory, at, when):
    child = _start(directory, at, when)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    stored = _acknowledged(output)
    _check(directory, stored)
    return stored


def _pick(calls, name, seed):
    return random.Random(seed).choice([i for i, call in enumerate(calls) if call == name])


@pytest.mark.parametrize(("name", "when"), [
    ("pwrite", "before"),  # half a record is on the disk
    ("pwrite", "after"),  # between pwrite and fdatasync
    ("fdatasync", "after"),  # between fdatasync and commit
    ("sync_directory", "before"),  # a new segment whose name is not durable yet
    ("commit", "after"),  # committed, but nobody was told
])  # fmt: skip
def test_killed_between_the_steps(tmp_path, name, when):
    calls = _calls(tmp_path / "calls")
    at = _pick(calls, name, seed=f"{name} {when}")
    stored = _kill_at(tmp_path / "kv", at, when)
    assert len(stored) == calls[:at].count("commit")


def test_the_order_is_write_sync_commit(tmp_path):
    open_store(tmp_path / "kv").close()
    io = FaultIo()
    store = open_store(tmp_path / "kv", io=io)
    assert put(store, 0, 512).stored
    assert io.calls == ["pwrite", "pwrite", "pwrite", "fdatasync", "sync_directory", "commit"]
    assert put(store, 1, 512).stored  # rolls over into a second segment
    assert io.calls[6:] == ["pwrite", "pwrite", "pwrite", "fdatasync", "fdatasync", "sync_directory", "commit"]
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_call(tmp_path, when):
    calls = _calls(tmp_path / "calls")
    counts = [len(_kill_at(tmp_path / f"kv{at}", at, when)) for at in range(len(calls))]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, len(STORY) - 1)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    """Not at a call: wherever SQLite or the interpreter happens to be."""
    begin = time.monotonic()
    _calls(tmp_path / "calls")
    story_s, rng, reached = time.monotonic() - begin, random.Random(7), set()
    for attempt in range(25):
        child = _start(tmp_path / f"kv{attempt}", 1 << 60, "never")
        while not (tmp_path / f"kv{attempt}" / "lock").exists():
            time.sleep(0.001)
        time.sleep(rng.random() * story_s)
        child.kill()
        stored = _acknowledged(child.communicate(timeout=60)[0])
        reached.add(len(stored))
        _check(tmp_path / f"kv{attempt}", stored)
    assert len(reached) > 2
