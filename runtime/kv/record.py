"""One record of a segment: 128 header bytes, ciphertext, 16 tag bytes, zeros to the next 4 KiB (docs/kv-format.md).

The header is associated data of AES-256-GCM. A reader never trusts a header it finds: it builds the one that must
stand there from what it asked for, so a record of another prefix, tenant, fingerprint or place does not open. Only
the length of a tail, which no layout fixes, is taken from the header found; the tag covers it.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.errors import StoreError

MAGIC = b"SKVR"
FORMAT = 2
ALIGN_BYTES = 4096
HEADER_BYTES = 128
TAG_BYTES = 16
EPOCH_BYTES = 8
PARENT_BYTES = 7  # of the parent's chain hash, in a tail's header and in the index
KEY_GENERATION = 1
_CIPHER_AES_256_GCM = 1
# magic, format, kind, cipher, fingerprint id, tenant id, chain hash, first token, end token, payload bytes,
# epoch, offset / 4096 (these two are the nonce), key generation, created (unix s), role, parent of a tail
_HEADER = struct.Struct("<4sHBB16s16s32sQQQ8sIIQB7s")


class Kind(enum.IntEnum):
    """What a record holds."""

    BLOCK = 1
    CHECKPOINT = 2
    TAIL = 3
    FOOTER = 4  # the headers of a sealed segment; never in the index


class Role(enum.IntEnum):
    """Why a checkpoint or tail was written; decides how long it is kept."""

    NONE = 0  # blocks
    PROMPT = 1  # c(n) of a prompt
    ANSWER = 2  # the end of an answer
    ANCHOR = 3  # a common prefix, the declared end of system or tools, on the way of a long prefill
    SUSPENDED = 4  # tails


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What the 128 bytes say. Tokens [first_token, end_token); ``epoch`` is 8 random bytes of one appender's life."""

    kind: Kind
    fingerprint_id: bytes  # F[0:16]
    tenant_id: bytes  # 16 bytes
    chain: bytes  # h_i of the prefix that ends at end_token; a tail's own name
    first_token: int
    end_token: int
    payload_bytes: int
    epoch: bytes
    offset: int  # bytes from the start of the segment, a multiple of 4096
    created_s: int
    role: Role = Role.NONE
    parent: bytes = bytes(PARENT_BYTES)  # tails: h_i[0:7] of the blocks before it
    key_generation: int = KEY_GENERATION

    @property
    def nonce(self) -> bytes:
        """96 bits: epoch ‖ u32 offset / 4096. One epoch writes each offset once, so no nonce comes twice."""
        return self.epoch + struct.pack("<I", self.offset // ALIGN_BYTES)

    @property
    def size_bytes(self) -> int:
        """On disk, padding included."""
        return record_bytes(self.payload_bytes)

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
            self.key_generation, self.created_s, self.role, self.parent,
        )  # fmt: skip

    @staticmethod
    def unpack(packed: bytes | memoryview) -> RecordHeader | None:
        """What 128 bytes say, believed by nobody yet; None where no header of this format stands."""
        if len(packed) != HEADER_BYTES:
            return None
        (magic, form, kind, cipher, fingerprint_id, tenant_id, chain, first, end, payload_bytes, epoch, place,
         generation, created_s, role, parent) = _HEADER.unpack(packed)  # fmt: skip
        if (magic, form, cipher) != (MAGIC, FORMAT, _CIPHER_AES_256_GCM) or kind not in _KINDS or role not in _ROLES:
            return None
        return RecordHeader(Kind(kind), fingerprint_id, tenant_id, chain, first, end, payload_bytes, epoch,
                            place * ALIGN_BYTES, created_s, Role(role), parent, generation)  # fmt: skip


_KINDS, _ROLES = frozenset(Kind), frozenset(Role)


def record_bytes(payload_bytes: int) -> int:
    """Size on disk of a record with this payload: header, payload, tag, rounded up to 4 KiB."""
    return -(-(HEADER_BYTES + payload_bytes + TAG_BYTES) // ALIGN_BYTES) * ALIGN_BYTES


def seal(header: RecordHeader, payload: bytes | memoryview, cipher: AESGCM) -> bytearray:
    """The whole record, padded; encrypted straight into its place."""
    packed, raw = header.pack(), bytearray(header.size_bytes)
    raw[:HEADER_BYTES] = packed
    end = HEADER_BYTES + len(payload) + TAG_BYTES
    cipher.encrypt_into(header.nonce, payload, packed, memoryview(raw)[HEADER_BYTES:end])
    return raw


def unseal(header: RecordHeader, raw: bytes | bytearray | memoryview, cipher: AESGCM) -> bytes:
    """The payload of ``raw``, which must be the record that ``header`` describes; else StoreError."""
    packed = header.pack()
    if len(raw) != header.size_bytes:
        raise StoreError(f"KV record at {header.offset} is cut short: {len(raw)} bytes")
    if raw[:HEADER_BYTES] != packed:
        raise StoreError(f"KV record at {header.offset} has another header than its index entry says")
    end = HEADER_BYTES + header.payload_bytes + TAG_BYTES
    try:
        return cipher.decrypt(header.nonce, memoryview(raw)[HEADER_BYTES:end], packed)
    except InvalidTag:
        raise StoreError(f"KV record at {header.offset} is not authentic") from None
