"""Installing, switching, going back, and every refusal that leaves the current model as it was."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from bundle_support import Desk, Machine, build, files_of

from appliance import install as install_module
from appliance.bundle import VerifiedBundle
from appliance.errors import (
    BundleError,
    BusyError,
    SpaceError,
    StoreError,
    TrialError,
    TrustError,
    UsageError,
)
from appliance.floors import Floors
from appliance.journal import Journal
from appliance.layout import Layout
from appliance.lock import change_lock
from appliance.manifest import Manifest
from appliance.roots import add_root
from appliance.state import State
from exporter.signing import new_keys, sign


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path / "desk")


@pytest.fixture
def machine(tmp_path, desk) -> Machine:
    return Machine(tmp_path / "home", desk.root)


def events(machine: Machine) -> list[str]:
    return [record["event"] for record in Journal(machine.home).read()]


def test_install_copies_verifies_tries_and_switches(desk, machine):
    stick = desk.release(1)
    before = files_of(stick)
    outcome = machine.install(stick)
    bundle_id = outcome.bundle_id
    assert (machine.state.current, machine.state.previous, machine.state.trial) == (bundle_id, "", "")
    assert machine.tried == [bundle_id]
    assert outcome.restart.outcome == "down"
    bundle = VerifiedBundle.open_current(machine.home, full=True)
    assert bundle.signed
    assert bundle.graph_path == machine.home / "models" / f"{bundle_id}.model.onnx"
    assert bundle.tokenizer_path.read_bytes() == (stick / "tokenizer.json").read_bytes()
    assert bundle.root == machine.home / "models"
    for entry in bundle.manifest.objects:
        stored = bundle.root / entry.path
        assert stored.read_bytes() == (stick / entry.path).read_bytes()
        assert stored.stat().st_mode & 0o777 == 0o444
        assert stored.stat().st_nlink == 1
        assert not stored.is_symlink()
    assert events(machine) == ["root", "install", "verified", "trial", "switch"]
    assert [p.step for p in machine.steps] == ["verify", "copy", "trial", "trial", "switch", "restart"]
    assert files_of(stick) == before
    assert machine.floors.release_counter == 1


def test_the_next_release_shares_objects_and_rollback_returns(desk, machine):
    first, second = machine.install(desk.release(1)), machine.install(desk.release(2))
    assert second.copied_bytes < first.copied_bytes
    assert machine.state == State(second.bundle_id, first.bundle_id)
    machine.installer().rollback()
    assert machine.state == State(first.bundle_id, second.bundle_id)
    assert machine.floors.release_counter == 2
    assert machine.tried == [first.bundle_id, second.bundle_id, first.bundle_id]
    machine.installer().activate(second.bundle_id)
    assert machine.state == State(second.bundle_id, first.bundle_id)


def test_installing_again_changes_nothing_and_repairs_the_pool(desk, machine):
    stick = desk.release(1)
    first = machine.install(stick)
    again = machine.install(stick)
    assert not again.changed
    assert again.copied_bytes == 0
    assert machine.tried == [first.bundle_id]
    damaged = next((machine.home / "models" / "objects").glob("*/*"))
    damaged.chmod(0o644)
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    with pytest.raises(StoreError, match=damaged.name):
        VerifiedBundle.open_current(machine.home, full=True)
    assert machine.install(stick).copied_bytes > 0
    assert VerifiedBundle.open_current(machine.home, full=True).bundle_id == first.bundle_id


def test_signed_again_is_the_same_bundle_with_newer_metadata(desk, machine):
    stick = desk.release(1)
    first = machine.install(stick)
    sign(stick, desk.keys)
    again = machine.install(stick)
    assert again.bundle_id == first.bundle_id
    assert machine.floors.timestamp_version == 2
    stored = Layout(machine.home).metadata(first.bundle_id)
    assert sorted(p.name for p in stored.iterdir()) == [
        "1.root.json", "2.snapshot.json", "2.targets.json", "timestamp.json",
    ]  # fmt: skip
    assert VerifiedBundle.open_current(machine.home).chain.timestamp_version == 2


def refused(machine: Machine, stick: Path, kind: type[Exception], word: str) -> None:
    """The refusal, its journal line, and that nothing else changed."""
    state, floors = machine.state, machine.floors
    with pytest.raises(kind, match=word):
        machine.install(stick)
    assert machine.state == state
    assert machine.floors == floors
    assert events(machine)[-1] == "refused"
    if state.current:
        assert VerifiedBundle.open_current(machine.home, full=True).bundle_id == state.current


def test_older_metadata_is_refused_but_rolled_back_bundles_install_again(desk, machine):
    old, new = desk.release(1), desk.release(2)
    machine.install(old)
    second = machine.install(new)
    refused(machine, old, TrustError, r"timestamp\.json is version 1, older than version 2")
    machine.installer().rollback()
    assert machine.install(new).bundle_id == second.bundle_id


def test_an_older_release_signed_anew_is_refused_by_its_counter(desk, machine):
    old, new = desk.release(1), desk.release(2)
    machine.install(new)
    sign(old, desk.keys)
    refused(machine, old, TrustError, r"targets/[0-9a-f]{64}\.manifest\.json is release 1, older than release 2")


def test_a_bundle_signed_by_someone_else_is_refused(desk, machine, tmp_path):
    machine.install(desk.release(1))
    other = Desk(tmp_path / "other")
    refused(machine, other.release(2), TrustError, r"1\.root\.json is not the root trusted here")
    stick = other.release(3)
    shutil.copy(desk.keys / "root.json", stick / "metadata" / "1.root.json")
    refused(machine, stick, TrustError, r"timestamp\.json is not acceptable")


def test_no_root_no_installation(desk, tmp_path):
    machine = Machine(tmp_path / "untrusting")
    refused(machine, desk.release(1), TrustError, "solocard trust add")
    assert not list((tmp_path / "untrusting" / "models").glob("objects/*/*"))


def test_an_unsigned_bundle_is_refused(machine, tmp_path):
    build(tmp_path / "bare")
    refused(machine, tmp_path / "bare", TrustError, "not signed")


def test_a_bundle_without_tokenizer_is_neither_signed_nor_installed(desk, tmp_path):
    build(tmp_path / "bare", tokenizer=False)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        sign(tmp_path / "bare", desk.keys)


def test_not_a_directory(machine, tmp_path):
    with pytest.raises(UsageError, match="not a directory"):
        machine.install(tmp_path / "nowhere")


def test_expired_metadata_stops_installing_not_serving(desk, machine, monkeypatch):
    stick = desk.release(1, expires_days=30)
    machine.install(stick)
    later = datetime.now(UTC).replace(microsecond=0) + timedelta(days=31)
    monkeypatch.setattr(install_module, "utc_now", lambda: later)
    refused(machine, stick, TrustError, "expired on")
    assert VerifiedBundle.open_current(machine.home).bundle_id == machine.state.current
    monkeypatch.undo()
    machine.floors.raised(time_s=int(later.timestamp())).write(machine.home)
    refused(machine, stick, TrustError, "expired on")  # a clock set back does not help


def test_a_failed_trial_keeps_the_old_model_and_the_floors(desk, machine):
    first = machine.install(desk.release(1))
    stick = desk.release(2)
    machine.trial_error = "golden 0: token 3 is 17, not 12"
    refused(machine, stick, TrialError, "token 3 is 17")
    assert machine.state.trial == ""
    machine.trial_error = ""
    assert machine.install(stick).previous == first.bundle_id


def test_a_second_change_at_once_is_busy(desk, machine):
    stick = desk.release(1)
    with change_lock(machine.home), pytest.raises(BusyError, match=f"process {os.getpid()}"):
        machine.install(stick)
    assert machine.install(stick).changed


def test_files_nothing_lists_are_reported_and_left_alone(desk, machine):
    stick = desk.release(1)
    (stick / "README.txt").write_text("hello")
    (stick / "objects" / "extra").symlink_to("/etc/passwd")
    outcome = machine.install(stick)
    assert outcome.unlisted == ("README.txt", "objects/extra")
    assert not list((machine.home / "models").rglob("README.txt"))


def test_too_small_a_disk_is_known_before_copying(desk, machine, monkeypatch):
    stick = desk.release(1)
    free = os.statvfs(machine.home)
    small = os.statvfs_result((free.f_bsize, 1024, 10, 10, 10, *tuple(free)[5:]))
    monkeypatch.setattr("appliance.store.os.statvfs", lambda path: small)
    refused(machine, stick, SpaceError, "10,240 free")
    assert not list((machine.home / "models").glob("objects/*/*"))


@pytest.mark.parametrize("after_bytes", [0, 5000, 20_000])
def test_a_disk_that_fills_while_copying_leaves_nothing_partial(desk, machine, monkeypatch, after_bytes):
    first = machine.install(desk.release(1))
    stick = desk.release(2)
    written, real = 0, os.write

    def write(fd: int, data: bytes) -> int:
        nonlocal written
        if b'"event"' not in bytes(data[:200]):
            written += len(data)
            if written > after_bytes:
                raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr("appliance.store.os.write", write)
    if after_bytes < 19_000:
        refused(machine, stick, SpaceError, "no space left")
        assert list((machine.home / "models" / "partial").iterdir()) == []
        monkeypatch.undo()
    assert machine.install(stick).previous == first.bundle_id


def test_what_cannot_be_logged_is_not_done(desk, machine):
    stick = desk.release(1)
    (machine.home / "journal.jsonl").unlink()
    (machine.home / "journal.jsonl").mkdir()
    with pytest.raises(StoreError, match="cannot be logged is not done"):
        machine.install(stick)
    assert machine.state == State()


def test_a_release_can_forbid_those_before_it(desk, machine):
    machine.install(desk.release(1))
    second = machine.install(desk.release(2, min_secure_counter=2))
    assert machine.floors.security_counter == 2
    with pytest.raises(TrustError, match="forbids every one below 2"):
        machine.installer().rollback()
    assert machine.state.current == second.bundle_id


def test_the_security_floor_rises_even_when_the_trial_fails(desk, machine):
    machine.install(desk.release(1))
    stick = desk.release(3, min_secure_counter=2)
    machine.trial_error = "wrong token"
    with pytest.raises(TrialError):
        machine.install(stick)
    assert machine.floors.security_counter == 2
    assert machine.floors.release_counter == 1


def test_one_damaged_copy_of_the_floors_is_healed_both_lost_stop(desk, machine):
    machine.install(desk.release(1))
    a, b = (machine.home / "trust" / f"floors.{c}.json" for c in "ab")
    for damage in (b"", b"\0" * 200, a.read_bytes().replace(b'"release_counter":1', b'"release_counter":0')):
        a.write_bytes(damage)
        assert machine.floors.release_counter == 1
    b.unlink()
    with pytest.raises(StoreError, match="both copies of the version floors"):
        machine.install(desk.release(2))
    add_root(machine.home, desk.root, Path("root.json"), reset=True)
    assert machine.floors.release_counter == 0
    assert machine.install(desk.folder / "release-2").changed
    assert machine.floors.release_counter == 2


def test_floors_below_the_current_model_are_raised_again(desk, machine):
    """As after a power cut between the switch and the floors."""
    machine.install(desk.release(1))
    low = machine.floors
    old = desk.release(2)
    machine.install(desk.release(3))
    low.write(machine.home)
    Floors(**{**{f: getattr(low, f) for f in low.__slots__}, "generation": 50}).write(machine.home)
    with pytest.raises(TrustError, match="older than"):
        machine.install(old)
    assert machine.floors.release_counter == 3


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"\0" * 64, b'{"current":"../x","previous":"","trial":""}'])
def test_a_damaged_state_file_is_named_and_activate_mends_it(desk, machine, damage):
    first = machine.install(desk.release(1))
    (machine.home / "models" / "state.json").write_bytes(damage)
    with pytest.raises(StoreError, match=r"state\.json is damaged"):
        machine.install(desk.release(2))
    with pytest.raises(StoreError, match=r"state\.json is damaged"):
        VerifiedBundle.open_current(machine.home)
    machine.installer().activate(first.bundle_id)
    assert machine.state == State(first.bundle_id)


def test_a_trial_left_by_a_killed_process_is_cleared(desk, machine):
    first = machine.install(desk.release(1))
    State(first.bundle_id, "", first.bundle_id).write(machine.home)
    (machine.home / "models" / "partial").mkdir(exist_ok=True)
    (machine.home / "models" / "partial" / ("0" * 64)).write_bytes(b"half")
    machine.install(desk.release(2))
    assert "recovered" in events(machine)
    assert machine.state.trial == ""
    assert list((machine.home / "models" / "partial").iterdir()) == []


def test_rollback_and_activate_name_what_is_missing(machine):
    with pytest.raises(StoreError, match="no previous model"):
        machine.installer().rollback()
    for bundle_id in ("nonsense", "../../etc", "sample-1-" + "0" * 12):
        with pytest.raises(StoreError, match="no bundle"):
            machine.installer().activate(bundle_id)


def test_remove_keeps_shared_objects_and_what_is_in_use(desk, machine):
    ids = [machine.install(desk.release(n)).bundle_id for n in (1, 2, 3)]
    for used in ids[1:]:
        with pytest.raises(UsageError, match="stays"):
            machine.installer().remove(used)
    assert machine.installer().remove(ids[0]) > 16_000
    for kept in ids[1:]:
        VerifiedBundle.open_installed(machine.home, kept, full=True)
    assert not [p for p in (machine.home / "models").iterdir() if p.name.startswith(ids[0])]
    listed = {e.sha256 for i in ids[1:] for e in VerifiedBundle.open_installed(machine.home, i).manifest.objects}
    assert {p.name for p in (machine.home / "models" / "objects").glob("*/*")} == listed
    with pytest.raises(StoreError, match="no bundle"):
        machine.installer().remove(ids[0])


def test_a_verified_bundle_cannot_be_made_by_hand(desk, machine):
    machine.install(desk.release(1))
    good = VerifiedBundle.open_current(machine.home)
    with pytest.raises(TypeError, match="open_installed"):
        VerifiedBundle(good.root, good.manifest, good.spec, good.chain, proof=object())


def test_every_damage_of_an_installed_bundle_is_named(desk, machine):
    machine.install(desk.release(1))
    models, trust = machine.home / "models", machine.home / "trust"
    listed = [models / n for n in files_of(models) if n != "state.json"] + [trust / "1.root.json"]
    assert len(listed) == 12
    for path in listed:
        data = path.read_bytes()
        path.chmod(0o644)
        for damaged in (data[:-1], bytes([data[0] ^ 1]) + data[1:], data[:-1] + bytes([data[-1] ^ 0x20])):
            path.write_bytes(damaged)
            with pytest.raises((StoreError, TrustError), match=path.name.removeprefix("1.")):
                VerifiedBundle.open_current(machine.home, full=True)
        path.unlink()
        with pytest.raises((StoreError, TrustError), match=path.name.removeprefix("1.")):
            VerifiedBundle.open_current(machine.home)
        path.write_bytes(data)
    assert VerifiedBundle.open_current(machine.home, full=True)


def test_another_bundles_files_do_not_pass_under_this_id(desk, machine):
    first, second = (machine.install(desk.release(n)).bundle_id for n in (1, 2))
    layout = Layout(machine.home)
    shutil.rmtree(layout.metadata(second))
    shutil.copytree(layout.metadata(first), layout.metadata(second))
    with pytest.raises(TrustError, match="not the manifest"):
        VerifiedBundle.open_installed(machine.home, second)
    shutil.copy(layout.bundle_file(first, "manifest.json"), layout.bundle_file(second, "manifest.json"))
    with pytest.raises((StoreError, TrustError), match="not of"):
        VerifiedBundle.open_installed(machine.home, second)


def test_the_journal_survives_a_torn_line(machine):
    journal = Journal(machine.home)
    journal.append("one", x=1)
    with journal.path.open("ab") as file:
        file.write(b'{"event":"tor')
    journal.append("two")
    assert [r["event"] for r in journal.read()] == ["root", "one", "two"]


def test_keys_are_never_overwritten(desk):
    with pytest.raises(UsageError, match="never overwritten"):
        new_keys(desk.keys)


def test_the_manifest_of_a_signed_bundle_is_stored_once(desk):
    stick = desk.release(1)
    digest = json.loads((stick / "metadata" / "1.targets.json").read_bytes())["signed"]["targets"]["manifest.json"]
    data = (stick / "targets" / f"{digest['hashes']['sha256']}.manifest.json").read_bytes()
    assert Manifest.from_bytes(data).release_counter == 1
    assert not (stick / "manifest.json").exists()
