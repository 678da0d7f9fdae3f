"""What makes a bundle trusted: TUF metadata, checked on bytes. python-tuf parses and verifies; no file is opened here.

    root (kept on this machine) signs for ──► timestamp ──► snapshot ──► targets ──► manifest.json ──► every byte
                                                              └──► root's own version, length and SHA-256

Stricter than TUF, so that no byte of a bundle can change unseen: every metadata file equals its own compact
re-encoding, signatures are lower-case hex and all of them must verify, timestamp and snapshot carry length and
SHA-256, and the snapshot lists the root it was signed under.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined] # python-tuf documents these names here, without __all__
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from appliance.errors import TrustError
from appliance.manifest import MAX_MANIFEST_BYTES

MANIFEST_NAME = "manifest.json"  # the one TUF target that is a bundle's list
MAX_METADATA_BYTES = {"root": 64 << 10, "timestamp": 16 << 10, "snapshot": 64 << 10, "targets": 1 << 20}
MAX_ROOT_ROTATIONS = 64  # steps from the trusted root to the one a bundle was signed under

Read = Callable[[str, int], bytes]  # (file name in metadata/, most bytes) -> its bytes; raises BundleError

_SIGNATURE = re.compile(r"(?:[0-9a-f]{2}){1,512}")
_KEY_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class TrustedRoot:
    """A root this machine trusts, or is asked to: signed by its own keys, byte for byte as it came."""

    data: bytes
    signed: Root

    @staticmethod
    def from_bytes(data: bytes, source: str) -> TrustedRoot:
        """TrustError naming ``source`` unless it is a root signed by a threshold of its own root keys."""
        metadata = parse_metadata(data, Root, source)
        try:
            metadata.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
        except RepositoryError:
            raise TrustError(f"{source} is not signed by its own root keys; it is damaged, fetch it again") from None
        _check_root_keys(metadata.signed, source)
        return TrustedRoot(data, metadata.signed)

    @property
    def version(self) -> int:
        return self.signed.version

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file, as ``sha256sum`` prints it."""
        return hashlib.sha256(self.data).hexdigest()

    def successor(self, data: bytes, source: str) -> TrustedRoot:
        """The next root: version + 1, signed by a threshold of this root's keys and of its own. Else TrustError."""
        metadata = parse_metadata(data, Root, source)
        if metadata.signed.version != self.version + 1:
            found = metadata.signed.version
            raise TrustError(f"{source} is root version {found}; after version {self.version} only the next is taken")
        try:
            self.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
            metadata.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
        except RepositoryError:
            raise TrustError(f"{source} is not signed by the keys of root version {self.version} and its own") from None
        _check_root_keys(metadata.signed, source)
        return TrustedRoot(data, metadata.signed)


@dataclass(frozen=True, slots=True)
class Chain:
    """What verified metadata says. ``files`` are its bytes by name in metadata/, all of them needed to verify again."""

    root_version: int
    timestamp_version: int
    snapshot_version: int
    targets_version: int
    manifest_sha256: str
    manifest_size_bytes: int
    min_secure_counter: int
    expires: datetime  # the earliest of all four
    expires_file: str
    files: dict[str, bytes] = field(repr=False)

    @property
    def manifest_path(self) -> str:
        return f"targets/{self.manifest_sha256}.{MANIFEST_NAME}"

    def check_manifest(self, data: bytes, source: str) -> None:
        """TrustError unless these are the signed manifest's bytes."""
        if len(data) != self.manifest_size_bytes or hashlib.sha256(data).hexdigest() != self.manifest_sha256:
            raise TrustError(f"{source} is damaged: it is not the manifest that metadata/ signs for")

    def check_time(self, now: datetime) -> None:
        """TrustError when any of the metadata has expired at ``now``. Asked before installing, never before serving."""
        if now >= self.expires:
            raise TrustError(
                f"metadata/{self.expires_file} expired on {self.expires:%Y-%m-%d} and today is {now:%Y-%m-%d}; ask for "
                "a bundle signed anew (its weights need not be copied again), or set this machine's clock"
            )


def verify_chain(root: TrustedRoot, read: Read) -> Chain:
    """Follow the metadata from a trusted root to the manifest's digest. TrustError names the first file that fails."""
    files: dict[str, bytes] = {}

    def load(name: str, role: str) -> bytes:
        files[name] = read(name, MAX_METADATA_BYTES[role])
        return files[name]

    root_name = f"{root.version}.root.json"
    if load(root_name, "root") != root.data:
        raise TrustError(f"metadata/{root_name} is not the root trusted here ({root.fingerprint[:16]}…); copy the "
                         "bundle again, or ask who signed it")  # fmt: skip
    timestamp = _verified(load("timestamp.json", "timestamp"), Timestamp, root, "metadata/timestamp.json")
    entry = timestamp.snapshot_meta
    name = f"{entry.version}.snapshot.json"
    snapshot = _verified(_listed(load(name, "snapshot"), entry, name), Snapshot, root, f"metadata/{name}")
    _expect_version(snapshot, entry, name)
    _check_listed_root(snapshot, root, name)
    entry = _meta(snapshot, "targets.json", name)
    name = f"{entry.version}.targets.json"
    targets = _verified(_listed(load(name, "targets"), entry, name), Targets, root, f"metadata/{name}")
    _expect_version(targets, entry, name)
    manifest_sha256, size_bytes, secure = _manifest_target(targets, f"metadata/{name}")
    soonest, file = min(
        (signed.expires, label)
        for signed, label in ((root.signed, root_name), (timestamp, "timestamp.json"),
                              (snapshot, f"{snapshot.version}.snapshot.json"), (targets, name))
    )  # fmt: skip
    return Chain(root.version, timestamp.version, snapshot.version, targets.version, manifest_sha256, size_bytes,
                 secure, soonest, file, files)  # fmt: skip


