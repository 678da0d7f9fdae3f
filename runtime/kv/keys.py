"""Keys of the KV store: one master file; what it gives, and what each tenant's secret gives.

The chain names a prefix without telling it: names are HMACs under the tenant's key, so neither file nor index
confirms a guessed prompt, and one tenant's chain says nothing about another's (docs/kv-format.md, "Keys").
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from appliance.errors import EngineError, StoreError
from appliance.model import BLOCK_TOKENS
from runtime.kv.files import Io, write_new

KEY_BYTES = 32
TENANT_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class MasterKeys:
    """What the master key itself gives; no tenant's rows can be read with it alone once their secret is gone."""

    names: bytes  # HMAC key: tenant name → file name
    wrap: AESGCM  # of the tenants' secrets
    store: AESGCM  # of the segments' footers, which hold headers only


@dataclass(frozen=True, slots=True)
class TenantKeys:
    """Everything derived from one tenant's secret; ``cipher`` is AES-256-GCM under the tenant's data key."""

    tenant_id: bytes  # 16 bytes, stands for the tenant in headers and index
    chain_key: bytes
    cipher: AESGCM
    replay_cipher: AESGCM

    def root(self, fingerprint: bytes) -> bytes:
        """h_0, the parent of the first block."""
        return hmac.digest(self.chain_key, fingerprint, "sha256")

    def chain(self, fingerprint: bytes, ids: Sequence[int], count: int) -> list[bytes]:
        """h_1 … h_count of the first 256·count ``ids``; raises EngineError for an id that is no u32."""
        link, hashes_out = self.root(fingerprint), []
        for i in range(count):
            block = ids[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]
            if len(block) != BLOCK_TOKENS:
                raise EngineError(f"tokens {i * BLOCK_TOKENS} and on are not {BLOCK_TOKENS} ids below 2^32")
            link = hmac.digest(self.chain_key, link + _packed(block, i * BLOCK_TOKENS), "sha256")
            hashes_out.append(link)
        return hashes_out

    def tail_name(self, parent: bytes, rest: Sequence[int]) -> bytes:
        """The name of an exact tail: ``parent`` is h_i of the whole blocks before it, ``rest`` the ids after them."""
        return hmac.digest(self.chain_key, parent + b"tail" + _packed(rest, 0), "sha256")

    def replay_name(self, name: str) -> bytes:
        """The name under which the exact ids of a tool call or answer are kept."""
        return hmac.digest(self.chain_key, b"replay" + name.encode(), "sha256")


def _packed(ids: Sequence[int], first: int) -> bytes:
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error:
        raise EngineError(f"tokens {first} and on are not {len(ids)} ids below 2^32") from None


def derive_master(master_key: bytes) -> MasterKeys:
    """HKDF-SHA256 from the master key; StoreError when it has another length than 32 bytes."""
    if len(master_key) != KEY_BYTES:
        raise StoreError(f"the KV master key has {len(master_key)} bytes, not {KEY_BYTES}; restore keys/kv-master")
    return MasterKeys(
        _expand(master_key, b"solocard kv 2 names", KEY_BYTES),
        AESGCM(_expand(master_key, b"solocard kv 2 wrap", KEY_BYTES)),
        AESGCM(_expand(master_key, b"solocard kv 2 store", KEY_BYTES)),
    )


def derive_tenant(secret: bytes) -> TenantKeys:
    """HKDF-SHA256 from a tenant's 32 random bytes to its id and keys."""
    return TenantKeys(
        _expand(secret, b"solocard kv 2 id", TENANT_ID_BYTES),
        _expand(secret, b"solocard kv 2 chain", KEY_BYTES),
        AESGCM(_expand(secret, b"solocard kv 2 data", KEY_BYTES)),
        AESGCM(_expand(secret, b"solocard kv 2 replay", KEY_BYTES)),
    )


def _expand(key: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=None, info=info).derive(key)


def load_master_key(path: Path) -> bytes:
    """Read ``keys/kv-master`` (32 bytes, mode 0600); make it first where there is none.

    Raises StoreError when the file has another length or others may read it.
    """
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_new(path, secrets.token_bytes(KEY_BYTES), Io())  # another process's, where that was first
        mode, key = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; the KV cache needs this key") from None
    if mode & 0o077:
        raise StoreError(f"{path} is readable by others (mode {mode & 0o777:04o}); chmod 600 it")
    if len(key) != KEY_BYTES:
        raise StoreError(f"{path} has {len(key)} bytes, not {KEY_BYTES}; restore it, or delete it and the kv directory")
    return key
