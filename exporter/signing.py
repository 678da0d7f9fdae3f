"""Signing a built bundle: Ed25519 keys, one per TUF role, and the metadata that leads from the root to the manifest.

A keys directory holds ``<role>.key`` (PKCS#8 PEM, mode 0600), ``root.json`` for `solocard trust add`, earlier roots as
``N.root.json``, and ``versions.json``: the last metadata versions this desk gave out, which must never go back.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined] # named in its __all__ at run time
from tuf.api.metadata import (  # type: ignore[attr-defined] # python-tuf documents these names here, without __all__
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from appliance.bundle import BuiltBundle
from appliance.bundle_writer import sync_directory, write_synced
from appliance.errors import BundleError, UsageError
from appliance.manifest import canonical_json
from appliance.trust import MANIFEST_NAME, TrustedRoot, compact_bytes, parse_metadata, utc_now

ROLES = ("root", "targets", "snapshot", "timestamp")
ROOT_DAYS = 3650
DEFAULT_DAYS = 365

Signers = dict[str, CryptoSigner]  # role -> its private key


@dataclass(frozen=True, slots=True)
class Versions:
    """TUF versions of the last metadata signed with these keys; 0 before the first."""

    targets: int = 0
    snapshot: int = 0
    timestamp: int = 0

    @staticmethod
    def read(path: Path) -> Versions:
        """UsageError when the file is damaged: guessing would sign a version that was given out before."""
        if not path.exists():
            return Versions()
        try:
            versions = Versions(**json.loads(path.read_bytes()))
            if not all(type(v) is int and v >= 0 for v in asdict(versions).values()):
                raise ValueError("not counters")
        except (ValueError, TypeError):
            raise UsageError(f"{path} is damaged; write the highest versions ever signed into it") from None
        return versions

    def after(self, other: Versions) -> Versions:
        """The next versions after both."""
        return Versions(*(max(a, b) + 1 for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def new_keys(directory: Path) -> TrustedRoot:
    """Make ``directory`` with one key per role and root.json; UsageError when it exists and is not empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} exists and is not empty; keys are never overwritten, name a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    root = Root(expires=utc_now() + timedelta(days=ROOT_DAYS), consistent_snapshot=True)
    signers = {}
    for role in ROLES:
        private = Ed25519PrivateKey.generate()
        _write_key(directory / f"{role}.key", private)
        signers[role] = CryptoSigner(private)
        root.add_key(signers[role].public_key, role)
    metadata = Metadata(root)
    metadata.sign(signers["root"])
    write_synced(directory / "root.json", compact_bytes(metadata))
    return TrustedRoot.from_bytes(compact_bytes(metadata), "root.json")


def sign(
    bundle: Path, keys: Path, *, expires_days: int = DEFAULT_DAYS, min_secure_counter: int = 0
) -> tuple[BuiltBundle, Versions]:
    """Sign ``bundle`` in place, after checking every byte of it; signing again gives new versions, the same manifest.

    ``min_secure_counter``: machines that see this bundle refuse anything with a lower release counter, for ever.
    """
    built = BuiltBundle.open(bundle)
    if built.tokenizer_path is None:
        raise BundleError(f"{bundle} has no tokenizer.json, so it cannot be installed; build it with its tokenizer")
    if not 0 <= min_secure_counter <= built.manifest.release_counter:
        raise UsageError(f"--min-secure-counter must be 0 to {built.manifest.release_counter}, this release's counter")
    root, signers = _load_keys(keys)
    versions = Versions.read(keys / "versions.json").after(_versions_of(bundle / "metadata"))
    write_synced(keys / "versions.json", canonical_json(asdict(versions)))
    _place_manifest(bundle, built)
    expires = utc_now() + timedelta(days=expires_days)
    files = _metadata(built, root, signers, versions, expires, min_secure_counter)
    _write_metadata(bundle / "metadata", keys, root, files)
    return built, versions


def _metadata(
    built: BuiltBundle, root: TrustedRoot, signers: Signers, versions: Versions, expires: datetime, secure: int
) -> dict[str, bytes]:
    """Name in metadata/ -> bytes, in the order they are written: timestamp.json last."""
    manifest = built.manifest.to_bytes()
    target = TargetFile(len(manifest), {"sha256": hashlib.sha256(manifest).hexdigest()}, MANIFEST_NAME)
    if secure:
        target.unrecognized_fields["custom"] = {"min_secure_counter": secure}
    targets = _signed(Targets(versions.targets, expires=expires, targets={MANIFEST_NAME: target}), signers["targets"])
    listed = {"targets.json": _meta(versions.targets, targets), "root.json": _meta(root.version, root.data)}
    snapshot = _signed(Snapshot(versions.snapshot, expires=expires, meta=listed), signers["snapshot"])
    entry = _meta(versions.snapshot, snapshot)
    timestamp = _signed(Timestamp(versions.timestamp, expires=expires, snapshot_meta=entry), signers["timestamp"])
    return {
        f"{versions.targets}.targets.json": targets,
        f"{versions.snapshot}.snapshot.json": snapshot,
        "timestamp.json": timestamp,
    }


