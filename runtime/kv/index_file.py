"""The index's file: its tables, the two kinds of connections, and whether SQLite can be trusted to read it.

A flipped bit may sit where SQLite sees it only at some later query, or takes it for another table. So opening looks at
what a query depends on, the description of the tables, and compares it with that of a new index; rows are checked
when they are read.
"""

from __future__ import annotations

import functools
import sqlite3
from pathlib import Path

from appliance.errors import StoreError
from runtime.kv import requests

INDEX_NAME = "index.sqlite3"
INDEX_FORMAT = 2

_SCHEMA = """
CREATE TABLE segment (
    number INTEGER PRIMARY KEY, end_bytes INTEGER NOT NULL, sealed INTEGER NOT NULL, created_s INTEGER NOT NULL,
    records INTEGER NOT NULL
);
CREATE TABLE record (
    chain BLOB NOT NULL, kind INTEGER NOT NULL, role INTEGER NOT NULL,
    tenant_id BLOB NOT NULL, fingerprint_id BLOB NOT NULL, end_token INTEGER NOT NULL,
    segment INTEGER NOT NULL, offset INTEGER NOT NULL, size_bytes INTEGER NOT NULL, epoch BLOB NOT NULL,
    key_generation INTEGER NOT NULL, created_s INTEGER NOT NULL, used_s INTEGER NOT NULL,
    hits INTEGER NOT NULL, state INTEGER NOT NULL,
    PRIMARY KEY (chain, kind)
) WITHOUT ROWID;
CREATE INDEX record_segment ON record (segment);
CREATE TABLE tail (
    parent BLOB NOT NULL, chain BLOB NOT NULL, end_token INTEGER NOT NULL, PRIMARY KEY (parent, chain)
) WITHOUT ROWID;
CREATE TABLE fingerprint (digest BLOB PRIMARY KEY, canonical TEXT NOT NULL, used_s INTEGER NOT NULL);
CREATE TABLE ledger (day INTEGER PRIMARY KEY, written_bytes INTEGER NOT NULL);
CREATE TABLE replay (
    name BLOB PRIMARY KEY, tenant_id BLOB NOT NULL, sealed BLOB NOT NULL, used_s INTEGER NOT NULL
) WITHOUT ROWID;
"""
_TABLES = f"{_SCHEMA} {requests.SCHEMA};"


class OldFormatError(Exception):
    """An index of an earlier format; ``args`` = (the format,)."""


def is_damage(error: BaseException) -> bool:
    """Does it say that the file cannot be trusted, and not that the disk is full or failing, or the file in use?"""
    if isinstance(error, UnicodeDecodeError):  # SQLite's message itself
        return True
    if not isinstance(error, sqlite3.DatabaseError) or isinstance(error, sqlite3.ProgrammingError):
        return False
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # not SQLite's word: the rows' own check, or Python could not decode a text
        return type(error) is sqlite3.DatabaseError or str(error).startswith("Could not decode")
    return code & 0xFF not in _NOT_DAMAGE


_NOT_DAMAGE = frozenset({
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_MISUSE, sqlite3.SQLITE_INTERRUPT,
})  # fmt: skip


def connect(path: Path, *, create: bool = True) -> sqlite3.Connection:
    """Open with the durability this store promises; autocommit, so that every transaction is written out here.

    Raises sqlite3.DatabaseError where the file is not an index as this code makes it (an empty one too, unless
    ``create``), OldFormatError for an earlier format, StoreError for a later one.
    """
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    try:
        path.chmod(0o600)
        if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise sqlite3.DatabaseError("it refuses the write-ahead log")
        connection.execute("PRAGMA synchronous = FULL")
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if 0 < found < INDEX_FORMAT:
            raise OldFormatError(found)
        if found == 0:
            if not create:
                raise sqlite3.DatabaseError("it is missing or empty")
            connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {INDEX_FORMAT}; COMMIT;")
        _check(path, connection)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(path: Path) -> sqlite3.Connection:
    """Read-only, beside a writer; errors as ``connect``."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False, timeout=10.0
    )
    try:
        _check(path, connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(path: Path, connection: sqlite3.Connection) -> None:
    """The format, and that the tables are described as in a new index."""
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found != INDEX_FORMAT:
        raise StoreError(
            f"{path} has format {found}, this Solocard reads {INDEX_FORMAT}; "
            f"update Solocard, or delete the directory {path.parent}"
        )
    if _described(connection) != _described_anew():
        raise sqlite3.DatabaseError("its tables are not described as they were made")


def _described(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()


@functools.cache
def _described_anew() -> list[tuple[str, ...]]:
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(_TABLES)
        return _described(connection)
    finally:
        connection.close()
