"""The index: which record holds which prefix. SQLite, WAL, synchronous=FULL; metadata only, no tokens and no keys.

A row is a claim, not a proof: the store builds the header that must stand at the row's place and the record opens
with that or not at all. Rows that failed to open stay, marked ``damaged``, until the same prefix is written again,
so that a miss can say why.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import StoreError
from runtime.kv.fingerprint import Fingerprint
from runtime.kv.record import Kind
from runtime.kv.segment import Io

INDEX_NAME = "index.sqlite3"
INDEX_FORMAT = 1
_FIND_AT_ONCE = 500  # below SQLite's smallest limit of host parameters
_log = logging.getLogger("solocard.kv")

_SCHEMA = """
CREATE TABLE segment (number INTEGER PRIMARY KEY, end_bytes INTEGER NOT NULL);
CREATE TABLE record (
    chain BLOB NOT NULL, kind INTEGER NOT NULL,
    tenant_id BLOB NOT NULL, fingerprint_id BLOB NOT NULL, end_token INTEGER NOT NULL,
    segment INTEGER NOT NULL, offset INTEGER NOT NULL, size_bytes INTEGER NOT NULL, epoch BLOB NOT NULL,
    key_generation INTEGER NOT NULL, created_s INTEGER NOT NULL, damaged INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (chain, kind)
) WITHOUT ROWID;
CREATE TABLE fingerprint (digest BLOB PRIMARY KEY, canonical TEXT NOT NULL, used_s INTEGER NOT NULL);
"""
_COLUMNS = (
    "chain, kind, tenant_id, fingerprint_id, end_token, segment, offset, size_bytes, epoch, key_generation, "
    "created_s, damaged"
)
_BLOBS = (0, 2, 3, 8)  # positions in _COLUMNS; the others are integers


@dataclass(frozen=True, slots=True)
class Row:
    """One record's place; fields in the order of the table's columns. ``damaged`` rows are never read."""

    chain: bytes
    kind: Kind
    tenant_id: bytes
    fingerprint_id: bytes
    end_token: int
    segment: int
    offset: int
    size_bytes: int
    epoch: bytes
    key_generation: int
    created_s: int
    damaged: int = 0


class Index:
    """One connection, used under the store's lock; every method may raise sqlite3.Error."""

    def __init__(self, connection: sqlite3.Connection, io: Io) -> None:
        self._db, self._io = connection, io

    @staticmethod
    def open(directory: Path, io: Io) -> Index:
        """Open or create; an index SQLite cannot read is set aside and the cache starts empty.

        Raises StoreError for an index of another format, sqlite3.OperationalError where the disk refuses.
        """
        path = directory / INDEX_NAME
        try:
            return Index(_connect(path), io)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            aside = path.with_name(path.name + ".damaged")
            _log.warning("%s cannot be read (%s): set aside as %s, the KV cache starts empty", path, error, aside.name)
            path.replace(aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            return Index(_connect(path), io)

    def segment_ends(self) -> dict[int, int]:
        return dict(self._db.execute("SELECT number, end_bytes FROM segment"))

    def shorten(self, ends: Mapping[int, int]) -> int:
        """Record that files end where ``ends`` says; rows past the end become damaged. Returns how many."""
        self._db.execute("BEGIN IMMEDIATE")
        lost = 0
        for number, end in ends.items():
            lost += self._db.execute(
                "UPDATE record SET damaged = 1 WHERE segment = ? AND offset + size_bytes > ? AND damaged = 0",
                (number, end),
            ).rowcount
            if end:
                self._db.execute("UPDATE segment SET end_bytes = ? WHERE number = ?", (end, number))
            else:
                self._db.execute("DELETE FROM segment WHERE number = ?", (number,))
        self._io.commit(self._db)
        return lost

    def find(self, chains: Sequence[bytes]) -> dict[tuple[bytes, Kind], Row]:
        """Every row, damaged ones too, whose chain hash is asked for."""
        found: dict[tuple[bytes, Kind], Row] = {}
        for start in range(0, len(chains), _FIND_AT_ONCE):
            some = chains[start : start + _FIND_AT_ONCE]
            query = f"SELECT {_COLUMNS} FROM record WHERE chain IN ({','.join('?' * len(some))})"  # noqa: S608
            for values in self._db.execute(query, some):
                row = _row(values)
                found[row.chain, row.kind] = row
        return found

    def add(self, rows: Iterable[Row], ends: Mapping[int, int]) -> None:
        """Commit new rows and segment ends together; the write-ahead log is synced before this returns."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany(
            f"INSERT OR REPLACE INTO record ({_COLUMNS}) VALUES ({','.join('?' * 12)})",  # noqa: S608
            [(r.chain, int(r.kind), r.tenant_id, r.fingerprint_id, r.end_token, r.segment, r.offset, r.size_bytes,
              r.epoch, r.key_generation, r.created_s, r.damaged) for r in rows],
        )  # fmt: skip
        self._db.executemany("INSERT OR REPLACE INTO segment VALUES (?, ?)", list(ends.items()))
        self._io.commit(self._db)

    def rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def mark_damaged(self, row: Row) -> None:
        self._db.execute("UPDATE record SET damaged = 1 WHERE chain = ? AND kind = ?", (row.chain, int(row.kind)))

    def remember(self, fingerprint: Fingerprint, now_s: int) -> None:
        """Note that ``fingerprint`` is in use now."""
        self._db.execute(
            "INSERT INTO fingerprint VALUES (?, ?, ?) ON CONFLICT (digest) DO UPDATE SET used_s = excluded.used_s",
            (fingerprint.digest, fingerprint.canonical, now_s),
        )

    def other_fingerprints(self, digest: bytes, limit: int) -> list[Fingerprint]:
        """The fingerprints used before, newest first."""
        query = "SELECT canonical FROM fingerprint WHERE digest != ? ORDER BY used_s DESC, rowid DESC LIMIT ?"
        return [Fingerprint.from_canonical(text) for (text,) in self._db.execute(query, (digest, limit))]

    def close(self) -> None:
        self._db.close()


def _row(values: tuple[Any, ...]) -> Row:
    """A row with the types the table is meant to have; SQLite itself would store anything anywhere."""
    typed = all(isinstance(v, bytes if i in _BLOBS else int) for i, v in enumerate(values))
    if not typed or values[1] not in tuple(Kind):
        raise sqlite3.DatabaseError("a row of table record has values of the wrong type")
    return Row(values[0], Kind(values[1]), *values[2:])


def _connect(path: Path) -> sqlite3.Connection:
    """Open with the durability this store promises; autocommit, so that every transaction is written out here."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    try:
        path.chmod(0o600)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found == 0:
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {INDEX_FORMAT}; COMMIT;")
        elif found != INDEX_FORMAT:
            raise StoreError(
                f"{path} has format {found}, this Solocard writes {INDEX_FORMAT}; delete the directory {path.parent}"
            )
        checked = connection.execute("PRAGMA quick_check(1)").fetchone()[0]  # 80 ms for 100,000 records (90 GB)
        if checked != "ok":
            raise sqlite3.DatabaseError(checked)
    except BaseException:
        connection.close()
        raise
    return connection