def _meta(version: int, data: bytes) -> MetaFile:
    return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


def _signed(signed: Any, signer: CryptoSigner) -> bytes:
    metadata = Metadata(signed)
    metadata.sign(signer)
    return compact_bytes(metadata)


def _write_metadata(directory: Path, keys: Path, root: TrustedRoot, files: dict[str, bytes]) -> None:
    directory.mkdir(exist_ok=True)
    roots = {path.name: path.read_bytes() for path in keys.glob("*.root.json")}
    roots[f"{root.version}.root.json"] = root.data
    for name, data in (roots | files).items():
        write_synced(directory / name, data)
    for path in directory.iterdir():
        if path.name not in files and path.name.endswith((".targets.json", ".snapshot.json")):
            path.unlink()
    sync_directory(directory)


def _place_manifest(bundle: Path, built: BuiltBundle) -> None:
    target = bundle / "targets" / f"{built.manifest.digest}.{MANIFEST_NAME}"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        (bundle / "manifest.json").rename(target)
        sync_directory(target.parent)
        sync_directory(bundle)


def _versions_of(directory: Path) -> Versions:
    """Versions the bundle was signed with before; zeros for an unsigned one or a foreign timestamp."""
    highest = {"targets": 0, "snapshot": 0}
    for role in highest:
        found = [p.name.split(".")[0] for p in directory.glob(f"*.{role}.json")]
        highest[role] = max((int(n) for n in found if n.isdecimal()), default=0)
    path = directory / "timestamp.json"
    stamp = parse_metadata(path.read_bytes(), Timestamp, "timestamp.json").signed.version if path.exists() else 0
    return Versions(highest["targets"], highest["snapshot"], stamp)


def _load_keys(directory: Path) -> tuple[TrustedRoot, Signers]:
    """Root and one signer per online role; UsageError naming the file that is missing or does not belong."""
    if not (directory / "root.json").is_file():
        raise UsageError(f"{directory} has no root.json; make keys with `solocard-export keys new {directory}`")
    root = TrustedRoot.from_bytes((directory / "root.json").read_bytes(), f"{directory / 'root.json'}")
    signers: Signers = {}
    for role in ROLES[1:]:
        path = directory / f"{role}.key"
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), None)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}); the {role} key is needed to sign") from None
        except (ValueError, TypeError):
            raise UsageError(f"{path} is not an unencrypted PEM private key") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise UsageError(f"{path} is not an Ed25519 key")
        signers[role] = CryptoSigner(private)
        if signers[role].public_key.keyid not in root.signed.roles[role].keyids:
            raise UsageError(f"{path} is not the {role} key that {directory / 'root.json'} names")
    return root, signers


def _write_key(path: Path, private: Ed25519PrivateKey) -> None:
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``keys new DIR`` and ``sign BUNDLE --keys DIR``; each sets ``func(args) -> exit code``."""
    keys = subparsers.add_parser("keys", help="make signing keys", description="Make the keys that sign bundles.")
    actions = keys.add_subparsers(dest="keys_command", required=True)
    new = actions.add_parser(
        "new",
        help="make a new set of keys and root.json",
        description="Make one Ed25519 key per TUF role in a new directory, and the root.json that machines trust with "
        "`solocard trust add`.",
    )
    new.add_argument("directory", type=Path, metavar="DIR", help="a new directory, kept secret")
    new.set_defaults(func=_keys_new)
    command = subparsers.add_parser(
        "sign",
        help="sign a built bundle in place",
        description="Check every byte of a built bundle and sign its manifest.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory written by `solocard-export build`")
    command.add_argument("--keys", type=Path, required=True, metavar="DIR", help="directory made by `keys new`")
    command.add_argument(
        "--expires-days",
        type=_days,
        default=DEFAULT_DAYS,
        metavar="N",
        help="days in which the bundle may be installed (default %(default)s); an installed one is served for ever",
    )
    command.add_argument(
        "--min-secure-counter",
        type=int,
        default=0,
        metavar="N",
        help="machines that install this refuse releases below N from then on, rollback too",
    )
    command.set_defaults(func=_sign)


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= ROOT_DAYS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days from 1 to {ROOT_DAYS}")
    return int(text)


def _keys_new(args: argparse.Namespace) -> int:
    root = new_keys(args.directory)
    print(f"keys:        {args.directory} (mode 0700; whoever reads them can sign bundles)")
    print(f"root:        {args.directory / 'root.json'} (give this to machines: solocard trust add root.json)")
    print(f"fingerprint: {root.fingerprint}")
    return 0


def _sign(args: argparse.Namespace) -> int:
    days: int = args.expires_days
    built, versions = sign(args.bundle, args.keys, expires_days=days, min_secure_counter=args.min_secure_counter)
    manifest = built.manifest
    print(f"signed {manifest.bundle_id}: {len(manifest.objects)} objects, {manifest.total_bytes:,} bytes")
    print(f"metadata version {versions.timestamp}, to be installed within {days} days")
    return 0
