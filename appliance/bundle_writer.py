"""Writing an unsigned bundle: objects are streamed to a temporary file, hashed in one pass and renamed into place.

The manifest is written last, so a directory without one is not a bundle, however far the writer came.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from appliance.errors import BundleError, SpaceError, UsageError
from appliance.manifest import (
    ALLOWED_FILES,
    MAX_OBJECT_BYTES,
    Chunk,
    FileEntry,
    Manifest,
    ObjectEntry,
    file_limit_bytes,
    object_path,
)

CHUNK_BYTES = 16 << 20  # of objects without records of their own


class BundleWriter:
    """Fills the empty or absent directory ``out``: any number of objects and files, then :meth:`finish`.

    UsageError when ``out`` holds anything already (unless ``resume``); SpaceError when the disk is full. One thread.
    """

    def __init__(self, out: Path, *, resume: bool = False) -> None:
        self.out = out
        if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out} exists and is not an empty directory; name a new one or empty it")
        (out / "objects").mkdir(parents=True, exist_ok=True)
        self._objects: dict[str, ObjectEntry] = {}
        self._files: dict[str, FileEntry] = {}
        self._partial = out / "objects" / "partial"

    def add_object(self, chunks: Iterable[bytes | memoryview], record_bytes: int | None = None) -> ObjectEntry:
        """Store the concatenation of ``chunks`` (any piece sizes); the entry's chunks are ``record_bytes`` long.

        None means 16 MiB. The object must be a whole number of records. Equal bytes are stored once, and the first
        entry is returned again.
        """
        record = _RecordHasher(record_bytes or CHUNK_BYTES)
        try:
            with self._partial.open("wb") as file:
                for piece in chunks:
                    view = memoryview(piece).cast("B")
                    record.update(view)
                    if record.size_bytes > MAX_OBJECT_BYTES:
                        raise BundleError(f"an object is larger than {MAX_OBJECT_BYTES:,} bytes; split it")
                    file.write(view)
                file.flush()
                os.fsync(file.fileno())
            entry = record.entry(whole_records=record_bytes is not None)
            return self._place(entry)
        except OSError as error:
            raise _space(error, self.out) from None
        finally:
            self._partial.unlink(missing_ok=True)

    def adopt(self, entry: ObjectEntry) -> None:
        """List an object that lies at its place already, complete and fsynced."""
        self._objects[entry.sha256] = entry

    def _place(self, entry: ObjectEntry) -> ObjectEntry:
        if entry.sha256 in self._objects:
            return self._objects[entry.sha256]
        target = self.out / object_path(entry.sha256)
        target.parent.mkdir(exist_ok=True)
        self._partial.chmod(0o444)
        self._partial.rename(target)
        self._objects[entry.sha256] = entry
        return entry

    def add_file(self, name: str, data: bytes) -> FileEntry:
        """Store a small file under an allowed name; BundleError for another name, twice, empty or too long."""
        limit = file_limit_bytes(name)
        if limit is None or name in self._files:
            raise BundleError(f"{name} is {'added twice' if limit else 'not one of ' + ALLOWED_FILES}")
        if not 0 < len(data) <= limit:
            raise BundleError(f"{name} has {len(data):,} bytes; 1 to {limit:,} are allowed")
        try:
            write_synced(self.out / name, data)
        except OSError as error:
            raise _space(error, self.out) from None
        self._files[name] = FileEntry(name, hashlib.sha256(data).hexdigest(), len(data))
        return self._files[name]

    def replace_file(self, name: str, data: bytes) -> FileEntry:
        """Store ``name`` anew; the manifest on disk describes the old bytes until :meth:`finish` is called again."""
        self._files.pop(name, None)
        return self.add_file(name, data)

    def finish(self, name: str, version: str, release_counter: int, provenance: dict[str, Any]) -> Manifest:
        """Write manifest.json last, everything fsynced; the directory is a bundle from that moment on."""
        manifest = Manifest(
            name=name,
            version=version,
            release_counter=release_counter,
            provenance=provenance,
            files=tuple(sorted(self._files.values(), key=lambda f: f.path)),
            objects=tuple(sorted(self._objects.values(), key=lambda o: o.sha256)),
        )
        try:
            for folder in {(self.out / o.path).parent for o in manifest.objects}:
                sync_directory(folder)
            sync_directory(self.out / "objects")
            write_synced(self.out / "manifest.json", manifest.to_bytes())
            sync_directory(self.out)
        except OSError as error:
            raise _space(error, self.out) from None
        return manifest


class _RecordHasher:
    """Hash of the whole and of each record, in one pass over the pieces; the first record is hashed once for both."""

    def __init__(self, record_bytes: int) -> None:
        self.record_bytes = record_bytes
        self.size_bytes = 0
        self._whole = self._record = hashlib.sha256()
        self._filled = 0
        self._chunks: list[Chunk] = []

    def update(self, view: memoryview) -> None:
        self.size_bytes += len(view)
        while len(view):
            if self._filled == self.record_bytes:
                self._close()
            part = view[: self.record_bytes - self._filled]
            self._record.update(part)
            if self._record is not self._whole:
                self._whole.update(part)
            self._filled += len(part)
            view = view[len(part) :]

    def _close(self) -> None:
        offset = len(self._chunks) * self.record_bytes
        self._chunks.append(Chunk(offset, self._filled, self._record.hexdigest()))
        self._record, self._filled = hashlib.sha256(), 0

    def entry(self, *, whole_records: bool) -> ObjectEntry:
        if self.size_bytes == 0:
            raise BundleError("an object is empty; leave it out")
        if self._filled != self.record_bytes and whole_records:
            raise BundleError(f"an object of {self.size_bytes:,} bytes is no multiple of {self.record_bytes:,}")
        self._close()
        return ObjectEntry(self._whole.hexdigest(), self.size_bytes, tuple(self._chunks))


def write_synced(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace ``path`` by a rename of a fsynced temporary file beside it; the directory entry is fsynced too."""
    partial = path.with_name(path.name + ".partial")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """fsync of a directory: what was renamed into it survives a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _space(error: OSError, where: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceError(f"no space left while writing {where}; free some and start again")
    return BundleError(f"{where}: writing failed ({error.strerror})")
