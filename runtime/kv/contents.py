"""What the KV cache holds, read from its files: beside a running server or without one, and changing nothing."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from appliance.config import KvConfig
from appliance.errors import StoreError
from appliance.wire import KvReport, KvStatus, KvTenant
from runtime.kv import requests
from runtime.kv.files import Io
from runtime.kv.index import INDEX_NAME, Index
from runtime.kv.keys import load_master_key
from runtime.kv.record import Kind, Role
from runtime.kv.tenants import TenantInfo, Tenants

KV_DIRECTORY, KV_MASTER_KEY = "kv", "keys/kv-master"  # below SOLOCARD_HOME
DAY_S = 86_400
Held = dict[bytes, KvTenant]  # tenant id → what it holds, still without a name


def open_tenants(home: Path) -> Tenants | None:
    """The tenants' keys; None where this home has no master key yet. StoreError for one that cannot be used."""
    path = home / KV_MASTER_KEY
    return Tenants(home / KV_DIRECTORY, load_master_key(path)) if path.exists() else None


@contextlib.contextmanager
def open_index(home: Path) -> Iterator[Index | None]:
    """The index, read-only; None where nothing was stored yet. StoreError where it cannot be read."""
    directory = home / KV_DIRECTORY
    if not (directory / INDEX_NAME).exists():
        yield None
        return
    index = None
    try:
        index = Index.open(directory, Io(), read_only=True)
        yield index
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
    try:
        tenants = open_tenants(home)
        infos = tenants.all() if tenants else []
    except (StoreError, OSError) as error:
        problems.append(str(error))
    problems += [info.damaged for info in infos if info.damaged]
    try:
        with open_index(home) as index:
            if index:
                report = _filled(report, index, [info for info in infos if not info.damaged])
    except StoreError as error:
        problems.append(str(error))
    return replace(report, problems=(*report.problems, *problems))


def _filled(report: KvReport, index: Index, infos: list[TenantInfo]) -> KvReport:
    """One look at the index, as it is at one moment."""
    db = index.connection
    db.execute("BEGIN")
    try:
        held, log = held_by_tenant(db), requests.summary(db)
        named = [replace(held.pop(info.tenant_id, KvTenant()), name=info.name) for info in infos]
        status = report.status if report.live else _counted(report.status, index)
        return replace(
            report, status=status, tenants=tuple(sorted(named, key=lambda tenant: -tenant.size_bytes)),
            roles=_roles(db), damaged=_count(db, "SELECT COUNT(*) FROM record WHERE state = 1 AND segment >= 0"),
            purged_bytes=sum(tenant.size_bytes for tenant in held.values()), logged_requests=log.requests,
            logged_prompt_tokens=log.prompt_tokens, logged_hit_tokens=log.hit_tokens, logged_reasons=log.reasons,
            misses=tuple(requests.newest_misses(db)),
        )  # fmt: skip
    finally:
        db.execute("ROLLBACK")


def held_by_tenant(db: sqlite3.Connection) -> Held:
    """Readable records of each tenant id, those of purged tenants too."""
    held: Held = {}
    query = (
        "SELECT tenant_id, kind, COUNT(*), SUM(size_bytes), MAX(used_s) FROM record WHERE state IN (0, 4) "
        "GROUP BY tenant_id, kind"
    )
    for tenant_id, kind, count, size_bytes, used_s in db.execute(query):
        before = held.get(tenant_id, KvTenant())
        held[tenant_id] = replace(
            before, blocks=before.blocks + count * (kind == Kind.BLOCK),
            checkpoints=before.checkpoints + count * (kind != Kind.BLOCK), size_bytes=before.size_bytes + size_bytes,
            last_used_s=max(before.last_used_s, used_s),
        )  # fmt: skip
    return held


def _counted(status: KvStatus, index: Index) -> KvStatus:
    segments, kinds = index.segments(), index.count()
    return replace(
        status, used_bytes=sum(row.end_bytes for row in segments), segments=len(segments),
        blocks=kinds.get(Kind.BLOCK, 0), checkpoints=kinds.get(Kind.CHECKPOINT, 0) + kinds.get(Kind.TAIL, 0),
        written_today_bytes=index.written_today(int(time.time() // DAY_S)),
    )  # fmt: skip


def _roles(db: sqlite3.Connection) -> dict[str, int]:
    query = "SELECT role, COUNT(*) FROM record WHERE state IN (0, 4) AND kind != ? GROUP BY role"
    counts = dict(db.execute(query, (int(Kind.BLOCK),)))
    return {role.name.lower(): counts.get(role, 0) for role in Role if role is not Role.NONE}


def _count(db: sqlite3.Connection, query: str) -> int:
    return int(db.execute(query).fetchone()[0])


def _free_bytes(home: Path) -> int:
    """Of the file system of ``kv/``; 0 where there is no such folder."""
    with contextlib.suppress(OSError):
        found = os.statvfs(home / KV_DIRECTORY)
        return found.f_bavail * found.f_frsize
    return 0
