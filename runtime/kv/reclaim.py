"""Room for what is about to be written: whole segments go, the least worth per byte first.

Nothing is written before there is room for it, so the files never hold more than ``max_bytes`` and what is copied
out of the one segment that is just being given up, at most a fifth of it. The order of one victim: its hottest
records are written again at the end and synced; one commit gives them their new places and forgets the rest; the file
is unlinked. A crash before the commit leaves the copies beyond the indexed end, one after it a file that the index
does not know: both are removed at the next start.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from runtime.kv.files import no_room
from runtime.kv.index import Index, Row, State
from runtime.kv.policy import DAY_S, Policy
from runtime.kv.record import Kind
from runtime.kv.value import Worth

__all__ = ["COPY_SHARE", "Ground", "Policy", "reserve", "sweep"]

COPY_SHARE = 0.2  # of a victim's bytes may be written again
HOT = 4.0  # copied are records worth this many times the store's mean per byte
_log = logging.getLogger("solocard.kv")


class Ground(Protocol):
    """What reclaiming asks of the store; all of it is called under the store's write lock."""

    @property
    def policy(self) -> Policy: ...
    @property
    def index(self) -> Index: ...
    @property
    def fingerprint_id(self) -> bytes: ...
    def used_bytes(self) -> int:
        """All segment files, pending bytes and the footer the open one will get included."""
        ...

    def free_disk_bytes(self) -> int:
        """Free for this user on the store's file system."""
        ...

    def live_tenants(self) -> frozenset[bytes] | None:
        """Ids of the tenants whose keys exist; None where a key file does not open: then nobody is taken for gone."""
        ...

    def open_segment(self) -> int | None:
        """The segment appended to; None when the next record starts one."""
        ...

    def seal_open(self) -> None:
        """Footer, sync, commit; the next record starts a new segment."""
        ...

    def copy_forward(self, rows: Sequence[Row]) -> list[Row]:
        """Write records again at the end, synced, not committed; OSError with everything cut back."""
        ...

    def drop(self, segment: int, moved: Sequence[Row], tombstones: Mapping[Row, int], written_bytes: int, day: int
             ) -> None:  # fmt: skip
        """One commit: rows moved, the segment forgotten, the ledger; then the file is unlinked."""
        ...


def reserve(ground: Ground, need_bytes: int, pinned: Set[bytes], now_s: int) -> str:
    """Free segments until ``need_bytes`` may be written; "" or the reason why not (``policy: …``, ``quota: …``).

    Rows of ``pinned`` chains are kept: copied, or their segment is spared. Raises OSError and sqlite3.Error.
    """
    policy = ground.policy
    if policy.max_bytes <= 0:
        return "policy: the cache is switched off (kv.max_bytes: 0)"
    if need_bytes > policy.max_bytes:
        return f"quota: {need_bytes} bytes are more than kv.max_bytes = {policy.max_bytes}"
    if need_bytes and _budget_bytes(ground, now_s) < need_bytes:
        return f"policy: kv.daily_write_bytes = {policy.daily_write_bytes} is used up until 00:00 UTC"
    return _Reclaim(ground, need_bytes, pinned, now_s).run()


def sweep(ground: Ground, pinned: Set[bytes], now_s: int) -> int:
    """Remove every segment in which no record can be read again; bytes freed. Raises OSError and sqlite3.Error."""
    before = ground.used_bytes()
    reclaim = _Reclaim(ground, 0, pinned, now_s)
    for candidate in reclaim.candidates():
        if candidate.value <= 0:
            reclaim.give_up(candidate)
    return before - ground.used_bytes()


