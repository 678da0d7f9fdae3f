"""Records read in order, each authenticated and handed over; the first that does not open ends it.

A restore is bound by the disk: records that follow one another are read by one call into a few buffers that are used
again and again, by threads that do nothing else, while the calling thread authenticates and decrypts what has arrived
into one more buffer and hands that to the sink. Reads go past the page cache where the file system can: copying out of
it costs the processor more than decrypting does.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.errors import StoreError
from runtime.kv.files import Io
from runtime.kv.record import ALIGN_BYTES, HEADER_BYTES, TAG_BYTES, RecordHeader

SPAN_BYTES = 4 * 1024 * 1024  # read by one call, at most, unless one record is longer
READERS = 2  # threads: the disk has the next span to do while one of them waits for the interpreter
BUFFERS = 2  # per thread: one being read into, one being decrypted
MAX_RECORD_BYTES = 256 * 1024 * 1024  # no segment holds a longer one: an index that says so is wrong
_PLACES = 1 << 44  # the header's u32 of 4 KiB steps
_log = logging.getLogger("solocard.kv")

Deliver = Callable[[int, memoryview], None]


class Files(Protocol):
    """Where segments are and how they are read."""

    @property
    def io(self) -> Io: ...
    def path(self, segment: int, /) -> Path: ...


@dataclass(frozen=True, slots=True)
class ReadItem:
    """One record: the segment it is in, the only header that may stand there (with its offset), the key."""

    segment: int
    header: RecordHeader
    cipher: AESGCM


@dataclass(frozen=True, slots=True)
class _Span:
    """Records ``first`` … ``stop`` − 1 of those wanted: ``size_bytes`` from ``offset`` on, without a gap."""

    first: int
    stop: int
    segment: int
    offset: int
    size_bytes: int


@dataclass(slots=True)
class _Arrived:
    """What a span's read gave: the first ``got_bytes`` of ``buffer``, and the error that kept the rest away."""

    span: _Span
    buffer: memoryview
    got_bytes: int
    error: Exception | None = None


def read_records(files: Files, wanted: Sequence[ReadItem], sink: Deliver) -> tuple[int, OSError | StoreError | None]:
    """Give ``sink`` (position in ``wanted``, payload) of each record in turn; the view is good during the call only.

    Every file is opened before anything is read, so a segment may be unlinked meanwhile. Returns how many records
    were given, and the error of the one after them: OSError where it could not be read (a missing file included),
    StoreError where another record stands, or it is not authentic. What ``sink`` raises goes through. Memory: READERS
    times BUFFERS spans and one payload, whatever the number of records.
    """
    for i, item in enumerate(wanted):
        if not _possible(item.header):
            given, error = read_records(files, wanted[:i], sink)
            return given, error or StoreError(f"KV record at an impossible place ({item.header.offset})")
    spans = _spans(wanted)
    if not spans:
        return 0, None
    opened = _Opened(files, spans)
    payload = bytearray(max(item.header.payload_bytes for item in wanted))
    try:
        with contextlib.closing(_arrivals(opened, spans)) as arrivals:
            for arrived in arrivals:
                for i in range(arrived.span.first, arrived.span.stop):
                    try:
                        view = _open_record(wanted[i], _record(arrived, wanted[i]), payload)
                    except (OSError, StoreError) as error:
                        return i, error
                    sink(i, view)
    finally:
        opened.close()
    return len(wanted), None


def _possible(header: RecordHeader) -> bool:
    """False for a place or length that only a broken index can name."""
    aligned = 0 <= header.offset < _PLACES and header.offset % ALIGN_BYTES == 0
    return aligned and header.payload_bytes >= 0 and header.size_bytes <= MAX_RECORD_BYTES


def _spans(wanted: Sequence[ReadItem]) -> list[_Span]:
    spans: list[_Span] = []
    for i, item in enumerate(wanted):
        size_bytes, offset = item.header.size_bytes, item.header.offset
        last = spans[-1] if spans else None
        if last and last.segment == item.segment and last.offset + last.size_bytes == offset and (
            last.size_bytes + size_bytes <= SPAN_BYTES
        ):  # fmt: skip
            spans[-1] = _Span(last.first, i + 1, item.segment, last.offset, last.size_bytes + size_bytes)
        else:
            spans.append(_Span(i, i + 1, item.segment, offset, size_bytes))
    return spans


