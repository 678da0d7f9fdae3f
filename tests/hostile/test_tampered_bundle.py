"""Each file of a signed bundle changed, cut, removed or replaced: refused by its name, the old model still current."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
from bundle_support import Desk, Machine, files_of
from tuf.api.exceptions import DownloadError, RepositoryError
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface

from appliance.bundle import VerifiedBundle
from appliance.errors import BundleError

FILES = 11  # of the synthetic bundle: 3 objects, 3 small files, the manifest, 4 of metadata


class Attack:
    """A machine that serves release 1, and a stick with release 2 to damage."""

    def __init__(self, folder: Path) -> None:
        self.desk = Desk(folder / "desk")
        self.machine = Machine(folder / "home", self.desk.root)
        self.machine.install(self.desk.release(1))
        self.good = self.desk.release(2)
        self.before = self._fingerprint()
        self.stick = folder / "stick"

    def _fingerprint(self) -> tuple:
        names = [n for n in files_of(self.machine.home) if n not in ("journal.jsonl", "run/install.lock")]
        return self.machine.state, self.machine.floors, [n for n in names if "/objects/" not in n]

    def fresh_stick(self) -> Path:
        shutil.rmtree(self.stick, ignore_errors=True)
        shutil.copytree(self.good, self.stick)
        for name in files_of(self.stick):
            (self.stick / name).chmod(0o644)
        return self.stick

    def expect_refusal(self, name: str) -> str:
        """Refused naming the file; state, floors and everything but the object pool as before."""
        with pytest.raises(BundleError) as caught:
            self.machine.install(self.stick)
        assert Path(name).name in str(caught.value), f"{name} is not named: {caught.value}"
        assert self._fingerprint() == self.before, name
        return str(caught.value)


@pytest.fixture(scope="module")
def attack(tmp_path_factory) -> Attack:
    return Attack(tmp_path_factory.mktemp("attack"))


def flipped(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


@pytest.mark.parametrize("mask", [0x01, 0x20])
def test_first_middle_and_last_byte_of_every_file(attack, mask):
    names = files_of(attack.good)
    assert len(names) == FILES
    stick = attack.fresh_stick()
    for name in names:
        data = (attack.good / name).read_bytes()
        for at in (0, len(data) // 2, len(data) - 1):
            (stick / name).write_bytes(flipped(data, at, mask))
            attack.expect_refusal(name)
        (stick / name).write_bytes(data)
    assert VerifiedBundle.open_current(attack.machine.home, full=True).bundle_id == attack.before[0].current


@pytest.mark.parametrize("damage", ["removed", "truncated", "emptied", "lengthened"])
def test_every_file_removed_or_of_another_length(attack, damage):
    stick = attack.fresh_stick()
    for name in files_of(attack.good):
        data = (attack.good / name).read_bytes()
        if damage == "removed":
            (stick / name).unlink()
        else:
            changed = {"truncated": data[: len(data) * 2 // 3], "emptied": b"", "lengthened": data + b"\n"}
            (stick / name).write_bytes(changed[damage])
        attack.expect_refusal(name)
        (stick / name).write_bytes(data)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "socket"])
def test_every_file_replaced_by_something_else(attack, kind, monkeypatch):
    stick = attack.fresh_stick()
    for name in files_of(attack.good):
        path = stick / name
        path.unlink()
        if kind == "symlink":
            path.symlink_to(attack.good / name)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        else:
            monkeypatch.chdir(path.parent)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path.name[-60:])
            (path.parent / path.name[-60:]).rename(path)
        attack.expect_refusal(name)
        path.rmdir() if kind == "directory" else path.unlink()
        path.write_bytes((attack.good / name).read_bytes())


@pytest.mark.parametrize("folder", ["metadata", "objects", "targets"])
def test_a_folder_that_is_a_link(attack, folder):
    stick = attack.fresh_stick()
    shutil.rmtree(stick / folder)
    (stick / folder).symlink_to(attack.good / folder)
    with pytest.raises(BundleError, match=f"{folder}/.*behind a link"):
        attack.machine.install(stick)
    assert attack._fingerprint() == attack.before


def test_an_endless_file_is_not_read_to_its_end(attack):
    stick = attack.fresh_stick()
    for name in ("metadata/timestamp.json", "metadata/2.targets.json", "tokenizer.json", "metadata/1.root.json"):
        path = stick / name
        data = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(1 << 40)  # sparse
        attack.expect_refusal(name)
        path.write_bytes(data)


def test_metadata_of_two_releases_does_not_mix(attack):
    third = attack.desk.release(3)
    for name in ("2.snapshot.json", "2.targets.json"):
        stick = attack.fresh_stick()
        newer = name.replace("2", "3", 1)
        shutil.copy(third / "metadata" / newer, stick / "metadata" / name)
        attack.expect_refusal(name)
    stick = attack.fresh_stick()
    shutil.copy(third / "metadata" / "timestamp.json", stick / "metadata" / "timestamp.json")
    attack.expect_refusal("3.snapshot.json")


def test_a_swapped_object_is_named(attack):
    stick = attack.fresh_stick()
    first, second, *_ = [n for n in files_of(stick) if n.startswith("objects/")]
    a, b = (stick / first).read_bytes(), (stick / second).read_bytes()
    (stick / first).write_bytes(b)
    (stick / second).write_bytes(a)
    attack.expect_refusal(first)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"null", b"[]", b"[" * 100_000, b'{"signatures":[],"signed":{}}', b"\xff" * 100,
        b'{"signatures":[],"signed":{"_type":"timestamp","expires":"2030-01-01T00:00:00Z","meta":{},'
        b'"spec_version":"1.0.31","version":1e400}}',
        b'{"signatures":[],"signed":{"_type":"root","expires":"2030-01-01T00:00:00Z","spec_version":"1.0.31"}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["timestamp.json", "2.root.json"])
def test_nonsense_in_place_of_metadata(attack, data, name):
    stick = attack.fresh_stick()
    (stick / "metadata" / name).write_bytes(data)
    attack.expect_refusal(name)


def test_rewritten_but_equal_json_is_refused(attack):
    """Blanks, upper-case hex, a field outside what is signed, a duplicate key: TUF takes them, we do not."""
    stick = attack.fresh_stick()
    path = stick / "metadata" / "timestamp.json"
    data = path.read_bytes()
    signature = data.split(b'"sig":"')[1].split(b'"')[0]
    for changed in (
        data.replace(b'"version":2', b'"version": 2', 1),
        data.replace(signature, signature.upper()),
        data.replace(b'{"signatures"', b'{"extra":1,"signatures"'),
        data.replace(b'"sig":', b'"note":1,"sig":'),
        data[:-1] + b',"signed":' + data.split(b'"signed":')[1],
        b"\xef\xbb\xbf" + data,
    ):
        assert changed != data
        path.write_bytes(changed)
        attack.expect_refusal("timestamp.json")


def test_a_second_signature_beside_the_good_one_is_refused(attack, tmp_path):
    stick = attack.fresh_stick()
    path = stick / "metadata" / "timestamp.json"
    other = Desk(tmp_path / "other").release(1) / "metadata" / "timestamp.json"
    foreign = other.read_bytes().split(b'"signatures":[')[1].split(b"]")[0]
    path.write_bytes(path.read_bytes().replace(b'"signatures":[', b'"signatures":[' + foreign + b",", 1))
    assert "beside the valid one" in attack.expect_refusal("timestamp.json")


class FolderFetcher(FetcherInterface):
    """The plainest way to show a folder to python-tuf."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _fetch(self, url: str):
        from tuf.api.exceptions import DownloadHTTPError

        path = self.folder / url.removeprefix("x://y/")
        if not path.is_file():
            raise DownloadHTTPError("missing", 404)
        return iter([path.read_bytes()])


