"""The model pool ``models/``: objects by digest, bundles beside them, and what may be removed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from appliance.bundle import Tick, check_file, check_object
from appliance.bundle_writer import sync_directory, write_synced
from appliance.errors import BundleError, SpaceError, StoreError
from appliance.layout import Layout
from appliance.manifest import MAX_MANIFEST_BYTES, Manifest, ObjectEntry, is_bundle_id
from appliance.tree import Tree, read_pieces
from appliance.trust import Chain

MARGIN_BYTES = 64 << 20  # left free beside what an installation writes


@dataclass(frozen=True, slots=True)
class Installed:
    """A bundle in the pool; its manifest parses, its bytes are not looked at."""

    bundle_id: str
    name: str
    version: str
    release_counter: int
    size_bytes: int
    profiles: tuple[str, ...]


class Pool:
    """Writes and lists what lies in ``models/``. The caller holds the change lock for everything that writes."""

    def __init__(self, home: Path) -> None:
        self.layout = Layout(home)
        self.tree = Tree(self.layout.models, remedy="install the bundle again")
        self._partial = self.layout.models / "partial"

    def missing_bytes(self, manifest: Manifest) -> int:
        """Bytes an installation would write: objects that are absent or of the wrong size, and the small files."""
        return sum(f.size_bytes for f in manifest.files) + sum(
            o.size_bytes for o in manifest.objects if not self._has_size(o)
        )

    def check_space(self, needed_bytes: int) -> None:
        """SpaceError naming both numbers when the disk is too small; also when it has no file names left."""
        disk = os.statvfs(self.layout.models)
        free = disk.f_bavail * disk.f_frsize
        if needed_bytes + MARGIN_BYTES > free:
            raise SpaceError(
                f"{self.layout.models} needs {needed_bytes + MARGIN_BYTES:,} bytes and has {free:,} free; "
                "free some, for example with `solocard remove BUNDLE_ID`"
            )

    def add_object(self, stick: Tree, entry: ObjectEntry, tick: Tick) -> int:
        """Copy one object, hashing on the way; the bytes written, 0 when the pool had it.

        The stick's copy is read once and checked even when the pool has the object already. BundleError names a
        damaged one; nothing of it stays.
        """
        if self._is_good(entry):
            _copy(stick, entry, None, tick)
            return 0
        self._partial.mkdir(exist_ok=True)
        partial, target = self._partial / entry.sha256, self.layout.models / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _copy(stick, entry, fd, tick)
            os.fchmod(fd, 0o444)
            os.fsync(fd)
            partial.replace(target)
        finally:
            os.close(fd)
            partial.unlink(missing_ok=True)
        sync_directory(target.parent)
        return entry.size_bytes

    def add_bundle(self, manifest: Manifest, files: dict[str, bytes], chain: Chain) -> None:
        """Small files, manifest and metadata, in that order; ``timestamp.json`` last, it makes the bundle installed."""
        sync_directory(self.layout.models / "objects")
        bundle_id = manifest.bundle_id
        for name, data in {**files, "manifest.json": manifest.to_bytes()}.items():
            write_synced(self.layout.bundle_file(bundle_id, name), data, mode=0o444)
        folder = self.layout.metadata(bundle_id)
        folder.mkdir(exist_ok=True)
        for name, data in sorted(chain.files.items(), key=lambda item: item[0] == "timestamp.json"):
            write_synced(folder / name, data)
        for path in folder.iterdir():
            if path.name not in chain.files:
                path.unlink()
        sync_directory(self.layout.models)

    def clear_partial(self) -> None:
        """Remove what an interrupted copy left."""
        if self._partial.is_dir():
            shutil.rmtree(self._partial)

    def installed(self) -> list[Installed]:
        """Every installed bundle, newest release first. StoreError names a manifest that is damaged."""
        found = []
        for bundle_id in self._ids():
            m = self.manifest(bundle_id)
            found.append(Installed(bundle_id, m.name, m.version, m.release_counter, m.total_bytes, m.profiles))
        return sorted(found, key=lambda item: (-item.release_counter, item.bundle_id))

    def _ids(self) -> list[str]:
        stamps = self.layout.models.glob("*.metadata/timestamp.json")
        ids = (stamp.parent.name.removesuffix(".metadata") for stamp in stamps)
        return [bundle_id for bundle_id in ids if is_bundle_id(bundle_id)]

    def manifest(self, bundle_id: str) -> Manifest:
        """The stored manifest, its digest compared with the bundle id only. StoreError when damaged or missing."""
        if not is_bundle_id(bundle_id) or not self.layout.metadata(bundle_id).is_dir():
            raise StoreError(f"no bundle {bundle_id!r} is installed in {self.layout.home}; see `solocard list`")
        name = f"{bundle_id}.manifest.json"
        try:
            manifest = Manifest.from_bytes(self.tree.read(name, MAX_MANIFEST_BYTES), name)
        except BundleError as error:
            raise StoreError(str(error)) from None
        if manifest.bundle_id != bundle_id:
            raise StoreError(f"{name} is the list of {manifest.bundle_id}; install the bundle again")
        return manifest

    def remove(self, bundle_id: str) -> int:
        """Remove one bundle and every object no other bundle lists; bytes freed. Killed midway, it can be repeated."""
        others = [self.manifest(other) for other in self._ids() if other != bundle_id]
        folder = self.layout.metadata(bundle_id)
        (folder / "timestamp.json").unlink(missing_ok=True)
        sync_directory(folder)
        freed = 0
        for path in self.layout.models.glob(f"{bundle_id}.*.*"):
            freed += path.stat().st_size
            path.unlink()
        shutil.rmtree(folder)
        keep = {entry.sha256 for manifest in others for entry in manifest.objects}
        for path in (self.layout.models / "objects").glob("??/*"):
            if path.name not in keep:
                freed += path.lstat().st_size
                path.unlink()
        sync_directory(self.layout.models)
        return freed

    def _has_size(self, entry: ObjectEntry) -> bool:
        try:
            return self.tree.size_bytes(entry.path) == entry.size_bytes
        except BundleError:
            return False

    def _is_good(self, entry: ObjectEntry) -> bool:
        try:
            check_object(self.tree, entry)
        except BundleError:
            return False
        return True


def read_small_files(stick: Tree, manifest: Manifest) -> dict[str, bytes]:
    """The small files' bytes by name, each checked. BundleError names the damaged one."""
    files = {}
    for entry in manifest.files:
        files[entry.path] = stick.read(entry.path, entry.size_bytes + 1)
        check_file(entry, files[entry.path], entry.path, stick.remedy)
    return files