class _Segment:
    """One file, open for reading: past the page cache where the file system can, unless the bytes are in it already.

    Reading into the page cache and copying out of it costs the processor more than decrypting does; direct reads need
    neither. But what was written a moment ago is best taken from memory, so the first page of a span is asked for
    without waiting: where it is there, the span is read the ordinary way.
    """

    def __init__(self, path: Path, io: Io) -> None:
        self._io, self._direct = io, -1
        self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with contextlib.suppress(OSError):  # the probe must not make the system read ahead
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        with contextlib.suppress(OSError):  # this file system has no direct reads
            self._direct = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECT)

    def read(self, buffer: memoryview, offset: int) -> int:
        """As many bytes of ``buffer`` as the file has from ``offset`` on, both multiples of 4096; raises OSError."""
        fd, got = (self._fd if self._direct < 0 or self._cached(offset) else self._direct), 0
        while got < len(buffer):
            try:
                count = self._io.preadv(fd, buffer[got:], offset + got)
            except OSError as error:
                if fd != self._direct or error.errno != errno.EINVAL:
                    raise
                fd, count = self._fd, -1  # not with this disk's block size
            if count >= 0:
                got += count
                if count % ALIGN_BYTES or not count:
                    break
        return got

    def _cached(self, offset: int) -> bool:
        try:
            return os.preadv(self._fd, [bytearray(ALIGN_BYTES)], offset, os.RWF_NOWAIT) > 0
        except OSError:
            return False

    def close(self) -> None:
        os.close(self._fd)
        if self._direct >= 0:
            os.close(self._direct)


class _Opened:
    """The segment files of one read, all opened at once; what could not be opened fails when its turn comes."""

    def __init__(self, files: Files, spans: Sequence[_Span]) -> None:
        self._segments: dict[int, _Segment | OSError] = {}
        for number in dict.fromkeys(span.segment for span in spans):
            try:
                self._segments[number] = _Segment(files.path(number), files.io)
            except OSError as error:
                self._segments[number] = error

    def read(self, span: _Span, buffer: memoryview) -> _Arrived:
        """All of the span, or what stands before the end of the file; or the error."""
        segment = self._segments[span.segment]
        if isinstance(segment, OSError):
            return _Arrived(span, buffer, 0, segment)
        try:
            return _Arrived(span, buffer, segment.read(buffer[: span.size_bytes], span.offset))
        except Exception as error:  # the calling thread raises it when it comes to what is missing
            return _Arrived(span, buffer, 0, error)

    def close(self) -> None:
        for segment in self._segments.values():
            if isinstance(segment, _Segment):
                segment.close()
        self._segments.clear()


class _Reader(threading.Thread):
    """Reads every ``step``-th span from ``first`` on, into two buffers in turn; what arrived waits in ``done``."""

    def __init__(self, opened: _Opened, spans: Sequence[_Span]) -> None:
        super().__init__(name="kv-reader", daemon=True)
        self._opened, self._spans = opened, spans
        self.done: queue.SimpleQueue[_Arrived] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        for _ in range(min(BUFFERS, len(spans))):
            self._free.put(memoryview(mmap.mmap(-1, max(span.size_bytes for span in spans))))
        self.start()

    def run(self) -> None:
        for span in self._spans:
            buffer = self._free.get()
            if buffer is None:
                return
            self.done.put(self._opened.read(span, buffer))

    def free(self, buffer: memoryview | None) -> None:
        """Give a buffer back; None ends the thread."""
        self._free.put(buffer)


def _arrivals(opened: _Opened, spans: Sequence[_Span]) -> Generator[_Arrived, None, None]:
    """Each span once it is read; its buffer is read into again after the next one was asked for."""
    if len(spans) == 1:
        yield opened.read(spans[0], memoryview(mmap.mmap(-1, spans[0].size_bytes)))
        return
    readers = [_Reader(opened, spans[i::READERS]) for i in range(min(READERS, len(spans)))]
    try:
        for i in range(len(spans)):
            reader = readers[i % len(readers)]
            arrived = reader.done.get()
            yield arrived
            reader.free(arrived.buffer)
    finally:
        for reader in readers:
            reader.free(None)
        for reader in readers:
            reader.join()


def _record(arrived: _Arrived, item: ReadItem) -> memoryview:
    """The bytes of one record of a span, fewer at the end of the file; the span's error when they are not there."""
    start = item.header.offset - arrived.span.offset
    stop = start + item.header.size_bytes
    if arrived.error and stop > arrived.got_bytes:
        raise arrived.error
    return arrived.buffer[start : min(stop, arrived.got_bytes)] if start < arrived.got_bytes else memoryview(b"")


def _open_record(item: ReadItem, raw: memoryview, payload: bytearray) -> memoryview:
    """Decrypt ``raw``, which must be the record that ``item`` describes, to the front of ``payload``; StoreError."""
    header = item.header
    packed, end = header.pack(), HEADER_BYTES + header.payload_bytes + TAG_BYTES
    if len(raw) != header.size_bytes:
        raise StoreError(f"KV record at {header.offset} is cut short: {len(raw)} bytes")
    if raw[:HEADER_BYTES] != packed:
        raise StoreError(f"KV record at {header.offset} has another header than its index entry says")
    view = memoryview(payload)[: header.payload_bytes]
    try:
        item.cipher.decrypt_into(header.nonce, raw[HEADER_BYTES:end], packed, view)
    except InvalidTag:
        raise StoreError(f"KV record at {header.offset} is not authentic") from None
    return view.toreadonly()
