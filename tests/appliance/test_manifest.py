"""The manifest's canonical form, its limits, and the bundle directory written from it."""

from __future__ import annotations

import hashlib
import json

import pytest
from bundle_support import build

from appliance.bundle import BuiltBundle, BundleWriter
from appliance.bundle_writer import write_synced
from appliance.errors import BundleError, UsageError
from appliance.manifest import Chunk, FileEntry, Manifest, ObjectEntry, canonical_json, is_bundle_id
from appliance.tree import Tree

SHA = "ab" * 32


def manifest(**changes):
    fields = {
        "name": "sample", "version": "1.0", "release_counter": 1, "provenance": {"commit": "abc"},
        "files": (FileEntry("model.json", SHA, 3), FileEntry("model.onnx", SHA, 4)),
        "objects": (ObjectEntry(SHA, 10, (Chunk(0, 6, SHA), Chunk(6, 4, SHA))),),
    }
    return Manifest(**{**fields, **changes})


def test_bytes_are_canonical_and_round_trip():
    data = manifest().to_bytes()
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
    assert not data.endswith(b"\n")
    assert Manifest.from_bytes(data) == manifest()
    assert manifest().digest == hashlib.sha256(data).hexdigest()
    assert manifest().bundle_id == f"sample-1-{manifest().digest[:12]}"
    assert is_bundle_id(manifest().bundle_id)


def test_the_order_of_entries_does_not_change_the_digest():
    files = manifest().files
    assert manifest(files=files[::-1]).digest == manifest().digest


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"name": "../up"}, "name"), ({"name": "Upper"}, "name"), ({"name": ""}, "name"),
        ({"version": "1\n0"}, "version"), ({"release_counter": 0}, "release_counter"),
        ({"release_counter": True}, "release_counter"), ({"release_counter": 2**63}, "release_counter"),
        ({"files": (FileEntry("model.json", SHA, 3),)}, "model.onnx"),
        ({"files": (*manifest().files, FileEntry("../x", SHA, 3))}, "../x"),
        ({"files": (*manifest().files, FileEntry("model.json", SHA, 3))}, "twice"),
        ({"files": (FileEntry("model.json", "AB" * 32, 3), manifest().files[1])}, "sha256"),
        ({"files": (FileEntry("model.json", SHA, 1 << 40), manifest().files[1])}, "size_bytes"),
        ({"objects": (ObjectEntry(SHA, 10, (Chunk(0, 6, SHA),)),)}, "cover"),
        ({"objects": (ObjectEntry(SHA, 10, (Chunk(0, 6, SHA), Chunk(5, 5, SHA))),)}, "one after the other"),
        ({"objects": (ObjectEntry(SHA, 1 << 33, (Chunk(0, 1 << 33, SHA),)),)}, "size_bytes"),
        ({"objects": manifest().objects * 2}, "twice"),
        ({"objects": (ObjectEntry("../../etc/passwd", 1, (Chunk(0, 1, SHA),)),)}, "sha256"),
        ({"provenance": {"x": 0.5}}, "float"), ({"provenance": {"x": "y" * 70_000}}, "longer"),
    ],
)
def test_refused_fields(changes, word):
    with pytest.raises(BundleError, match=word):
        manifest(**changes)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"format":1}', b"[" * 100_000,
        b"\xef\xbb\xbf" + manifest().to_bytes(),
        manifest().to_bytes() + b"\n", manifest().to_bytes().replace(b'"format":1', b'"format":2'),
        manifest().to_bytes().replace(b'"format":1', b'"format":1,"format":1'),
        manifest().to_bytes().replace(b'"format":1', b'"extra":0,"format":1'),
        manifest().to_bytes().replace(b'"release_counter":1', b'"release_counter":NaN'),
        manifest().to_bytes().replace(b'"size_bytes":3', b'"size_bytes":3.0'),
        manifest().to_bytes().replace(b'"offset":0,', b""),
        b" " * (17 << 20),
    ],
)
def test_only_the_canonical_encoding_is_read(data):
    with pytest.raises(BundleError, match=r"here\.json"):
        Manifest.from_bytes(data, "here.json")


def test_canonical_json_refuses_what_it_cannot_hold():
    assert canonical_json({"b": [1, None], "a": "é"}) == '{"a":"é","b":[1,null]}'.encode()
    for bad in (float("nan"), 1.0, {1: 2}, ["\ud800"]):
        with pytest.raises(ValueError, match=r"float|text|surrogates"):
            canonical_json(bad)


