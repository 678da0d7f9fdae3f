"""What the store's parts share: the files, the index they are listed in, the keys and the bounds.

``reserve`` and ``sweep`` (runtime/kv/reclaim.py) work on it; everything that writes is under the store's write lock.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from appliance.errors import StoreError
from runtime.kv.files import Io, is_short
from runtime.kv.fingerprint import Fingerprint
from runtime.kv.index import Index, Row, RowKey, State
from runtime.kv.keys import TenantKeys
from runtime.kv.layout import KvLayout
from runtime.kv.policy import Policy
from runtime.kv.reading import MAX_RECORD_BYTES
from runtime.kv.record import HEADER_BYTES, PARENT_BYTES, Kind, RecordHeader, unseal
from runtime.kv.segment import Segments
from runtime.kv.tail import tail_bytes
from runtime.kv.tenants import Tenants

NO_PARENT = bytes(PARENT_BYTES)
_log = logging.getLogger("solocard.kv")


@dataclass(slots=True)
class Uses:
    """What lookups noticed and the next commit writes: uses of rows, and rows that did not open."""

    touched: dict[RowKey, tuple[int, int]] = field(default_factory=dict)  # → (unix s, how often)
    replays: dict[bytes, int] = field(default_factory=dict)
    damaged: dict[RowKey, Row] = field(default_factory=dict)

    def touch(self, key: RowKey, now_s: int, hits: int = 1) -> None:
        self.touched[key] = (now_s, self.touched.get(key, (0, 0))[1] + hits)

    @property
    def any(self) -> bool:
        return bool(self.touched or self.replays or self.damaged)

    def copy(self) -> Uses:
        return Uses(self.touched.copy(), self.replays.copy(), self.damaged.copy())

    def forget(self, written: Uses) -> None:
        """Drop what is in the index now; what was noted meanwhile stays."""
        for key, use in written.touched.items():
            if self.touched.get(key) == use:
                del self.touched[key]
        for name in written.replays:
            self.replays.pop(name, None)
        for key, row in written.damaged.items():
            if self.damaged.get(key) is row:
                del self.damaged[key]

    def seen(self, row: Row) -> Row:
        """``row`` as it will be after the next commit."""
        lost = self.damaged.get((row.chain, row.kind))
        if lost and lost.place == row.place:
            row = replace(row, state=State.DAMAGED)
        used = self.touched.get((row.chain, row.kind))
        return replace(row, used_s=max(row.used_s, used[0])) if used else row


@dataclass(slots=True)
class Ground:
    """The open store's parts; ``index`` is the writing connection."""

    directory: Path
    io: Io
    index: Index
    segments: Segments
    tenants: Tenants
    policy: Policy
    layout: KvLayout
    fingerprint: Fingerprint
    segment_bytes: int
    clock: Callable[[], float] = time.time
    uses: Uses = field(default_factory=Uses)
    reclaimed_bytes: int = 0  # of segments dropped since the store was opened

    @property
    def fingerprint_id(self) -> bytes:
        return self.fingerprint.digest[:16]

    def used_bytes(self) -> int:
        """All segment files, what is pending, and the footer the open one will get."""
        return self.segments.promised_bytes

    def free_disk_bytes(self) -> int:
        return self.io.free_bytes(self.directory)

    def live_tenants(self) -> frozenset[bytes] | None:
        """Ids of the tenants whose keys exist; None where a key file does not open: then nobody is taken for gone."""
        found = self.tenants.all()
        return None if any(info.damaged for info in found) else frozenset(info.tenant_id for info in found)

    def open_segment(self) -> int | None:
        return self.segments.open_segment()

    def seal_open(self) -> None:
        """Footer, sync, commit; the next record starts a new segment."""
        self._committed(lambda: self.segments.seal_open(int(self.clock())), lambda: None)

    def flush(self) -> Uses:
        """Write what lookups noticed, in the caller's transaction; after its commit ``uses.forget`` what is given."""
        uses = self.uses.copy()
        self.index.touch(uses.touched)
        self.index.set_state(uses.damaged.values(), State.DAMAGED)
        for name, now_s in uses.replays.items():
            self.index.touch_replays([name], now_s)
        return uses

    def write_uses(self) -> None:
        """The same in a transaction of its own, where there is anything to write."""
        if self.uses.any:
            self.index.begin()
            uses = self.flush()
            self.index.commit()
            self.uses.forget(uses)

    def copy_forward(self, rows: Sequence[Row]) -> list[Row]:
        """Write records again at the end, synced but not accepted: the rows with their new places.

        Those that do not open are left out; OSError is raised with everything cut back, also where the system lacks
        files or memory to read them.
        """
        moved: list[Row] = []
        refused = self.tenants.refused()
        if refused and is_short(refused):
            raise refused
        try:
            keys = {tenant_id: self.tenants.keys_of(tenant_id) for tenant_id in {row.tenant_id for row in rows}}
            for row in rows:
                copied = self._copy(row, keys[row.tenant_id])
                if copied:
                    moved.append(copied)
            self.segments.sync()
        except OSError:
            self.segments.abandon()
            raise
        return moved

    def drop(
        self, segment: int, moved: Sequence[Row], tombstones: Mapping[Row, int], written_bytes: int, day: int
    ) -> None:  # fmt: skip
        """Forget a segment: one commit, then the file goes."""
        def change() -> None:
            self.index.move(moved)
            self.index.forget(segment, tombstones)
            self.index.add_written(day, written_bytes)

        size_bytes = self.segments.rows()[segment].end_bytes
        self._committed(lambda: None, change)
        self.reclaimed_bytes += size_bytes
        self.segments.remove([segment])
        self.io.sync_directory(self.directory)

    def _committed(self, write: Callable[[], None], change: Callable[[], None]) -> None:
        try:
            write()
            self.segments.sync()
            self.index.begin()
            change()
            self.index.set_segments(self.segments.pending())
            self.index.commit()
        except BaseException:
            self.segments.abandon()
            self.rollback()
            raise
        self.segments.accept()

    def rollback(self) -> None:
        try:
            self.index.rollback()
        except sqlite3.Error as error:
            _log.warning("KV index: rollback failed (%s)", error)

    def _copy(self, row: Row, keys: TenantKeys | None) -> Row | None:
        if keys is None:
            return None
        try:
            header, raw = read_record(self.segments.path(row.segment), row, self.io)
            payload = unseal(header, raw, keys.cipher)
        except (OSError, StoreError) as error:
            if is_short(error):
                raise
            _log.warning("KV record not moved out of segment %04d: %s", row.segment, error)
            return None
        number, written = self.segments.append(header, payload, keys.cipher, int(self.clock()))
        return replace(row, segment=number, offset=written.offset, epoch=written.epoch)

    def payload_bytes(self, kind: Kind, end_token: int) -> int:
        """How long the payload of a record is that ends there, by this store's layout."""
        if kind is Kind.TAIL:
            return tail_bytes(self.layout, end_token)
        return self.layout.block_bytes if kind is Kind.BLOCK else self.layout.checkpoint_bytes

    def header(self, keys: TenantKeys, row: Row, parent: bytes = NO_PARENT) -> RecordHeader:
        """The only header that may stand at a row's place, by this store's fingerprint and layout."""
        first = row.end_token - self.layout.block_tokens if row.kind is Kind.BLOCK else 0
        return RecordHeader(
            row.kind, self.fingerprint_id, keys.tenant_id, row.chain, first, row.end_token,
            self.payload_bytes(row.kind, row.end_token), row.epoch, row.offset, row.created_s, row.role, parent,
            row.key_generation,
        )  # fmt: skip


