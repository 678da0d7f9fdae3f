"""The index: which record holds which prefix. SQLite, WAL, synchronous=FULL; metadata only, no tokens and no keys.

A row is a claim, not a proof: the store builds the header that must stand at the row's place and the record opens
with that or not at all. Rows that failed to open stay, marked damaged, until the same prefix is written again, and
checkpoints that were removed leave a tombstone, so that a miss can say why.
"""

from __future__ import annotations

import enum
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.kv.files import Io
from runtime.kv.fingerprint import Fingerprint
from runtime.kv.index_file import INDEX_NAME, connect, connect_reader
from runtime.kv.record import Kind, Role
from runtime.kv.segment import SegmentRow

TOMBSTONES = 50_000  # of EVICTED and EXPIRED rows the newest so many are kept
REPLAYS = 50_000
REPLAY_BYTES = 64 << 20  # of all together: no bound of the segments counts them
_FIND_AT_ONCE = 500  # below SQLite's smallest limit of host parameters

_COLUMNS = (
    "chain, kind, role, tenant_id, fingerprint_id, end_token, segment, offset, size_bytes, epoch, key_generation, "
    "created_s, used_s, hits, state"
)
_TRIM_REPLAYS = """
DELETE FROM replay WHERE name IN (SELECT name FROM (
  SELECT name, ROW_NUMBER() OVER newest AS place, SUM(LENGTH(sealed)) OVER newest AS size_bytes FROM replay
  WINDOW newest AS (ORDER BY used_s DESC, name ROWS UNBOUNDED PRECEDING)
) WHERE place > ? OR size_bytes > ?)
"""
_TYPES = tuple(bytes if i in (0, 3, 4, 9) else int for i in range(15))  # of _COLUMNS


class State(enum.IntEnum):
    """Of a row. EVICTED and EXPIRED are tombstones: nothing is on disk any more."""

    LIVE = 0
    DAMAGED = 1
    EVICTED = 2
    EXPIRED = 3
    SUPERSEDED = 4  # a later checkpoint of the same conversation is there; still readable


READABLE = frozenset({State.LIVE, State.SUPERSEDED})
TOMBSTONE = frozenset({State.EVICTED, State.EXPIRED})


@dataclass(frozen=True, slots=True)
class Row:
    """One record's place; fields in the order of the table's columns."""

    chain: bytes
    kind: Kind
    role: Role
    tenant_id: bytes
    fingerprint_id: bytes
    end_token: int
    segment: int
    offset: int
    size_bytes: int
    epoch: bytes
    key_generation: int
    created_s: int
    used_s: int
    hits: int = 0
    state: State = State.LIVE

    @property
    def readable(self) -> bool:
        return self.state in READABLE

    @property
    def place(self) -> tuple[int, int, bytes]:
        """What changes when the record is written again or moved."""
        return self.segment, self.offset, self.epoch


RowKey = tuple[bytes, Kind]
Rows = dict[RowKey, Row]


