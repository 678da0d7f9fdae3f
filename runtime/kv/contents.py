"""What the KV cache holds, read from its files: beside a running server or without one, and changing nothing."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from appliance.config import KvConfig
from appliance.errors import StoreError
from appliance.wire import KvReport, KvStatus, KvTenant
from runtime.kv import requests
from runtime.kv.files import Io
from runtime.kv.index import Index, State
from runtime.kv.index_file import INDEX_NAME
from runtime.kv.keys import load_master_key
from runtime.kv.policy import DAY_S
from runtime.kv.record import Kind, Role
from runtime.kv.tenants import TenantInfo, Tenants

KV_DIRECTORY, KV_MASTER_KEY = "kv", "keys/kv-master"  # below SOLOCARD_HOME


def open_tenants(home: Path) -> Tenants | None:
    """The tenants' keys; None where this home has no master key yet. StoreError for one that cannot be used."""
    path = home / KV_MASTER_KEY
    return Tenants(home / KV_DIRECTORY, load_master_key(path)) if path.exists() else None


@contextlib.contextmanager
def open_index(home: Path) -> Iterator[Index | None]:
    """The index, read-only; None where nothing was stored yet. StoreError where it is lost or cannot be read."""
    directory = home / KV_DIRECTORY
    if not (directory / INDEX_NAME).exists():
        if any(directory.glob("*.kvs")):
            raise StoreError(f"{directory / INDEX_NAME} is missing; a server makes it anew when it starts")
        yield None
        return
    index = None
    try:
        index = Index.open(directory, Io(), read_only=True)
        yield index
    except sqlite3.OperationalError as error:  # a full disk, another user's folder: the file itself may be good
        raise StoreError(
            f"{directory / INDEX_NAME} cannot be opened now ({error}); look at the disk's free space and at whose it is"
        ) from None
    except sqlite3.Error as error:
        raise StoreError(
            f"{directory / INDEX_NAME} cannot be read ({error}); a server makes it anew when it starts"
        ) from None
    finally:
        if index:
            index.close()


def configured(config: KvConfig) -> KvStatus:
    """What a stopped server would say of itself."""
    return KvStatus(
        enabled=config.enabled, max_bytes=config.max_bytes * config.enabled, min_free_bytes=config.min_free_bytes,
        daily_write_bytes=config.daily_write_bytes,
    )  # fmt: skip


def read_report(home: Path, status: KvStatus, *, live: bool) -> KvReport:
    """``status`` and what the files hold; a ``live`` status counts itself, another one gets the files' numbers.

    What cannot be read becomes a sentence in ``problems``; nothing is raised.
    """
    report = KvReport(status=status, live=live, free_bytes=_free_bytes(home))
    problems: list[str] = []
    infos: list[TenantInfo] = []
    keyless = False
    try:
        tenants = open_tenants(home)
        infos = tenants.all() if tenants else []
    except (StoreError, OSError) as error:
        problems.append(str(error))
        keyless = True
    problems += [info.damaged for info in infos if info.damaged]
    report = replace(report, tenants=tuple(KvTenant(info.name) for info in infos if not info.damaged))
    try:
        with open_index(home) as index:
            if index:
                report = _filled(report, index, [info for info in infos if not info.damaged])
    except StoreError as error:
        problems.append(str(error))
    if keyless:  # whose the records are cannot be told, so not that they are nobody's
        report = replace(report, purged_bytes=0)
    return replace(report, problems=(*report.problems, *problems))


def _filled(report: KvReport, index: Index, infos: list[TenantInfo]) -> KvReport:
    """One look at the index, as it is at one moment."""
    db = index.connection
    db.execute("BEGIN")
    try:
        held, log = read_held(db), requests.summary(db)
        tenants = dict(held.tenants)
        named = [replace(tenants.pop(info.tenant_id, KvTenant()), name=info.name) for info in infos]
        return replace(
            report, status=report.status if report.live else _counted(report.status, index, held),
            tenants=tuple(sorted(named, key=lambda tenant: -tenant.size_bytes)), roles=held.roles,
            damaged=held.damaged, purged_bytes=sum(tenant.size_bytes for tenant in tenants.values()),
            logged_requests=log.requests, logged_prompt_tokens=log.prompt_tokens, logged_hit_tokens=log.hit_tokens,
            logged_reasons=log.reasons, misses=tuple(requests.newest_misses(db)),
        )  # fmt: skip
    finally:
        db.execute("ROLLBACK")


@dataclass(slots=True)
class Held:
    """Readable records by tenant id (those of purged tenants too, all without a name) and by role; damaged ones."""

    tenants: dict[bytes, KvTenant] = field(default_factory=dict)
    roles: dict[str, int] = field(default_factory=lambda: {role.name.lower(): 0 for role in Role if role})
    damaged: int = 0


def read_held(db: sqlite3.Connection) -> Held:
    """Adds up every row in one walk: half a second of CPU for 100,000, outside the GIL. May raise sqlite3.Error."""
    held = Held()
    query = (
        "SELECT tenant_id, kind, role, state, COUNT(*), SUM(size_bytes), MAX(used_s) FROM record "
        "WHERE state IN (0, 1, 4) AND segment >= 0 GROUP BY tenant_id, kind, role, state"
    )
    for tenant_id, kind, role, state, count, size_bytes, used_s in db.execute(query):
        if state == State.DAMAGED:
            held.damaged += count
            continue
        before, block = held.tenants.get(tenant_id, KvTenant()), kind == Kind.BLOCK
        held.tenants[tenant_id] = replace(
            before, blocks=before.blocks + count * block, checkpoints=before.checkpoints + count * (not block),
            size_bytes=before.size_bytes + size_bytes, last_used_s=max(before.last_used_s, used_s),
        )  # fmt: skip
        if not block and role in _ROLES:
            held.roles[Role(role).name.lower()] += count
    return held


_ROLES = frozenset(role for role in Role if role)


def _counted(status: KvStatus, index: Index, held: Held) -> KvStatus:
    segments = index.segments()
    return replace(
        status, used_bytes=sum(row.end_bytes for row in segments), segments=len(segments),
        blocks=sum(tenant.blocks for tenant in held.tenants.values()),
        checkpoints=sum(tenant.checkpoints for tenant in held.tenants.values()),
        written_today_bytes=index.written_today(int(time.time() // DAY_S)),
    )  # fmt: skip


def _free_bytes(home: Path) -> int:
    """Of the file system of ``kv/``; 0 where there is no such folder."""
    with contextlib.suppress(OSError):
        found = os.statvfs(home / KV_DIRECTORY)
        return found.f_bavail * found.f_frsize
    return 0
