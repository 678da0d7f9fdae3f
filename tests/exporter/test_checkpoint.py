"""The checkpoint reader: bits and values of good files; one line naming file and tensor for every bad one."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from appliance.errors import CheckpointError
from exporter import codec
from exporter.checkpoint import Checkpoint
from exporter.safetensors_file import read_header, write_file
from exporter.sample import write_sample

TINY_Q = Path(__file__).parents[1] / "golden/tiny-q"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_sample(folder, "tiny")
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_shards_and_one_file_read_alike(tiny, tmp_path):
    sharded = Checkpoint.open(tiny)
    shards = [f"model-{number:05d}-of-00010.safetensors" for number in range(1, 11)]
    assert [source.path.name for source in sharded.sources] == shards
    assert all(source.size_bytes == (tiny / source.path.name).stat().st_size for source in sharded.sources)
    (tmp_path / "one").mkdir()
    shutil.copy(tiny / "config.json", tmp_path / "one")
    names = sharded.names
    write_file(tmp_path / "one/model.safetensors", [(n, sharded.info(n).dtype, sharded.read(n)) for n in names])
    single = Checkpoint.open(tmp_path / "one")
    assert single.names == names
    assert single.config == sharded.config
    assert all(single.read(n).tobytes() == sharded.read(n).tobytes() for n in names)


def test_official_fixture():
    checkpoint = Checkpoint.open(TINY_Q)
    assert len(checkpoint.names) == 585
    info = checkpoint.info("layers.0.ffn.experts.0.w1.weight")
    assert (info.dtype, info.shape, info.size_bytes) == ("I8", (128, 128), 16384)
    assert checkpoint.raw_config["expert_dtype"] == "fp4"
    assert checkpoint.read("layers.0.ffn.gate.tid2eid").dtype == np.int64
    assert checkpoint.read("embed.weight").dtype == np.uint16


def test_our_reader_agrees_with_the_safetensors_library(tiny):
    safetensors = pytest.importorskip("safetensors")
    checkpoint = Checkpoint.open(tiny)
    for source in checkpoint.sources[:3]:
        with safetensors.safe_open(source.path, "numpy") as library:
            assert set(library.keys()) == {t.name for t in read_header(source.path)}
            for name in (n for n in library.keys() if checkpoint.info(n).dtype in ("F32", "I64")):  # noqa: SIM118
                assert np.array_equal(library.get_tensor(name), checkpoint.read(name))


def test_float32_multiplies_by_the_scale_sibling(tiny):
    checkpoint = Checkpoint.open(tiny)
    for name, dequantize in (("layers.2.attn.wq_b", codec.fp8_block_dequantize),
                             ("layers.3.ffn.experts.5.w2", codec.fp4_dequantize)):
        expected = dequantize(checkpoint.read(f"{name}.weight"), checkpoint.read(f"{name}.scale"))
        assert np.array_equal(checkpoint.float32(f"{name}.weight"), expected)
    assert np.array_equal(checkpoint.float32("norm.weight"), codec.bf16_decode(checkpoint.read("norm.weight")))
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.gate\.tid2eid is I64"):
        checkpoint.float32("layers.0.ffn.gate.tid2eid")


def test_stream_and_read_into(tiny):
    checkpoint = Checkpoint.open(tiny)
    name = "layers.0.attn.wq_b.weight"
    raw = checkpoint.read(name)
    pieces = list(checkpoint.stream(name, chunk_bytes=1000))
    assert b"".join(pieces) == raw.tobytes()
    assert max(len(piece) for piece in pieces) == 1000
    out = np.zeros(raw.size, np.uint8)
    checkpoint.read_into(name, out)
    assert out.tobytes() == raw.tobytes()
    with pytest.raises(CheckpointError, match=r"wq_b\.weight has 32768 bytes, the buffer 5"):
        checkpoint.read_into(name, np.zeros(5, np.uint8))


def test_unknown_tensor(tiny):
    checkpoint = Checkpoint.open(tiny)
    assert not checkpoint.has("layers.99.hc_attn_fn")
    with pytest.raises(CheckpointError, match=r"index\.json: tensor layers\.99\.hc_attn_fn is missing"):
        checkpoint.read("layers.99.hc_attn_fn")


def test_file_cut_after_opening(copy):
    checkpoint = Checkpoint.open(copy)
    info = checkpoint.info("layers.1.attn.wq_b.weight")
    with info.file.open("r+b") as handle:
        handle.truncate(info.offset + 10)
    with pytest.raises(CheckpointError, match=r"wq_b\.weight ends 32758 bytes early"):
        checkpoint.read(info.name)


@pytest.mark.parametrize(("header", "data", "message"), [
    (b"{", b"", "header of 1 bytes"),
    (b"{]", b"", "header is not JSON"),
    (b"[]", b"", "header is a list"),
    (b'{"a":1,"a":2}', b"", "a key appears twice"),
    ({"a": 5}, b"", "a: not a tensor entry"),
    ({"a" * 600: entry()}, b"1234", "not a tensor entry"),
    ({"a": entry("F64")}, b"1234", "a: dtype 'F64', expected one of F8_E4M3"),
    ({"a": entry(shape=(-4,))}, b"1234", "shape or data_offsets are not lists of counts"),
    ({"a": entry(shape=(1,) * 9)}, b"1", "shape or data_offsets"),
    ({"a": entry(offsets=(0, 4, 8))}, b"1234", "shape or data_offsets"),
    ({"a": entry(shape=(True,))}, b"1", "shape or data_offsets"),
    ({"a": entry("F32")}, b"1234", r"a: 4 bytes for F32 \[4\], expected 16"),
    ({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456", "b at byte .* overlaps the tensor before it"),
    ({"a": entry(), "b": entry(offsets=(6, 10))}, b"1234567890", "b at byte .* leaves a hole before it"),
    ({"a": entry()}, b"123", "its header says .*cut short or damaged"),
    ({"a": entry()}, b"12345", "its header says .*cut short or damaged"),
])
def test_bad_file(tmp_path, header, data, message):
    path = header_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as failure:
        read_header(path)
    assert str(failure.value).startswith(str(path))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("raw", [b"", b"\0" * 7, struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 100) + b"{}"])
def test_header_length_is_not_trusted(tmp_path, raw):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="cut short or not a safetensors file"):
        read_header(path)


def test_any_changed_header_byte_is_read_or_refused_by_name(tiny):
    """No other exception than CheckpointError, whatever byte of a header changes."""
    source = next(tiny.glob("model-00009-*"))
    good, refused = source.read_bytes(), 0
    path = tiny.parent / "flipped.safetensors"
    header_bytes = struct.unpack("<Q", good[:8])[0]
    for position in range(0, 8 + header_bytes, 3):
        path.write_bytes(good[:position] + bytes([good[position] ^ (1 << position % 8)]) + good[position + 1 :])
        try:
            read_header(path)
        except CheckpointError:
            refused += 1
    assert refused > header_bytes // 10


@pytest.mark.parametrize("damage", [
    (lambda d: (d / "model-00004-of-00010.safetensors").unlink(),
     r"model-00004-of-00010\.safetensors: the shard is missing .*lists layers\.2\."),
    (lambda d: (d / INDEX).write_text("{"), r"index\.json: not JSON"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "weight_map is missing or empty"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'), "a: file '../x.safetensors' is"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {"a": 5}}'), "a: file 5 is not a plain"),
    (lambda d: (d / INDEX).unlink(), r"neither model\.safetensors\.index\.json nor model\.safetensors"),
    (lambda d: (d / "config.json").unlink(), r"config\.json: cannot be read"),
])
def test_bad_folder(copy, damage):
    damage, message = damage
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(copy)


def test_index_and_shards_must_agree(copy):
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["norm.weight"] = index["weight_map"]["embed.weight"]
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"holds norm\.weight, .* lists it model-00001"):
        Checkpoint.open(copy)
    index["weight_map"]["norm.weight"] = "model-00009-of-00010.safetensors"
    index["weight_map"]["norm.bias"] = "model-00009-of-00010.safetensors"
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00009-of-00010\.safetensors: tensor norm\.bias is missing"):
        Checkpoint.open(copy)


def test_not_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: not a folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_sibling_of_equal_shapes_is_another_checkpoint(tiny_checkpoint, tmp_path):
    """Headers and config are equal, weights are not: a ranking of one must not pass for the other."""
    write_sample(tmp_path / "sibling", "tiny", seed=5)
    one, other = Checkpoint.open(tiny_checkpoint), Checkpoint.open(tmp_path / "sibling")
    assert {n: (t.dtype, t.shape, t.offset) for n, t in one.tensors.items()} == {
        n: (t.dtype, t.shape, t.offset) for n, t in other.tensors.items()
    }
    assert one.source_sha256 != other.source_sha256
    assert one.source_sha256 == Checkpoint.open(tiny_checkpoint).source_sha256
