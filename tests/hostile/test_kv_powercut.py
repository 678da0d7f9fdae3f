"""The power goes at any moment: every put acknowledged before is served bit for bit, a purged tenant stays purged.

Stories are recorded once, call by call, with strace; then many states that the disk may be in are built and opened.
The slow sweep has 1,000 cuts. Broken stores show that a cut can be seen to lose something.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import sys

import pytest
from kv_disk_support import lay_out
from kv_fault_support import memory_folder
from kv_powercut_support import after_cut, cut_points
from kv_recording_support import record
from kv_scene_support import ENVIRONMENT, Scene

STORIES = 10


@pytest.fixture
def folder():
    with memory_folder() as path:
        yield path


@pytest.mark.parametrize("seed", [0, 1])
def test_a_power_cut_loses_nothing_acknowledged(folder, seed):
    assert Scene(folder, seed).cuts(24) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(STORIES))
def test_a_thousand_power_cuts(folder, seed):
    assert Scene(folder, seed).cuts(100, "slow") == []


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_power_cut_while_opening(folder, rebuild):
    """Recovery and a rebuild of the index, cut off themselves."""
    scene, rng = Scene(folder, 2), random.Random(f"opening {rebuild}")
    assert scene.cuts_of_opening(rng, 8, rebuild=rebuild) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(STORIES))
def test_many_power_cuts_while_opening(folder, seed):
    scene, rng, found = Scene(folder, seed), random.Random(f"opening {seed}"), []
    for number in range(6):
        found += scene.cuts_of_opening(rng, 5, rebuild=number % 3 == 2)
    assert found == []


@pytest.mark.parametrize("mutant", ["NoDataSync", "CommitFirst", "NoDirectorySync", "SleepyIndex", "HalfPurge"])
def test_a_broken_store_is_found(folder, mutant):
    scene, rng = Scene(folder, 0, mutant), random.Random(mutant)
    found = []
    for at in cut_points(scene.recording, rng, 200):
        found = scene.cut(at, rng)
        if found:
            break
    assert found, f"{mutant}: nothing in 200 cuts"


SQLITE = """
import os, sqlite3, sys
folder, level = sys.argv[1:]
os.mkdir(folder + "/db")
fd = os.open(folder, os.O_RDONLY); os.fsync(fd); os.close(fd)
for begin in (0, 12):
    db = sqlite3.connect(folder + "/db/db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL"); db.execute("PRAGMA synchronous = " + level)
    db.execute("PRAGMA wal_autocheckpoint = 8")
    db.execute("CREATE TABLE IF NOT EXISTS t (a, b)")
    for i in range(begin, begin + 12):
        db.execute("INSERT INTO t VALUES (?, zeroblob(3000))", (i,))
        os.write(1, b"done %d\\n" % i)
    db.close()
"""


def lost_by_sqlite(folder, level, count):
    """How many of ``count`` cuts lose an acknowledged row of a plain SQLite database."""
    (folder / level).mkdir()
    recording = record(folder / level, [sys.executable, "-c", SQLITE, str(folder / level), level], ENVIRONMENT)
    rng, lost = random.Random(level), 0
    for at in cut_points(recording, rng, count):
        lay_out(*after_cut(recording, at, rng), folder / "state")
        done = [int(text.split()[1]) for text in recording.said(at) if text.startswith("done ")]
        try:
            with contextlib.closing(sqlite3.connect(folder / "state" / "db" / "db")) as db:
                lost += [row for (row,) in db.execute("SELECT a FROM t ORDER BY a")][: len(done)] != done
        except sqlite3.Error:
            lost += bool(done)
        shutil.rmtree(folder / "state")
    return lost


def test_the_simulator_believes_sqlite_and_doubts_it_without_syncs(tmp_path):
    """A state that no disk can be in would break SQLite's own promise, which is taken as true."""
    assert lost_by_sqlite(tmp_path, "FULL", 60) == 0
    assert lost_by_sqlite(tmp_path, "OFF", 60) > 10
