"""The bytes of a block and of a checkpoint, against the arithmetic of V4-Flash's cache and cell by cell."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from kv_support import REAL, TINY, make_pools, make_spec

from appliance.errors import BundleError, EngineError, StoreError
from runtime.kv.layout import (
    KvLayout,
    gather_block,
    gather_checkpoint,
    reset_slot,
    scatter_block,
    scatter_checkpoint,
)


def test_real_model_bytes():
    layout = KvLayout.from_spec(make_spec(REAL))
    assert layout.block_bytes == 21 * 64 * (584 + 68) + 20 * 2 * 584 == 899_648
    assert layout.block_bytes / 256 == 3514.25
    assert layout.checkpoint_bytes == 43 * 128 * 584 + 21 * 4 * (2 * 512 + 2 * 128) * 4 == 3_644_416
    assert [p.state_name for p in layout.block_parts[:4]] == [
        "layers.2.ent", "layers.2.ient", "layers.3.ent", "layers.4.ent"]  # fmt: skip
    assert [p.state_name for p in layout.checkpoint_parts[:6]] == [
        "layers.0.win", "layers.1.win", "layers.2.win", "layers.2.ring", "layers.2.iring", "layers.3.win"]  # fmt: skip
    ring = layout.checkpoint_parts[3]
    assert (ring.rows, ring.columns, ring.shape) == ((4, 8), ((0, 512), (1024, 1536)), (4, 1024))
    iring = layout.checkpoint_parts[4]
    assert (iring.rows, iring.columns, iring.shape) == ((4, 8), ((0, 128), (256, 384)), (4, 256))


@pytest.mark.parametrize("numerics", ["kv-v4", "kv-f32"])
def test_parts_tile_the_payload(numerics):
    layout = KvLayout.from_spec(make_spec(TINY, numerics))
    for parts, total in ((layout.block_parts, layout.block_bytes), (layout.checkpoint_parts, layout.checkpoint_bytes)):
        end = 0
        for part in parts:
            assert part.offset == end
            end += part.size_bytes
        assert end == total > 0


@pytest.mark.parametrize("numerics", ["kv-v4", "kv-f32"])
def test_block_round_trip_touches_its_page_only(numerics):
    spec = make_spec(TINY, numerics)
    layout = KvLayout.from_spec(spec)
    source, target = make_pools(spec, seed=1), make_pools(spec)
    payload = gather_block(source, layout, 2)
    scatter_block(target, layout, 3, payload)
    for state in spec.states:
        assert not target[state.name][:3].any()
        if state.paged:
            assert target[state.name][3].tobytes() == source[state.name][2].tobytes()
        else:
            assert not target[state.name].any()
    assert gather_block(target, layout, 3) == payload


def test_block_payload_is_layer_by_layer_ent_then_ient():
    spec = make_spec(TINY)
    pools = make_pools(spec, seed=5)
    names = ["layers.1.ent", "layers.1.ient", "layers.2.ent", "layers.3.ent", "layers.3.ient", "layers.4.ent"]
    expected = b"".join(pools[name][1].tobytes() for name in names)
    assert gather_block(pools, KvLayout.from_spec(spec), 1) == expected


def test_checkpoint_round_trip_cell_by_cell():
    spec = make_spec(TINY)
    layout = KvLayout.from_spec(spec)
    source, target = make_pools(spec, seed=2), make_pools(spec, seed=3)
    before = {name: pool.copy() for name, pool in target.items()}
    scatter_checkpoint(target, layout, 1, gather_checkpoint(source, layout, 2))
    for state in spec.states:
        got, want = target[state.name], before[state.name].copy()
        if state.kind == "win":
            want[1] = source[state.name][2]
        elif not state.paged:
            want[1, :, : state.width // 2], want[1, :, state.width // 2 :] = 0, -np.inf
            if spec.config.layer_kind(state.layer) == "C":
                d = state.width // 4
                for columns in (slice(0, d), slice(2 * d, 3 * d)):
                    want[1, 4:8, columns] = source[state.name][2, 4:8, columns]
        assert got.tobytes() == want.tobytes(), state.name


def test_special_floats_survive():
    spec = make_spec(TINY)
    layout = KvLayout.from_spec(spec)
    source, target = make_pools(spec, seed=2), make_pools(spec)
    bits = np.array([0x80000000, 0xFF800000, 0x00000001, 0x7FC12345], np.uint32)  # -0, -inf, subnormal, a NaN
    source["layers.1.ring"][1, 4, :4] = bits.view(np.float32)
    scatter_checkpoint(target, layout, 2, gather_checkpoint(source, layout, 1))
    assert target["layers.1.ring"][2, 4, :4].tobytes() == bits.tobytes()


def test_reset_slot_leaves_a_used_slot_like_a_fresh_one():
    spec = make_spec(TINY)
    used, fresh = make_pools(spec, seed=4), make_pools(spec)
    neighbour = used["layers.1.ring"][2].copy()
    reset_slot(used, spec, 1)
    reset_slot(fresh, spec, 1)
    for state in spec.states:
        if not state.paged:
            assert used[state.name][1].tobytes() == fresh[state.name][1].tobytes()
    ring = used["layers.2.ring"][1]
    assert not ring[:, :128].any()
    assert np.isneginf(ring[:, 128:]).all()
    assert used["layers.1.ring"][2].tobytes() == neighbour.tobytes()


def test_wrong_payload_or_pool_writes_nothing():
    spec = make_spec(TINY)
    layout = KvLayout.from_spec(spec)
    pools = make_pools(spec, seed=6)
    before = {name: pool.tobytes() for name, pool in pools.items()}
    payload = gather_checkpoint(make_pools(spec, seed=7), layout, 1)
    with pytest.raises(StoreError, match="bytes, the layout says"):
        scatter_checkpoint(pools, layout, 1, payload[:-1])
    with pytest.raises(EngineError, match="reserved"):
        scatter_checkpoint(pools, layout, 0, payload)
    with pytest.raises(EngineError, match=r"no u8 \[16, 200\] at 9"):
        scatter_checkpoint(pools, layout, 9, payload)
    wrong = {**pools, "layers.4.win": pools["layers.4.win"].astype(np.float32)}
    with pytest.raises(EngineError, match=r"layers\.4\.win"):
        scatter_checkpoint(wrong, layout, 1, payload)
    assert {name: pool.tobytes() for name, pool in pools.items()} == before


def test_layout_id_names_the_byte_order():
    ids = {
        KvLayout.from_spec(make_spec(config, numerics)).layout_id
        for config in (TINY, REAL, dataclasses.replace(TINY, sliding_window=32))
        for numerics in ("kv-v4", "kv-f32")
    }
    assert len(ids) == 6
    assert KvLayout.from_spec(make_spec(TINY)).layout_id == KvLayout.from_spec(make_spec(TINY)).layout_id


def test_shapes_that_cannot_be_cached_are_refused():
    spec = make_spec(TINY)
    with pytest.raises(BundleError, match="not a multiple of the 48 rows"):
        KvLayout.from_spec(make_spec(dataclasses.replace(TINY, sliding_window=48)))
    with pytest.raises(BundleError, match="64 rows of 96 tokens"):
        KvLayout.from_spec(dataclasses.replace(spec, states=(dataclasses.replace(spec.states[3], ratio=96),)))