def unlisted(stick: Tree, manifest: Manifest, chain: Chain) -> list[str]:
    """Files of the stick that nothing signed lists: reported, never read."""
    known = {entry.path for entry in manifest.files} | {entry.path for entry in manifest.objects}
    known |= {chain.manifest_path} | {f"metadata/{name}" for name in chain.files}
    old_roots = {f"metadata/{version}.root.json" for version in range(1, chain.root_version)}
    return sorted(name for name in stick.names() if name not in known | old_roots)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """OSErrors of the appliance's own disk as SpaceError or StoreError."""
    try:
        yield
    except BrokenPipeError:  # the reader of our output went away; no disk had a part in it
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceError(f"no space left below {where}; free some and run the same command again") from None
        name = error.filename or where
        raise StoreError(f"{name}: {error.strerror}; check the disk and its permissions") from None


def _copy(stick: Tree, entry: ObjectEntry, out: int | None, tick: Tick) -> None:
    digest, size = hashlib.sha256(), 0
    with stick.open(entry.path) as file:
        for piece in read_pieces(file, entry.size_bytes + 1, entry.path):
            digest.update(piece)
            size += len(piece)
            if out is not None:
                _write_all(out, piece)
            tick(len(piece))
    if size != entry.size_bytes:
        raise BundleError(f"{entry.path} has {size:,} bytes or more, not {entry.size_bytes:,}; {stick.remedy}")
    if digest.hexdigest() != entry.sha256:
        raise BundleError(f"{entry.path} is damaged (SHA-256 differs from its name); {stick.remedy}")


def _write_all(fd: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(fd, data) :]
