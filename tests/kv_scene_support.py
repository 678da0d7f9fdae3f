"""A story recorded call by call, and power cuts in it: while it is told, and while what a cut left is opened."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import kv_mutant_support
from kv_disk_support import Link, Say, Write, lay_out
from kv_fault_support import Acknowledged, done_lists, ever, problems
from kv_powercut_support import after_cut, cut_points
from kv_recording_support import record
from kv_story_support import make_story

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}


def small(seed: int) -> bool:
    """Even seeds are told under a small quota."""
    return seed % 2 == 0


class Scene:
    """A recorded story and the cuts that are tried on it."""

    def __init__(self, folder: Path, seed: int, mutant: str = "none") -> None:
        self.folder, self.seed = folder, seed
        self.story = make_story(seed, small=small(seed))
        root = folder / f"story {seed} {mutant}"
        root.mkdir()
        self.recording = record(root, self.command(root, mutant, "tell"), ENVIRONMENT)
        shutil.rmtree(root)
        self.undisturbed = done_lists(self.recording.said(1 << 60))
        assert len(self.undisturbed) == len(self.story.steps)

    def command(self, root: Path, mutant: str, what: str) -> list[str]:
        return [sys.executable, kv_mutant_support.__file__, str(root / "kv"), str(self.seed),
                "small" if small(self.seed) else "large", mutant, what]  # fmt: skip

    def told(self, at: int) -> Acknowledged:
        return Acknowledged.read(self.recording.said(at), self.story, self.undisturbed)

    def cut(self, at: int, rng: random.Random) -> list[str]:
        """What is wrong after one cut, if anything."""
        tree, files = after_cut(self.recording, at, rng)
        state = self.folder / "state"
        lay_out(tree, files, state)
        told = self.told(at)
        found = problems(state / "kv", self.story, told)
        shutil.rmtree(state)
        return [f"story {self.seed} cut at {at}: {problem}" for problem in [*found, *self.secrets(files, told)]]

    def cuts_of_opening(self, rng: random.Random, count: int, *, rebuild: bool = False) -> list[str]:
        """The power goes while a store is opened that an earlier cut left; or whose index is made again."""
        at = 1 << 60 if rebuild else cut_points(self.recording, rng, 1)[0]
        told = self.told(at)
        root = self.folder / "opened"
        lay_out(*after_cut(self.recording, at, rng), root)
        if rebuild:
            told = Acknowledged(told.done, told.must, ever(self.story, self.undisturbed))
            for path in (root / "kv").glob("index.sqlite3*"):
                path.unlink()
        recording, found = record(root, self.command(root, "none", "open"), ENVIRONMENT), []
        shutil.rmtree(root)
        for second in cut_points(recording, rng, count):
            lay_out(*after_cut(recording, second, rng), self.folder / "state")
            wrong = problems(self.folder / "state" / "kv", self.story, told, rebuilt=rebuild)
            shutil.rmtree(self.folder / "state")
            found += [f"story {self.seed} cut at {at}, opening cut at {second}: {problem}" for problem in wrong]
        return found

    def secrets(self, files: dict[int, bytes], told: Acknowledged) -> Iterator[str]:
        """A key file of a purged tenant that is still somewhere on the disk, under any name or none."""
        purge = next(i for i, step in enumerate(self.story.steps) if step.what == "purge")
        if told.done > purge:
            for key in self.keys_before(purge):
                if any(key in data for data in files.values()):
                    yield "the wrapped secret of a purged tenant is still on the disk"

    def keys_before(self, purge: int) -> list[bytes]:
        """Contents of the key files written before the purge that are there no more after it."""
        lines = {c.text: c.begin for c in self.recording.changes if isinstance(c, Say)}
        begin = lines[f"begin {purge}"]
        made = {c.inode for c in self.recording.changes
                if isinstance(c, Link) and c.name.endswith(".key") and c.begin < begin}  # fmt: skip
        zeroed = {c.inode for c in self.recording.changes
                  if isinstance(c, Write) and c.begin > begin and c.inode in made}  # fmt: skip
        gone = zeroed or made  # a broken purge that does not overwrite
        return [c.data for c in self.recording.changes
                if isinstance(c, Write) and c.inode in gone and c.begin < begin]  # fmt: skip

    def cuts(self, count: int, seed: str = "cuts") -> list[str]:
        rng, found = random.Random(f"{seed} {self.seed}"), []
        for at in cut_points(self.recording, rng, count):
            found += self.cut(at, rng)
        return found