def _budget_bytes(ground: Ground, now_s: int) -> float:
    """What may still be written today."""
    limit = ground.policy.daily_write_bytes
    return limit - ground.index.written_today(now_s // DAY_S) if limit > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A segment that may go; ``value`` is the sum of its records' values."""

    number: int
    end_bytes: int
    value: float

    @property
    def density(self) -> float:
        return self.value / max(self.end_bytes, 1)


class _Reclaim:
    """One call of ``reserve`` or ``sweep``."""

    def __init__(self, ground: Ground, need_bytes: int, pinned: Set[bytes], now_s: int) -> None:
        self._ground, self._need_bytes, self._pinned, self._now_s = ground, need_bytes, pinned, now_s
        self._spared: set[int] = set()
        self._hot_density = 0.0

    def run(self) -> str:
        """Until both bounds hold, or nothing is left that may go."""
        policy, ground = self._ground.policy, self._ground
        while ground.used_bytes() + self._need_bytes > policy.max_bytes:
            if not self._free_one():
                return f"quota: kv.max_bytes = {policy.max_bytes} is in use"
        missing = policy.min_free_bytes + self._need_bytes - ground.free_disk_bytes() if policy.min_free_bytes else 0
        goal = ground.used_bytes() - missing  # no further, where freeing files does not free the disk
        while missing > 0 and ground.used_bytes() > max(goal, 0) and self._free_one():
            missing = policy.min_free_bytes + self._need_bytes - ground.free_disk_bytes()
        return "" if missing <= 0 else f"quota: less than kv.min_free_bytes = {policy.min_free_bytes} would be left"

    def candidates(self) -> list[_Candidate]:
        """Every segment that may go, the least worth per byte first; the open one only where there is no other."""
        sums, index = self._worth.sums(self._ground.index.connection), self._ground.index
        found = [_Candidate(s.number, s.end_bytes, sums.get(s.number, 0.0)) for s in index.segments()]
        total_bytes = sum(c.end_bytes for c in found)
        self._hot_density = HOT * sum(c.value for c in found) / max(total_bytes, 1)
        found = [c for c in found if c.number not in self._spared]
        now_open = self._ground.open_segment()
        closed = [c for c in found if c.number != now_open or c.value <= 0]
        return sorted(closed or found, key=lambda c: (c.density, c.number))

    def give_up(self, victim: _Candidate) -> bool:
        """Remove one segment, what is hot in it copied first; False when it holds more pinned rows than may be copied.

        Then it is spared for the rest of the call.
        """
        rows = self._ground.index.rows_of(victim.number)
        moved = self._copy(victim, rows)
        if moved is None:
            self._spared.add(victim.number)
            return False
        written_bytes = sum(row.size_bytes for row in moved)
        self._ground.drop(victim.number, moved, self._tombstones(rows, moved), written_bytes, self._now_s // DAY_S)
        _log.info("KV segment %04d removed: %d of its %d bytes copied", victim.number, written_bytes, victim.end_bytes)
        return True

    def _free_one(self) -> bool:
        return any(self.give_up(victim) for victim in self.candidates())

    def _copy(self, victim: _Candidate, rows: Sequence[Row]) -> list[Row] | None:
        """The rows written again; None where pinned ones cannot be kept."""
        kept = [row for row in rows if row.chain in self._pinned and row.readable]
        room_bytes = min(COPY_SHARE * victim.end_bytes, _budget_bytes(self._ground, self._now_s) - self._need_bytes)
        pinned_bytes = sum(row.size_bytes for row in kept)
        if pinned_bytes > room_bytes:
            return None
        if victim.number == self._ground.open_segment():
            self._ground.seal_open()
        try:
            return self._ground.copy_forward([*kept, *self._hottest(rows, room_bytes - pinned_bytes)])
        except OSError as error:
            if not no_room(error):
                raise
            return None if kept else []  # a full disk is what reclaiming is for: go on without the copies

    def _hottest(self, rows: Sequence[Row], room_bytes: float) -> list[Row]:
        """The rows worth more than ``HOT`` times the mean, the best first, as far as they fit."""
        ranked = sorted(((self._worth.of(row) / row.size_bytes, row) for row in rows if row.chain not in self._pinned),
                        key=lambda pair: -pair[0])  # fmt: skip
        chosen: list[Row] = []
        for density, row in ranked:
            if density <= self._hot_density or row.size_bytes > room_bytes:
                break
            chosen.append(row)
            room_bytes -= row.size_bytes
        return chosen

    def _tombstones(self, rows: Sequence[Row], moved: Sequence[Row]) -> dict[Row, int]:
        """What a later miss is told about checkpoints and tails that go now, and about damaged records."""
        stay, expired = {(row.chain, row.kind) for row in moved}, self._ground.policy.expired
        marks: dict[Row, int] = {row: State.DAMAGED for row in rows if row.state is State.DAMAGED}
        for row in rows:
            if row.kind is not Kind.BLOCK and row.readable and (row.chain, row.kind) not in stay:
                gone_by_time = expired(row.role, row.used_s, self._now_s)
                marks[row] = State.EXPIRED if gone_by_time else State.EVICTED
        return marks

    @functools.cached_property
    def _worth(self) -> Worth:
        """Reckoned when something has to go: a put that finds room looks at nothing."""
        oldest_s = min((s.created_s for s in self._ground.index.segments()), default=self._now_s)
        return Worth(self._ground.policy, self._ground.fingerprint_id, self._ground.live_tenants(), self._now_s,
                     max(self._now_s - oldest_s, 0))  # fmt: skip
