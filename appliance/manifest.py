"""The manifest: the one list of every byte of a bundle. Pure on bytes; no file is touched here.

``manifest.json`` is canonical JSON (sorted keys, compact, no final newline, UTF-8), so one manifest has one digest. It
names the small files by path and the big ones (objects) by their SHA-256, with one chunk per record of an object.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from appliance.errors import BundleError
from appliance.model import MAX_PROFILES
from appliance.wire import FULL, PROFILE_ID

MANIFEST_FORMAT = 1
MAX_MANIFEST_BYTES = 16 << 20
MAX_OBJECTS = 65_536
MAX_CHUNKS = 262_144  # over all objects
MAX_OBJECT_BYTES = (1 << 32) - 1  # FAT32's largest file
MAX_BUNDLE_BYTES = 1 << 40
MAX_PROVENANCE_BYTES = 64 << 10
MAX_RELEASE_COUNTER = (1 << 31) - 1
FILE_LIMITS_BYTES = {
    "model.onnx": 64 << 20, "model.json": 16 << 20, "tokenizer.json": 64 << 20, "quality.json": 4 << 20,
}  # fmt: skip
REQUIRED_FILES = ("model.json", "model.onnx")
ALLOWED_FILES = ", ".join((*FILE_LIMITS_BYTES, "model.<profile id>.onnx"))

_GRAPH = re.compile(rf"model\.({PROFILE_ID.pattern})\.onnx")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,31}")
_BUNDLE_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}-[1-9][0-9]{0,9}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A small file of the bundle, by one of the allowed names."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One record of an object: bytes [offset, offset + size_bytes)."""

    offset: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """A content-addressed file ``objects/ab/<sha256>``; its chunks cover it without a gap."""

    sha256: str
    size_bytes: int
    chunks: tuple[Chunk, ...]

    @property
    def path(self) -> str:
        return object_path(self.sha256)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a bundle consists of. ``provenance`` is free JSON without floats: where the weights came from."""

    name: str
    version: str
    release_counter: int
    files: tuple[FileEntry, ...]
    objects: tuple[ObjectEntry, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    def to_bytes(self) -> bytes:
        """The canonical encoding: files sorted by path, objects by digest."""
        return canonical_json(
            {
                "files": [_plain(f) for f in sorted(self.files, key=lambda f: f.path)],
                "format": MANIFEST_FORMAT,
                "name": self.name,
                "objects": [_plain_object(o) for o in sorted(self.objects, key=lambda o: o.sha256)],
                "provenance": self.provenance,
                "release_counter": self.release_counter,
                "version": self.version,
            }
        )

    @staticmethod
    def from_bytes(data: bytes, source: str = "manifest.json") -> Manifest:
        """Strict: anything but the canonical encoding of a valid manifest is a BundleError naming ``source``."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{source} is longer than {MAX_MANIFEST_BYTES:,} bytes; not a Solocard manifest")
        try:
            raw = json.loads(data.decode("utf-8"))
            if not isinstance(raw, dict) or raw.get("format") != MANIFEST_FORMAT:
                raise BundleError(f"{source} is not a manifest of format {MANIFEST_FORMAT}; is Solocard too old?")
            manifest = _parse(raw)
            canonical = manifest.to_bytes() == data
        except BundleError as error:
            raise BundleError(f"{source}: {error}" if source not in str(error) else str(error)) from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise BundleError(f"{source} is damaged ({error}); copy the bundle again") from None
        if not canonical:
            raise BundleError(f"{source} is not in canonical form (sorted, compact); copy the bundle again")
        return manifest

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical encoding, hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def bundle_id(self) -> str:
        """``name-release_counter-`` and the first 12 hex digits of the digest."""
        return f"{self.name}-{self.release_counter}-{self.digest[:12]}"

    @property
    def total_bytes(self) -> int:
        """Bytes of all files and objects, without the manifest and the metadata."""
        return sum(f.size_bytes for f in self.files) + sum(o.size_bytes for o in self.objects)

    @property
    def profiles(self) -> tuple[str, ...]:
        """Ids of the profiles whose graphs are listed, ``full`` first, the others by name."""
        others = (profile_of(f.path) for f in self.files)
        return (FULL, *sorted(profile for profile in others if profile not in (None, FULL)))

    def file(self, path: str) -> FileEntry | None:
        """The entry of a small file, None when the bundle has none of that name."""
        return next((f for f in self.files if f.path == path), None)

    def object(self, sha256: str) -> ObjectEntry | None:
        """The entry of an object, None when the bundle has none of that digest."""
        return next((o for o in self.objects if o.sha256 == sha256), None)


def object_path(sha256: str) -> str:
    """Where an object lies in a bundle and in the pool, and the ``location`` model.onnx refers to it by."""
    return f"objects/{sha256[:2]}/{sha256}"


def graph_file(profile: str) -> str:
    """The name of a profile's graph in the bundle."""
    return "model.onnx" if profile == FULL else f"model.{profile}.onnx"


def profile_of(path: str) -> str | None:
    """The profile whose graph ``path`` is; None for another file, and for model.full.onnx, which is no name."""
    if path == graph_file(FULL):
        return FULL
    match = _GRAPH.fullmatch(path)
    return match[1] if match is not None and match[1] != FULL else None


