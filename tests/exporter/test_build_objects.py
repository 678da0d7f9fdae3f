"""What a build writes: every byte of the checkpoint where it belongs, the same for any number of workers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random

import onnx
import pytest
from build_support import (
    SMALL,
    a_release,
    build,
    files_of,
    no_goldens,
    small_checkpoint,
    stored_objects,
    tensor_bytes,
)

from appliance.errors import CheckpointError, UsageError
from exporter.__main__ import main as export
from exporter.build import choose_encoding
from exporter.checkpoint import Checkpoint
from exporter.inventory import DSpark
from exporter.object_plan import experts_plan
from exporter.ops.moe import record_bytes
from exporter.presets import SLICE
from exporter.ranking import Ranking
from exporter.record_io import SourceFiles
from exporter.release import write_bundle
from exporter.sample import write_random
from exporter.view import View

PARTS = ("w1.weight", "w3.weight", "w2.weight", "w1.scale", "w3.scale", "w2.scale")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("build") / "checkpoint")


@pytest.fixture(scope="module")
def ranking(checkpoint):
    draw = random.Random(3)
    orders = tuple(tuple(draw.sample(range(4), 4)) for _ in range(3))
    return Ranking(Checkpoint.open(checkpoint).source_sha256, "random", orders)


def located(bundle, graph="model.onnx"):
    """Initializer → (SHA-256 of its object, bytes mapped), from the graph itself."""
    found = {}
    for tensor in onnx.load(str(bundle / graph), load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            assert place["offset"] == "0"
            found[tensor.name] = (place["location"].rsplit("/", 1)[1], int(place["length"]))
    return found


def test_every_untouched_tensor_and_expert_is_copied_byte_for_byte(checkpoint, ranking, tmp_path):
    build(checkpoint, tmp_path / "b", ranking=ranking, workers=2)
    source, objects, places = tensor_bytes(checkpoint), stored_objects(tmp_path / "b"), located(tmp_path / "b")
    equal = total = 0
    for layer, order in enumerate(ranking.orders):
        sha256, size = places[f"layers.{layer}.ffn.experts"]
        record = size // 4
        for rank, expert in enumerate(order):
            expected = b"".join(source[f"layers.{layer}.ffn.experts.{expert}.{part}"] for part in PARTS)
            stored = objects[sha256][rank * record : (rank + 1) * record]
            total += 1
            equal += hashlib.sha256(stored[: len(expected)]).digest() == hashlib.sha256(expected).digest()
            assert not any(stored[len(expected) :])
    assert (equal, total) == (12, 12)
    plain = [name for name in source if ".experts." not in name and ".gate." not in name and not name.startswith("mtp")]
    assert len(plain) > 80
    for name in plain:
        sha256, size = places[name]
        assert objects[sha256] == source[name]
        assert size == len(source[name])


def test_router_rows_follow_the_ranking(checkpoint, ranking, tmp_path):
    build(checkpoint, tmp_path / "b", ranking=ranking)
    source, objects, places = tensor_bytes(checkpoint), stored_objects(tmp_path / "b"), located(tmp_path / "b")
    for layer, order in enumerate(ranking.orders):
        rows = source[f"layers.{layer}.ffn.gate.weight"]
        width = len(rows) // 4
        expected = b"".join(rows[e * width : (e + 1) * width] for e in order)
        assert objects[places[f"layers.{layer}.ffn.gate.weight"][0]] == expected


def test_one_and_many_workers_write_the_same_files(checkpoint, ranking, tmp_path):
    built = [build(checkpoint, tmp_path / str(n), ranking=ranking, workers=n).digest for n in (1, 4, 9)]
    assert len(set(built)) == 1
    assert files_of(tmp_path / "1") == files_of(tmp_path / "9")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "4", "9"]


def test_large_tensors_come_in_chunks_of_16_mib(tmp_path):
    config = dataclasses.replace(SMALL, vocab_size=140_000, num_hidden_layers=1, compress_ratios=(0,))
    write_random(tmp_path / "c", config, mtp=0)
    manifest = build(tmp_path / "c", tmp_path / "b", workers=2, tokenizer=None)
    sizes = [[c.size_bytes for c in o.chunks] for o in manifest.objects if o.size_bytes == 140_000 * 256]
    assert sizes == [[16 << 20, 16 << 20, 140_000 * 256 - (32 << 20)]] * 2  # embedding and head
    stored_objects(tmp_path / "b")


def test_provenance_names_what_was_read_and_what_was_left_out(checkpoint, ranking, tmp_path):
    manifests = [build(checkpoint, tmp_path / "a"), build(checkpoint, tmp_path / "b", ranking=ranking)]
    source = tensor_bytes(checkpoint)
    lines = []
    for name, data in source.items():
        if name.endswith("w1.weight") and ".experts." in name and not name.startswith("mtp"):
            expert = name.removesuffix(".w1.weight")
            lines.append([expert, hashlib.sha256(b"".join(source[f"{expert}.{p}"] for p in PARTS)).hexdigest()])
        elif ".experts." not in name and not name.startswith("mtp"):
            lines.append([name, hashlib.sha256(data).hexdigest()])
    expected = hashlib.sha256(json.dumps(sorted(lines), separators=(",", ":")).encode()).hexdigest()
    for manifest in manifests:
        assert manifest.provenance["source"]["read_sha256"] == expected
        dropped = [len(data) for name, data in source.items() if name.startswith("mtp.")]
        assert manifest.provenance["dropped"] == {"tensors": len(dropped), "bytes": sum(dropped)}
    assert manifests[1].provenance["ranking"]["sha256"] == ranking.sha256
    assert str(tmp_path) not in json.dumps(manifests[1].provenance)


def test_the_0731_refresh_is_built_without_its_draft_stages(tmp_path):
    write_random(tmp_path / "c", SMALL, 5, dspark=DSpark())
    base = Checkpoint.open(tmp_path / "c")
    assert choose_encoding(base, None) == "dsv4-0731"
    with pytest.raises(UsageError, match="holds DSpark tensors"):
        choose_encoding(base, "dsv4-0424")
    manifest = build(tmp_path / "c", tmp_path / "b")
    drafts = {name: data for name, data in tensor_bytes(tmp_path / "c").items() if name.startswith("mtp.")}
    assert manifest.provenance["dropped"] == {"tensors": len(drafts), "bytes": sum(map(len, drafts.values()))}
    plain = build(small_checkpoint(tmp_path / "p"), tmp_path / "q")
    assert {o.sha256 for o in manifest.objects} == {o.sha256 for o in plain.objects}  # the backbone is the same


def test_a_short_source_file_is_named(checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = Checkpoint.open(tmp_path)
    info = found.info("layers.1.ffn.experts.2.w3.weight")
    with info.file.open("r+b") as file:
        file.truncate(info.offset + 10)
    plan = experts_plan(View(found), 1, "x")
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.2\.w3\.weight ends \d+ bytes early"):
        SourceFiles().fill(list(plan.records())[2], memoryview(bytearray(plan.record_bytes)))


def test_refusals_come_before_any_work(checkpoint, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    common = ["--encoding", "dsv4-0731", "--no-tokenizer"]
    assert export(["build", str(checkpoint), str(tmp_path / "there"), *common]) == 2
    assert "exists; name a new folder" in capsys.readouterr().err
    assert export(["build", str(checkpoint), str(tmp_path / "no" / "b"), *common]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert export(["build", str(checkpoint), str(tmp_path / "b"), *common, "--workers", "0"]) == 2
    assert "--workers 0: expected 1 to" in capsys.readouterr().err
    release = a_release(checkpoint)
    full = dataclasses.replace(release.profiles[0], without_quality="x" * 70_000)
    with pytest.raises(UsageError, match="provenance takes"):
        write_bundle(dataclasses.replace(release, profiles=(full,)), tmp_path / "b", find=no_goldens)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_the_real_record_is_one_page_aligned_read():
    assert record_bytes(SLICE.hidden_size, SLICE.moe_intermediate_size) == 13_369_344
