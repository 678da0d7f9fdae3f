"""The power goes at any moment: every put acknowledged before is served bit for bit, a purged tenant stays purged.

Stories are recorded once, call by call, with strace; then many states that the disk may be in are built and opened.
The slow sweep has 1,000 cuts. Broken stores show that a cut can be seen to lose something.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import sys

import kv_mutant_support
import pytest
from kv_disk_support import Link, Write, lay_out
from kv_fault_support import Acknowledged, done_lists, memory_folder, problems
from kv_powercut_support import after_cut, cut_points
from kv_recording_support import record
from kv_story_support import make_story

STORIES = 10
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}


def small(seed):
    """Even seeds are told under a small quota."""
    return seed % 2 == 0


class Scene:
    """A recorded story and the cuts that are tried on it."""

    def __init__(self, folder, seed, mutant="none"):
        self.folder, self.seed = folder, seed
        self.story = make_story(seed, small=small(seed))
        root = folder / f"story {seed} {mutant}"
        root.mkdir()
        self.recording = record(root, self.command(root, mutant, "tell"), ENVIRONMENT)
        shutil.rmtree(root)
        self.undisturbed = done_lists(self.recording.said(1 << 60))
        assert len(self.undisturbed) == len(self.story.steps)

    def command(self, root, mutant, what):
        return [sys.executable, kv_mutant_support.__file__, str(root / "kv"), str(self.seed),
                "small" if small(self.seed) else "large", mutant, what]  # fmt: skip

    def told(self, at):
        return Acknowledged.read(self.recording.said(at), self.story, self.undisturbed)

    def cut(self, at, rng):
        """What is wrong after one cut, if anything."""
        tree, files = after_cut(self.recording, at, rng)
        state = self.folder / "state"
        lay_out(tree, files, state)
        told = self.told(at)
        found = problems(state / "kv", self.story, told)
        shutil.rmtree(state)
        return [f"story {self.seed} cut at {at}: {problem}" for problem in [*found, *self.secrets(files, told)]]

    def secrets(self, files, told):
        """A key file of a purged tenant that is still somewhere on the disk, under any name or none."""
        purge = next(i for i, step in enumerate(self.story.steps) if step.what == "purge")
        if told.done > purge:
            for key in self.keys_before(purge):
                if any(key in data for data in files.values()):
                    yield "the wrapped secret of a purged tenant is still on the disk"

    def keys_before(self, purge):
        """Contents of the key files written before the purge that are there no more after it."""
        lines = {c.text: c.begin for c in self.recording.changes if hasattr(c, "text")}
        begin = lines[f"begin {purge}"]
        made = {c.inode for c in self.recording.changes
                if isinstance(c, Link) and c.name.endswith(".key") and c.begin < begin}  # fmt: skip
        zeroed = {c.inode for c in self.recording.changes
                  if isinstance(c, Write) and c.begin > begin and c.inode in made}  # fmt: skip
        gone = zeroed or made  # a broken purge that does not overwrite
        return [c.data for c in self.recording.changes
                if isinstance(c, Write) and c.inode in gone and c.begin < begin]  # fmt: skip

    def cuts(self, count, seed="cuts"):
        rng, found = random.Random(f"{seed} {self.seed}"), []
        for at in cut_points(self.recording, rng, count):
            found += self.cut(at, rng)
        return found


@pytest.fixture
def folder():
    with memory_folder() as path:
        yield path


@pytest.mark.parametrize("seed", [0, 1])
def test_a_power_cut_loses_nothing_acknowledged(folder, seed):
    assert Scene(folder, seed).cuts(30) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(STORIES))
def test_a_thousand_power_cuts(folder, seed):
    assert Scene(folder, seed).cuts(100, "slow") == []


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
