"""Large reads and writes that leave the page cache as they found it.

Sources are read by few, large, scattered reads and dropped from the cache behind; output goes past the cache
(O_DIRECT) from page-aligned buffers where the file system can, through it and then dropped where it cannot.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from appliance.errors import CheckpointError
from exporter.object_plan import FileRange, Record

PAGE_BYTES = 4096
MAX_OPEN_FILES = 64
_Piece = tuple[FileRange, memoryview]  # what is read, and where to


def page_buffer(size_bytes: int) -> memoryview:
    """Writable memory that starts on a page, as O_DIRECT wants it."""
    return memoryview(mmap.mmap(-1, size_bytes))[:size_bytes]


def read_back(path: Path, piece_bytes: int = 16 << 20) -> Iterator[memoryview]:
    """The file in pieces (each valid until the next), its pages dropped behind."""
    buffer, offset = page_buffer(min(piece_bytes, max(path.stat().st_size, 1))), 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(buffer):
            yield buffer[:count]
            os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_DONTNEED)
            offset += count


class SourceFiles:
    """The files that records are read from, kept open."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def fill(self, record: Record, out: memoryview) -> int:
        """The record's pieces into ``out``, zeros behind; returns how many bytes are not padding.

        CheckpointError names the file and tensor that cannot be read or ends early.
        """
        at, pieces = 0, []
        for piece in record.pieces:
            size_bytes = piece.size_bytes if isinstance(piece, FileRange) else len(piece)
            place = out[at : at + size_bytes]
            if isinstance(piece, FileRange):
                pieces.append((piece, place))
            else:
                place[:] = piece
            at += size_bytes
        for run in _runs(pieces):
            self._read(run)
        if at < len(out):
            out[at:] = bytes(len(out) - at)
        return at

    def _read(self, run: Sequence[_Piece]) -> None:
        """One read of pieces that follow each other in a file, scattered to where each belongs."""
        info = run[0][0].info
        try:
            fd = self._open(info.file)
            offset, total = info.offset + run[0][0].start, sum(piece.size_bytes for piece, _ in run)
            if os.preadv(fd, [place for _, place in run], offset) != total:
                for piece, place in run:
                    _read_exactly(fd, piece, place)
            os.posix_fadvise(fd, offset, total, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"{info.file}: {info.name} cannot be read ({error.strerror})") from None

    def _open(self, path: Path) -> int:
        if path not in self._fds:
            if len(self._fds) >= MAX_OPEN_FILES:
                self.close()
            self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.posix_fadvise(self._fds[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._fds[path]


class OutputFile:
    """A file written at given offsets, from page-aligned buffers; opened for going on, never emptied."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._fd, self._direct = os.open(path, flags | os.O_DIRECT, 0o644), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd, self._direct = os.open(path, flags, 0o644), False

    def close(self) -> None:
        os.close(self._fd)

    def read(self, out: memoryview, offset: int) -> bool:
        """Fill ``out`` from ``offset``; False if the file ends before."""
        self._buffered()
        done = 0
        while done < len(out):
            count = os.preadv(self._fd, [out[done:]], offset + done)
            if count == 0:
                return False
            done += count
        os.posix_fadvise(self._fd, offset, len(out), os.POSIX_FADV_DONTNEED)
        return True

    def truncate(self, size_bytes: int) -> None:
        """Cut to ``size_bytes`` if longer; what follows is written past the page cache again."""
        if os.fstat(self._fd).st_size > size_bytes:
            os.ftruncate(self._fd, size_bytes)
        if self._direct:
            self._flags(os.O_DIRECT)

    def write(self, data: memoryview, offset: int) -> None:
        """All of ``data`` at ``offset``; OSError when the disk is full."""
        whole = len(data) // PAGE_BYTES * PAGE_BYTES
        done = 0
        while done < len(data):
            if self._direct and done >= whole:
                self._buffered()  # the last bytes of a file that ends within a page
            end = whole if self._direct and done < whole else len(data)
            try:
                done += os.pwrite(self._fd, data[done:end], offset + done)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._buffered()  # this file system wants another alignment
                self._direct = False

    def sync(self) -> None:
        """Everything on disk, nothing left in the page cache."""
        os.fsync(self._fd)
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _buffered(self) -> None:
        if self._direct:
            self._flags(0)

    def _flags(self, direct: int) -> None:
        now = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, now & ~os.O_DIRECT | direct)


def _runs(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces in file order, those that follow each other without a gap together."""
    runs: list[list[_Piece]] = []
    end = (Path(), -1)
    for piece, place in sorted(pieces, key=lambda p: (p[0].info.file, p[0].info.offset + p[0].start)):
        begin = (piece.info.file, piece.info.offset + piece.start)
        if begin != end or not runs:
            runs.append([])
        runs[-1].append((piece, place))
        end = (begin[0], begin[1] + piece.size_bytes)
    return runs


def _read_exactly(fd: int, piece: FileRange, out: memoryview) -> None:
    info, done = piece.info, 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], info.offset + piece.start + done)
        if count == 0:
            left = info.size_bytes - piece.start - done
            raise CheckpointError(f"{info.file}: {info.name} ends {left} bytes early; copy the file again")
        done += count
