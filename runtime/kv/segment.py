"""Segment files ``NNNN.kvs``: append-only, 256 MiB, 4 KiB-aligned records and nothing else.

``place`` and ``write`` extend the newest file, ``sync`` makes the bytes durable, ``accept`` follows the index's
commit, ``abandon`` cuts everything off that was not accepted. Bytes beyond an indexed end do not exist: ``recover``
removes them at the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import BusyError, StoreError
from runtime.kv.record import ALIGN_BYTES, EPOCH_BYTES

SEGMENT_BYTES = 256 * 1024 * 1024
_READ_AHEAD = 8  # records, at least, that the system is told of before they are read
_log = logging.getLogger("solocard.kv")


class Io:
    """The calls that can fail or be cut off; tests hand in others that do."""

    def pwrite(self, fd: int, data: bytes, offset: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def commit(self, connection: sqlite3.Connection) -> None:
        connection.execute("COMMIT")


def lock_directory(directory: Path, io: Io) -> int:
    """Make the store's directory (0700) where needed and lock it for one writer; returns the lock's descriptor.

    Raises BusyError when another process holds it, StoreError when the directory cannot be used.
    """
    try:
        if not directory.is_dir():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            io.sync_directory(directory.parent)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StoreError(f"{directory}: {error.strerror}; the KV cache needs a directory it can write") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise BusyError(f"{directory} is in use by another solocard-serve; stop it first") from None
    return fd


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record goes: ``offset`` bytes into segment ``segment``, written by the appender ``epoch``."""

    segment: int
    offset: int
    epoch: bytes


class Segments:
    """The files of one store directory. Not thread-safe: the store's lock is around it."""

    def __init__(self, directory: Path, io: Io, segment_bytes: int) -> None:
        self._directory, self._io, self._segment_bytes = directory, io, segment_bytes
        self._accepted: dict[int, int] = {}
        self._pending: dict[int, int] = {}
        self._fds: dict[int, int] = {}
        self._epoch = b""
        self._new_file = False

    def path(self, segment: int) -> Path:
        return self._directory / f"{segment:04d}.kvs"

    @property
    def used_bytes(self) -> int:
        """Sum of the accepted ends: what the files hold."""
        return sum(self._accepted.values())

    def recover(self, indexed_ends: Mapping[int, int]) -> dict[int, int]:
        """Cut each file to its indexed end, remove files the index does not know; returns the ends that are left.

        An end below the indexed one means that the file is shorter than it must be: the caller drops those rows.
        """
        ends: dict[int, int] = {}
        for path in sorted(self._directory.glob("*.kvs")):
            number, size_bytes = int(path.stem) if path.stem.isdecimal() else -1, path.stat().st_size
            end = min(indexed_ends.get(number, 0), size_bytes // ALIGN_BYTES * ALIGN_BYTES)
            if number < 0 or end == 0:
                path.unlink()
                continue
            if end != size_bytes:
                os.truncate(path, end)
            ends[number] = end
        self._accepted = dict(ends)
        return {number: ends.get(number, 0) for number in indexed_ends}

    def place(self, size_bytes: int) -> Place:
        """The next free place for a record of ``size_bytes``; opens or starts a segment where needed."""
        ends = self.ends()
        number = max(ends, default=0)
        if ends.get(number, 0) and ends[number] + size_bytes > self._segment_bytes:
            number += 1
        if number not in self._fds:
            self._open(number)
        return Place(number, ends.get(number, 0), self._epoch)

    def _open(self, number: int) -> None:
        self._new_file = self._new_file or not self.path(number).exists()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._fds[number] = os.open(self.path(number), flags, 0o600)
        self._epoch = secrets.token_bytes(EPOCH_BYTES)  # a place may have been written before: never with this epoch

    def write(self, place: Place, record: bytes) -> None:
        """Write at ``place``; raises OSError (ENOSPC, EIO …) as the system says."""
        self._pending[place.segment] = place.offset + len(record)
        self._io.pwrite(self._fds[place.segment], record, place.offset)

    def sync(self) -> None:
        """Make every written record and new file name durable."""
        for number in self._pending:
            self._io.fdatasync(self._fds[number])
        if self._new_file:
            self._io.sync_directory(self._directory)

    def ends(self) -> dict[int, int]:
        """Segment → bytes, what was written since the last ``accept`` included."""
        return {**self._accepted, **self._pending}

    def accept(self) -> None:
        """The index has committed: what was written is part of the store."""
        self._accepted.update(self._pending)
        self._pending.clear()
        self._new_file = False
        for number in [n for n in self._fds if n != max(self._accepted)]:
            os.close(self._fds.pop(number))

    def abandon(self) -> None:
        """Cut off everything not accepted and forget the epoch. Never raises: what stays is cut at the next start."""
        for number in self._pending:
            try:
                os.ftruncate(self._fds[number], self._accepted.get(number, 0))
            except OSError as error:
                _log.warning("%s: not cut back now (%s)", self.path(number).name, error.strerror)
        self._pending.clear()
        self._new_file = False
        self.close()

    def close(self) -> None:
        """Close the append files; the next ``place`` opens them with a fresh epoch."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reader]:
        """A reader whose files are closed at the end of the block."""
        reader = Reader(self, self._io)
        try:
            yield reader
        finally:
            reader.close()


class Reader:
    """Reads the records of one lookup into one buffer, telling the system ahead what comes next."""

    def __init__(self, segments: Segments, io: Io) -> None:
        self._segments, self._io = segments, io
        self._fds: dict[int, int] = {}
        self._buffer = bytearray()

    def stream(self, places: Sequence[tuple[int, int, int]]) -> Iterator[memoryview]:
        """The bytes of each (segment, offset, size) in turn, fewer at the end of a file.

        A view is good until the next one is asked for. OSError comes with the place it is about.
        """
        for i, (segment, offset, size_bytes) in enumerate(places):
            if i % _READ_AHEAD == 0:
                for ahead in places[i : i + 2 * _READ_AHEAD]:
                    self._expect(*ahead)
            if len(self._buffer) < size_bytes:
                self._buffer = bytearray(size_bytes)
            view = memoryview(self._buffer)[:size_bytes]
            yield view[: self._io.preadv(self._fd(segment), view, offset)]

    def _expect(self, segment: int, offset: int, size_bytes: int) -> None:
        try:
            os.posix_fadvise(self._fd(segment), offset, size_bytes, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            _log.debug("no read-ahead (%s): the read itself will meet and report the error", error.strerror)

    def _fd(self, segment: int) -> int:
        if segment not in self._fds:
            self._fds[segment] = os.open(self._segments.path(segment), os.O_RDONLY | os.O_NOFOLLOW)
        return self._fds[segment]

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])
