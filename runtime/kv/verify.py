"""Reading every record of the KV cache and authenticating it, beside a writer that goes on. Changes nothing.

What is found damaged here is set aside by the server when it next meets it; a miss is all that comes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from appliance.errors import StoreError
from runtime.kv.files import Io
from runtime.kv.footer import read_footer
from runtime.kv.ground import read_record
from runtime.kv.index import Index, Row
from runtime.kv.keys import MasterKeys, TenantKeys
from runtime.kv.record import unseal
from runtime.kv.segment import SegmentRow, segment_path

Tick = Callable[[int], None]  # bytes that were read


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where something else stands than the index says; ``offset`` in bytes."""

    file: str
    offset: int
    problem: str


@dataclass(slots=True)
class Verified:
    """What came of it. ``purged_records`` belong to tenants without a key: nothing opens them, as it should be."""

    records: int = 0
    read_bytes: int = 0
    purged_records: int = 0
    damaged: list[Finding] = field(default_factory=list)


def verify(directory: Path, index: Index, keys: dict[bytes, TenantKeys], master: MasterKeys, tick: Tick) -> Verified:
    """Open every record whose tenant has a key in ``keys`` (by tenant id), and every sealed segment's footer.

    Raises sqlite3.Error where the index cannot be read.
    """
    result, io = Verified(), Io()
    for segment in index.segments():
        for row in index.rows_of(segment.number):
            tenant = keys.get(row.tenant_id)
            if tenant is None:
                result.purged_records += 1
            else:
                _check(directory, index, row, tenant, io, result)
            tick(row.size_bytes)
        if segment.sealed:
            _check_footer(directory, index, segment, io, master, result)
    return result


def _check(directory: Path, index: Index, row: Row, tenant: TenantKeys, io: Io, result: Verified) -> None:
    path = segment_path(directory, row.segment)
    try:
        header, raw = read_record(path, row, io)
        result.read_bytes += len(raw)
        unseal(header, raw, tenant.cipher)
    except (StoreError, OSError) as error:
        now = index.find([row.chain]).get((row.chain, row.kind))
        if now is None or now.place != row.place:
            return  # freed or moved while it was read
        problem = error.strerror if isinstance(error, OSError) else str(error)
        result.damaged.append(Finding(path.name, row.offset, problem or str(error)))
    result.records += 1


def _check_footer(
    directory: Path, index: Index, segment: SegmentRow, io: Io, master: MasterKeys, result: Verified
) -> None:  # fmt: skip
    path = segment_path(directory, segment.number)
    try:
        found = read_footer(segment.number, path, io, master.store)
    except OSError:
        found = None
    if found is None and segment in index.segments():
        result.damaged.append(Finding(path.name, segment.end_bytes, "its list of records (at the end) does not open; "
                                      "needed only where the index is lost, and then the file is walked"))  # fmt: skip
