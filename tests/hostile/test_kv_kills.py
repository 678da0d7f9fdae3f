"""kill -9 by count in every phase: writing, sealing, reclaim, purge, recovery of what a kill left, index rebuild.

The slow sweep is 1,000 kills: 700 while a story is told, 150 while the store that one left is opened, 150 while a
lost index is built again.
"""

from __future__ import annotations

import random

import pytest
from kv_fault_support import memory_folder
from kv_kill_support import Kills, Sweep, Warm

STORIES = 10


@pytest.fixture(scope="module")
def warm():
    with Warm() as process:
        yield process


@pytest.fixture
def folder():
    with memory_folder() as path:
        yield path


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(STORIES))
def test_a_thousand_kills(warm, folder, seed):
    sweep = Sweep(warm, folder, seed)
    sweep.while_told(70)
    sweep.while_recovering(15)
    sweep.while_rebuilding(15)
    assert sweep.found == []


def test_killed_while_opening(warm, folder):
    sweep = Sweep(warm, folder, 6)
    sweep.while_recovering(4)
    sweep.while_rebuilding(4)
    assert sweep.found == []


@pytest.fixture(scope="module")
def reclaims(warm):
    """Kills of a story under a small quota; the undisturbed telling is paid once."""
    with memory_folder() as path:
        yield Kills(warm, path, 8, small=True)


@pytest.mark.parametrize(("ahead", "when"), [(0, "before"), (0, "after"), (-1, "before"), (-1, "after"), (1, "after")])
def test_killed_around_a_reclaim(reclaims, ahead, when):
    """On both sides of the calls that remove a segment: of the commit that forgets it, of the sync of the names."""
    calls = reclaims.calls["io"]
    places = [at for at, call in enumerate(calls) if call == "unlink.kvs"]
    assert len(places) > 3
    assert {calls[at - 1] for at in places} <= {"commit", "unlink.kvs", "sync_directory"}
    for at in random.Random(ahead).sample(places, 3):
        assert reclaims.kill("io", at + ahead, when) == []


def test_killed_while_the_writer_thread_writes(warm, folder):
    kills, rng = Kills(warm, folder, 9, small=False), random.Random("writer")
    for at in rng.sample(range(len(kills.calls["io"]) * 3 // 4), 5):  # groups may be larger, then there are fewer calls
        assert kills.kill_writer(at, rng.choice(["before", "after"])) == []
