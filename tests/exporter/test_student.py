"""The student checkpoint: the view's values in official names, dtypes and shards; transformers loads it as it is."""

import json
import re
import shutil

import numpy as np
import pytest
from student_support import fp8_head, linear_names, overlaid, random_fp4_linears

from appliance.errors import CheckpointError, SpaceError, UsageError
from exporter import inventory, student
from exporter.__main__ import main
from exporter.checkpoint import Checkpoint
from exporter.presets import TINY
from exporter.ranking import Ranking
from exporter.sample import write_sample
from exporter.student import NEVER, write_student
from exporter.view import View

WHOLE, CUT = 8, 5
KEPT = (WHOLE,) * 3 + (CUT,) * 4


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return Checkpoint.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def ranking(base):
    rng = np.random.Generator(np.random.PCG64(5))
    return Ranking(base.source_sha256, "random", tuple(tuple(map(int, rng.permutation(WHOLE))) for _ in range(7)))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_plain_view_is_the_checkpoint_again(base, tmp_path, capsys):
    assert main(["student", str(base.path), str(tmp_path / "out")]) == 0
    assert "draft stages (mtp.*): kept" in capsys.readouterr().out
    again = Checkpoint.open(tmp_path / "out")
    assert set(again.names) == set(base.names)
    for name in base.names:
        assert again.info(name).dtype == base.info(name).dtype
        assert again.read(name).tobytes() == base.read(name).tobytes(), name
    assert again.raw_config == base.raw_config
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base.path / name).read_bytes()
    assert files(tmp_path / "out") == files(base.path) | {"recipe.json": (tmp_path / "out/recipe.json").read_bytes()}


