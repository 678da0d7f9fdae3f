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


@pytest.mark.parametrize("name", ["unlink", "fdatasync", "commit", "truncate"])
def test_killed_around_a_reclaim(warm, folder, name):
    """A small quota: the calls on both sides of removing a segment, and the sealing of the next."""
    kills, rng = Kills(warm, folder, 8, small=True), random.Random(name)
    places = [at for at, call in enumerate(kills.calls["io"]) if call == name]
    for when in ("before", "after"):
        if places:
            assert kills.kill("io", rng.choice(places), when) == []
    assert "unlink" in kills.calls["io"]
