"""A bundle as it lies on disk, and what may be read from it.

``BuiltBundle``     a directory the exporter wrote: every byte checked against its manifest, nobody vouches for it
``VerifiedBundle``  an installed bundle whose signatures lead to a root this machine trusts; what is served

Both give ``root`` (the directory beside whose ``objects/`` the graph lies), ``graph_path``, ``tokenizer_path``,
``spec``, ``manifest``, ``bundle_id`` and ``signed``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from appliance.bundle_writer import BundleWriter
from appliance.errors import BundleError
from appliance.manifest import (
    FILE_LIMITS_BYTES,
    MAX_MANIFEST_BYTES,
    Chunk,
    FileEntry,
    Manifest,
    ObjectEntry,
)
from appliance.model import ModelSpec
from appliance.tree import Tree, read_pieces

__all__ = ["BuiltBundle", "BundleWriter", "Chunk", "FileEntry", "Manifest", "ObjectEntry"]

MANIFEST_TARGET = re.compile(r"([0-9a-f]{64})\.manifest\.json")


@dataclass(frozen=True, slots=True)
class BuiltBundle:
    """A bundle directory whose every file and object matches its manifest; ``signed`` is False whatever lies in it."""

    root: Path
    manifest: Manifest
    spec: ModelSpec
    graph_path: Path
    tokenizer_path: Path | None
    signed: bool = False

    @staticmethod
    def open(path: Path) -> BuiltBundle:
        """Read everything once; BundleError names the first file that is missing, damaged or of the wrong size."""
        tree = Tree(path)
        manifest = read_built_manifest(tree)
        spec = None
        for entry in manifest.files:
            data = tree.read(entry.path, FILE_LIMITS_BYTES[entry.path])
            check_file(entry, data)
            if entry.path == "model.json":
                spec = parse_spec(data)
        for item in manifest.objects:
            check_object(tree, item)
        if spec is None:
            raise BundleError(f"{path}: model.json is not listed")
        tokenizer = path / "tokenizer.json" if manifest.file("tokenizer.json") else None
        return BuiltBundle(path, manifest, spec, path / "model.onnx", tokenizer)

    @property
    def bundle_id(self) -> str:
        return self.manifest.bundle_id


def read_built_manifest(tree: Tree) -> Manifest:
    """The manifest of an unsigned bundle, or of a signed one (exactly one ``targets/<sha256>.manifest.json``)."""
    if not tree.root.is_dir():
        raise BundleError(f"{tree.root} is not a directory; name the bundle's directory")
    if (tree.root / "manifest.json").exists():
        return Manifest.from_bytes(tree.read("manifest.json", MAX_MANIFEST_BYTES))
    names = sorted(p.name for p in (tree.root / "targets").glob("*.manifest.json"))
    if len(names) != 1:
        raise BundleError(f"{tree.root} has no manifest.json: not a finished bundle; build it again")
    match = MANIFEST_TARGET.fullmatch(names[0])
    name = f"targets/{names[0]}"
    data = tree.read(name, MAX_MANIFEST_BYTES)
    if match is None or hashlib.sha256(data).hexdigest() != match[1]:
        raise BundleError(f"{name} in {tree.root} is damaged: its SHA-256 is not its name; copy the bundle again")
    return Manifest.from_bytes(data, name)


def check_file(entry: FileEntry, data: bytes) -> None:
    """BundleError naming the file unless size and SHA-256 are those listed."""
    if len(data) != entry.size_bytes:
        raise BundleError(f"{entry.path} has {len(data):,} bytes, not {entry.size_bytes:,}; copy the bundle again")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise BundleError(f"{entry.path} is damaged (SHA-256 differs from the manifest); copy the bundle again")


def check_object(tree: Tree, entry: ObjectEntry) -> None:
    """BundleError naming the object unless its size, its SHA-256 and that of every chunk are those listed."""
    digest, chunks, size = hashlib.sha256(), _ChunkCheck(entry), 0
    for piece in _bounded(tree, entry):
        digest.update(piece)
        size += len(piece)
        chunks.update(piece)
    if size != entry.size_bytes:
        raise BundleError(f"{entry.path} has {size:,} bytes, not {entry.size_bytes:,}; copy the bundle again")
    if digest.hexdigest() != entry.sha256:
        raise BundleError(f"{entry.path} is damaged (SHA-256 differs from its name); copy the bundle again")


def check_chunk(tree: Tree, entry: ObjectEntry, chunk: Chunk) -> None:
    """BundleError naming object and offset unless this one chunk has the SHA-256 listed."""
    digest = hashlib.sha256()
    with tree.open(entry.path) as file:
        file.seek(chunk.offset)
        for piece in read_pieces(file, chunk.size_bytes, entry.path):
            digest.update(piece)
    if digest.hexdigest() != chunk.sha256:
        raise BundleError(f"{entry.path} is damaged at byte {chunk.offset:,} (SHA-256 of the record differs)")


def parse_spec(data: bytes, source: str = "model.json") -> ModelSpec:
    """model.json's bytes as a ModelSpec; BundleError naming ``source``."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"{source} is not UTF-8; copy the bundle again") from None
    return ModelSpec.from_json(text, source)


def _bounded(tree: Tree, entry: ObjectEntry) -> Iterator[memoryview]:
    """Pieces of an object, one byte more than listed at most."""
    with tree.open(entry.path) as file:
        yield from read_pieces(file, entry.size_bytes + 1, entry.path)


class _ChunkCheck:
    """Compares the SHA-256 of each chunk as the bytes go by; an object of one chunk is not hashed twice."""

    def __init__(self, entry: ObjectEntry) -> None:
        self._entry, self._index, self._filled, self._digest = entry, 0, 0, hashlib.sha256()
        self._single = len(entry.chunks) == 1 and entry.chunks[0].sha256 == entry.sha256

    def update(self, piece: memoryview) -> None:
        chunks = () if self._single else self._entry.chunks
        while len(piece) and self._index < len(chunks):
            chunk = chunks[self._index]
            part = piece[: chunk.size_bytes - self._filled]
            self._digest.update(part)
            self._filled += len(part)
            piece = piece[len(part) :]
            if self._filled == chunk.size_bytes:
                if self._digest.hexdigest() != chunk.sha256:
                    raise BundleError(f"{self._entry.path} is damaged at byte {chunk.offset:,}; copy the bundle again")
                self._index, self._filled, self._digest = self._index + 1, 0, hashlib.sha256()
