"""System prompts that an administrator approved for sharing: their blocks are stored once, for every tenant.

An approval is a file ``kv/shared/<SHA-256 of the text>.json`` with an HMAC under a key derived from the KV master key,
so that nobody who can only write files can widen what tenants share. The text itself is not kept.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from appliance.errors import StoreError

APPROVALS = "shared"  # below the KV directory
MAX_APPROVAL_BYTES = 1024
_INFO = b"solocard kv 2 shared"
_MAC_BYTES = 32


class Approvals:
    """The approvals in one directory. Any thread; a directory that does not exist holds none."""

    def __init__(self, directory: Path, master_key: bytes) -> None:
        self._directory = directory
        self._key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_INFO).derive(master_key)

    def approve(self, text: str) -> Path:
        """Approve exactly ``text``; the file that says so, durable when this returns. StoreError names it."""
        digest = hashlib.sha256(text.encode()).digest()
        path = self._path(digest)
        body = json.dumps({"hmac": self._mac(digest).hex(), "sha256": digest.hex()}, sort_keys=True) + "\n"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_whole(path, body.encode())
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}; nothing was approved") from None
        return path

    def remove(self, text: str) -> bool:
        """Take an approval back; False when ``text`` had none. StoreError names the file."""
        path = self._path(hashlib.sha256(text.encode()).digest())
        try:
            path.unlink()
            _sync_directory(path.parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}; the approval stays") from None
        return True

    def is_approved(self, text: str) -> bool:
        """Whether exactly ``text`` was approved under this master key; a damaged or forged file approves nothing."""
        digest = hashlib.sha256(text.encode()).digest()
        try:
            with self._path(digest).open("rb") as file:
                raw = json.loads(file.read(MAX_APPROVAL_BYTES))
            found = bytes.fromhex(raw["hmac"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            found = bytes(_MAC_BYTES)
        return hmac.compare_digest(found, self._mac(digest))

    def _mac(self, digest: bytes) -> bytes:
        return hmac.digest(self._key, digest, "sha256")

    def _path(self, digest: bytes) -> Path:
        return self._directory / f"{digest.hex()}.json"


def _write_whole(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename, fsync the directory: a crash leaves the whole file or none."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    draft.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
