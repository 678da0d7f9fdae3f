"""What crosses the admin unix socket and the ``--json`` progress of ``solocard``: plain dataclasses, no behaviour.

``GET /admin/v1/status`` on ``run/admin.sock`` (mode 0600) answers a :class:`Status` as JSON;
``GET /admin/v1/log?lines=N`` answers ``{"lines": [...]}``. The console reads; nothing here activates anything.
Every ``solocard … --json`` command prints :class:`Progress` objects as JSON lines; the last has ``done`` true.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

ADMIN_SOCKET = "run/admin.sock"  # below SOLOCARD_HOME
FULL = "full"  # the profile every bundle has: all experts, graph model.onnx
PROFILE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


@dataclass(frozen=True, slots=True)
class KvStatus:
    """The KV cache on disk: bytes, quota, and where lookups ended since the server started (tokens)."""

    enabled: bool = False
    used_bytes: int = 0
    max_bytes: int = 0
    hit_tokens: int = 0
    miss_tokens: int = 0
    writing: bool = True
    reason: str = ""  # why writing stopped, empty while it goes on
    miss_reasons: dict[str, int] = field(default_factory=dict)


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
        """Unknown keys are ignored, so an older console reads a newer server."""
        known = {f.name for f in dataclasses.fields(Status)}
        values = {k: v for k, v in raw.items() if k in known}
        kv_known = {f.name for f in dataclasses.fields(KvStatus)}
        values["kv"] = KvStatus(**{k: v for k, v in dict(raw.get("kv") or {}).items() if k in kv_known})
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
