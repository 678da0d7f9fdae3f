"""API keys as the server reads them: ``keys/<name>.json`` with the SHA-256 of a key, written by ``solocard key new``.

The folder is looked at on every request and read again when it changed, so a new or revoked key counts at once.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import threading
import time
from pathlib import Path

from appliance.wire import TENANT_DEFAULT, TENANT_NAME, TENANT_SHARED
from runtime.server.auth import Caller

MAX_KEYS = 1000
MAX_KEY_FILE_BYTES = 4096
_SETTLED_S = 1.0  # a folder that changed this recently may change again within one tick of its clock
_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger("solocard.serve")


class KeyFolder:
    """``verify(token)`` of one folder. Any thread; a folder that does not exist holds no keys."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._callers: dict[Caller, str] = {}  # → SHA-256 of the key, hex
        self._seen_mtime_ns = -1

    def verify(self, token: str) -> Caller | None:
        """Whose key it is, None when there is none. Every digest is compared, in constant time each."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            self._refresh()
            callers = [caller for caller, known in self._callers.items() if hmac.compare_digest(digest, known)]
        return callers[0] if callers else None

    def _refresh(self) -> None:
        try:
            mtime_ns = self._folder.stat().st_mtime_ns
        except FileNotFoundError:
            self._callers, self._seen_mtime_ns = {}, -1
            return
        if mtime_ns == self._seen_mtime_ns:
            return
        self._callers = dict(filter(None, (_read(path) for path in sorted(self._folder.glob("*.json"))[:MAX_KEYS])))
        self._seen_mtime_ns = mtime_ns if time.time_ns() - mtime_ns > _SETTLED_S * 1e9 else -1


def _read(path: Path) -> tuple[Caller, str] | None:
    """A damaged file is one key less, and a line in the log; so is one with a tenant that no key may have."""
    try:
        with path.open("rb") as file:
            raw = json.loads(file.read(MAX_KEY_FILE_BYTES))
        digest, tenant = raw["sha256"], raw.get("tenant", TENANT_DEFAULT)
        if raw["name"] == path.stem and _SHA256.fullmatch(digest) and _may_have_keys(tenant):
            return Caller(path.stem, tenant), digest
        what = "its fields do not fit"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = type(error).__name__
    _log.warning("%s is not a key (%s); remove it and make the key anew", path, what)
    return None


def _may_have_keys(tenant: str) -> bool:
    return TENANT_NAME.fullmatch(tenant) is not None and tenant != TENANT_SHARED
