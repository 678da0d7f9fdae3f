"""The end of a sealed segment: a footer record with the headers of all its records, and a block that points at it.

Two reads therefore tell what a sealed segment holds. Of one that is not sealed (or whose end is damaged) the headers
are found by walking. Headers are claims either way: each record proves itself when it is read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.errors import StoreError
from runtime.kv.files import Io
from runtime.kv.record import ALIGN_BYTES, FORMAT, HEADER_BYTES, Kind, RecordHeader, record_bytes, seal, unseal

_MAGIC = b"SKVT"
_TRAILER = struct.Struct("<4sH2xIII")  # magic, format, zeros, offset of the footer / 4096, headers in it, segment


def footer_bytes(count: int) -> int:
    """What sealing a segment of ``count`` records adds to its file."""
    return record_bytes(count * HEADER_BYTES) + ALIGN_BYTES


def seal_footer(segment: int, offset: int, epoch: bytes, packed: Sequence[bytes], created_s: int,
                cipher: AESGCM) -> bytes:  # fmt: skip
    """Footer record and trailer block, to be written at ``offset``; ``packed`` are the 128-byte headers in order."""
    payload = b"".join(packed)
    header = RecordHeader(Kind.FOOTER, bytes(16), bytes(16), bytes(32), segment, len(packed), len(payload), epoch,
                          offset, created_s)  # fmt: skip
    trailer = _TRAILER.pack(_MAGIC, FORMAT, offset // ALIGN_BYTES, len(packed), segment)
    return bytes(seal(header, payload, cipher)) + trailer.ljust(ALIGN_BYTES, b"\0")


def read_footer(segment: int, path: Path, io: Io, cipher: AESGCM) -> list[RecordHeader] | None:
    """The headers of a sealed segment by two reads; None when it is not sealed or its end does not open.

    Raises OSError as the system says.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        end = os.fstat(fd).st_size // ALIGN_BYTES * ALIGN_BYTES
        trailer = _read(io, fd, max(end - ALIGN_BYTES, 0), _TRAILER.size)
        if len(trailer) < _TRAILER.size:
            return None
        magic, form, place, count, named = _TRAILER.unpack(trailer)
        offset, size_bytes = place * ALIGN_BYTES, record_bytes(count * HEADER_BYTES)
        if (magic, form, named) != (_MAGIC, FORMAT, segment) or offset + size_bytes + ALIGN_BYTES != end:
            return None
        raw = _read(io, fd, offset, size_bytes)
        header = RecordHeader.unpack(raw[:HEADER_BYTES])
        wanted = (Kind.FOOTER, segment, count, offset, count * HEADER_BYTES)
        if header is None or wanted != (header.kind, header.first_token, header.end_token, header.offset,
                                        header.payload_bytes):  # fmt: skip
            return None
        payload = unseal(header, raw, cipher)
    except StoreError:
        return None
    finally:
        os.close(fd)
    found = [RecordHeader.unpack(payload[i : i + HEADER_BYTES]) for i in range(0, len(payload), HEADER_BYTES)]
    return [header for header in found if header]


def walk(fd: int, end: int, io: Io) -> Iterator[RecordHeader]:
    """The headers of the records in the first ``end`` bytes, footers left out; what is no header is stepped over."""
    at = 0
    while at + ALIGN_BYTES <= end:
        header = RecordHeader.unpack(_read(io, fd, at, HEADER_BYTES))
        if header is None or header.offset != at or at + header.size_bytes > end:
            at += ALIGN_BYTES
            continue
        if header.kind is not Kind.FOOTER:
            yield header
        at += header.size_bytes


def _read(io: Io, fd: int, offset: int, size_bytes: int) -> bytes:
    buffer = bytearray(size_bytes)
    return bytes(buffer[: io.preadv(fd, memoryview(buffer), offset)])