def test_shorter_layers_are_filled_with_experts_no_router_chooses(base, ranking, tmp_path):
    view = View(base, ranking=ranking, experts_kept=KEPT)
    written = write_student(view, tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    inventory.check(found)
    assert found.config == TINY
    assert (written.experts, written.empty_experts, written.drafts) == (8, 12, "kept")
    for name in view.names:
        if not re.search(r"ffn\.gate\.(weight|bias)", name):
            assert found.read(name).tobytes() == view.read(name).tobytes(), name
    for layer in range(3, 7):
        gate = f"layers.{layer}.ffn.gate"
        assert np.array_equal(found.read(f"{gate}.weight")[:CUT], view.read(f"{gate}.weight"))
        assert np.array_equal(found.read(f"{gate}.bias")[:CUT], view.read(f"{gate}.bias"))
        assert not found.read(f"{gate}.weight")[CUT:].any()
        assert (found.read(f"{gate}.bias")[CUT:] == NEVER).all()
        for expert in range(CUT, WHOLE):
            for part in ("w1.weight", "w2.scale", "w3.weight"):
                assert not found.read(f"layers.{layer}.ffn.experts.{expert}.{part}").any()


def test_empty_experts_take_no_disk(tmp_path):
    write_sample(tmp_path / "source", "tiny", experts=64)
    view = View(Checkpoint.open(tmp_path / "source"), experts_kept=(64,) * 3 + (4,) * 4)
    written = write_student(view, tmp_path / "out")
    paths = list((tmp_path / "out").glob("*.safetensors"))
    apparent, real = sum(p.stat().st_size for p in paths), sum(p.stat().st_blocks * 512 for p in paths)
    assert written.size_bytes - written.disk_bytes == 4 * 60 * 13_056  # six tensors of an expert, unpadded
    headers = apparent - written.size_bytes
    assert 0 < headers < 1 << 20
    assert real <= written.disk_bytes + headers + 64 * 4096 * len(paths)
    assert real < apparent - (2 << 20)


def test_all_layers_cut_give_fewer_experts_and_no_drafts(tmp_path, capsys):
    for draft in ("mtp", "dspark"):
        write_sample(tmp_path / draft, "tiny", draft=draft)
        base = Checkpoint.open(tmp_path / draft)
        view = View(base, experts_kept=(CUT,) * 7)
        tables = [(f"layers.{layer}.ffn.gate.tid2eid", "I64", base.read(f"layers.{layer}.ffn.gate.tid2eid") % CUT)
                  for layer in range(3)]  # fmt: skip
        view = overlaid(view, tmp_path / f"{draft}-hash", tables)
        written = write_student(view, tmp_path / f"{draft}-out")
        found = Checkpoint.open(tmp_path / f"{draft}-out")
        inventory.check(found)
        assert found.config.n_routed_experts == CUT
        assert (written.empty_experts, written.drafts, inventory.draft_of(found)) == (0, "dropped", (0, None))
        assert found.raw_config["num_nextn_predict_layers"] == 0
        assert len(found.raw_config["compress_ratios"]) == 7
        assert not [key for key in found.raw_config if key.startswith("dspark")]
        assert np.array_equal(found.read("layers.0.ffn.gate.tid2eid"), tables[0][2])


def test_dspark_stages_are_kept_with_their_experts(tmp_path):
    write_sample(tmp_path / "source", "tiny", draft="dspark")
    base = Checkpoint.open(tmp_path / "source")
    written = write_student(View(base, experts_kept=KEPT), tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    assert written.drafts == "kept"
    assert inventory.draft_of(found) == (0, inventory.DSpark())
    assert found.raw_config == base.raw_config
    for name in ("mtp.0.main_proj.weight", "mtp.2.markov_head.markov_w1.weight", "mtp.1.ffn.experts.7.w2.weight"):
        assert found.read(name).tobytes() == base.read(name).tobytes()


def test_fp4_linears_and_an_fp8_head_keep_their_values(base, ranking, tmp_path):
    view = View(base, ranking=ranking, experts_kept=KEPT)
    view = overlaid(view, tmp_path / "d4", [*random_fp4_linears(view), *fp8_head(view)])
    write_student(view, tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    inventory.check(found)
    names = [f"{name}.weight" for name in (*linear_names(view), "head")]
    assert len(names) == 7 * 8 + 2 + 1
    for name in names:
        assert view.info(name).dtype != found.info(name).dtype
        assert np.array_equal(found.float32(name), view.float32(name)), name


def test_a_damaged_overlay_is_refused_before_anything_is_written(base, tmp_path):
    view = overlaid(View(base), tmp_path / "d4", random_fp4_linears(View(base)))
    shard = next((tmp_path / "d4").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"safetensors: damaged \(SHA-256"):
        write_student(view, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_what_has_no_exact_official_form_is_named(base, tmp_path):
    view = View(base)
    far = overlaid(view, tmp_path / "far", random_fp4_linears(view, spread=40))
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.wq_a\.weight: FP4 scales of rows 0…"):
        write_student(far, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rotated = overlaid(view, tmp_path / "rotated", random_fp4_linears(view), {"layers.4.attn.wq_b": 32})
    with pytest.raises(UsageError, match=r"layers\.4\.attn\.wq_b\.weight is stored rotated \(block 32\)"):
        write_student(rotated, tmp_path / "other")
    assert not (tmp_path / "other.partial").exists()  # refused before anything was written
    bits = np.zeros((768, 128), np.float32)
    floats = overlaid(view, tmp_path / "floats", [("embed.weight", "F32", bits)])
    message = r"embed\.weight: found F32 \[768, 128\], an official checkpoint has BF16 \[768, 128\]"
    with pytest.raises(CheckpointError, match=message):
        write_student(floats, tmp_path / "other")
    stray = overlaid(view, tmp_path / "stray", [("layers.0.attn.extra", "F32", bits)])
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.extra has no place"):
        write_student(stray, tmp_path / "other")


def test_stopped_at_any_shard_it_goes_on_to_the_same_bytes(base, ranking, tmp_path, monkeypatch):
    view = View(base, ranking=ranking, experts_kept=KEPT)
    write_student(view, tmp_path / "whole")
    written = []

    def stop_after_two(path, entries, source):
        if len(written) % 3 == 2:
            written.append("stopped")
            path.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, entries, source)

    real = student._write
    monkeypatch.setattr(student, "_write", stop_after_two)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            write_student(view, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    write_student(view, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    shards = [name for name in written if name != "stopped"]
    assert len(shards) == len(set(shards)) == 10  # embed, 7 layers, head, MTP: each written once


def test_what_a_kill_leaves_is_overwritten(base, tmp_path):
    view = View(base)
    write_student(view, tmp_path / "whole")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    for name in ("recipe.json", "model-00001-of-00010.safetensors", "config.json"):
        shutil.copy(tmp_path / "whole" / name, partial / name)
    for name in ("model-00002-of-00010.safetensors.partial", "recipe.json.partial"):
        (partial / name).write_bytes(b"torn")
    write_student(view, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_view_does_not_go_on_where_one_stopped(base, tmp_path, monkeypatch):
    def fail(path, entries, source):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(student, "_write", fail)
    with pytest.raises(SpaceError, match="no space left; free some"):
        write_student(View(base), tmp_path / "out")
    with pytest.raises(UsageError, match=r"out\.partial was made by another recipe \(view_sha256"):
        write_student(View(base, experts_kept=KEPT), tmp_path / "out")


def test_a_folder_in_use_and_a_full_disk(base, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    with pytest.raises(UsageError, match="used is not empty"):
        write_student(View(base), tmp_path / "used")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(SpaceError, match=r"needs 4,136,586 bytes more and 1,000,000 are free"):
        write_student(View(base), tmp_path / "out")


def test_recipe_is_the_view(base, tmp_path):
    view = View(base)
    write_student(view, tmp_path / "out")
    recipe = json.loads((tmp_path / "out/recipe.json").read_text())
    assert recipe == {"stage": "student", "format": 1, "view_sha256": view.recipe_sha256}