def test_writer_and_built_bundle_agree(tmp_path):
    out = tmp_path / "bundle"
    written = build(out, seed=3)
    bundle = BuiltBundle.open(out)
    assert bundle.manifest == written
    assert bundle.bundle_id == written.bundle_id
    assert not bundle.signed
    assert bundle.graph_path.read_bytes() == b"not a graph, 3"
    assert bundle.tokenizer_path == out / "tokenizer.json"
    assert bundle.spec.config.num_hidden_layers == 3
    record = next(o for o in written.objects if o.size_bytes == 4 * 4096)
    data = (out / record.path).read_bytes()
    records = [data[start : start + 4096] for start in range(0, len(data), 4096)]
    assert [c.sha256 for c in record.chunks] == [hashlib.sha256(r).hexdigest() for r in records]
    names = {"manifest.json", "model.json", "model.onnx", "objects", "tokenizer.json"}
    assert {p.name for p in out.iterdir()} == names


def test_object_pieces_may_have_any_size(tmp_path):
    data = bytes(range(256)) * 64
    entries = []
    for number, step in enumerate((1, 100, 4096, 5000, len(data))):
        writer = BundleWriter(tmp_path / str(number))
        entries.append(writer.add_object((data[i : i + step] for i in range(0, len(data), step)), record_bytes=4096))
    assert len(set(entries)) == 1
    assert len(entries[0].chunks) == 4


def test_equal_objects_are_stored_once(tmp_path):
    writer = BundleWriter(tmp_path / "b")
    first = writer.add_object([b"x" * 10])
    assert writer.add_object([b"x"] * 10) == first
    assert len([p for p in (tmp_path / "b" / "objects").rglob("*") if p.is_file()]) == 1


def test_writer_refusals(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match="not an empty directory"):
        BundleWriter(tmp_path / "full")
    writer = BundleWriter(tmp_path / "b")
    with pytest.raises(BundleError, match="empty"):
        writer.add_object([])
    with pytest.raises(BundleError, match="multiple"):
        writer.add_object([b"x" * 10], record_bytes=4)
    with pytest.raises(BundleError, match="not one of"):
        writer.add_file("evil.so", b"x")
    with pytest.raises(BundleError, match=r"model\.json"):
        writer.finish("sample", "1", 1, {})
    assert not (tmp_path / "b" / "manifest.json").exists()
    with pytest.raises(BundleError, match="not a finished bundle"):
        BuiltBundle.open(tmp_path / "b")


def test_every_damage_of_a_built_bundle_is_named(tmp_path):
    build(tmp_path / "b")
    for path in sorted(p for p in (tmp_path / "b").rglob("*") if p.is_file()):
        data = path.read_bytes()
        path.chmod(0o644)
        for damaged in (data[:-1], data + b"x", bytes([data[0] ^ 1]) + data[1:], data[:-1] + bytes([data[-1] ^ 0x20])):
            path.write_bytes(damaged)
            with pytest.raises(BundleError, match=path.name):
                BuiltBundle.open(tmp_path / "b")
        path.write_bytes(data)
    assert BuiltBundle.open(tmp_path / "b").manifest.name == "sample"


def test_a_file_is_replaced_by_rename_never_rewritten(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_synced(path, b"old")
    with path.open("rb") as reader:
        write_synced(path, b"new")
        assert (reader.read(), path.read_bytes()) == (b"old", b"new")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("appliance.bundle_writer.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_synced(path, b"newer")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_a_small_file_longer_than_the_read_buffer_comes_back_whole(tmp_path):
    data = bytes(range(256)) * 10_000  # 2.56 MB, and no two megabytes of it are alike
    data = b"".join(hashlib.sha256(data[i : i + 32] + i.to_bytes(4)).digest() for i in range(0, len(data), 32))
    (tmp_path / "model.onnx").write_bytes(data)
    assert Tree(tmp_path).read("model.onnx", len(data)) == data


def test_an_object_of_one_record_is_hashed_once(tmp_path, monkeypatch):
    hashed = []

    class Counting:
        def __init__(self, data=b""):
            self._hash = hashlib.sha256(data)
            self.hexdigest = self._hash.hexdigest

        def update(self, data):
            hashed.append(len(data))
            self._hash.update(data)

    monkeypatch.setattr("appliance.bundle_writer.hashlib", type("H", (), {"sha256": Counting}))
    writer = BundleWriter(tmp_path / "b")
    entry = writer.add_object([b"x" * 5000] * 3)
    assert (sum(hashed), entry.sha256) == (15_000, entry.chunks[0].sha256)
    assert entry.sha256 == hashlib.sha256(b"x" * 15_000).hexdigest()
