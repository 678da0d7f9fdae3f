"""The tenants' secrets: 32 random bytes each, wrapped under the master key, one file a tenant.

A purge destroys the file. Every process looks at the file before it uses a key it holds in memory, so a purge by
another process counts from the next call on; what was encrypted under the secret is then noise for everyone, and a
later tenant of the same name gets another secret, other ids and other chains.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag

from appliance.errors import StoreError
from runtime.kv.files import Io, make_directory, write_new
from runtime.kv.keys import KEY_BYTES, TenantKeys, derive_master, derive_tenant

SHARED = "shared"  # the tenant of approved system prompts
DIRECTORY = "tenants"
_MAGIC, _VERSION = b"SKVT", 2
_HEAD = struct.Struct("<4sH2x12s")  # magic, version, zeros, nonce
_INSIDE = struct.Struct(f"<{KEY_BYTES}sQ")  # secret, created (unix s); then the name in UTF-8
_MAX_BYTES = 4096
_DRAFT_S = 60.0
_log = logging.getLogger("solocard.kv")
_Stamp = tuple[int, int, int]  # inode, modified (ns), size: another file shows in at least one


@dataclass(frozen=True, slots=True)
class TenantInfo:
    """One file of the directory; ``damaged`` says why it cannot be opened, and then the other fields are empty."""

    name: str
    tenant_id: bytes
    created_s: int
    path: Path
    damaged: str = ""


@dataclass(frozen=True, slots=True)
class _Known:
    stamp: _Stamp
    keys: TenantKeys
    info: TenantInfo


class Tenants:
    """``directory`` is the store's; any number of processes may have one. Thread-safe."""

    def __init__(
        self, directory: Path, master_key: bytes, io: Io | None = None, clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        self._directory, self._io, self._clock = directory / DIRECTORY, io or Io(), clock
        self._master = derive_master(master_key)
        self._known: dict[Path, _Known] = {}
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """Where this tenant's file is; the name cannot be told from it."""
        return self._directory / f"{hmac.digest(self._master.names, name.encode(), 'sha256')[:16].hex()}.key"

    def find(self, name: str) -> TenantKeys | None:
        """The keys of a tenant that has a file now; None where there is none. StoreError for one that is damaged."""
        known = self._load(self.path(name))
        return known.keys if known else None

    def create(self, name: str) -> TenantKeys:
        """The tenant's keys, made where there are none; a damaged file is replaced, what it opened is lost.

        Raises OSError when the disk refuses a new file, StoreError for a file that cannot be read now: it stays.
        """
        path = self.path(name)
        for _ in range(3):  # another process may create or purge between the steps
            try:
                known = self._load(path)
            except StoreError as error:
                if isinstance(error.__cause__, OSError):
                    raise
                _log.warning("%s; a new secret takes its place", error)
                self._io.unlink(path)
                known = None
            if known:
                return known.keys
            with contextlib.suppress(FileNotFoundError):
                if not any(_read(path)):
                    self._io.unlink(path)  # left by a purge that was cut off
            make_directory(self._directory, self._io)
            write_new(path, self._wrap(path, name), self._io)
        raise StoreError(f"{path} is made and removed again and again; stop the purge")

    def purge(self, name: str) -> bool:
        """Destroy the secret, durably: overwrite, sync, unlink, sync. False where there was none."""
        path = self.path(name)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            size_bytes = os.fstat(fd).st_size
            self._io.pwrite(fd, bytes(size_bytes), 0)
            self._io.fdatasync(fd)
        finally:
            os.close(fd)
        self._io.unlink(path)
        self._io.sync_directory(self._directory)
        with self._lock:
            self._known.pop(path, None)
        return True

    def tidy(self) -> None:
        """Remove drafts that a crash has left; OSError as the system says."""
        for draft in self._directory.glob("*.new"):
            with contextlib.suppress(FileNotFoundError):
                if self._clock() - draft.stat().st_mtime > _DRAFT_S:  # a younger one may be another process at work
                    self._io.unlink(draft)

    def all(self) -> list[TenantInfo]:
        """Every tenant with a file, by name; damaged files come first, with what is wrong."""
        infos = []
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(self._directory.iterdir()):
                if path.suffix != ".key":
                    continue
                try:
                    known = self._load(path)
                except StoreError as error:
                    infos.append(TenantInfo("", b"", 0, path, str(error)))
                    continue
                if known:
                    infos.append(known.info)
        return sorted(infos, key=lambda info: info.name)

    def refused(self) -> OSError | None:
        """What the system says where it does not let a key file be read now; damaged ones are no such case."""
        for info in self.all():
            if info.damaged:
                try:
                    self._load(info.path)
                except StoreError as error:
                    if isinstance(error.__cause__, OSError):
                        return error.__cause__
        return None

    def live_ids(self) -> frozenset[bytes]:
        """The ids of all tenants whose secret is there."""
        return frozenset(info.tenant_id for info in self.all() if not info.damaged)

    def keys_of(self, tenant_id: bytes) -> TenantKeys | None:
        """The keys that go with an id found in a header; None when no secret gives it."""
        for info in self.all():
            if info.tenant_id == tenant_id and not info.damaged:
                known = self._load(info.path)
                return known.keys if known else None
        return None

    def _load(self, path: Path) -> _Known | None:
        """The file's keys, from memory while it is still the same file."""
        try:
            found = path.lstat()
        except FileNotFoundError:
            with self._lock:
                self._known.pop(path, None)
            return None
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}; the tenant's part of the KV cache needs it") from error
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        with self._lock:
            known = self._known.get(path)
        if known is None or known.stamp != stamp:
            known = self._open(path, stamp)
            with self._lock:
                if known is None:
                    self._known.pop(path, None)
                else:
                    self._known[path] = known
        return known

    def _open(self, path: Path, stamp: _Stamp) -> _Known | None:
        try:
            raw = _read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}; the tenant's part of the KV cache needs it") from error
        if raw and not any(raw):
            return None  # a purge that was cut off after the secret was gone
        if len(raw) < _HEAD.size or raw[:8] != _HEAD.pack(_MAGIC, _VERSION, bytes(12))[:8]:
            raise StoreError(f"{path} is no tenant file of format {_VERSION}; delete it: what it opened is lost")
        nonce = raw[_HEAD.size - 12 : _HEAD.size]
        try:
            inside = self._master.wrap.decrypt(nonce, raw[_HEAD.size :], path.name.encode())
        except InvalidTag:
            raise StoreError(f"{path} does not open with keys/kv-master; delete it: what it opened is lost") from None
        secret, created_s = _INSIDE.unpack_from(inside)
        keys = derive_tenant(secret)
        info = TenantInfo(inside[_INSIDE.size :].decode(), keys.tenant_id, created_s, path)
        return _Known(stamp, keys, info)

    def _wrap(self, path: Path, name: str) -> bytes:
        nonce = secrets.token_bytes(12)
        inside = _INSIDE.pack(secrets.token_bytes(KEY_BYTES), int(self._clock())) + name.encode()
        return _HEAD.pack(_MAGIC, _VERSION, nonce) + self._master.wrap.encrypt(nonce, inside, path.name.encode())


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        return os.read(fd, _MAX_BYTES)
    finally:
        os.close(fd)
