"""An exact tail at any n: found, and its logits and 64 further tokens have the bits of the run that was suspended."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from kv_restore_support import EDGES, STEPS, TENANT, dirty, go_on, open_store, prompt_of, run_cold

from appliance.errors import EngineError, StoreError
from runtime.engine import Engine
from runtime.kv.tail import TailPart, tail_parts

QUICK = (1, 130, 255, 256, 385)


def check_tail(engine: Engine, folder: Path, n: int, steps: int = STEPS) -> None:
    """Suspended after n tokens and stored; then any longer prompt resumes at n without computing one of them."""
    ids = prompt_of(engine, n)
    cold = run_cold(engine, ids, steps)
    store = open_store(folder, engine)
    try:
        assert store.put(cold.job(ids, tail=True)).stored
        without = store.lookup(TENANT, [*ids, 7], lambda index, payload: None)
        assert without.tokens == 0  # a tail is only given where it was asked for, and there is no checkpoint
        seq = engine.open()
        hit = store.lookup(TENANT, [*ids, 7], functools.partial(engine.import_block, seq), tails=True)
    finally:
        store.close()
    assert (hit.tokens, hit.blocks, hit.checkpoint, hit.replay, hit.reason) == (n, n // 256, None, False, "")
    assert hit.tail == cold.tail
    logits = engine.resume(seq, hit.tokens, tail=hit.tail, blocks=hit.blocks)
    warm = go_on(engine, seq, logits, steps)
    again = {i: engine.export_block(seq, i) for i in range(n // 256)}
    engine.close(seq)
    dirty(engine)
    assert again == cold.blocks
    assert np.array_equal(cold.rows.view(np.uint32), warm.view(np.uint32))


@pytest.mark.parametrize("n", QUICK)
def test_mini_goes_on_as_if_never_suspended(n: int, mini_engine: Engine, tmp_path: Path) -> None:
    check_tail(mini_engine, tmp_path / "kv", n)


def test_the_real_cache_geometry_goes_on_as_if_never_suspended(shallow_engine: Engine, tmp_path: Path) -> None:
    check_tail(shallow_engine, tmp_path / "kv", 383)


@pytest.mark.slow
@pytest.mark.parametrize("n", [*(n for n in EDGES if n not in QUICK), 1000, 4095, 4096, 4097])
def test_mini_goes_on_at_every_edge(n: int, mini_engine: Engine, tmp_path: Path) -> None:
    check_tail(mini_engine, tmp_path / "kv", n)


@pytest.mark.slow
@pytest.mark.parametrize("n", EDGES)
def test_the_real_cache_geometry_goes_on_at_every_edge(n: int, shallow_engine: Engine, tmp_path: Path) -> None:
    check_tail(shallow_engine, tmp_path / "kv", n)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 130, 255, 383, 513])
def test_kv_true_goes_on_as_if_never_suspended(n: int, true_engine: Engine, tmp_path: Path) -> None:
    check_tail(true_engine, tmp_path / "kv", n, steps=64 if n == 255 else 8)


def test_a_resumed_sequence_is_suspended_with_the_same_bytes(mini_engine: Engine) -> None:
    """Tail → resume → the checkpoints that follow, and the next tail, are those of the uninterrupted run."""
    ids = prompt_of(mini_engine, 300)
    cold = run_cold(mini_engine, ids, 0)
    longer = run_cold(mini_engine, ids[:256], 0)

    def extend(seq: object) -> tuple:
        logits = mini_engine.prefill(seq, ids[256:300])
        return mini_engine.export_tail(seq, logits), seq.checkpoint

    seq = mini_engine.open()
    mini_engine.import_block(seq, 0, cold.blocks[0])
    mini_engine.resume(seq, 256, tail=longer.tail, blocks=1)
    tail, checkpoint = extend(seq)
    mini_engine.close(seq)
    assert checkpoint == (256, cold.checkpoints[256])
    assert tail == cold.tail


def test_calls_that_do_not_fit_are_refused(mini_engine: Engine) -> None:
    engine = mini_engine
    cold = run_cold(engine, prompt_of(engine, 300), 0)
    seq = engine.open()
    with pytest.raises(EngineError, match="without tokens"):
        engine.export_tail(seq, cold.rows[0])
    with pytest.raises(EngineError, match="cannot be resumed"):
        engine.resume(seq, 300, tail=cold.tail, blocks=1)
    with pytest.raises(EngineError, match="block 1 cannot follow 0"):
        engine.import_block(seq, 1, cold.blocks[0])
    with pytest.raises(StoreError, match="bytes, the layout says"):
        engine.import_block(seq, 0, cold.blocks[0][:-1])
    engine.import_block(seq, 0, cold.blocks[0])
    for tokens, arguments in ((256, {}), (600, {}), (300, {"checkpoint": cold.checkpoints[256]})):
        with pytest.raises(EngineError, match="do not go with 1 blocks"):
            engine.resume(seq, tokens, **({"tail": cold.tail} if tokens == 600 else arguments), blocks=1)
    with pytest.raises(StoreError, match="tail of 301 tokens"):
        engine.resume(seq, 301, tail=cold.tail, blocks=1)
    engine.close(seq)


# -- every stored value counts ---------------------------------------------------------------------------------------

AT = 303  # CSA: three rows of the open group; HCA of 16: fifteen; eleven CSA and two HCA entries of the open block


def part_of(engine: Engine, kind: str, layer_kind: str, which: int) -> TailPart:
    states = {s.name: s for s in engine.spec.states}
    wanted = [
        part for part in tail_parts(engine.layout, AT)
        if states[part.state_name].kind == kind
        and engine.spec.config.layer_kind(states[part.state_name].layer) == layer_kind
    ]  # fmt: skip
    return wanted[which]


def change_cell(engine: Engine, tail: bytearray, kind: str, layer_kind: str, which: int) -> None:
    """The last row's first nonzero code changes its sign, or its first float grows by one."""
    part = part_of(engine, kind, layer_kind, which)
    start = part.offset + (part.shape[0] - 1) * (part.size_bytes // part.shape[0])
    if part.dtype == "u8":
        at = next(i for i in range(start, start + 64) if tail[i] & 0x7F)
        tail[at] ^= 0x80
    else:
        np.frombuffer(tail, np.float32, 1, start)[:] += 1.0


CHANGES = {
    "window": ("win", "S", 0),
    "CSA carry": ("ring", "C", 0),
    "CSA open group": ("ring", "C", 1),
    "HCA open group": ("ring", "H", 0),
    "CSA entry": ("ent", "C", 0),
    "HCA entry": ("ent", "H", 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_value_of_a_tail_changes_the_logits(change: str, mini_engine: Engine) -> None:
    ids = prompt_of(mini_engine, AT + 20)
    cold = run_cold(mini_engine, ids[:AT], 0)

    def logits(tail: bytes | bytearray) -> np.ndarray:
        dirty(mini_engine)
        seq = mini_engine.open()
        mini_engine.import_block(seq, 0, cold.blocks[0])
        mini_engine.resume(seq, AT, tail=tail, blocks=1)
        rows = mini_engine.forward(seq, ids[AT:], rows=range(20))
        mini_engine.close(seq)
        return rows

    before, tail = logits(cold.tail), bytearray(cold.tail)
    assert np.array_equal(before, logits(tail))
    change_cell(mini_engine, tail, *CHANGES[change])
    assert np.abs(before - logits(tail)).max() > 0.0
