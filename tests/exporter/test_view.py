"""The view: rank order, cut and overlays over a checkpoint; with none of them it is the checkpoint, byte for byte."""

import json
from pathlib import Path

import numpy as np
import pytest

from appliance.errors import CheckpointError, UsageError
from exporter.checkpoint import Checkpoint
from exporter.overlay import Overlay, OverlayWriter
from exporter.ranking import Ranking
from exporter.view import View

LEARNED = 4  # a layer with a learned router in the tiny preset; layer 0 is routed by token id


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return Checkpoint.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def ranking(base):
    rng = np.random.Generator(np.random.PCG64(3))
    layers, experts = base.config.num_hidden_layers, base.config.n_routed_experts
    orders = tuple(tuple(map(int, rng.permutation(experts))) for _ in range(layers))
    return Ranking(base.source_sha256, "random", orders)


def kept(base, count):
    config = base.config
    return [config.n_routed_experts] * config.num_hash_layers + [count] * (
        config.num_hidden_layers - config.num_hash_layers
    )


def test_plain_view_reads_the_checkpoint_byte_for_byte(base):
    view = View(base)
    assert view.names == base.names
    for name in base.names:
        assert view.info(name) == base.info(name)
        assert view.read(name).tobytes() == b"".join(view.stream(name)) == base.read(name).tobytes()


def test_ranked_view_renames_experts_and_moves_router_rows_with_them(base, ranking):
    view, order = View(base, ranking=ranking), ranking.orders[LEARNED]
    name = f"layers.{LEARNED}.ffn"
    for rank, expert in enumerate(order):
        for part in ("w1.weight", "w2.scale"):
            ranked, official = f"{name}.experts.{rank}.{part}", f"{name}.experts.{expert}.{part}"
            assert np.array_equal(view.read(ranked), base.read(official))
    assert np.array_equal(view.read(f"{name}.gate.weight"), base.read(f"{name}.gate.weight")[list(order)])
    assert np.array_equal(view.read(f"{name}.gate.bias"), base.read(f"{name}.gate.bias")[list(order)])
    ids = view.read("layers.0.ffn.gate.tid2eid")
    assert np.array_equal(np.array(ranking.orders[0])[ids], base.read("layers.0.ffn.gate.tid2eid"))


def test_cut_view_drops_the_last_ranks(base, ranking):
    view = View(base, ranking=ranking, experts_kept=kept(base, 5))
    name = f"layers.{LEARNED}.ffn"
    assert view.has(f"{name}.experts.4.w1.weight")
    assert not view.has(f"{name}.experts.5.w1.weight")
    info, gate = view.info(f"{name}.gate.weight"), view.read(f"{name}.gate.weight")
    assert info.shape == (5, base.config.hidden_size) == gate.shape
    assert b"".join(view.stream(f"{name}.gate.weight")) == gate.tobytes()
    assert info.size_bytes == gate.nbytes
    assert len(view.names) == len(base.names) - 6 * (base.config.n_routed_experts - 5) * (
        base.config.num_hidden_layers - base.config.num_hash_layers
    )
    with pytest.raises(CheckpointError, match="experts kept"):
        view.info(f"{name}.experts.5.w1.weight")


def test_cut_hash_layer_is_refused_until_its_table_is_rewritten(base, ranking, tmp_path):
    counts = [5] * base.config.num_hidden_layers
    view = View(base, ranking=ranking, experts_kept=counts)
    with pytest.raises(CheckpointError, match="tid2eid: some tokens"):
        view.read("layers.0.ffn.gate.tid2eid")
    table = np.zeros(base.info("layers.0.ffn.gate.tid2eid").shape, np.int64)
    writer = OverlayWriter(tmp_path / "hash", "hash", view.recipe_sha256, {"rule": "test"})
    writer.add("layer_000", [("layers.0.ffn.gate.tid2eid", "I64", table)])
    assert not view.over(writer.finish()).read("layers.0.ffn.gate.tid2eid").any()