class Index:
    """One connection; every method may raise sqlite3.Error. ``connection`` is for the owner of the write lock.

    Methods without BEGIN of their own run inside the caller's transaction (``begin`` … ``commit``).
    """

    def __init__(self, connection: sqlite3.Connection, io: Io) -> None:
        self.connection, self._io = connection, io

    @staticmethod
    def open(
        directory: Path, io: Io, *, read_only: bool = False, create: bool = True, name: str = INDEX_NAME
    ) -> Index:  # fmt: skip
        """Open, or create where there is none. ``read_only``: beside a writer, in this or another process.

        Errors as runtime.kv.index_file says.
        """
        path = directory / name
        return Index(connect_reader(path) if read_only else connect(path, create=create), io)

    # -- transactions

    def begin(self) -> None:
        self.connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """The write-ahead log is synced before this returns."""
        self._io.commit(self.connection)

    def rollback(self) -> None:
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    # -- reading

    def segments(self) -> list[SegmentRow]:
        query = "SELECT number, end_bytes, sealed, created_s, records FROM segment ORDER BY number"
        return [SegmentRow(number, end, bool(sealed), created, records)
                for number, end, sealed, created, records in self.connection.execute(query)]  # fmt: skip

    def find(self, chains: Sequence[bytes]) -> Rows:
        """Every row, whatever its state, whose chain hash is asked for."""
        found: Rows = {}
        for start in range(0, len(chains), _FIND_AT_ONCE):
            some = chains[start : start + _FIND_AT_ONCE]
            query = f"SELECT {_COLUMNS} FROM record WHERE chain IN ({','.join('?' * len(some))})"  # noqa: S608
            for values in self.connection.execute(query, some):
                row = _row(values)
                found[row.chain, row.kind] = row
        return found

    def rows_of(self, segment: int) -> list[Row]:
        """The rows, damaged ones too, of what lies in one segment; by offset. Tombstones lie nowhere."""
        query = f"SELECT {_COLUMNS} FROM record WHERE segment = ? AND state NOT IN (2, 3) ORDER BY offset"  # noqa: S608
        return [_row(values) for values in self.connection.execute(query, (segment,))]

    def tails(self, parents: Sequence[bytes]) -> list[tuple[bytes, bytes, int]]:
        """(parent, chain, end_token) of tails whose parent's first seven bytes are asked for."""
        found: list[tuple[bytes, bytes, int]] = []
        for start in range(0, len(parents), _FIND_AT_ONCE):
            some = parents[start : start + _FIND_AT_ONCE]
            query = f"SELECT parent, chain, end_token FROM tail WHERE parent IN ({','.join('?' * len(some))})"  # noqa: S608
            found += self.connection.execute(query, some)
        return found

    def count(self) -> dict[Kind, int]:
        """Readable records by kind."""
        query = "SELECT kind, COUNT(*) FROM record WHERE state IN (0, 4) GROUP BY kind"
        return {Kind(kind): count for kind, count in self.connection.execute(query)}

    # -- writing, inside the caller's transaction

    def add(self, rows: Iterable[Row], segments: Iterable[SegmentRow]) -> None:
        """New rows and segment ends."""
        self.connection.executemany(
            f"INSERT OR REPLACE INTO record ({_COLUMNS}) VALUES ({','.join('?' * 15)})",  # noqa: S608
            [(r.chain, int(r.kind), int(r.role), r.tenant_id, r.fingerprint_id, r.end_token, r.segment, r.offset,
              r.size_bytes, r.epoch, r.key_generation, r.created_s, r.used_s, r.hits, int(r.state)) for r in rows],
        )  # fmt: skip
        self.set_segments(segments)

    def set_segments(self, segments: Iterable[SegmentRow]) -> None:
        self.connection.executemany(
            "INSERT OR REPLACE INTO segment VALUES (?, ?, ?, ?, ?)",
            [(s.number, s.end_bytes, int(s.sealed), s.created_s, s.records) for s in segments],
        )

    def add_tails(self, tails: Iterable[tuple[bytes, bytes, int]]) -> None:
        """(parent's first seven bytes, chain, end_token) of each."""
        self.connection.executemany("INSERT OR REPLACE INTO tail VALUES (?, ?, ?)", tails)

    def touch(self, uses: Mapping[RowKey, tuple[int, int]]) -> None:
        """Note uses: (chain, kind) → (unix s of the last one, how many)."""
        self.connection.executemany(
            "UPDATE record SET used_s = max(used_s, ?), hits = hits + ? WHERE chain = ? AND kind = ?",
            [(used_s, hits, chain, int(kind)) for (chain, kind), (used_s, hits) in uses.items()],
        )

    def set_state(self, rows: Iterable[Row], state: State) -> None:
        """Only of rows that are still where ``rows`` say."""
        self.connection.executemany(
            "UPDATE record SET state = ? WHERE chain = ? AND kind = ? AND segment = ? AND offset = ? AND epoch = ?",
            [(int(state), r.chain, int(r.kind), r.segment, r.offset, r.epoch) for r in rows],
        )

    def move(self, rows: Iterable[Row]) -> None:
        """Give rows that are there already their new places."""
        self.connection.executemany(
            "UPDATE record SET segment = ?, offset = ?, epoch = ?, created_s = ? WHERE chain = ? AND kind = ?",
            [(r.segment, r.offset, r.epoch, r.created_s, r.chain, int(r.kind)) for r in rows],
        )

    def forget(self, segment: int, tombstones: Mapping[Row, int] = {}) -> None:
        """Remove a segment and the rows that still lie in it; ``tombstones`` stay, in their new state."""
        self.connection.executemany(
            "UPDATE record SET state = ?, segment = -1 WHERE chain = ? AND kind = ? AND segment = ?",
            [(int(state), r.chain, int(r.kind), segment) for r, state in tombstones.items()],
        )
        self.connection.execute(
            "DELETE FROM tail WHERE chain IN (SELECT chain FROM record WHERE segment = ? AND kind = 3)", (segment,)
        )
        self.connection.execute("DELETE FROM record WHERE segment = ?", (segment,))
        self.connection.execute("DELETE FROM segment WHERE number = ?", (segment,))
        self._bound_tombstones()

    def _bound_tombstones(self) -> None:
        query = "SELECT COUNT(*) FROM record WHERE segment = -1"
        over = self.connection.execute(query).fetchone()[0] - TOMBSTONES
        if over > 0:
            oldest = "SELECT chain, kind FROM record WHERE segment = -1 ORDER BY used_s LIMIT ?"
            self.connection.execute(f"DELETE FROM record WHERE (chain, kind) IN ({oldest})", (over,))  # noqa: S608
            self.connection.execute("DELETE FROM tail WHERE chain NOT IN (SELECT chain FROM record WHERE kind = 3)")

    def shorten(self, short: Iterable[SegmentRow]) -> int:
        """Files end where ``short`` says; rows past the end become damaged. Own transaction; returns how many."""
        self.begin()
        lost = 0
        for row in short:
            lost += self.connection.execute(
                "UPDATE record SET state = 1 WHERE segment = ? AND offset + size_bytes > ? AND state IN (0, 4)",
                (row.number, row.end_bytes),
            ).rowcount
            if row.end_bytes:
                self.set_segments([row])
            else:
                self.connection.execute("UPDATE record SET segment = -1 WHERE segment = ?", (row.number,))
                self.connection.execute("DELETE FROM segment WHERE number = ?", (row.number,))
        self.commit()
        return lost

    # -- ledger, replays, fingerprints

    def written_today(self, day: int) -> int:
        """Bytes written on ``day`` (unix s // 86400)."""
        row = self.connection.execute("SELECT written_bytes FROM ledger WHERE day = ?", (day,)).fetchone()
        return int(row[0]) if row else 0

    def add_written(self, day: int, written_bytes: int) -> None:
        query = "INSERT INTO ledger VALUES (?, ?) ON CONFLICT (day) DO UPDATE SET written_bytes = written_bytes + ?"
        self.connection.execute(query, (day, written_bytes, written_bytes))
        self.connection.execute("DELETE FROM ledger WHERE day < ?", (day - 31,))

    def add_replays(self, replays: Iterable[tuple[bytes, bytes, bytes, int]]) -> None:
        """(name, tenant_id, sealed ids, unix s) of each; the oldest make room."""
        rows = list(replays)
        if rows:
            self.connection.executemany("INSERT OR REPLACE INTO replay VALUES (?, ?, ?, ?)", rows)
            count, size_bytes = self.connection.execute("SELECT COUNT(*), SUM(LENGTH(sealed)) FROM replay").fetchone()
            if count > REPLAYS or size_bytes > REPLAY_BYTES:
                self.connection.execute(_TRIM_REPLAYS, (REPLAYS, REPLAY_BYTES))

    def replays(self, names: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for start in range(0, len(names), _FIND_AT_ONCE):
            some = names[start : start + _FIND_AT_ONCE]
            query = f"SELECT name, sealed FROM replay WHERE name IN ({','.join('?' * len(some))})"  # noqa: S608
            found.update(self.connection.execute(query, some))
        return found

    def touch_replays(self, names: Iterable[bytes], now_s: int) -> None:
        self.connection.executemany("UPDATE replay SET used_s = ? WHERE name = ?", [(now_s, name) for name in names])

    def remember(self, fingerprint: Fingerprint, now_s: int) -> None:
        """Note that ``fingerprint`` is in use now; a transaction of its own."""
        self.connection.execute(
            "INSERT INTO fingerprint VALUES (?, ?, ?) ON CONFLICT (digest) DO UPDATE SET used_s = excluded.used_s",
            (fingerprint.digest, fingerprint.canonical, now_s),
        )

    def other_fingerprints(self, digest: bytes, limit: int) -> list[Fingerprint]:
        """The fingerprints used before, newest first."""
        query = "SELECT canonical FROM fingerprint WHERE digest != ? ORDER BY used_s DESC, rowid DESC LIMIT ?"
        return [Fingerprint.from_canonical(text) for (text,) in self.connection.execute(query, (digest, limit))]

    def close(self) -> None:
        self.connection.close()


def _row(values: tuple[Any, ...]) -> Row:
    """A row with the types the table is meant to have; SQLite itself would store anything anywhere."""
    typed = tuple(map(type, values)) == _TYPES
    if not typed or values[1] not in _KINDS or values[2] not in _ROLES or values[14] not in _STATES:
        raise sqlite3.DatabaseError("a row of table record has values of the wrong type")
    fields: list[Any] = list(values)
    fields[1], fields[2], fields[14] = Kind(values[1]), Role(values[2]), State(values[14])
    return Row(*fields)


_KINDS, _ROLES, _STATES = frozenset(Kind), frozenset(Role), frozenset(State)
