"""Exact replay: blocks without a checkpoint. R tokens computed again are enough, bit for bit; 256 fewer are not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from kv_restore_support import (
    MINI,
    SHALLOW,
    TENANT,
    dirty,
    go_on,
    make_engine,
    open_store,
    prompt_of,
    run_cold,
    run_warm,
)

from appliance.errors import EngineError
from appliance.model import ModelConfig
from exporter.presets import KV_TRUE, TINY, V4_FLASH
from runtime.engine import Engine
from runtime.kv.replay import replay_tokens
from runtime.kv.store import PutJob
from runtime.schedule import prompt_calls

# -- the bound -------------------------------------------------------------------------------------------------------


def replay_is_exact(config: ModelConfig, chunks: int, chunk: int) -> bool:
    """Token by token, from what the graph reads: is a state exact that ``chunks`` chunks of replay lead to?

    Tokens count from the replay's start; those before it were never seen, so their rows are not exact.
    """
    count, window = chunks * chunk, config.sliding_window
    exact = np.ones(count, bool)  # rows that enter the layer
    for layer in range(config.num_hidden_layers):
        kind, ratio = config.layer_kind(layer), config.compress_ratios[layer]
        read = np.zeros(count, bool)
        for token in range(count):
            tokens = list(range(token - window + 1, token + 1))
            if kind != "S":
                start = token // chunk * chunk
                for entry in range(start // ratio, (token + 1) // ratio):  # this chunk's own candidates
                    tokens += range((entry - (kind == "C")) * ratio, (entry + 1) * ratio)
            read[token] = all(t >= 0 and exact[t] for t in tokens)
        needed = max(window, ratio if kind == "C" else 0)
        if not exact[count - needed :].all() or needed > count:
            return False  # this layer's window or carry at the end
        exact = exact & read
    return True


SMALL = dataclasses.replace(MINI, sliding_window=8)
BOUNDS = {  # name: (config, chunk)
    "mini": (MINI, 64),
    "tiny": (TINY, 64),
    "windows only": (dataclasses.replace(SMALL, num_hidden_layers=6, compress_ratios=(0,) * 6), 16),
    "CSA only": (dataclasses.replace(SMALL, num_hidden_layers=5, compress_ratios=(4,) * 5), 16),
    "HCA only": (dataclasses.replace(SMALL, num_hidden_layers=5, compress_ratios=(16,) * 5), 16),
    "HCA below CSA": (dataclasses.replace(SMALL, num_hidden_layers=4, compress_ratios=(16, 4, 16, 4)), 16),
    "window as long as a chunk": (dataclasses.replace(SMALL, sliding_window=16), 16),
    "one layer": (dataclasses.replace(SMALL, num_hidden_layers=1, compress_ratios=(4,)), 16),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bound_is_the_smallest_that_is_exact(name: str) -> None:
    config, chunk = BOUNDS[name]
    replay = replay_tokens(config, chunk)
    assert replay % chunk == 0
    exact = [replay_is_exact(config, chunks, chunk) for chunks in range(1, replay // chunk + 2)]
    assert exact == [False] * (replay // chunk - 1) + [True, True]


def test_the_real_model_replays_22_chunks() -> None:
    """43 layers: S, S, then 20 times C and H, then C. Two windows, and each C waits for the next chunk.

    Rows that enter layer 42 are exact 2·127, then 512 after the first C, 127 more after the first H; each further
    pair ends 256 later: 512 + 127 + 19·256 = 5,503. The window at the end needs 128 more: 5,631, in whole chunks 5,632.
    """
    assert 512 + 127 + 19 * 256 + 128 == 5631
    assert replay_tokens(V4_FLASH, 256) == replay_tokens(KV_TRUE, 256) == 5632
    assert replay_tokens(TINY, 256) == 768
    assert replay_tokens(MINI, 256) == replay_tokens(SHALLOW, 256) == 512


# -- on the engine ---------------------------------------------------------------------------------------------------


def check_replay(engine: Engine, folder: Path, reach: int, extra: int, steps: int = 16) -> None:
    """``reach`` blocks stored and no checkpoint: found as a replay, then everything from 256·reach on is equal."""
    end, replay = 256 * reach, engine.replay_tokens
    ids = prompt_of(engine, end + extra)
    cold = run_cold(engine, ids, steps)
    store = open_store(folder, engine)
    try:
        blocks = {i: cold.blocks[i] for i in range(reach)}
        assert store.put(PutJob(TENANT, ids, blocks)).stored
        warm, calls, hit = run_warm(engine, store, ids, steps, replay_tokens=replay)
    finally:
        store.close()
    assert (hit.tokens, hit.blocks, hit.checkpoint, hit.tail, hit.replay) == (end - replay, reach, None, None, True)
    assert calls == [256] * (replay // 256) + cold.calls[reach:]
    assert np.array_equal(cold.rows.view(np.uint32), warm.view(np.uint32))


@pytest.mark.parametrize(("reach", "extra"), [(3, 1), (5, 300)])
def test_mini_replays_exactly(reach: int, extra: int, mini_engine: Engine, tmp_path: Path) -> None:
    check_replay(mini_engine, tmp_path / "kv", reach, extra)


@pytest.mark.slow
@pytest.mark.parametrize(("reach", "extra"), [(3, 256), (4, 77), (7, 1), (8, 200), (16, 130), (31, 256)])
def test_mini_replays_exactly_at_more_reaches(reach: int, extra: int, mini_engine: Engine, tmp_path: Path) -> None:
    check_replay(mini_engine, tmp_path / "kv", reach, extra, steps=64)


@pytest.mark.slow
@pytest.mark.parametrize(("reach", "extra"), [(3, 1), (4, 200), (6, 256)])
def test_the_real_cache_geometry_replays_exactly(
    reach: int, extra: int, shallow_engine: Engine, tmp_path: Path
) -> None:  # fmt: skip
    check_replay(shallow_engine, tmp_path / "kv", reach, extra, steps=64)


@pytest.mark.slow
def test_nine_layers_of_the_real_geometry_replay_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """S, S, then C and H in turn, as in V4-Flash: R = 1,280; 256 tokens less are not enough here either."""
    layers = dataclasses.replace(KV_TRUE, num_hidden_layers=9, compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128, 4))
    engine = make_engine(layers, tmp_path / "model", 2048)
    assert engine.replay_tokens == 1280
    check_replay(engine, tmp_path / "kv", 6, 40)
    monkeypatch.setattr(engine, "_replay_tokens", 1024)
    with pytest.raises(AssertionError, match="view"):
        check_replay(engine, tmp_path / "short", 6, 40)


@pytest.mark.slow
def test_kv_true_replays_exactly(true_engine: Engine, tmp_path: Path) -> None:
    """All 43 layers: 5,632 tokens computed again below 23 blocks. Some minutes."""
    check_replay(true_engine, tmp_path / "kv", 23, 40, steps=8)


def replayed(engine: Engine, ids: list[int], blocks: dict[int, bytes], start: int) -> tuple:
    """Rows of all tokens from 256·blocks on, the checkpoint there, and the blocks as they are afterwards."""
    seq, rows, checkpoint = engine.open(), [], None
    for index, payload in blocks.items():
        engine.import_block(seq, index, payload)
    engine.resume(seq, start, blocks=len(blocks))
    for call in prompt_calls(ids, start):
        logits = engine.forward(seq, call, rows=range(len(call)))
        assert seq.checkpoint is None or seq.checkpoint[0] >= 256 * len(blocks)
        if seq.n_tokens == 256 * len(blocks):
            checkpoint = seq.checkpoint[1]
        if seq.n_tokens > 256 * len(blocks):
            rows.append(logits)
    rows.append(go_on(engine, seq, logits[-1], 4)[1:])
    after = {i: engine.export_block(seq, i) for i in range(len(ids) // 256)}
    engine.close(seq)
    dirty(engine)
    return np.concatenate(rows), checkpoint, after


def test_every_row_checkpoint_and_block_after_a_replay_is_exact_and_256_tokens_less_are_not_enough(
    mini_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, end = prompt_of(mini_engine, 1024 + 300), 1024
    cold = run_cold(mini_engine, ids, 0)
    blocks = {i: cold.blocks[i] for i in range(4)}
    whole, checkpoint, after = replayed(mini_engine, ids, blocks, 0)
    assert checkpoint == cold.checkpoints[end]
    assert after == cold.blocks
    for start, exact in ((512, True), (256, True), (768, False)):
        monkeypatch.setattr(mini_engine, "_replay_tokens", end - start)
        rows, state, kept = replayed(mini_engine, ids, blocks, start)
        assert {i: kept[i] for i in range(4)} == blocks  # stored entries stay, whatever the replay made of them
        assert (state == checkpoint) is exact
        assert np.array_equal(rows.view(np.uint32), whole.view(np.uint32)) is exact
        assert (kept == after) is exact


def test_a_replay_that_is_too_short_or_not_by_chunks_is_refused(mini_engine: Engine) -> None:
    engine = mini_engine
    cold = run_cold(engine, prompt_of(engine, 1024), 0)
    seq = engine.open()
    for index, payload in cold.blocks.items():
        engine.import_block(seq, index, payload)
    for start in (768, 500, 1024, 1280):
        with pytest.raises(EngineError, match="do not go with 4 blocks"):
            engine.resume(seq, start, blocks=4)
    engine.resume(seq, 512, blocks=4)
    with pytest.raises(EngineError, match="whole chunks of 256"):
        engine.prefill(seq, prompt_of(engine, 100))
    with pytest.raises(EngineError, match="in a replay"):
        engine.export_tail(seq, cold.rows[0])
    engine.close(seq)


def test_a_replay_feeds_what_the_uninterrupted_run_feeds(
    mini_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The table of blocks is as wide as the call needs, not as wide as what was imported: its width may move bits."""

    class Stop(Exception):  # noqa: N818 (ends the call once its feeds are seen)
        pass

    class Feeds:
        def run(self, feeds: dict[str, np.ndarray]) -> None:
            raise Stop(feeds["block_table"].shape, int(feeds["pos"][0]))

    seq = mini_engine.open()
    for index in range(4):
        mini_engine.import_block(seq, index, bytes(mini_engine.layout.block_bytes))
    mini_engine.resume(seq, 512, blocks=4)
    monkeypatch.setattr(mini_engine, "backend", Feeds())
    with pytest.raises(Stop) as stopped:
        mini_engine.prefill(seq, prompt_of(mini_engine, 256))
    mini_engine.close(seq)
    assert stopped.value.args == ((1, 3), 512)


def test_blocks_seen_but_not_counted_are_given_back(mini_engine: Engine) -> None:
    """A lookup that failed half way: the sequence starts cold, with all of the pool."""
    engine, ids = mini_engine, prompt_of(mini_engine, 400)
    cold, free = run_cold(engine, ids, 2), len(mini_engine._free_blocks)
    seq = engine.open()
    engine.import_block(seq, 0, cold.blocks[0])
    engine.import_block(seq, 1, cold.blocks[0])
    engine.import_block(seq, 0, cold.blocks[0])  # once more from the start: the store looked again
    engine.resume(seq, 0, blocks=0)
    assert (seq.blocks, seq.n_tokens, len(engine._free_blocks)) == ([], 0, free)
    for call in prompt_calls(ids):
        logits = engine.prefill(seq, call)
    assert np.array_equal(go_on(engine, seq, logits, 2), cold.rows)
    engine.close(seq)
