"""Roots, their rotation, and the chain of signatures."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from bundle_support import Desk, Machine
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from appliance.bundle import VerifiedBundle
from appliance.errors import BundleError, StoreError, TrustError
from appliance.roots import add_root, read_root
from appliance.tree import Tree
from appliance.trust import TrustedRoot, compact_bytes, verify_chain


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path / "desk")


def signer(desk: Desk, role: str) -> CryptoSigner:
    return CryptoSigner(serialization.load_pem_private_key((desk.keys / f"{role}.key").read_bytes(), None))


def rotate(desk: Desk, *, role: str = "timestamp", version: int | None = None, sign_old: bool = True) -> TrustedRoot:
    """The next root with a new key for ``role``; the desk signs with it from now on."""
    metadata = Metadata[Root].from_bytes((desk.keys / "root.json").read_bytes())
    old, new = metadata.signed, Ed25519PrivateKey.generate()
    (desk.keys / f"{old.version}.root.json").write_bytes((desk.keys / "root.json").read_bytes())
    old_root_signer = signer(desk, "root")
    old.revoke_key(old.roles[role].keyids[0], role)
    old.add_key(CryptoSigner(new).public_key, role)
    old.version = version or old.version + 1
    pem = new.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (desk.keys / f"{role}.key").write_bytes(pem)
    metadata.signatures.clear()
    if sign_old:
        metadata.sign(old_root_signer, append=True)
    if role == "root" or not sign_old:
        metadata.sign(signer(desk, "root") if role == "root" else CryptoSigner(new), append=True)
    (desk.keys / "root.json").write_bytes(compact_bytes(metadata))
    return metadata


def chain_of(stick: Path, root: TrustedRoot):
    return verify_chain(root, Tree(stick / "metadata").read)


def test_the_chain_names_versions_and_manifest(desk):
    stick = desk.release(1)
    chain = chain_of(stick, desk.root)
    assert (chain.root_version, chain.timestamp_version, chain.snapshot_version, chain.targets_version) == (1, 1, 1, 1)
    assert (stick / chain.manifest_path).stat().st_size == chain.manifest_size_bytes
    assert set(chain.files) == {"1.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json"}
    chain.check_manifest((stick / chain.manifest_path).read_bytes(), "manifest")
    with pytest.raises(TrustError, match="manifest"):
        chain.check_manifest(b"{}", "manifest")


def test_metadata_is_compact_and_lists_length_and_digest(desk):
    stick = desk.release(1)
    for path in (stick / "metadata").iterdir():
        data = path.read_bytes()
        assert not data.endswith(b"\n")
        assert b": " not in data
    for name in ("timestamp.json", "1.snapshot.json"):
        meta = Metadata.from_bytes((stick / "metadata" / name).read_bytes()).signed.to_dict()["meta"]
        assert all(set(entry) == {"hashes", "length", "version"} for entry in meta.values())


def test_time_is_asked_only_when_asked(desk):
    chain = chain_of(desk.release(1, expires_days=10), desk.root)
    chain.check_time(datetime.now(UTC))
    with pytest.raises(TrustError, match=r"1\.snapshot\.json expired"):
        chain.check_time(datetime.now(UTC) + timedelta(days=11))


def test_fingerprint_is_that_of_the_file(desk):
    root = read_root(desk.keys / "root.json")
    assert root.fingerprint == desk.root.fingerprint
    assert len(root.fingerprint) == 64


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "root"])
def test_a_new_root_on_the_stick_replaces_the_key_and_the_old_key_is_refused(desk, tmp_path, role):
    machine = Machine(tmp_path / "home", desk.root)
    first = machine.install(desk.release(1))
    before_rotation = desk.release(2)
    rotate(desk, role=role)
    stick = desk.release(3)
    assert (stick / "metadata" / "1.root.json").exists()
    third = machine.install(stick)
    assert machine.floors.root_version == 2
    assert third.unlisted == ()
    with pytest.raises(BundleError, match=r"2\.root\.json"):
        machine.install(before_rotation)
    machine.installer().rollback()  # installed under root 1, which was trusted then
    assert machine.state.current == first.bundle_id
    assert VerifiedBundle.open_installed(machine.home, third.bundle_id).chain.root_version == 2


@pytest.mark.parametrize("role", ["timestamp", "root"])
def test_a_removed_new_root_is_missed(desk, tmp_path, role):
    machine = Machine(tmp_path / "home", desk.root)
    rotate(desk, role=role)
    stick = desk.release(1)
    (stick / "metadata" / "2.root.json").unlink()
    with pytest.raises(BundleError, match=r"2\.root\.json"):
        machine.install(stick)


def test_a_bundle_from_before_a_key_change_is_refused_under_the_new_root(desk, tmp_path):
    """Its other keys are still good and anyone can add the new root to the stick; the snapshot says which it was."""
    stick = desk.release(1)
    rotate(desk, role="root")
    (stick / "metadata" / "2.root.json").write_bytes((desk.keys / "root.json").read_bytes())
    machine = Machine(tmp_path / "home", read_root(desk.keys / "root.json"))
    with pytest.raises(TrustError, match="from before a key change"):
        machine.install(stick)
    older = Machine(tmp_path / "older", desk.root)
    with pytest.raises(TrustError, match="from before a key change"):
        older.install(stick)


def test_a_new_root_without_the_old_ones_signature_is_refused(desk, tmp_path):
    machine = Machine(tmp_path / "home", desk.root)
    rotate(desk, role="root", sign_old=False)
    stick = desk.release(1)
    with pytest.raises(TrustError, match=r"2\.root\.json"):
        machine.install(stick)
    with pytest.raises(TrustError, match="not signed by the keys of root version 1"):
        add_root(machine.home, read_root(desk.keys / "root.json"), desk.keys / "root.json")
    assert machine.floors.root_version == 1


def test_a_skipped_root_is_refused(desk, tmp_path):
    machine = Machine(tmp_path / "home", desk.root)
    rotate(desk, version=3)
    stick = desk.release(1)
    with pytest.raises(BundleError, match=r"2\.root\.json"):
        machine.install(stick)
    with pytest.raises(TrustError, match="only the next"):
        add_root(machine.home, read_root(desk.keys / "root.json"), desk.keys / "root.json")


def test_trust_add_takes_the_same_root_its_successor_or_a_reset(desk, tmp_path):
    home = tmp_path / "home"
    assert add_root(home, desk.root, Path("root.json"))
    assert not add_root(home, desk.root, Path("root.json"))
    rotate(desk)
    assert add_root(home, read_root(desk.keys / "root.json"), Path("root.json"))
    assert sorted(p.name for p in (home / "trust").glob("*.root.json")) == ["1.root.json", "2.root.json"]
    other = Desk(tmp_path / "other")
    with pytest.raises(TrustError, match="--reset"):
        add_root(home, other.root, Path("other.json"))
    assert add_root(home, other.root, Path("other.json"), reset=True)
    assert [p.name for p in (home / "trust").glob("*.root.json")] == ["1.root.json"]


def test_a_reset_takes_the_installed_models_with_it(desk, tmp_path):
    machine = Machine(tmp_path / "home", desk.root)
    machine.install(desk.release(1))
    add_root(machine.home, Desk(tmp_path / "other").root, Path("other.json"), reset=True)
    with pytest.raises(TrustError, match="not the root trusted here"):
        VerifiedBundle.open_current(machine.home)


@pytest.mark.parametrize("change", ["flip", "not root", "own key twice", "not json", "newline"])
def test_a_root_file_that_is_none(desk, tmp_path, change):
    path = tmp_path / "root.json"
    data = desk.root.data
    if change == "flip":
        data = data.replace(b'"version":1', b'"version":2')
    elif change == "not root":
        data = (desk.release(1) / "metadata" / "timestamp.json").read_bytes()
    elif change == "own key twice":
        data = same_key_twice(desk)
    elif change == "not json":
        data = b"ssh-ed25519 AAAA"
    else:
        data += b"\n"
    path.write_bytes(data)
    with pytest.raises(TrustError, match=r"root\.json"):
        read_root(path)


def same_key_twice(desk: Desk) -> bytes:
    metadata = Metadata[Root].from_bytes(desk.root.data)
    key = metadata.signed.keys[metadata.signed.roles["targets"].keyids[0]]
    twin = type(key).from_dict("ab" * 32, key.to_dict())
    metadata.signed.add_key(twin, "targets")
    metadata.sign(signer(desk, "root"))
    return compact_bytes(metadata)


def test_a_lost_root_file_is_named(desk, tmp_path):
    machine = Machine(tmp_path / "home", desk.root)
    machine.install(desk.release(1))
    (machine.home / "trust" / "1.root.json").unlink()
    with pytest.raises(StoreError, match=r"1\.root\.json"):
        machine.install(desk.release(2))
    with pytest.raises(StoreError, match=r"1\.root\.json"):
        VerifiedBundle.open_current(machine.home)
