"""A disk that fails at a chosen call, and one that is really full: what the store must then still do.

``python kv_full_support.py DIR KIND`` mounts a small file system of its own (KIND: tmpfs, or a loop device with ext4)
on DIR, fills it while a story is told, makes room again and restarts; it needs ``unshare -m`` around it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from kv_fault_support import Acknowledged, next_put, problems, reach, wrong_bits
from kv_story_support import NOW_S, Piece, Step, Story, job_of, look, make_story, names, open_faulty
from kv_support import MASTER_KEY

from appliance.errors import StoreError
from runtime.kv.files import Io
from runtime.kv.tenants import Tenants

WRITING = ("pwrite", "fdatasync", "truncate", "unlink", "rename", "link", "sync_directory", "commit")
CALLS = (*WRITING, "preadv")


class FailIo(Io):
    """Counts the calls named in ``only``; number ``at`` and the ``more`` after it raise ``code``."""

    def __init__(self, code: int, at: int, more: int, only: Collection[str]) -> None:
        self.calls, self._code, self._from, self._to, self._only = 0, code, at, at + more, only

    def _fails(self, name: str) -> bool:
        if name in self._only:
            self.calls += 1
            return self._from <= self.calls - 1 <= self._to
        return False


def _failing(name):
    real = getattr(Io, name)

    def call(self, *arguments):
        if self._fails(name):
            if name == "pwrite":
                fd, data, offset = arguments
                real(self, fd, bytes(data)[: len(data) // 2], offset)
            if name == "commit":
                raise sqlite3.OperationalError("database or disk is full")
            raise OSError(self._code, os.strerror(self._code))
        return real(self, *arguments)

    return call


for _name in CALLS:
    setattr(FailIo, _name, _failing(_name))


def endure(directory: Path, story: Story, io: Io, *, reads: bool = False) -> Iterator[str]:
    """Tell the story on a failing disk and then, restarted, on a sound one; what is wrong, in words.

    ``reads``: reading fails too, so a record may become a miss; what is served must still be right.
    """
    try:
        store = open_faulty(directory, story, io)
    except StoreError:
        store = None
    stored: frozenset[str] = frozenset()
    for number, step in enumerate(story.steps):
        if store is None:
            break
        if step.what == "restart":
            store.close()
            try:
                store = open_faulty(directory, story, io, NOW_S + 60 * number)
            except StoreError:  # a start may fail on such a disk, with a reason in a line
                store = None
        else:
            yield from _one_step(store, directory, step, io)
        stored = frozenset(names(directory, story))
        if store:
            yield from _serves(store, story, stored, f"step {number}", all_of_it=not reads)
    if store:
        store.close()
    told = Acknowledged(len(story.steps), frozenset() if reads else stored, stored)
    if reads:
        yield from _only_reasoned(directory, story)
        return
    yield from (f"after a restart: {problem}" for problem in problems(directory, story, told))


def _one_step(store, directory: Path, step: Step, io: Io) -> Iterator[str]:
    if step.what == "purge":
        try:
            Tenants(directory, MASTER_KEY, io).purge(step.tenant)
        except OSError:
            Tenants(directory, MASTER_KEY).purge(step.tenant)
    elif step.what == "put":
        for result in store.put_all([job_of(piece) for piece in step.pieces]):
            if not result.stored and not result.reason:
                yield "a put was refused without a reason"
        status = store.status()
        if not status.writing and not status.reason:
            yield "writing stopped without a reason"


def _only_reasoned(directory: Path, story: Story) -> Iterator[str]:
    """After failing reads: a restart, everything right or missed, and the next put works."""
    store = open_faulty(directory, story)
    yield from _serves(store, story, frozenset(), "after a restart", all_of_it=False)
    yield from next_put(store)
    store.close()


def _serves(
    store, story: Story, stored: frozenset[str], when: str, *, all_of_it: bool = True
) -> Iterator[str]:  # fmt: skip
    """Everything the index names is served; nothing else is."""
    for (tenant, chat), tokens in story.chats.items():
        for boundary in (256, tokens):
            found, what = look(store, tenant, chat, boundary + 1), f"{when}: {tenant}/{chat} at {boundary}"
            yield from wrong_bits(found, chat, what)
            need = reach(stored, tenant, chat, boundary)
            if all_of_it and found.hit.tokens != need:
                yield f"{what}: {found.hit.tokens} of {need} ({found.hit.reason})"


# -- a file system of its own


def fill(directory: Path, kind: str) -> Iterator[str]:
    """Everything below happens in a mount namespace that ends with this process."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(directory)]
    else:
        image = directory.with_name("image")
        image.write_bytes(bytes(4 << 20))
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True)
        mount = ["mount", "-o", "loop", str(image), str(directory)]
    subprocess.run(mount, check=True)
    ballast = directory / "ballast"
    free = os.statvfs(directory)
    ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 600_000)))
    story = make_story(3, small=False)
    store = open_faulty(directory / "kv", story)
    full = ""
    for step in story.steps:
        if step.what == "put":
            for result in store.put_all([job_of(piece) for piece in step.pieces]):
                full = full or result.reason
                if not result.stored and not result.reason.startswith(("ENOSPC", "index: ", "evicted")):
                    yield f"refused with {result.reason!r}"
    stored = frozenset(names(directory / "kv", story))
    if not full or store.status().writing:
        yield f"the disk never got full ({full!r})"
    if len(stored) < 5:
        yield f"only {len(stored)} records before it was full"
    yield from _serves(store, story, stored, "full")
    store.close()
    yield from _full_restart(directory / "kv", story, stored)
    ballast.unlink()
    yield from problems(directory / "kv", story, Acknowledged(len(story.steps), stored, stored))


def _full_restart(directory: Path, story: Story, stored: frozenset[str]) -> Iterator[str]:
    """A start on a disk without a free byte serves what is there, or is refused in one line; it loses nothing."""
    with (directory.parent / "more").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(512)):
            pass
    try:
        store = open_faulty(directory, story)
    except StoreError:  # SQLite needs a few bytes beside the index; the server then serves without the cache
        store = None
    if store:
        yield from _serves(store, story, stored, "restarted while full")
        if store.put(job_of(Piece("default", 77, 1280, (1280,)))).stored:
            yield "a put was stored on a full disk"
        store.close()
    (directory.parent / "more").unlink()


if __name__ == "__main__":
    for problem in fill(Path(sys.argv[1]), sys.argv[2]):
        print(problem)
