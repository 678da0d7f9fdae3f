"""Segment files ``NNNN.kvs``: append-only, 256 MiB, 4 KiB-aligned records; a full one is sealed with its own index.

``append`` extends the newest file and seals it when the next record does not fit, ``sync`` makes the bytes durable,
``accept`` follows the index's commit, ``abandon`` cuts everything off that was not accepted. Bytes beyond an indexed
end do not exist: ``recover`` removes them at the next start.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from runtime.kv.files import Io
from runtime.kv.footer import footer_bytes, seal_footer, walk
from runtime.kv.record import ALIGN_BYTES, EPOCH_BYTES, RecordHeader, seal

SEGMENT_BYTES = 256 * 1024 * 1024
_log = logging.getLogger("solocard.kv")


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentRow:
    """One file as the index has it: ``end_bytes`` of it count, ``sealed`` ones are never appended to."""

    number: int
    end_bytes: int
    sealed: bool
    created_s: int
    records: int = 0  # what the footer will list


class Segments:
    """The files of one store directory. Not thread-safe: the store's write lock is around it.

    ``cipher`` encrypts the footers (the store's key, no tenant's).
    """

    def __init__(self, directory: Path, io: Io, segment_bytes: int, cipher: AESGCM) -> None:
        self._directory, self._io, self._segment_bytes, self._cipher = directory, io, segment_bytes, cipher
        self._accepted: dict[int, SegmentRow] = {}
        self._pending: dict[int, SegmentRow] = {}
        self._fds: dict[int, int] = {}
        self._epoch = b""
        self._packed: list[bytes] = []  # headers in the segment that is appended to, once it is open
        self._next = 0  # numbers are never used twice while the process lives: a lookup may still hold an old row
        self._new_file = False
        self.used_bytes = 0  # sum of the accepted ends: what the files hold

    def path(self, segment: int) -> Path:
        return segment_path(self._directory, segment)

    @property
    def io(self) -> Io:
        return self._io

    @property
    def promised_bytes(self) -> int:
        """What the files hold, what is written and not yet accepted, and the footer the open segment will get."""
        number = self.open_segment()
        footer = 0 if number is None else footer_bytes(self.rows()[number].records)
        return self.total_bytes + footer

    @property
    def total_bytes(self) -> int:
        """What the files hold and what is written and not yet accepted."""
        return sum(row.end_bytes for row in self.rows().values())

    def rows(self) -> dict[int, SegmentRow]:
        """Every segment, what was written since the last ``accept`` included."""
        return {**self._accepted, **self._pending}

    def pending(self) -> list[SegmentRow]:
        """The segments that changed since the last ``accept``."""
        return list(self._pending.values())

    # -- opening

    def recover(self, indexed: Iterable[SegmentRow]) -> list[SegmentRow]:
        """Cut each file to its indexed end, remove files the index does not know; returns the rows that got shorter.

        A row with a smaller end than the indexed one means that the file is shorter than it must be. Raises
        sqlite3.DatabaseError, nothing cut or removed, for an index that no crash leaves: it is damaged.
        """
        known, short = {segment_name(row.number): row for row in indexed}, []
        with os.scandir(self._directory) as entries:  # 90 GB are 350 files: pathlib would take longer than SQLite
            files = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".kvs")}
        _check_sealed(known, files)
        self._accepted.clear()
        for name, size_bytes in files.items():
            row = known.pop(name, None)
            if row is None or row.end_bytes <= 0:
                self._io.unlink(self._directory / name)
                continue
            end = min(row.end_bytes, size_bytes // ALIGN_BYTES * ALIGN_BYTES)
            if end != size_bytes:
                self._io.truncate(self._directory / name, end)
            if end != row.end_bytes:
                row = dataclasses.replace(row, end_bytes=end, sealed=True)  # what is left is never appended to
                short.append(row)
            if end:
                self._accepted[row.number] = row
            else:
                self._io.unlink(self._directory / name)
        short += [dataclasses.replace(row, end_bytes=0) for row in known.values()]
        self._next = max(self._next, 1 + max(self._accepted, default=-1))
        self._add_up()
        return short

    def _add_up(self) -> None:
        self.used_bytes = sum(row.end_bytes for row in self._accepted.values())

    # -- writing

    def need_bytes(self, sizes_bytes: Iterable[int]) -> int:
        """How much ``promised_bytes`` will grow when records of these sizes (padding included) are appended."""
        number = self.open_segment()
        row = None if number is None else self.rows()[number]
        end, count = (row.end_bytes, row.records) if row else (0, 0)
        total = -(footer_bytes(count) if count else 0)
        for size_bytes in sizes_bytes:
            if count and end + size_bytes + footer_bytes(count + 1) > self._segment_bytes:
                total += footer_bytes(count)
                end = count = 0
            end, count, total = end + size_bytes, count + 1, total + size_bytes
        return total + (footer_bytes(count) if count else 0)

    def append(
        self, draft: RecordHeader, payload: bytes | memoryview, cipher: AESGCM, now_s: int
    ) -> tuple[int, RecordHeader]:  # fmt: skip
        """Write one record; (segment, the header as written). ``draft``'s epoch and offset do not count.

        Raises OSError (ENOSPC, EIO …) as the system says; then ``abandon``.
        """
        number = self._with_room(draft.size_bytes, now_s)
        header = dataclasses.replace(draft, epoch=self._epoch, offset=self._end(number))
        self._write(number, seal(header, payload, cipher), now_s, records=1)
        self._packed.append(header.pack())
        return number, header

    def seal_open(self, now_s: int) -> None:
        """Write the footer of the segment that is appended to, where there is one; still to be synced and accepted."""
        number = self.open_segment()
        if number is None:
            return
        self._open(number)
        end = self._end(number)
        self._write(number, seal_footer(number, end, self._epoch, self._packed, now_s, self._cipher), now_s)
        self._pending[number] = dataclasses.replace(self._pending[number], sealed=True)

    def open_segment(self) -> int | None:
        """The segment that is appended to; None when the next record starts one."""
        rows = self.rows()
        number = max(rows, default=-1)
        return None if number < 0 or rows[number].sealed else number

    def _with_room(self, size_bytes: int, now_s: int) -> int:
        number = self.open_segment()
        if number is not None:
            self._open(number)
            if self._end(number) + size_bytes + footer_bytes(len(self._packed) + 1) <= self._segment_bytes:
                return number
            self.seal_open(now_s)
        self._open(self._next)
        self._next += 1
        return self._next - 1

    def _open(self, number: int) -> None:
        if number in self._fds:
            return
        self._new_file = self._new_file or not self.path(number).exists()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._fds[number] = os.open(self.path(number), flags, 0o600)
        self._epoch = secrets.token_bytes(EPOCH_BYTES)  # a place may have been written before: never with this epoch
        self._packed = [header.pack() for header in walk(self._fds[number], self._end(number), self._io)]

    def _write(self, number: int, raw: bytes | bytearray, now_s: int, records: int = 0) -> None:
        row = self.rows().get(number) or SegmentRow(number, 0, False, now_s)
        self._pending[number] = dataclasses.replace(
            row, end_bytes=row.end_bytes + len(raw), records=row.records + records
        )
        self._io.pwrite(self._fds[number], raw, row.end_bytes)

    def _end(self, number: int) -> int:
        row = self.rows().get(number)
        return row.end_bytes if row else 0

    # -- committing

    def sync(self) -> None:
        """Make every written record and new file name durable."""
        for number in self._pending:
            self._io.fdatasync(self._fds[number])
        if self._new_file:
            self._io.sync_directory(self._directory)

    def accept(self) -> None:
        """The index has committed: what was written is part of the store."""
        self._accepted.update(self._pending)
        self._pending.clear()
        self._add_up()
        self._new_file = False
        number = self.open_segment()
        for other in [n for n in self._fds if n != number]:
            os.close(self._fds.pop(other))

    def abandon(self) -> None:
        """Cut off everything not accepted and forget the epoch. Never raises: what stays is cut at the next start."""
        for number in self._pending:
            row = self._accepted.get(number)
            try:
                if row:
                    self._io.truncate(self.path(number), row.end_bytes)
                else:
                    self._io.unlink(self.path(number))
            except OSError as error:
                _log.warning("%s: not cut back now (%s)", self.path(number).name, error.strerror)
        self._pending.clear()
        self._new_file = False
        self.close()

    def remove(self, numbers: Iterable[int]) -> None:
        """Unlink segments that the index has forgotten. Never raises: what stays is removed at the next start."""
        for number in numbers:
            self._accepted.pop(number, None)
            if number in self._fds:
                os.close(self._fds.pop(number))
            try:
                self._io.unlink(self.path(number))
            except OSError as error:
                _log.warning("%s: not removed now (%s)", self.path(number).name, error.strerror)
        self._add_up()

    def close(self) -> None:
        """Close the append files; the next record opens them with a fresh epoch."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def _check_sealed(known: Mapping[str, SegmentRow], files: Mapping[str, int]) -> None:
    """A sealed file is never appended to, and a file is made before its row and removed after it."""
    for name, row in known.items():
        if row.sealed and files.get(name, 0) > row.end_bytes:
            raise sqlite3.DatabaseError(f"{name} is sealed and longer than its row says ({row.end_bytes} bytes)")
    if known.keys() - files.keys() and files.keys() - known.keys():
        raise sqlite3.DatabaseError("segments without a row beside rows without a segment")


def segment_name(number: int) -> str:
    return f"{number:04d}.kvs"


def segment_path(directory: Path, number: int) -> Path:
    return directory / segment_name(number)

