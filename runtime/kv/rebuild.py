"""The index made again from the segments, when it is missing or SQLite cannot read it: nothing acknowledged is lost.

Sealed segments tell what they hold in their footers; in others the records are walked and each must open. The new
index is built beside, and takes its name in one rename, so a crash leaves the old state or the new one. What only the
index knew starts anew: hits, replays, the request log and the names of earlier fingerprints; a record counts as used
at that moment, because nobody knows when it was, and one taken for unused since it was written might have outlived its
time.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from appliance.errors import StoreError
from runtime.kv.files import Io
from runtime.kv.footer import read_footer, walk
from runtime.kv.ground import Ground, read_record, row_of
from runtime.kv.index import Index, Row, RowKey
from runtime.kv.index_file import INDEX_FORMAT, INDEX_NAME, OldFormatError, is_damage
from runtime.kv.keys import TenantKeys, derive_master
from runtime.kv.record import ALIGN_BYTES, Kind, RecordHeader, unseal
from runtime.kv.segment import SegmentRow, Segments
from runtime.kv.tenants import Tenants

_DRAFT = f"{INDEX_NAME}.new"
_BESIDE = ("-wal", "-shm")
_log = logging.getLogger("solocard.kv")


def open_index(
    directory: Path, io: Io, master_key: bytes, tenants: Tenants, segments: Segments, now_s: int
) -> Index:  # fmt: skip
    """The index for writing, made again where it is missing or damaged, and ``segments`` recovered by it.

    A cache of an earlier format is removed: it is a cache. Raises StoreError for one of a later format, OSError and
    sqlite3.Error where the disk refuses.
    """
    path = directory / INDEX_NAME
    try:
        return _open(directory, io, segments)
    except OldFormatError as error:
        _log.warning("%s has format %d, this Solocard writes %d: removed, the KV cache starts empty",
                     directory, error.args[0], INDEX_FORMAT)  # fmt: skip
        _remove_all(directory, io)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if not is_damage(error):
            raise
        _log.warning("%s cannot be read (%s): made again from the segments", path, error)
        rebuild(directory, io, master_key, tenants, now_s)
    return _open(directory, io, segments)


def remake(ground: Ground, master_key: bytes) -> None:
    """The index of an open store made again, its files closed first. Errors as ``open_index``."""
    ground.index.close()
    ground.segments.close()
    where, now_s = (ground.directory, ground.io, master_key, ground.tenants), int(ground.clock())
    rebuild(*where, now_s)
    ground.index = open_index(*where, ground.segments, now_s)
    ground.index.remember(ground.fingerprint, now_s)


def _open(directory: Path, io: Io, segments: Segments) -> Index:
    index = Index.open(directory, io, create=not any(directory.glob("*.kvs")))
    try:
        short = segments.recover(index.segments())
        if short:
            _log.warning("KV segments are shorter than their index: %d records lost", index.shorten(short))
    except BaseException:
        index.close()
        raise
    return index


def rebuild(directory: Path, io: Io, master_key: bytes, tenants: Tenants, now_s: int) -> None:
    """Make the index again; the old one, if there is one, is kept as ``index.sqlite3.damaged``.

    OSError where the disk refuses, or a tenant's key file cannot be read; StoreError where nothing opens.
    """
    begin_s = time.monotonic()
    refused = tenants.refused()
    if refused:  # a tenant left out here loses what it has in segments without a footer
        raise refused
    found, segments = _scan(directory, io, master_key, tenants)
    if not found and any(info.damaged for info in tenants.all()):
        raise StoreError(
            f"{directory}: the index has to be made again, and nothing there opens with keys/kv-master; restore that "
            "key, or delete the directory"
        )
    draft = directory / _DRAFT
    _unlink_all(draft, io)
    index = Index.open(directory, io, name=_DRAFT)
    try:
        index.begin()
        index.add((dataclasses.replace(row, used_s=now_s) for row, _ in found.values()), segments)
        index.add_tails((h.parent, h.chain, h.end_token) for _, h in found.values() if h.kind is Kind.TAIL)
        index.commit()
        index.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        index.close()
    path = directory / INDEX_NAME
    if path.exists():  # first of all: without its log it might read well, and older
        io.rename(path, path.with_name(path.name + ".damaged"))
        io.sync_directory(directory)
    for suffix in _BESIDE:  # a log left beside would be played into the new index
        io.unlink(path.with_name(path.name + suffix))
    io.sync_directory(directory)
    io.rename(draft, path)
    io.sync_directory(directory)
    _log.warning("KV index made again: %d records in %d segments, %.1f s",
                 len(found), len(segments), time.monotonic() - begin_s)  # fmt: skip


Found = dict[RowKey, tuple[Row, RecordHeader]]


def _scan(directory: Path, io: Io, master_key: bytes, tenants: Tenants) -> tuple[Found, list[SegmentRow]]:
    """Newest record of each name, and the segments that hold any."""
    cipher, found, segments = derive_master(master_key).store, Found(), []
    keys = {info.tenant_id: tenants.keys_of(info.tenant_id) for info in tenants.all() if not info.damaged}
    for number, path in _files(directory):
        headers = read_footer(number, path, io, cipher)
        sealed = headers is not None
        if headers is None:
            headers = list(_opened(path, number, io, keys))
        end = path.stat().st_size // ALIGN_BYTES * ALIGN_BYTES if sealed else _end(headers)
        if not headers:
            continue
        created_s = min(header.created_s for header in headers)
        segments.append(SegmentRow(number, end, sealed, created_s, len(headers)))
        for header in headers:
            key = header.chain, header.kind
            if key not in found or _age(found[key][0]) <= (header.created_s, number, header.offset):
                found[key] = row_of(header, number), header
    return found, segments


def _files(directory: Path) -> list[tuple[int, Path]]:
    return [(int(path.stem), path) for path in sorted(directory.glob("*.kvs")) if path.stem.isdecimal()]


def _opened(path: Path, number: int, io: Io, keys: dict[bytes, TenantKeys | None]) -> Iterator[RecordHeader]:
    """The records of a segment without a footer that open; the others were never acknowledged, or are damaged."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        for header in walk(fd, os.fstat(fd).st_size, io):
            tenant = keys.get(header.tenant_id)
            if tenant is None:
                continue
            try:
                unseal(header, read_record(path, row_of(header, number), io)[1], tenant.cipher)
            except StoreError:
                continue
            yield header
    finally:
        os.close(fd)


def _age(row: Row) -> tuple[int, int, int]:
    return row.created_s, row.segment, row.offset


def _end(headers: list[RecordHeader]) -> int:
    return max((header.offset + header.size_bytes for header in headers), default=0)


def _unlink_all(path: Path, io: Io) -> None:
    for suffix in ("", *_BESIDE):
        io.unlink(path.with_name(path.name + suffix))


def _remove_all(directory: Path, io: Io) -> None:
    """Segments before the index: a crash in between is met again at the next start."""
    for path in directory.glob("*.kvs"):
        io.unlink(path)
    io.sync_directory(directory)
    _unlink_all(directory / INDEX_NAME, io)
    io.sync_directory(directory)
