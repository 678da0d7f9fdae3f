"""The restore pipeline against records written one by one: order, what a failure leaves, memory, threads, files."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.errors import StoreError
from runtime.kv import reading
from runtime.kv.files import Io
from runtime.kv.reading import ReadItem, read_records
from runtime.kv.record import HEADER_BYTES, Kind, RecordHeader, record_bytes, seal

CIPHER = AESGCM(bytes(range(32)))
SIZES = (5000, 5000, 100, 70_000, 5000, 1, 33_000, 5000, 4096, 9000, 5000, 60_000, 5000, 5000)


class Folder:
    """Segments in a folder, as the store shows them to the reading."""

    def __init__(self, path: Path, io: Io | None = None) -> None:
        self._path, self.io = path, io or Io()

    def path(self, segment: int) -> Path:
        return self._path / f"{segment:04d}.kvs"


def payload_of(i: int) -> bytes:
    return np.random.default_rng(i).bytes(SIZES[i % len(SIZES)])


def write_records(folder: Folder, count: int, *, per_segment: int = 5, gap_after: tuple[int, ...] = ()) -> list:
    """``count`` records, ``per_segment`` a file; a foreign record stands after each of ``gap_after``."""
    items = []
    for i in range(count):
        segment = i // per_segment
        path = folder.path(segment)
        offset = path.stat().st_size if path.exists() else 0
        header = RecordHeader(Kind.BLOCK, b"f" * 16, b"t" * 16, bytes([i]) * 32, 256 * i, 256 * i + 256,
                              len(payload_of(i)), i.to_bytes(8, "little"), offset, 7)  # fmt: skip
        items.append(ReadItem(segment, header, CIPHER))
        with path.open("ab") as file:
            file.write(seal(header, payload_of(i), CIPHER))
            file.write(bytes(8192) if i in gap_after else b"")
    return items


def read_all(folder: Folder, items: list) -> tuple[list[tuple[int, bytes]], object]:
    got: list[tuple[int, bytes]] = []
    count, error = read_records(folder, items, lambda i, view: got.append((i, bytes(view))))
    assert count == len(got)
    return got, error


def expect(count: int) -> list[tuple[int, bytes]]:
    return [(i, payload_of(i)) for i in range(count)]


@pytest.fixture(params=["direct", "through the page cache", "no direct reads"])
def path_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All three ways a span is read; the tests' files are in the page cache, so the probe is answered for them."""
    monkeypatch.setattr(reading, "SPAN_BYTES", 40_000)  # several spans a file, and one longer than a span
    monkeypatch.setattr(reading._Segment, "_cached", lambda self, offset: request.param != "direct")
    if request.param == "no direct reads":
        monkeypatch.setattr(os, "O_DIRECT", 0)
    return request.param