def read_record(path: Path, row: Row, io: Io) -> tuple[RecordHeader, bytearray]:
    """The record at a row's place and the header it carries, which is the row's in every field the row has.

    For readers without a layout: length, first token and parent are the header's own word until the tag is checked.
    Raises StoreError where another record stands there, OSError as the system says.
    """
    if not HEADER_BYTES <= row.size_bytes <= MAX_RECORD_BYTES or row.offset < 0:
        raise StoreError(f"KV record at {row.offset} of {path.name} is at an impossible place by its index entry")
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        raw = bytearray(row.size_bytes)
        got = io.preadv(fd, memoryview(raw), row.offset)
    finally:
        os.close(fd)
    header = RecordHeader.unpack(memoryview(raw)[: min(HEADER_BYTES, got)])
    if header is None or got != row.size_bytes or not agrees(header, row):
        raise StoreError(f"KV record at {row.offset} of {path.name} has another header than its index entry says")
    return header, raw


def agrees(header: RecordHeader, row: Row) -> bool:
    """Does a header found at a row's place say what the row says?"""
    found = (header.kind, header.role, header.tenant_id, header.fingerprint_id, header.chain, header.end_token,
             header.offset, header.size_bytes, header.epoch, header.key_generation, header.created_s)  # fmt: skip
    return found == (row.kind, row.role, row.tenant_id, row.fingerprint_id, row.chain, row.end_token,
                     row.offset, row.size_bytes, row.epoch, row.key_generation, row.created_s)  # fmt: skip


def row_of(header: RecordHeader, segment: int) -> Row:
    """The row that a record found in a segment gives."""
    return Row(
        header.chain, header.kind, header.role, header.tenant_id, header.fingerprint_id, header.end_token, segment,
        header.offset, header.size_bytes, header.epoch, header.key_generation, header.created_s, header.created_s,
    )  # fmt: skip

