"""One record of a segment: 128 header bytes, ciphertext, 16 tag bytes, zeros to the next 4 KiB (docs/kv-format.md).

The header is associated data of AES-256-GCM. A reader never trusts a header it finds: it builds the one that must
stand there from what it asked for, so a record of another prefix, tenant, fingerprint or place does not open.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.errors import StoreError

MAGIC = b"SKVR"
FORMAT = 1
ALIGN_BYTES = 4096
HEADER_BYTES = 128
TAG_BYTES = 16
EPOCH_BYTES = 8
KEY_GENERATION = 1
_CIPHER_AES_256_GCM = 1
# magic, format, kind, cipher, fingerprint id, tenant id, chain hash, first token, end token, payload bytes,
# epoch, offset / 4096 (these two are the nonce), key generation, created (unix s), zeros
_HEADER = struct.Struct("<4sHBB16s16s32sQQQ8sIIQ8x")


class Kind(enum.IntEnum):
    BLOCK = 1
    CHECKPOINT = 2


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What the 128 bytes say. Tokens [first_token, end_token); ``epoch`` is 8 random bytes of one appender's life."""

    kind: Kind
    fingerprint_id: bytes  # F[0:16]
    tenant_id: bytes  # 16 bytes
    chain: bytes  # h_i of the prefix that ends at end_token
    first_token: int
    end_token: int
    payload_bytes: int
    epoch: bytes
    offset: int  # bytes from the start of the segment, a multiple of 4096
    created_s: int
    key_generation: int = KEY_GENERATION

    @property
    def nonce(self) -> bytes:
        """96 bits: epoch ‖ u32 offset / 4096. One epoch writes each offset once, so no nonce comes twice."""
        return self.epoch + struct.pack("<I", self.offset // ALIGN_BYTES)

    def pack(self) -> bytes:
        """The 128 bytes; StoreError where a value does not fit its field (then no such record was ever written)."""
        try:
            return self._packed()
        except struct.error as error:
            raise StoreError(f"KV record at {self.offset}: impossible header ({error})") from None

    def _packed(self) -> bytes:
        return _HEADER.pack(
            MAGIC, FORMAT, self.kind, _CIPHER_AES_256_GCM, self.fingerprint_id, self.tenant_id, self.chain,
            self.first_token, self.end_token, self.payload_bytes, self.epoch, self.offset // ALIGN_BYTES,
            self.key_generation, self.created_s,
        )  # fmt: skip


def record_bytes(payload_bytes: int) -> int:
    """Size on disk of a record with this payload: header, payload, tag, rounded up to 4 KiB."""
    return -(-(HEADER_BYTES + payload_bytes + TAG_BYTES) // ALIGN_BYTES) * ALIGN_BYTES


def seal(header: RecordHeader, payload: bytes, cipher: AESGCM) -> bytes:
    """The whole record, padded."""
    packed = header.pack()
    return b"".join((packed, cipher.encrypt(header.nonce, payload, packed))).ljust(record_bytes(len(payload)), b"\0")


def unseal(header: RecordHeader, raw: bytes | memoryview, cipher: AESGCM) -> bytes:
    """The payload of ``raw``, which must be the record that ``header`` describes; else StoreError."""
    packed = header.pack()
    if len(raw) != record_bytes(header.payload_bytes):
        raise StoreError(f"KV record at {header.offset} is cut short: {len(raw)} bytes")
    if raw[:HEADER_BYTES] != packed:
        raise StoreError(f"KV record at {header.offset} has another header than its index entry says")
    end = HEADER_BYTES + header.payload_bytes + TAG_BYTES
    try:
        return cipher.decrypt(header.nonce, memoryview(raw)[HEADER_BYTES:end], packed)
    except InvalidTag:
        raise StoreError(f"KV record at {header.offset} is not authentic") from None
