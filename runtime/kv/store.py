"""The KV cache on disk: prefixes of prompts that need not be computed again, also after a restart or a crash.

``put`` stores what is missing of a prefix: blocks, then the checkpoint at its end; it returns once all of it is
durable. ``lookup`` gives back the longest stored prefix, every byte authenticated, or nothing and the reason.
A full disk, a full quota or a failing disk stop the writing; lookups and serving go on.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import EngineError, SolocardError, StoreError
from appliance.model import BLOCK_TOKENS
from appliance.wire import KvStatus
from runtime.kv.fingerprint import Fingerprint, difference
from runtime.kv.index import Index, Row
from runtime.kv.keys import TenantKeys, derive_tenant
from runtime.kv.layout import KvLayout
from runtime.kv.record import KEY_GENERATION, Kind, RecordHeader, record_bytes, seal, unseal
from runtime.kv.segment import SEGMENT_BYTES, Io, Reader, Segments, lock_directory
from runtime.schedule import prompt_boundary

_OLD_FINGERPRINTS = 4  # how many earlier ones a miss is compared with
Rows = dict[tuple[bytes, Kind], Row]
_log = logging.getLogger("solocard.kv")


@dataclass(frozen=True, slots=True)
class KvHit:
    """``tokens`` (a multiple of 256, 0 = miss) need no prefill: ``blocks`` in order and the state after them.

    ``reason`` is empty when everything usable was there, else why the longest usable boundary was not reached:
    ``no-unit``, ``fingerprint: <fields>``, ``corrupt``, ``policy`` or ``too-short``.
    """

    tokens: int
    blocks: list[bytes]
    checkpoint: bytes | None
    reason: str


@dataclass(frozen=True, slots=True)
class PutResult:
    """``stored``: every record of the prefix is durable. Else ``reason``, and nothing of this call is visible."""

    stored: bool
    reason: str = ""
    records: int = 0
    written_bytes: int = 0


class KvStore:
    """One directory, one writing process. Methods may be called from any thread; ``status`` never waits for a write."""

    def __init__(
        self, lock_fd: int, index: Index, segments: Segments, layout: KvLayout, fingerprint: Fingerprint,
        master_key: bytes, max_bytes: int,
    ) -> None:  # fmt: skip
        self._lock_fd, self._index, self._segments, self._layout = lock_fd, index, segments, layout
        self._fingerprint, self._master_key, self._max_bytes = fingerprint, master_key, max_bytes
        self._lock, self._count_lock = threading.Lock(), threading.Lock()
        self._tenants: dict[str, TenantKeys] = {}
        self._stopped = ""
        self._hit_tokens = self._miss_tokens = 0
        self._miss_reasons: dict[str, int] = {}
        self._closed = False

    @staticmethod
    def open(
        directory: Path, *, layout: KvLayout, fingerprint: Fingerprint, master_key: bytes, max_bytes: int,
        io: Io | None = None, segment_bytes: int = SEGMENT_BYTES,
    ) -> KvStore:  # fmt: skip
        """Open and recover. ``max_bytes`` bounds the segment files; 0 switches the cache off (reason ``policy``).

        Raises BusyError when another process has the store, StoreError when the directory cannot be used.
        """
        if fingerprint.fields.get("layout") != layout.layout_id:
            raise EngineError("the KV fingerprint names another layout than the store's; build both from one model")
        derive_tenant(master_key, "default")  # a key of a wrong length fails here, not at a request
        io = io or Io()
        lock_fd = lock_directory(directory, io)
        try:
            index = Index.open(directory, io)
            try:
                segments = Segments(directory, io, segment_bytes)
                _recover(index, segments)
            except BaseException:
                index.close()
                raise
        except (OSError, sqlite3.Error) as error:
            os.close(lock_fd)
            raise StoreError(f"{directory}: the KV cache cannot be opened ({error})") from None
        except SolocardError:
            os.close(lock_fd)
            raise
        store = KvStore(lock_fd, index, segments, layout, fingerprint, master_key, max_bytes)
        store._remember()
        return store

    def lookup(self, tenant: str, ids: Sequence[int]) -> KvHit:
        """The longest boundary B ≤ c(len(ids)) with a checkpoint at B and every block below it, read and verified."""
        with self._lock:
            hit = self._find(tenant, ids)
        self._count(hit, len(ids))
        return hit

    def put(self, tenant: str, ids: Sequence[int], block: Callable[[int], bytes], checkpoint: bytes) -> PutResult:
        """Make ``ids`` (a multiple of 256) a stored prefix; ``block(i)`` is asked for the missing ones, i from 0.

        Raises EngineError when lengths do not fit the layout, and whatever ``block`` raises; then nothing is stored.
        """
        count, rest = divmod(len(ids), BLOCK_TOKENS)
        if rest or not count:
            raise EngineError(f"a stored prefix has a multiple of {BLOCK_TOKENS} tokens, not {len(ids)}")
        with self._lock:
            if self._max_bytes <= 0:
                return PutResult(False, "policy")
            try:
                return self._put(tenant, ids, count, block, checkpoint)
            except (OSError, sqlite3.Error) as error:
                self._undo()
                return self._stop(_reason(error))
            except BaseException:
                self._undo()
                raise

    def status(self) -> KvStatus:
        """A snapshot for ``/health`` and the console."""
        with self._count_lock:
            return KvStatus(
                self._max_bytes > 0, self._segments.used_bytes, self._max_bytes, self._hit_tokens, self._miss_tokens,
                not self._stopped, self._stopped, dict(self._miss_reasons),
            )  # fmt: skip

    def close(self) -> None:
        """Release files and lock; a second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._segments.close()
                self._index.close()
                os.close(self._lock_fd)

    # -- reading

    def _find(self, tenant: str, ids: Sequence[int]) -> KvHit:
        boundary = prompt_boundary(len(ids))
        if self._max_bytes <= 0:
            return KvHit(0, [], None, "policy")
        if not boundary:
            return KvHit(0, [], None, "too-short")
        keys = self._keys(tenant)
        chain = keys.chain(self._fingerprint.digest, ids, boundary // BLOCK_TOKENS)
        try:
            rows = self._index.find(chain)
            count, blocks, checkpoint = self._restore(keys, chain, rows)
            if count == len(chain):
                return KvHit(boundary, blocks, checkpoint, "")
            reason = self._why(keys, ids, chain, rows, count)
        except sqlite3.Error as error:
            _log.warning("KV index cannot be read: %s", error)
            return KvHit(0, [], None, "corrupt")
        return KvHit(count * BLOCK_TOKENS, blocks, checkpoint, reason)

    def _restore(self, keys: TenantKeys, chain: list[bytes], rows: Rows) -> tuple[int, list[bytes], bytes | None]:
        """Try boundaries from the longest down; a damaged record rules out the boundaries that need it."""
        reach = 0
        while reach < len(chain) and _live(rows, chain[reach], Kind.BLOCK):
            reach += 1
        blocks: list[bytes] = []
        with self._segments.reader() as reader:
            for count in range(reach, 0, -1):
                state = _live(rows, chain[count - 1], Kind.CHECKPOINT)
                if count > reach or state is None:
                    continue
                checkpoint = self._read(reader, keys, rows, [state])
                if not checkpoint:
                    continue
                wanted = [rows[link, Kind.BLOCK] for link in chain[len(blocks) : count]]
                blocks += self._read(reader, keys, rows, wanted)
                if len(blocks) >= count:
                    return count, blocks[:count], checkpoint[0]
                reach = len(blocks)
        return 0, [], None

    def _read(self, reader: Reader, keys: TenantKeys, rows: Rows, wanted: list[Row]) -> list[bytes]:
        """The payloads of ``wanted`` up to the first that is not what row and keys say; that one is set aside."""
        payloads: list[bytes] = []
        stream = reader.stream([(r.segment, r.offset, record_bytes(self._payload_bytes(r.kind))) for r in wanted])
        for row in wanted:
            try:
                payloads.append(unseal(self._header(keys, row), next(stream), keys.cipher))
            except (OSError, StoreError) as error:
                _log.warning("KV record set aside in segment %04d: %s", row.segment, error)
                self._set_aside(rows, row)
                break
        return payloads

    def _set_aside(self, rows: Rows, row: Row) -> None:
        rows[row.chain, row.kind] = dataclasses.replace(row, damaged=1)
        try:
            self._index.mark_damaged(row)
        except sqlite3.Error as error:
            _log.warning("KV index: the damaged record stays listed (%s)", error)

    def _why(self, keys: TenantKeys, ids: Sequence[int], chain: list[bytes], rows: Rows, count: int) -> str:
        """Why the boundary ``len(chain)`` was not reached when ``count`` blocks were found."""
        beyond = [rows.get((link, kind)) for link in chain[count:] for kind in Kind]
        if any(row.damaged for row in beyond if row):
            return "corrupt"
        if count:
            return "no-unit"
        for old in self._index.other_fingerprints(self._fingerprint.digest, _OLD_FINGERPRINTS):
            others = self._index.find(keys.chain(old.digest, ids, len(chain)))
            if any(row.kind is Kind.CHECKPOINT and not row.damaged for row in others.values()):
                return f"fingerprint: {difference(old, self._fingerprint)}"
        return "no-unit"

    # -- writing

    def _put(
        self, tenant: str, ids: Sequence[int], count: int, block: Callable[[int], bytes], checkpoint: bytes
    ) -> PutResult:
        keys = self._keys(tenant)
        chain = keys.chain(self._fingerprint.digest, ids, count)
        rows = self._index.find(chain)
        blocks = [i for i in range(count) if _live(rows, chain[i], Kind.BLOCK) is None]
        state = _live(rows, chain[-1], Kind.CHECKPOINT) is None
        if not blocks and not state:
            return PutResult(True)
        if self._stopped:
            return PutResult(False, self._stopped)
        need = len(blocks) * record_bytes(self._layout.block_bytes)
        need += state * record_bytes(self._layout.checkpoint_bytes)
        if self._segments.used_bytes + need > self._max_bytes:
            return self._stop(f"quota: kv.max_bytes = {self._max_bytes} is used up")
        new = [self._append(keys, chain, i, Kind.BLOCK, block(i)) for i in blocks]
        if state:
            new.append(self._append(keys, chain, count - 1, Kind.CHECKPOINT, checkpoint))
        self._segments.sync()
        self._index.add(new, self._segments.ends())
        with self._count_lock:
            self._segments.accept()
        return PutResult(True, "", len(new), need)

    def _append(self, keys: TenantKeys, chain: list[bytes], i: int, kind: Kind, payload: bytes) -> Row:
        expected = self._payload_bytes(kind)
        if len(payload) != expected:
            raise EngineError(f"KV {kind.name.lower()} has {len(payload)} bytes, the layout says {expected}")
        size_bytes = record_bytes(expected)
        place = self._segments.place(size_bytes)
        row = Row(
            chain[i], kind, keys.tenant_id, self._fingerprint.digest[:16], (i + 1) * BLOCK_TOKENS, place.segment,
            place.offset, size_bytes, place.epoch, KEY_GENERATION, int(time.time()),
        )  # fmt: skip
        self._segments.write(place, seal(self._header(keys, row), payload, keys.cipher))
        return row

    def _undo(self) -> None:
        self._segments.abandon()
        try:
            self._index.rollback()
        except sqlite3.Error as error:
            _log.warning("KV index: rollback failed (%s)", error)

    def _stop(self, reason: str) -> PutResult:
        with self._count_lock:
            self._stopped = reason
        _log.warning("KV cache stops writing: %s", reason)
        return PutResult(False, reason)

    # -- both

    def _header(self, keys: TenantKeys, row: Row) -> RecordHeader:
        """The only header that may stand at the row's place; a wrong row makes one that stands nowhere."""
        first = row.end_token - BLOCK_TOKENS if row.kind is Kind.BLOCK else 0
        return RecordHeader(
            row.kind, self._fingerprint.digest[:16], keys.tenant_id, row.chain, first, row.end_token,
            self._payload_bytes(row.kind), row.epoch, row.offset, row.created_s, row.key_generation,
        )  # fmt: skip

    def _payload_bytes(self, kind: Kind) -> int:
        return self._layout.block_bytes if kind is Kind.BLOCK else self._layout.checkpoint_bytes

    def _keys(self, tenant: str) -> TenantKeys:
        if tenant not in self._tenants:
            self._tenants[tenant] = derive_tenant(self._master_key, tenant)
        return self._tenants[tenant]

    def _count(self, hit: KvHit, tokens: int) -> None:
        with self._count_lock:
            self._hit_tokens += hit.tokens
            self._miss_tokens += tokens - hit.tokens
            if hit.reason == "corrupt" or not hit.tokens:
                name = hit.reason.partition(":")[0]
                self._miss_reasons[name] = self._miss_reasons.get(name, 0) + 1

    def _remember(self) -> None:
        """Note this fingerprint for later misses; a disk that is full now stops the writing, not the server."""
        try:
            self._index.remember(self._fingerprint, int(time.time()))
        except sqlite3.Error as error:
            self._stop(_reason(error))
        if 0 < self._max_bytes <= self._segments.used_bytes:
            self._stop(f"quota: kv.max_bytes = {self._max_bytes} is used up")


def _live(rows: Rows, chain: bytes, kind: Kind) -> Row | None:
    row = rows.get((chain, kind))
    return None if row is None or row.damaged else row


def _reason(error: OSError | sqlite3.Error) -> str:
    if isinstance(error, OSError):
        return f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror or error}"
    return f"index: {error}"


def _recover(index: Index, segments: Segments) -> None:
    indexed = index.segment_ends()
    ends = segments.recover(indexed)
    short = {number: end for number, end in ends.items() if end < indexed[number]}
    if short:
        lost = index.shorten(short)
        _log.warning("KV segments are shorter than their index: %d records lost", lost)