@pytest.mark.parametrize("count", [0, 1, 2, 14])
def test_every_record_in_order(count: int, path_kind: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    items = write_records(folder, count, gap_after=(2, 8))
    assert read_all(folder, items) == (expect(count), None)
    assert read_all(folder, items[1:])[0] == [(i - 1, payload) for i, payload in expect(count)[1:]]


def test_records_of_another_order_are_found_too(path_kind: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    items = write_records(folder, 14)
    order = np.random.default_rng(1).permutation(14).tolist()
    got, error = read_all(folder, [items[i] for i in order])
    assert [payload for _, payload in got] == [payload_of(i) for i in order]
    assert error is None


@pytest.mark.parametrize("region", ["header", "payload", "tag"])
@pytest.mark.parametrize("damaged", [0, 1, 6, 13])
def test_a_flipped_bit_ends_the_reading_before_it(damaged: int, region: str, path_kind: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    items = write_records(folder, 14)
    header = items[damaged].header
    inside = {"header": 121, "payload": HEADER_BYTES, "tag": HEADER_BYTES + header.payload_bytes + 3}[region]
    flip(folder.path(items[damaged].segment), header.offset + inside)
    got, error = read_all(folder, items)
    assert got == expect(damaged)
    assert isinstance(error, StoreError)
    assert ("another header" if region == "header" else "not authentic") in str(error)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_padding_is_not_looked_at(path_kind: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    items = write_records(folder, 3)
    flip(folder.path(0), items[1].header.offset - 1)
    assert read_all(folder, items) == (expect(3), None)


@pytest.mark.parametrize("cut", [0, 1, 4096, 4097, 30_000, 60_000])
def test_a_file_cut_short_gives_what_is_left(cut: int, path_kind: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    items = write_records(folder, 14)
    os.truncate(folder.path(1), cut)
    whole = sum(cut >= item.header.offset + item.header.size_bytes for item in items[5:10])
    got, error = read_all(folder, items)
    assert got == expect(5 + whole)
    assert isinstance(error, StoreError)
    assert "cut short" in str(error)


def test_a_missing_file_is_an_error_of_its_first_record(path_kind: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    items = write_records(folder, 14)
    folder.path(1).unlink()
    got, error = read_all(folder, items)
    assert got == expect(5)
    assert isinstance(error, FileNotFoundError)


def test_files_may_be_unlinked_once_the_reading_has_begun(path_kind: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    items = write_records(folder, 14)
    got = []

    def sink(i: int, view: memoryview) -> None:
        for segment in range(3):
            folder.path(segment).unlink(missing_ok=True)
        got.append((i, bytes(view)))

    assert read_records(folder, items, sink) == (14, None)
    assert got == expect(14)


class FailingIo(Io):
    """``error`` from every read that begins at or beyond ``offset`` of the descriptors of one file."""

    def __init__(self, path: Path, offset: int, error: int) -> None:
        self.file, self.offset, self.error = path, offset, error

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        if os.path.samestat(os.fstat(fd), self.file.stat()):
            if offset >= self.offset:
                raise OSError(self.error, os.strerror(self.error))
            buffer = buffer[: self.offset - offset]  # a disk gives what stands before a bad sector
        return super().preadv(fd, buffer, offset)


@pytest.mark.parametrize("bad", [0, 4096, 8192, 24_576, 40_960])
def test_a_bad_sector_ends_it_with_what_was_verified(bad: int, path_kind: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    items = write_records(folder, 14)
    folder.io = FailingIo(folder.path(1), bad, errno.EIO)
    good = sum(bad >= item.header.offset + item.header.size_bytes for item in items[5:10])
    got, error = read_all(folder, items)
    assert got == expect(5 + good)
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO


def test_a_disk_that_refuses_direct_reads_is_read_the_ordinary_way(path_kind: str, tmp_path: Path) -> None:
    class Refusing(Io):
        def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "alignment")
            return super().preadv(fd, buffer, offset)

    folder = Folder(tmp_path, Refusing())
    assert read_all(folder, write_records(folder, 14)) == (expect(14), None)


@pytest.mark.parametrize(("field", "value"), [("offset", 4097), ("offset", -4096), ("offset", 1 << 44),
                                              ("payload_bytes", 1 << 40), ("created_s", -1)])  # fmt: skip
def test_places_that_only_a_broken_index_names(field: str, value: int, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    items = write_records(folder, 9)
    items[6] = dataclasses.replace(items[6], header=dataclasses.replace(items[6].header, **{field: value}))
    got, error = read_all(folder, items)
    assert got == expect(6)
    assert isinstance(error, StoreError)


def test_what_the_sink_raises_goes_through_and_leaves_no_thread_and_no_file(path_kind: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    items = write_records(folder, 14)
    before = open_files(), threading.active_count()

    def sink(i: int, view: memoryview) -> None:
        if i == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read_records(folder, items, sink)
    flip(folder.path(0), items[2].header.offset)
    assert read_all(folder, items)[0] == expect(2)
    assert (open_files(), threading.active_count()) == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_view_cannot_be_written_and_is_used_again(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    items, views = write_records(folder, 2), []

    def sink(i: int, view: memoryview) -> None:
        assert view.readonly
        views.append(view)

    read_records(folder, items, sink)
    assert bytes(views[0]) == bytes(views[1]) == payload_of(1)


def test_spans_are_coalesced_up_to_their_length(tmp_path: Path) -> None:
    """Contiguous records of one file share a read; a gap, another file or 4 MiB end it."""
    folder = Folder(tmp_path)
    items = write_records(folder, 14, per_segment=10, gap_after=(3,))
    spans = reading._spans(items)
    assert [(span.first, span.stop) for span in spans] == [(0, 4), (4, 10), (10, 14)]
    assert spans[0].size_bytes == sum(record_bytes(len(payload_of(i))) for i in range(4))


def test_the_probe_of_the_page_cache_tells_cached_from_cold(tmp_path: Path) -> None:
    """A file just written is in memory; after the system was asked to drop it, it is not (where it does drop it)."""
    folder = Folder(tmp_path)
    write_records(folder, 14, per_segment=14)
    with folder.path(0).open("rb") as file:
        os.fsync(file.fileno())
        segment = reading._Segment(folder.path(0), Io())
        try:
            warm = segment._cached(0)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            cold = segment._cached(65_536)
        finally:
            segment.close()
    assert warm or not cold  # a file system without a page cache, or one that keeps all: then both are equal
