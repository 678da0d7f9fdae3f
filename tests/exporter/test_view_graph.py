"""The graph of a view in onnxruntime: ranked but whole gives equal bits; cut and quantized agrees in every call."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_support import run_calls, run_function, store_view, view_engine
from view_support import cut_view, random_ranking, rotate_rows, short_checkpoint

from appliance.errors import CheckpointError
from exporter import codec
from exporter.blocks import moe as moe_block
from exporter.checkpoint import Checkpoint
from exporter.graph import build_graph, graph_tensors
from exporter.ops import linear, moe
from exporter.view import View
from runtime.engine import Engine

CALLS = {"prefill": [256, 44], "decode": [256, *([1] * 12)], "ragged": [5, 3, 16, 33, 2, 1, 7, 64, 29]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return short_checkpoint(tmp_path_factory.mktemp("short") / "checkpoint")


@pytest.fixture(scope="module")
def plain(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return view_engine(View(base), tmp_path_factory.mktemp("view") / "plain")


def logits(engine: Engine, calls: list[int]) -> np.ndarray:
    ids = np.random.default_rng(5).integers(0, engine.spec.config.vocab_size, sum(calls)).tolist()
    seq = engine.open()
    try:
        return run_calls(engine, seq, ids, calls)
    finally:
        engine.close(seq)


def test_ranked_and_whole_gives_the_same_bits_in_every_call(base: Checkpoint, plain: Engine, tmp_path: Path) -> None:
    ranked = view_engine(View(base, ranking=random_ranking(base)), tmp_path / "ranked")
    for name, calls in CALLS.items():
        assert np.abs(logits(ranked, calls) - logits(plain, calls)).max() == 0.0, name


def test_ranked_without_the_official_order_has_other_bits(
    base: Checkpoint, plain: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe_block, "is_reordered", lambda view, index: False)
    dropped = view_engine(View(base, ranking=random_ranking(base)), tmp_path / "dropped")
    error = np.abs(logits(dropped, CALLS["prefill"]) - logits(plain, CALLS["prefill"])).max()
    assert 0 < error < 1  # the same model, its sums in another order


def test_only_reordered_layers_carry_official_ids(base: Checkpoint, tmp_path: Path) -> None:
    ranking = random_ranking(base)
    orders = list(ranking.orders)
    orders[1] = tuple(range(len(orders[1])))
    view = View(base, ranking=dataclasses.replace(ranking, orders=tuple(orders)))
    graph = build_graph(view, "kv-v4", store_view(view, tmp_path)).graph
    found = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith(".official")}
    assert set(found) == {f"layers.{i}.ffn.official" for i in (0, 2)}
    assert all(array.tolist() == list(orders[int(name.split(".")[1])]) for name, array in found.items())


def test_cut_maps_the_first_records_of_whole_objects(base: Checkpoint, tmp_path: Path) -> None:
    view = View(base, ranking=random_ranking(base), experts_kept=[8, 6, 5])
    whole = store_view(View(base, ranking=view.ranking), tmp_path)
    graph = build_graph(view, "kv-v4", whole).graph
    cut = {t.name: t for t in graph.initializer}
    assert [cut[f"layers.{i}.ffn.experts"].dims[0] for i in range(3)] == [8, 6, 5]
    assert [cut[f"layers.{i}.ffn.gate.weight"].dims[0] for i in range(3)] == [8, 6, 5]
    for layer in (1, 2):
        name = f"layers.{layer}.ffn.experts"
        place = {entry.key: entry.value for entry in cut[name].external_data}
        assert (place["location"], int(place["offset"])) == (whole[name].location, 0)
        assert int(place["length"]) == cut[name].dims[0] * cut[name].dims[1] < whole[name].size_bytes
        kept = onnx.numpy_helper.to_array(cut[f"layers.{layer}.ffn.n_kept"])
        assert int(kept) == view.experts_kept[layer]
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn.*: 6 rows are stored"):
        build_graph(View(base, ranking=view.ranking), "kv-v4", whole | store_view(view, tmp_path))


def test_cut_and_quantized_gives_equal_bits_in_any_calls(base: Checkpoint, tmp_path: Path) -> None:
    view = cut_view(base, 5, tmp_path / "overlay")
    assert "head.scale" in graph_tensors(view)
    engine = view_engine(view, tmp_path / "bundle")
    whole = logits(engine, [256, 256, 88])
    for calls in ([256, *([1] * 40)], [200, 5, 3, 16, 32, 256, 88], [16] * 16):
        ids = np.random.default_rng(5).integers(0, engine.spec.config.vocab_size, 600).tolist()
        seq = engine.open()
        other = run_calls(engine, seq, ids, calls)
        engine.close(seq)
        assert np.array_equal(whole[: len(other)], other)


@pytest.mark.parametrize("rotate", [0, 32, 64, 128])
def test_fp4_linear_is_the_product_with_the_rotated_input(rotate: int) -> None:
    rng = np.random.default_rng(6)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 256), (96, 256)))
    codes, scales = codec.fp4_quantize(rotate_rows(weight, rotate) if rotate else weight)
    (y,) = run_function(linear.fp4_matmul(96, 256, rotate=rotate), x=x, codes=codes, scales=scales)
    turned = rotate_rows(x, rotate) if rotate else x
    exact = turned.astype(np.float64) @ codec.fp4_dequantize(codes, scales).astype(np.float64).T
    assert np.abs(y - exact).max() <= 1e-5 * np.abs(exact).max()
    assert np.corrcoef(y.ravel(), (x @ weight.T).ravel())[0, 1] > 0.98  # H·Hᵀ = 1: it is still x·Wᵀ, in FP4


@pytest.mark.parametrize("rotate", [0, 64])
@pytest.mark.parametrize("groups", [1, 3])
def test_grouped_fp4_linear_meets_its_own_rows(groups: int, rotate: int) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((5, groups, 128)).astype(np.float32)
    codes, scales = codec.fp4_quantize(rng.standard_normal((groups * 32, 128)).astype(np.float32))
    (y,) = run_function(linear.fp4_grouped_matmul(groups, 32, 128, rotate=rotate), x=x, codes=codes, scales=scales)
    weight = codec.fp4_dequantize(codes, scales).astype(np.float64)
    for group in range(groups):
        turned = rotate_rows(x[:, group], rotate) if rotate else x[:, group]
        exact = turned.astype(np.float64) @ weight[32 * group : 32 * group + 32].T
        assert np.abs(y[:, 32 * group : 32 * group + 32] - exact).max() <= 1e-5 * np.abs(exact).max()


OFFICIAL = np.array([1, 3, 0, 2], np.int64)  # of ranks 0 … 3


def test_ranked_router_breaks_ties_by_the_official_id() -> None:
    """Four equal experts: official ids 0 and 1 are chosen, which ranks 2 and 0 hold; they come in that order."""
    x, gate = np.ones((3, 32), np.float32), np.zeros((4, 32), np.float32)
    ids, weights = run_function(
        moe.gating_topk(2, 1.5, ranked=True), x=x, gate=gate, bias=np.zeros(4, np.float32),
        n_kept=np.array(4, np.int64), official=OFFICIAL,
    )  # fmt: skip
    assert ids.tolist() == [[2, 0]] * 3
    assert np.allclose(weights, 0.75)


def test_ranked_hash_router_gives_ids_by_official_id_and_each_its_own_weight() -> None:
    rng = np.random.default_rng(8)
    x, gate = rng.standard_normal((5, 32)).astype(np.float32), rng.standard_normal((4, 32)).astype(np.float32)
    table = np.array([[0, 1], [1, 2], [3, 2]], np.int64)
    ids, weights = run_function(
        moe.gating_topk_hash(2, 1.5, ranked=True), x=x, gate=gate, tid2eid=table,
        input_ids=np.array([0, 1, 2, 0, 1]), official=OFFICIAL,
    )  # fmt: skip
    assert ids.tolist() == [[0, 1], [2, 1], [2, 3], [0, 1], [2, 1]]
    score = np.sqrt(np.logaddexp(0, x.astype(np.float64) @ gate.T))
    chosen = np.take_along_axis(score, ids, axis=1)
    assert np.abs(weights - chosen / chosen.sum(-1, keepdims=True) * 1.5).max() < 1e-6