def file_limit_bytes(path: str) -> int | None:
    """The longest a small file of this name may be; None for a name that no bundle has."""
    graph = isinstance(path, str) and profile_of(path) is not None
    return FILE_LIMITS_BYTES["model.onnx"] if graph else FILE_LIMITS_BYTES.get(path)


def is_bundle_id(text: str) -> bool:
    """True for the form ``name-counter-12hex``; says nothing about whether it exists."""
    return _BUNDLE_ID.fullmatch(text) is not None


def canonical_json(value: Any) -> bytes:
    """Sorted keys, compact, UTF-8, no final newline, no floats. ValueError for what JSON or this form cannot hold."""
    _refuse_floats(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _refuse_floats(value: Any) -> None:
    if isinstance(value, float):
        raise ValueError(f"{value!r} is a float; canonical JSON holds integers and text only")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"key {key!r} is not text")
            _refuse_floats(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _refuse_floats(inner)


def _plain(entry: FileEntry | Chunk) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in entry.__slots__}


def _plain_object(entry: ObjectEntry) -> dict[str, Any]:
    return {"chunks": [_plain(c) for c in entry.chunks], "sha256": entry.sha256, "size_bytes": entry.size_bytes}


def _parse(raw: dict[str, Any]) -> Manifest:
    return Manifest(
        name=raw["name"],
        version=raw["version"],
        release_counter=raw["release_counter"],
        files=tuple(FileEntry(**f) for f in _capped(raw["files"], len(FILE_LIMITS_BYTES) + MAX_PROFILES, "files")),
        objects=tuple(_parse_object(o) for o in _capped(raw["objects"], MAX_OBJECTS, "objects")),
        provenance=raw["provenance"],
    )


def _parse_object(raw: dict[str, Any]) -> ObjectEntry:
    chunks = tuple(Chunk(**c) for c in _capped(raw["chunks"], MAX_CHUNKS, "chunks"))
    return ObjectEntry(raw["sha256"], raw["size_bytes"], chunks)


def _capped(items: Any, maximum: int, what: str) -> list[Any]:
    if not isinstance(items, list) or len(items) > maximum:
        raise BundleError(f"{what} is not a list of at most {maximum:,} entries")
    return items


def _check(manifest: Manifest) -> None:
    _match(_NAME, manifest.name, "name")
    _match(_VERSION, manifest.version, "version")
    _integer(manifest.release_counter, 1, MAX_RELEASE_COUNTER, "release_counter")
    if not isinstance(manifest.provenance, dict):
        raise BundleError("provenance is not an object")
    try:
        size = len(canonical_json(manifest.provenance))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"provenance: {error}") from None
    if size > MAX_PROVENANCE_BYTES:
        raise BundleError(f"provenance is longer than {MAX_PROVENANCE_BYTES:,} bytes")
    _check_files(manifest.files)
    _check_objects(manifest.objects)
    if manifest.total_bytes > MAX_BUNDLE_BYTES:
        raise BundleError(f"the bundle is larger than {MAX_BUNDLE_BYTES:,} bytes")


def _check_files(files: tuple[FileEntry, ...]) -> None:
    paths = [f.path for f in files]
    for entry in files:
        limit = file_limit_bytes(entry.path)
        if limit is None:
            raise BundleError(f"file {entry.path!r} is not one of {ALLOWED_FILES}")
        _match(_SHA256, entry.sha256, f"{entry.path}.sha256")
        _integer(entry.size_bytes, 1, limit, f"{entry.path}.size_bytes")
    if len(set(paths)) != len(paths):
        raise BundleError("a file is listed twice")
    graphs = sum(profile_of(path) is not None for path in paths)
    if graphs > MAX_PROFILES + 1:
        raise BundleError(f"{graphs - 1} graphs besides model.onnx, at most {MAX_PROFILES} are allowed")
    for required in REQUIRED_FILES:
        if required not in paths:
            raise BundleError(f"{required} is not listed")


def _check_objects(objects: tuple[ObjectEntry, ...]) -> None:
    if len(objects) > MAX_OBJECTS or sum(len(o.chunks) for o in objects) > MAX_CHUNKS:
        raise BundleError(f"more than {MAX_OBJECTS:,} objects or {MAX_CHUNKS:,} chunks")
    if len({o.sha256 for o in objects}) != len(objects):
        raise BundleError("an object is listed twice")
    for entry in objects:
        _match(_SHA256, entry.sha256, "object sha256")
        _integer(entry.size_bytes, 1, MAX_OBJECT_BYTES, f"{entry.path} size_bytes")
        offset = 0
        for chunk in entry.chunks:
            _match(_SHA256, chunk.sha256, f"{entry.path} chunk sha256")
            _integer(chunk.size_bytes, 1, entry.size_bytes, f"{entry.path} chunk size_bytes")
            if type(chunk.offset) is not int or chunk.offset != offset:
                raise BundleError(f"{entry.path}: chunks are not one after the other at offset {offset:,}")
            offset += chunk.size_bytes
        if offset != entry.size_bytes:
            raise BundleError(f"{entry.path}: chunks cover {offset:,} of {entry.size_bytes:,} bytes")


def _match(pattern: re.Pattern[str], value: Any, what: str) -> None:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise BundleError(f"{what} {value!r} is not of the form {pattern.pattern}")


def _integer(value: Any, low: int, high: int, what: str) -> None:
    if type(value) is not int or not low <= value <= high:
        raise BundleError(f"{what} {value!r} is not an integer from {low:,} to {high:,}")
