"""kill -9 by count: what was acknowledged is there, bit by bit; nothing bad is served; writing goes on.

A story (``kv_story_support``) is told in a forked child that dies at its N-th call; then its store is opened here.
The whole sweep, 1,000 kills, is tests/hostile/test_kv_kills.py.
"""

from __future__ import annotations

import random

import pytest
from kv_fault_support import memory_folder
from kv_kill_support import NEVER, KillIo, Kills, Warm
from kv_story_support import Piece, job_of, make_story, open_faulty

SEED = 4


@pytest.fixture(scope="module")
def warm():
    with Warm() as process:
        yield process


@pytest.fixture
def folder():
    with memory_folder() as path:
        yield path


@pytest.fixture(scope="module")
def told(warm):
    """Kills of one story with reclaims; the undisturbed telling is paid once."""
    with memory_folder() as path:
        yield Kills(warm, path, SEED, small=True)


@pytest.mark.parametrize(("name", "when"), [
    ("pwrite", "before"),  # half a record is on the disk
    ("pwrite", "after"),  # between pwrite and fdatasync
    ("fdatasync", "after"),  # between fdatasync and commit
    ("sync_directory", "before"),  # a new segment whose name is not durable yet
    ("commit", "before"),  # everything is on the disk but the rows
    ("commit", "after"),  # committed, but nobody was told
])  # fmt: skip
def test_killed_between_the_steps(told, name, when):
    places = [at for at, call in enumerate(told.calls["io"]) if call == name]
    assert told.kill("io", random.Random(f"{name} {when}").choice(places), when) == []


@pytest.mark.parametrize("small", [False, True])
def test_killed_at_seeded_calls(warm, folder, small):
    """Half of them at the store's own calls, half at any system call that changes the disk, SQLite's too."""
    kills, rng = Kills(warm, folder, SEED + 1, small), random.Random(f"kills {small}")
    for count in ("io", "call"):
        for at in rng.sample(range(len(kills.calls[count])), 5):
            assert kills.kill(count, at, rng.choice(["before", "after"])) == []


def test_the_order_is_write_sync_commit(folder):
    io = KillIo(NEVER, "")
    store = open_faulty(folder / "kv", make_story(SEED, small=False), io)

    def calls_of(piece):
        begin = len(io.calls)
        assert store.put(job_of(piece)).stored
        calls = io.calls[begin:]
        end = calls.index("commit") + 1
        assert set(calls[end:]) <= {"commit"}  # nothing is written once the rows are there
        return calls[:end]

    calls_of(Piece("default", 0, 256, (256,)))  # makes the tenant and the first segment
    one = calls_of(Piece("default", 1, 256, (256,)))
    assert one == ["pwrite", "pwrite", "fdatasync", "commit"]
    many = calls_of(Piece("default", 2, 1280, (1280,)))  # fills this segment, seals it, starts another
    assert many[-3:] == ["fdatasync", "sync_directory", "commit"]
    assert set(many[:-3]) == {"pwrite", "fdatasync"}
    assert many.index("fdatasync") > max(i for i, call in enumerate(many) if call == "pwrite")
    store.close()