def test_overlay_replaces_tensors_and_is_bound_to_what_it_was_made_for(base, ranking, tmp_path):
    view = View(base, ranking=ranking)
    name = f"layers.{LEARNED}.ffn.gate.bias"
    bias = np.arange(base.config.n_routed_experts, dtype=np.float32)
    writer = OverlayWriter(tmp_path / "heal", "heal", view.recipe_sha256, {"steps": 3})
    writer.add("layer_004", [(name, "F32", bias)])
    overlay = writer.finish(rotated={"layers.0.attn.wq_b": 64})
    assert Overlay.open(tmp_path / "heal").sha256 == overlay.sha256
    over = view.over(overlay)
    assert np.array_equal(over.float32(name), bias)
    assert over.touched(name)
    assert not view.touched(name)
    assert over.rotation("layers.0.attn.wq_b") == 0  # rotated says nothing about a tensor the overlay does not hold
    assert over.recipe_sha256 != view.recipe_sha256
    with pytest.raises(UsageError, match="another model"):
        View(base, overlays=[overlay])
    with pytest.raises(UsageError, match="steps"):
        OverlayWriter(tmp_path / "heal", "heal", view.recipe_sha256, {"steps": 4})
    assert OverlayWriter(tmp_path / "heal", "heal", view.recipe_sha256, {"steps": 3}).has("layer_004")


def test_wrong_ranking_and_wrong_cut_are_refused(base, ranking, tmp_path):
    other = Ranking("0" * 64, ranking.score, ranking.orders)
    with pytest.raises(UsageError, match="another checkpoint"):
        View(base, ranking=other)
    with pytest.raises(UsageError, match="layer 0 keeps 1"):
        View(base, experts_kept=[1] * base.config.num_hidden_layers)
    path = tmp_path / "ranking.json"
    ranking.write(path)
    assert Ranking.read(path) == ranking
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="format 2"):
        Ranking.read(path)


def test_overlay_with_a_missing_shard_is_named(base, tmp_path):
    writer = OverlayWriter(tmp_path / "o", "heal", View(base).recipe_sha256, {})
    writer.add("layer_004", [("norm.weight", "BF16", np.zeros(base.config.hidden_size, np.uint16))])
    writer.finish()
    Path(tmp_path / "o" / "layer_004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"layer_004\.safetensors: missing"):
        Overlay.open(tmp_path / "o")


@pytest.mark.parametrize(
    ("field", "value"),
    [("stage", None), ("base_sha256", 7), ("recipe", [1]), ("files", ["layer_004"]), ("files", [{"size_bytes": 3}]),
     ("files", [{"name": "layer_004.safetensors", "size_bytes": 3, "sha256": None}]), ("files", {}),
     ("rotated", [1]), ("rotated", {"head": "x"}), ("rotated", {"head": 7}), ("format", 2)],
)  # fmt: skip
def test_overlay_json_that_nobody_wrote_is_refused_by_field(base, tmp_path, field, value):
    OverlayWriter(tmp_path / "o", "heal", View(base).recipe_sha256, {}).finish()
    listing = tmp_path / "o" / "overlay.json"
    listing.write_text(json.dumps(json.loads(listing.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=rf"overlay\.json: {field}"):
        Overlay.open(tmp_path / "o")


def test_a_flipped_byte_of_an_overlay_is_named(base, tmp_path):
    writer = OverlayWriter(tmp_path / "o", "heal", View(base).recipe_sha256, {})
    writer.add("layer_004", [("norm.weight", "BF16", np.zeros(base.config.hidden_size, np.uint16))])
    overlay, shard = writer.finish(), tmp_path / "o" / "layer_004.safetensors"
    overlay.check_bytes()
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=r"layer_004\.safetensors: damaged \(SHA-256"):
        Overlay.open(tmp_path / "o").check_bytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [("source_sha256", None), ("score", 3), ("stats_sha256", []), ("layers", [["0", "1"]]), ("layers", [[1, 2]])],
)
def test_a_ranking_that_nobody_wrote_is_refused_by_field(ranking, tmp_path, field, value):
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps(ranking.to_dict() | {field: value}))
    with pytest.raises(CheckpointError, match=rf"ranking\.json: {field}"):
        Ranking.read(path)