def test_python_tuf_alone_agrees(attack, tmp_path):
    """The oracle: what a plain Updater refuses we refuse, and it takes the bundle we take."""
    stick = attack.fresh_stick()

    def updater_takes(number: int) -> bool:
        scratch = tmp_path / str(number)
        scratch.mkdir()
        updater = Updater(
            str(scratch), "x://y/metadata", str(scratch), "x://y/targets", FolderFetcher(stick),
            bootstrap=attack.desk.root.data,
        )  # fmt: skip
        try:
            updater.refresh()
            updater.download_target(updater.get_targetinfo("manifest.json"))
        except (RepositoryError, DownloadError):
            return False
        return True

    assert updater_takes(0)
    refused = 0
    signed = [n for n in files_of(stick) if n.startswith(("metadata/", "targets/"))]
    for number, name in enumerate(signed, start=1):
        data = (stick / name).read_bytes()
        (stick / name).write_bytes(flipped(data, len(data) // 2, 0x01))
        refused += not updater_takes(number)
        attack.expect_refusal(name)
        (stick / name).write_bytes(data)
    assert refused == len(signed) - 1  # it never reads the copy of a root it has


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80])
def test_every_byte_of_what_is_signed(attack, mask):
    stick = attack.fresh_stick()
    tried = 0
    for name in files_of(attack.good):
        if name.startswith("objects/"):
            continue
        data = (attack.good / name).read_bytes()
        for at in range(len(data)):
            (stick / name).write_bytes(flipped(data, at, mask))
            with pytest.raises(BundleError):
                attack.machine.install(stick)
            tried += 1
        (stick / name).write_bytes(data)
    assert tried > 4000
    assert attack._fingerprint() == attack.before