def declared_root_version(read: Read) -> int:
    """Root version the snapshot says it was signed under, read before anything is verified; only a hint of a name."""
    data = read("timestamp.json", MAX_METADATA_BYTES["timestamp"])
    stamp = parse_metadata(data, Timestamp, "metadata/timestamp.json")
    name = f"{stamp.signed.snapshot_meta.version}.snapshot.json"
    snapshot = parse_metadata(read(name, MAX_METADATA_BYTES["snapshot"]), Snapshot, f"metadata/{name}")
    return _meta(snapshot.signed, "root.json", name).version


def parse_metadata(data: bytes, kind: type[Signed], source: str) -> Metadata[Any]:
    """Strictly parsed, not yet verified: right type, compact re-encoding equal, lower-case hex. TrustError else."""
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(data)
        canonical = compact_bytes(metadata)
    except (DeserializationError, RecursionError, ValueError, KeyError, TypeError):
        raise TrustError(f"{source} is damaged: not TUF metadata; copy the bundle again") from None
    if not isinstance(metadata.signed, kind):
        raise TrustError(f"{source} is {metadata.signed.type} metadata, not {kind.type}; copy the bundle again")
    if canonical != data:
        raise TrustError(f"{source} is damaged: not in its compact form; copy the bundle again")
    if metadata.unrecognized_fields or any(s.unrecognized_fields for s in metadata.signatures.values()):
        raise TrustError(f"{source} is damaged: a field stands outside what is signed; copy the bundle again")
    for key_id, signature in metadata.signatures.items():
        if not (_KEY_ID.fullmatch(key_id) and _SIGNATURE.fullmatch(signature.signature)):
            raise TrustError(f"{source} is damaged: a signature is not lower-case hex; copy the bundle again")
    return metadata


def compact_bytes(metadata: Metadata[Any]) -> bytes:
    """The one encoding of metadata in a bundle: sorted keys, no blanks, no final newline."""
    return JSONSerializer(compact=True).serialize(metadata)


def verify_signatures(metadata: Metadata[Any], root: Root, role: str, source: str) -> None:
    """A threshold of the role's keys signed, and no other signature stands beside them. Else TrustError."""
    try:
        result = root.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    except ValueError:
        raise TrustError(f"{source}: the root names no keys for {role}") from None
    if not result.verified:
        raise TrustError(
            f"{source} is not signed by the keys of root version {root.version} ({len(result.signed)} of "
            f"{result.threshold} signatures); it is damaged, or signed by someone this machine does not trust"
        )
    if set(metadata.signatures) != set(result.signed):
        raise TrustError(f"{source} carries a signature that is not valid beside the valid one; copy the bundle again")


def utc_now() -> datetime:
    """The machine's clock, whole seconds, as TUF writes times."""
    return datetime.now(UTC).replace(microsecond=0)


def _check_root_keys(root: Root, source: str) -> None:
    """One key counts once, whatever its id, and only Ed25519 keys are known."""
    if not root.consistent_snapshot:
        raise TrustError(f"{source}: consistent_snapshot is off; not a Solocard root")
    values = [key.keyval.get("public") for key in root.keys.values()]
    if len(set(values)) != len(values) or any(k.scheme != "ed25519" for k in root.keys.values()):
        raise TrustError(f"{source}: a key stands under two ids, or is no Ed25519 key; not a Solocard root")


def _verified(data: bytes, kind: type[Signed], root: TrustedRoot, source: str) -> Any:
    metadata = parse_metadata(data, kind, source)
    verify_signatures(metadata, root.signed, kind.type, source)
    return metadata.signed


def _listed(data: bytes, entry: MetaFile, name: str) -> bytes:
    if entry.length is None or set(entry.hashes or {}) != {"sha256"}:
        raise TrustError(f"metadata/{name}: the file that lists it gives no length and SHA-256; not a Solocard bundle")
    try:
        entry.verify_length_and_hashes(data)
    except RepositoryError:
        raise TrustError(f"metadata/{name} is damaged: length or SHA-256 differ; copy the bundle again") from None
    return data


def _meta(snapshot: Snapshot, role_file: str, name: str) -> MetaFile:
    entry = snapshot.meta.get(role_file)
    if entry is None:
        raise TrustError(f"metadata/{name} does not list {role_file}; not a Solocard bundle")
    return entry


def _expect_version(signed: Signed, entry: MetaFile, name: str) -> None:
    if signed.version != entry.version:
        raise TrustError(f"metadata/{name} says version {signed.version}, its list {entry.version}")


def _check_listed_root(snapshot: Snapshot, root: TrustedRoot, name: str) -> None:
    entry = _meta(snapshot, "root.json", name)
    if entry.version != root.version:
        raise TrustError(
            f"metadata/{entry.version}.root.json: the bundle was signed under root version {entry.version}, and "
            f"version {root.version} is the one at hand; the file is missing, or the bundle is from before a key change"
        )
    _listed(root.data, entry, f"{entry.version}.root.json")


def _manifest_target(targets: Targets, source: str) -> tuple[str, int, int]:
    target = targets.targets.get(MANIFEST_NAME)
    if target is None or set(target.hashes) != {"sha256"} or not 0 < target.length <= MAX_MANIFEST_BYTES:
        raise TrustError(f"{source} does not sign a {MANIFEST_NAME}; not a Solocard bundle")
    custom = target.custom if isinstance(target.custom, dict) else {}
    secure = custom.get("min_secure_counter", 0)
    if type(secure) is not int or secure < 0:
        raise TrustError(f"{source}: min_secure_counter {secure!r} is not a counter")
    return target.hashes["sha256"], target.length, secure
