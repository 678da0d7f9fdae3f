"""A bundle as it lies on disk, and what may be read from it.

``BuiltBundle``     a directory the exporter wrote: every byte checked against its manifest, nobody vouches for it
``VerifiedBundle``  an installed bundle whose signatures lead to a root this machine trusts; what is served

Both give ``root`` (the directory beside whose ``objects/`` the graphs lie), ``graph(profile)``, ``graph_path`` (that of
``full``), ``tokenizer_path``, ``spec``, ``manifest``, ``bundle_id`` and ``signed``.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from appliance.bundle_writer import BundleWriter
from appliance.errors import BundleError, StoreError, TrustError
from appliance.layout import Layout
from appliance.manifest import (
    MAX_MANIFEST_BYTES,
    Chunk,
    FileEntry,
    Manifest,
    ObjectEntry,
    graph_file,
    is_bundle_id,
)
from appliance.model import ModelSpec
from appliance.state import State
from appliance.tree import Tree, read_pieces
from appliance.trust import MAX_METADATA_BYTES, Chain, TrustedRoot, declared_root_version, verify_chain
from appliance.wire import FULL

__all__ = ["BuiltBundle", "BundleWriter", "Chunk", "FileEntry", "Manifest", "ObjectEntry", "VerifiedBundle"]

SAMPLE_BYTES = 1 << 30  # of object records hashed when an installed bundle is opened; sizes are always checked
Tick = Callable[[int], None]  # bytes just dealt with
_RANDOM = random.SystemRandom()
_PROOF = object()  # only this module can pass it, so a VerifiedBundle cannot be made without verifying

MANIFEST_TARGET = re.compile(r"([0-9a-f]{64})\.manifest\.json")


@dataclass(frozen=True, slots=True)
class BuiltBundle:
    """A bundle directory whose every file and object matches its manifest; ``signed`` is False whatever lies in it."""

    root: Path
    manifest: Manifest
    spec: ModelSpec
    tokenizer_path: Path | None
    signed: bool = False

    @staticmethod
    def open(path: Path) -> BuiltBundle:
        """Read everything once; BundleError names the first file that is missing, damaged or of the wrong size."""
        tree = Tree(path)
        manifest = read_built_manifest(tree)
        spec = None
        for entry in manifest.files:
            data = tree.read(entry.path, entry.size_bytes + 1)
            check_file(entry, data, entry.path, tree.remedy)
            if entry.path == "model.json":
                spec = parse_spec(data)
        for item in manifest.objects:
            check_object(tree, item)
        if spec is None:
            raise BundleError(f"{path}: model.json is not listed")
        check_profiles(spec, manifest, "model.json")
        tokenizer = path / "tokenizer.json" if manifest.file("tokenizer.json") else None
        return BuiltBundle(path, manifest, spec, tokenizer)

    def graph(self, profile: str) -> Path:
        """The graph of ``profile``; UsageError names the profiles there are."""
        return self.root / graph_file(self.spec.profile(profile, self.bundle_id).id)

    @property
    def graph_path(self) -> Path:
        return self.graph(FULL)

    @property
    def bundle_id(self) -> str:
        return self.manifest.bundle_id


class VerifiedBundle:
    """An installed bundle whose metadata leads from a root trusted on this machine to every one of its bytes.

    Only :meth:`open_installed` and :meth:`open_current` make one.
    """

    __slots__ = ("bundle_id", "chain", "manifest", "root", "signed", "spec", "tokenizer_path")

    def __init__(self, models: Path, manifest: Manifest, spec: ModelSpec, chain: Chain, *, proof: object) -> None:
        if proof is not _PROOF:
            raise TypeError("a VerifiedBundle is made by VerifiedBundle.open_installed only")
        self.root, self.bundle_id = models, manifest.bundle_id
        self.manifest, self.spec, self.chain, self.signed = manifest, spec, chain, True
        self.tokenizer_path = models / f"{self.bundle_id}.tokenizer.json"

    def graph(self, profile: str) -> Path:
        """The graph of ``profile``; UsageError names the profiles there are."""
        return self.root / f"{self.bundle_id}.{graph_file(self.spec.profile(profile, self.bundle_id).id)}"

    @property
    def graph_path(self) -> Path:
        return self.graph(FULL)

    @staticmethod
    def open_current(home: Path, *, full: bool = False) -> VerifiedBundle:
        """The bundle that ``state.json`` names; StoreError when none is installed."""
        current = State.read(home).current
        if not current:
            raise StoreError(f"no model is installed in {home}; run `solocard install DIRECTORY`")
        return VerifiedBundle.open_installed(home, current, full=full)

    @staticmethod
    def open_installed(
        home: Path, bundle_id: str, *, full: bool = False, tick: Tick = lambda _: None
    ) -> VerifiedBundle:
        """Verify again what was installed: metadata, manifest and small files whole, every object's size.

        One random record of each object is hashed, up to 1 GiB in all; ``full`` hashes every byte. ``tick`` gets the
        bytes of each object when it is done. Metadata may have expired since: expiry stops an installation, not
        service. TrustError: no way to a trusted root. StoreError names the file that is missing or damaged.
        """
        layout = Layout(home)
        if not is_bundle_id(bundle_id) or not layout.metadata(bundle_id).is_dir():
            raise StoreError(f"no bundle {bundle_id!r} is installed in {home}; `solocard list` shows those that are")
        try:
            return _open_installed(layout, bundle_id, full, tick)
        except TrustError as error:
            raise TrustError(f"installed bundle {bundle_id}: {error}") from None
        except BundleError as error:
            raise StoreError(f"installed bundle {bundle_id}: {error}") from None


def _open_installed(layout: Layout, bundle_id: str, full: bool, tick: Tick) -> VerifiedBundle:
    tree = Tree(layout.models, remedy="install the bundle again")
    chain = stored_chain(layout, bundle_id)
    name = f"{bundle_id}.manifest.json"
    data = tree.read(name, MAX_MANIFEST_BYTES)
    chain.check_manifest(data, name)
    manifest = Manifest.from_bytes(data, name)
    if manifest.bundle_id != bundle_id:
        raise TrustError(f"{name} is the list of {manifest.bundle_id}, not of {bundle_id}; install the bundle again")
    spec = None
    for entry in manifest.files:
        stored = f"{bundle_id}.{entry.path}"
        data = tree.read(stored, entry.size_bytes + 1)
        check_file(entry, data, stored, tree.remedy)
        if entry.path == "model.json":
            spec = parse_spec(data, stored)
    if spec is None or manifest.file("tokenizer.json") is None:
        raise BundleError(f"{name} lists no model.json or no tokenizer.json; such a bundle cannot be served")
    check_profiles(spec, manifest, f"{bundle_id}.model.json")
    _check_pool(tree, manifest, full, tick)
    return VerifiedBundle(layout.models, manifest, spec, chain, proof=_PROOF)


def stored_chain(layout: Layout, bundle_id: str) -> Chain:
    """An installed bundle's metadata, verified from the root it was installed under.

    That root must still lie in trust/ as it was accepted. TrustError or BundleError names the file that fails.
    """
    metadata = Tree(layout.metadata(bundle_id), remedy="install the bundle again")
    name = f"{declared_root_version(metadata.read)}.root.json"
    trust = Tree(layout.trust, remedy="the bundle was signed under a root this machine does not trust")
    root = TrustedRoot.from_bytes(trust.read(name, MAX_METADATA_BYTES["root"]), f"trust/{name}")
    return verify_chain(root, metadata.read)


def _check_pool(tree: Tree, manifest: Manifest, full: bool, tick: Tick) -> None:
    for entry in manifest.objects:
        size = tree.size_bytes(entry.path)
        if size != entry.size_bytes:
            raise BundleError(f"{entry.path} has {size:,} bytes, not {entry.size_bytes:,}; {tree.remedy}")
    budget = SAMPLE_BYTES
    for entry in _RANDOM.sample(manifest.objects, len(manifest.objects)):
        chunk = _RANDOM.choice(entry.chunks)
        if full:
            check_object(tree, entry)
        elif budget > 0:
            budget -= chunk.size_bytes
            check_chunk(tree, entry, chunk)
        tick(entry.size_bytes)


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


def check_file(entry: FileEntry, data: bytes, name: str, remedy: str) -> None:
    """BundleError calling it ``name`` unless size and SHA-256 are those listed."""
    if len(data) != entry.size_bytes:
        raise BundleError(f"{name} has {len(data):,} bytes or more, not {entry.size_bytes:,}; {remedy}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise BundleError(f"{name} is damaged (SHA-256 differs from the manifest); {remedy}")


def check_object(tree: Tree, entry: ObjectEntry) -> None:
    """BundleError naming the object unless its size, its SHA-256 and that of every chunk are those listed."""
    digest, chunks, size = hashlib.sha256(), _ChunkCheck(entry, tree.remedy), 0
    with tree.open(entry.path) as file:
        for piece in read_pieces(file, entry.size_bytes + 1, entry.path):
            digest.update(piece)
            size += len(piece)
            chunks.update(piece)
    if size != entry.size_bytes:
        raise BundleError(f"{entry.path} has {size:,} bytes or more, not {entry.size_bytes:,}; {tree.remedy}")
    if digest.hexdigest() != entry.sha256:
        raise BundleError(f"{entry.path} is damaged (SHA-256 differs from its name); {tree.remedy}")


def check_chunk(tree: Tree, entry: ObjectEntry, chunk: Chunk) -> None:
    """BundleError naming object and offset unless this one chunk has the SHA-256 listed."""
    digest = hashlib.sha256()
    with tree.open(entry.path) as file:
        file.seek(chunk.offset)
        for piece in read_pieces(file, chunk.size_bytes, entry.path):
            digest.update(piece)
    if digest.hexdigest() != chunk.sha256:
        raise BundleError(f"{entry.path} is damaged at byte {chunk.offset:,} (SHA-256 differs); {tree.remedy}")


def check_profiles(spec: ModelSpec, manifest: Manifest, source: str) -> None:
    """BundleError unless the list has one graph for each profile, with its SHA-256, and each profile's own objects."""
    listed, named = set(manifest.profiles), {profile.id for profile in spec.profiles}
    if listed != named:
        odd = sorted(listed ^ named)[0]
        raise BundleError(f"{source} and the list disagree about profile {odd!r} ({graph_file(odd)}); build it again")
    for profile in spec.profiles:
        entry = manifest.file(graph_file(profile.id))
        if entry is None or entry.sha256 != profile.graph_sha256:
            raise BundleError(f"{source}: profile {profile.id} was made for another {graph_file(profile.id)}")
        missing = [sha256 for sha256 in profile.overlay_objects if manifest.object(sha256) is None]
        if missing:
            raise BundleError(f"{source}: profile {profile.id} needs an object that is not listed: {missing[0]!r}")


def parse_spec(data: bytes, source: str = "model.json") -> ModelSpec:
    """model.json's bytes as a ModelSpec; BundleError naming ``source``."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"{source} is not UTF-8; copy the bundle again") from None
    return ModelSpec.from_json(text, source)


class _ChunkCheck:
    """Compares the SHA-256 of each chunk as the bytes go by; an object of one chunk is not hashed twice."""

    def __init__(self, entry: ObjectEntry, remedy: str) -> None:
        self._entry, self._remedy = entry, remedy
        self._index, self._filled, self._digest = 0, 0, hashlib.sha256()
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
                    raise BundleError(f"{self._entry.path} is damaged at byte {chunk.offset:,}; {self._remedy}")
                self._index, self._filled, self._digest = self._index + 1, 0, hashlib.sha256()
