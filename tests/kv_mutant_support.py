"""Stores that are broken on purpose, one promise each, so that the power-cut simulator can be seen to fail.

``python kv_mutant_support.py DIR SEED SMALL MUTANT WHAT`` tells a story (WHAT: tell) or only opens it (open).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kv_story_support import make_story, open_faulty, tell

from runtime.kv.files import Io


class NoDataSync(Io):
    """Acknowledges what was never synced."""

    def fdatasync(self, fd):
        pass


class CommitFirst(Io):
    """The index names records whose bytes are synced only afterwards."""

    def __init__(self):
        self._later = []

    def fdatasync(self, fd):
        self._later.append(os.dup(fd))

    def commit(self, connection):
        super().commit(connection)
        while self._later:
            fd = self._later.pop()
            super().fdatasync(fd)
            os.close(fd)


class NoDirectorySync(Io):
    """New files may have no name after a power cut."""

    def sync_directory(self, path):
        pass


class SleepyIndex(Io):
    """SQLite commits without a sync of its log."""

    def commit(self, connection):
        super().commit(connection)
        connection.execute("PRAGMA synchronous = OFF")


class HalfPurge(Io):
    """A purge that only unlinks the key file, and does not wait for that either."""

    def pwrite(self, fd, data, offset):
        if any(data):
            super().pwrite(fd, data, offset)

    def unlink(self, path):
        super().unlink(path)
        self._quiet = path.suffix == ".key"

    def sync_directory(self, path):
        if not getattr(self, "_quiet", False):
            super().sync_directory(path)
        self._quiet = False


MUTANTS = {"none": Io} | {
    mutant.__name__: mutant for mutant in (NoDataSync, CommitFirst, NoDirectorySync, SleepyIndex, HalfPurge)
}


if __name__ == "__main__":
    directory, seed, small, mutant, what = sys.argv[1:]
    story, io = make_story(int(seed), small=small == "small"), MUTANTS[mutant]()
    if what == "open":
        open_faulty(Path(directory), story, io).close()
    else:
        tell(Path(directory), story, io)
