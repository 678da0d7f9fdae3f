"""The bytes of an exact tail: sizes by hand, cells one by one against what a later token can still read."""

from __future__ import annotations

import numpy as np
import pytest
from kv_support import REAL, TINY, make_pools, make_spec

from appliance.errors import EngineError, StoreError
from runtime.kv.layout import KvLayout, gather_checkpoint
from runtime.kv.tail import gather_tail, scatter_tail, tail_bytes

LENGTHS = (1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 127, 128, 129, 130, 255, 256, 257, 383, 384, 385, 511, 512, 513, 4097)
SLOT, OPEN_BLOCK = 2, 3


def real_bytes(n: int) -> int:
    """V4-Flash: 584-byte rows, 68-byte index keys, CSA rings 2 × 1,024 and 2 × 256 floats wide, HCA rings 1,024."""
    windows = 43 * min(n, 128) * 584
    carry = 21 * 4 * (1024 + 256) * 4 if n >= 4 else 0
    partial = 21 * (n % 4) * (2048 + 512) * 4 + 20 * (n % 128) * 1024 * 4
    entries = 21 * (n % 256 // 4) * (584 + 68) + 20 * (n % 256 // 128) * 584
    return windows + carry + partial + entries + 129280 * 4


@pytest.mark.parametrize("n", LENGTHS)
def test_real_model_bytes(n):
    assert tail_bytes(KvLayout.from_spec(make_spec(REAL)), n) == real_bytes(n)


def test_real_model_at_a_boundary_is_a_checkpoint_and_logits():
    layout = KvLayout.from_spec(make_spec(REAL))
    assert tail_bytes(layout, 512) == layout.checkpoint_bytes + 4 * 129280
    assert max(tail_bytes(layout, n) for n in range(1, 2049)) == real_bytes(255) == 16_084_772


def live_cells(state, config, n):
    """Bool [rows, width] of the cells that tokens n, n+1, … can read, straight from the graph's definition."""
    ratio = config.compress_ratios[state.layer]
    live = np.zeros((state.rows, state.width), bool)
    for token in range(n):
        at = live[token % state.rows]
        if state.kind == "win":
            at[:] |= token >= n - state.rows
        elif state.paged:
            entry = token // ratio  # closed by its last token, in the block of 256 tokens that is open
            if entry < n // ratio and entry * ratio // 256 == n // 256:
                live[entry % state.rows] = True
        elif token // ratio == n // ratio:
            at[:] = True  # of the group that is open
        elif config.layer_kind(state.layer) == "C" and token // ratio == n // ratio - 1:
            kv, gate = np.split(at, 2)  # views: each b after a
            kv[: len(kv) // 2] = gate[: len(gate) // 2] = True
    return live


@pytest.mark.parametrize("n", LENGTHS)
def test_what_a_later_token_reads_survives_and_the_rest_is_fresh(n):
    spec = make_spec(TINY)
    layout = KvLayout.from_spec(spec)
    source, target, fresh = make_pools(spec, seed=n), make_pools(spec, seed=n + 1), make_pools(spec)
    before = {name: pool.copy() for name, pool in target.items()}
    logits = np.random.default_rng(n).standard_normal(TINY.vocab_size).astype(np.float32)
    payload = gather_tail(source, layout, 1, 2, n, logits)
    assert scatter_tail(target, layout, SLOT, OPEN_BLOCK, n, payload).tobytes() == logits.tobytes()
    stored = 4 * TINY.vocab_size
    for state in spec.states:
        live = live_cells(state, TINY, n)
        stored += int(live.sum()) * (1 if state.dtype == "u8" else 4)
        want = before[state.name].copy()
        if state.paged:
            want[OPEN_BLOCK][live] = source[state.name][2][live]
        else:
            empty = fresh[state.name][1]
            if state.kind != "win":
                empty[:, state.width // 2 :] = -np.inf
            want[SLOT] = np.where(live, source[state.name][1], empty)
        assert target[state.name].tobytes() == want.tobytes(), state.name
    assert len(payload) == stored  # nothing twice, nothing dead


def test_byte_order_at_21_tokens():
    """Window 16: rows of tokens 5 … 20. CSA: a-halves of tokens 16–19, then token 20 whole, then its five entries."""
    spec = make_spec(TINY)
    pools = make_pools(spec, seed=8)
    logits = np.arange(TINY.vocab_size, dtype=np.float32)
    payload = gather_tail(pools, KvLayout.from_spec(spec), 1, 2, 21, logits)
    window = [token % 16 for token in range(5, 21)]
    ring, iring = pools["layers.1.ring"][1], pools["layers.1.iring"][1]
    pieces = [pools["layers.0.win"][1][window], pools["layers.1.win"][1][window]]
    for rows, d in ((ring, 128), (iring, 32)):
        own = [np.r_[rows[t % 8, :d], rows[t % 8, 2 * d : 3 * d]] for t in range(16, 20)]
        name = "ent" if rows is ring else "ient"
        pieces += [*own, rows[20 % 8], pools[f"layers.1.{name}"][2][:5]]
    expected = b"".join(piece.tobytes() for piece in pieces)
    assert payload[: len(expected)] == expected
    assert payload[-4 * TINY.vocab_size :] == logits.astype("<f4").tobytes()


def test_at_a_boundary_it_begins_like_the_checkpoint():
    spec = make_spec(TINY)
    layout = KvLayout.from_spec(spec)
    pools = make_pools(spec, seed=9)
    logits = np.zeros(TINY.vocab_size, np.float32)
    assert gather_tail(pools, layout, 1, 0, 512, logits) == gather_checkpoint(pools, layout, 1) + logits.tobytes()


def test_what_does_not_fit_is_refused_and_writes_nothing():
    spec = make_spec(TINY)
    layout = KvLayout.from_spec(spec)
    pools = make_pools(spec, seed=6)
    logits = np.zeros(TINY.vocab_size, np.float32)
    payload = gather_tail(pools, layout, 1, 2, 300, logits)
    before = {name: pool.tobytes() for name, pool in pools.items()}
    with pytest.raises(StoreError, match=r"tail of 300 tokens has \d+ bytes, the layout says"):
        scatter_tail(pools, layout, 1, 2, 300, payload[:-1])
    with pytest.raises(StoreError, match="tail of 301 tokens"):
        scatter_tail(pools, layout, 1, 2, 301, payload)
    for slot, block, message in ((0, 2, "reserved"), (1, 0, "reserved"), (9, 2, "at 9"), (1, 9, "at 9")):
        with pytest.raises(EngineError, match=message):
            scatter_tail(pools, layout, slot, block, 300, payload)
    with pytest.raises(EngineError, match="1 or more tokens"):
        tail_bytes(layout, 0)
    with pytest.raises(EngineError, match=r"logits f32 \[129280\]"):
        gather_tail(pools, layout, 1, 2, 300, logits.astype(np.float64))
    assert {name: pool.tobytes() for name, pool in pools.items()} == before
