"""API keys: ``keys/<name>.json`` (0600) holds the SHA-256 of a key; the key itself is shown once and kept nowhere.

A key is 256 random bits, so an unsalted SHA-256 cannot be searched. The file names the key, never its text.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from appliance.bundle_writer import sync_directory, write_synced
from appliance.errors import StoreError, UsageError
from appliance.layout import Layout
from appliance.manifest import canonical_json
from appliance.trust import utc_now
from appliance.wire import TENANT_DEFAULT, TENANT_NAME, TENANT_SHARED

PREFIX = "sk-solo-"
MAX_KEYS = 1000
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is stored of a key."""

    name: str
    sha256: str
    created: str  # UTC, e.g. 2026-11-22T03:04:05Z
    tenant: str = TENANT_DEFAULT  # whose KV cache its requests use

    def matches(self, token: str) -> bool:
        """Constant-time comparison with the key's text."""
        return hmac.compare_digest(hash_token(token), self.sha256)


def hash_token(token: str) -> str:
    """SHA-256 of a key's text, hex."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_key(home: Path, name: str, tenant: str = TENANT_DEFAULT) -> str:
    """Make and store a key; the return value is the only copy of its text.

    Keys of one ``tenant`` share what the KV cache holds of their prompts, keys of different ones never do. UsageError:
    bad name or tenant, or name in use.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"key name {name!r}: up to 32 of a-z, 0-9, - and _, beginning with a letter or digit")
    check_tenant(tenant)
    directory = _directory(home)
    path = directory / f"{name}.json"
    if path.exists():
        raise UsageError(f"a key named {name} exists; choose another name, or `solocard key revoke {name}` first")
    if len(list(directory.glob("*.json"))) >= MAX_KEYS:
        raise UsageError(f"there are {MAX_KEYS:,} keys already; revoke some first")
    token = PREFIX + secrets.token_urlsafe(32)
    record = {
        "created": f"{utc_now():%Y-%m-%dT%H:%M:%SZ}", "name": name, "sha256": hash_token(token), "tenant": tenant,
    }  # fmt: skip
    write_synced(path, canonical_json(record), mode=0o600)
    return token


def check_tenant(tenant: str) -> None:
    """UsageError unless ``tenant`` is the name of a tenant that may have keys."""
    if not TENANT_NAME.fullmatch(tenant):
        raise UsageError(f"tenant {tenant[:60]!r}: up to 32 of a-z, 0-9, - and _, beginning with a letter or digit")
    if tenant == TENANT_SHARED:
        raise UsageError(f"tenant {tenant!r} is reserved for approved system prompts; choose another name")


def list_keys(home: Path) -> list[ApiKey]:
    """Every stored key, by name; none when no key was ever made. StoreError names a damaged file."""
    directory = Layout(home).keys
    return [_read(path) for path in sorted(directory.glob("*.json"))] if directory.is_dir() else []


def revoke_key(home: Path, name: str) -> None:
    """Forget a key; a running server refuses it from its next look at ``keys/``. UsageError when there is none."""
    path = Layout(home).keys / f"{name}.json"
    if not _NAME.fullmatch(name) or not path.exists():
        known = ", ".join(key.name for key in list_keys(home)) or "none"
        raise UsageError(f"there is no key named {name!r}; stored are: {known}")
    path.unlink()
    sync_directory(path.parent)


def find_key(home: Path, token: str) -> ApiKey | None:
    """The stored key whose text this is. Every key is compared, so the time says nothing about which one it was."""
    found = [key for key in list_keys(home) if key.matches(token)]
    return found[0] if found else None


def _directory(home: Path) -> Path:
    directory = Layout(home).keys
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    return directory


def _read(path: Path) -> ApiKey:
    try:
        raw = json.loads(path.read_bytes())
        key = ApiKey(raw["name"], raw["sha256"], raw["created"], raw.get("tenant", TENANT_DEFAULT))
        if key.name != path.stem or not _SHA256.fullmatch(key.sha256) or not isinstance(key.created, str):
            raise ValueError("fields")
        check_tenant(key.tenant)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError):
        raise StoreError(f"{path} is damaged or unreadable; remove it and make the key anew") from None
    return key
