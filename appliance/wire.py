"""What crosses the admin unix socket and the ``--json`` progress of ``solocard``: plain dataclasses, no behaviour.

``GET /admin/v1/status`` on ``run/admin.sock`` (mode 0600) answers a :class:`Status` as JSON;
``GET /admin/v1/log?lines=N`` answers ``{"lines": [...]}``; ``GET /admin/v1/kv`` a :class:`KvReport`. The console
reads; nothing here activates anything. What is missing has its default and what is unknown is left out, so that an
older and a newer side understand each other.
Every ``solocard … --json`` command prints :class:`Progress` objects as JSON lines; the last has ``done`` true.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

ADMIN_SOCKET = "run/admin.sock"  # below SOLOCARD_HOME
FULL = "full"  # the profile every bundle has: all experts, graph model.onnx
# Why a prompt, or a part of it, was computed and not read; docs/operations.md has a sentence for each.
MISS_REASONS = ("too-short", "no-unit", "fingerprint", "ttl", "evicted", "corrupt", "policy")
PROFILE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")  # whose KV cache an API key uses
TENANT_DEFAULT = "default"
TENANT_SHARED = "shared"  # reserved: approved system prompts, read by every tenant


@dataclass(frozen=True, slots=True)
class KvStatus:
    """The KV cache on disk: bytes, quota, and where lookups ended since the server started (tokens).

    ``hits`` are lookups that gave at least one token, ``replays`` those that gave blocks without a checkpoint.
    ``daily_write_bytes`` 0 is no limit; ``reclaimed_bytes`` counts freed segments since the server started.
    """

    enabled: bool = False
    used_bytes: int = 0
    max_bytes: int = 0
    hit_tokens: int = 0
    miss_tokens: int = 0
    writing: bool = True
    reason: str = ""  # why writing stopped, empty while it goes on
    miss_reasons: dict[str, int] = field(default_factory=dict)
    blocks: int = 0
    checkpoints: int = 0
    segments: int = 0
    written_today_bytes: int = 0
    daily_write_bytes: int = 0
    reclaimed_bytes: int = 0
    lookups: int = 0
    hits: int = 0
    replays: int = 0
    min_free_bytes: int = 0

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> KvStatus:
        return KvStatus(**_known(KvStatus, raw))


@dataclass(frozen=True, slots=True)
class KvTenant:
    """What one tenant has on disk; ``last_used_s`` is a Unix time, 0 where nothing of it is stored."""

    name: str = ""
    blocks: int = 0
    checkpoints: int = 0
    size_bytes: int = 0
    last_used_s: int = 0


@dataclass(frozen=True, slots=True)
class KvMiss:
    """A request whose prompt was not read whole: ``hit_tokens`` of ``tokens`` were; ``reason`` as in MISS_REASONS."""

    at_s: float = 0.0
    tokens: int = 0
    hit_tokens: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class KvReport:
    """The KV cache as its files show it, and as the running server counts it where ``live``.

    ``roles``: checkpoints by why they are there. ``logged_*`` sum up the request log, which outlives restarts;
    ``misses`` are its newest, newest first. ``problems`` are plain sentences.
    """

    status: KvStatus = field(default_factory=KvStatus)
    live: bool = False
    roles: dict[str, int] = field(default_factory=dict)
    damaged: int = 0  # records that failed their check and are not read any more
    purged_bytes: int = 0  # of tenants whose key is gone: unreadable, not yet freed
    free_bytes: int = 0  # of the file system
    tenants: tuple[KvTenant, ...] = ()
    logged_requests: int = 0
    logged_prompt_tokens: int = 0
    logged_hit_tokens: int = 0
    logged_reasons: dict[str, int] = field(default_factory=dict)
    misses: tuple[KvMiss, ...] = ()
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> KvReport:
        """Raises TypeError or ValueError where a part has another shape."""
        values = _known(KvReport, raw)
        values["status"] = KvStatus.from_dict(dict(raw.get("status") or {}))
        values["tenants"] = tuple(KvTenant(**_known(KvTenant, dict(item))) for item in raw.get("tenants") or ())
        values["misses"] = tuple(KvMiss(**_known(KvMiss, dict(item))) for item in raw.get("misses") or ())
        values["problems"] = tuple(raw.get("problems") or ())
        return KvReport(**values)


@dataclass(frozen=True, slots=True)
class Status:
    """One look at the server. Rates are means over the last ``window_s`` seconds; counters since start."""

    bundle_id: str = ""
    model: str = ""
    profile: str = ""  # of the bundle: which experts and overlays the engine loaded
    version: str = ""
    encoding: str = ""
    numerics: str = ""
    backend: str = ""  # e.g. "ort 1.31.1 CPU, function bodies, 2 threads"
    device: str = ""  # "CPU" or the card's name
    state: str = "starting"  # starting | ready | draining
    uptime_s: float = 0.0
    window_s: float = 10.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    running: int = 0
    queued: int = 0
    queue_depth: int = 0
    requests_total: int = 0
    prompt_tokens_total: int = 0
    completion_tokens_total: int = 0
    context_tokens: int = 0
    kv: KvStatus = field(default_factory=KvStatus)
    notes: tuple[str, ...] = ()  # plain sentences a person should know, e.g. "unverified on hardware"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Status:
        """Raises TypeError or ValueError where a part has another shape."""
        values = _known(Status, raw)
        values["kv"] = KvStatus.from_dict(dict(raw.get("kv") or {}))
        values["notes"] = tuple(raw.get("notes") or ())
        return Status(**values)


@dataclass(frozen=True, slots=True)
class Progress:
    """One JSON line of ``solocard … --json``: a step, how far it is in bytes, and the outcome in the last line."""

    step: str
    message: str
    done_bytes: int = 0
    total_bytes: int = 0
    elapsed_s: float = 0.0
    done: bool = False
    ok: bool = True
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _known(kind: type[Any], raw: dict[str, Any]) -> dict[str, Any]:
    """The items of ``raw`` that ``kind`` has a field for."""
    names = {f.name for f in dataclasses.fields(kind)}
    return {name: value for name, value in raw.items() if name in names}
