"""Same bits: what one request's rows depend on, measured with onnxruntime on this machine.

One thread: chunking, padding, a second sequence beside it, a used slot change nothing. What two threads do is
measured and printed, not promised; ``arithmetic`` carries the thread rule either way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_support import quick_engine, run_calls

from runtime import bits
from runtime.engine import Engine

N = 600


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return quick_engine(tiny_checkpoint, tmp_path_factory.mktemp("bits") / "one", max_sequences=2)


@pytest.fixture(scope="module")
def ids(engine: Engine) -> list[int]:
    return np.random.default_rng(5).integers(0, engine.spec.config.vocab_size, N).tolist()


def fresh_logits(engine: Engine, ids: list[int], calls: list[int]) -> np.ndarray:
    seq = engine.open()
    try:
        return run_calls(engine, seq, ids, calls)
    finally:
        engine.close(seq)


@pytest.mark.parametrize("calls", [[256, 256, 88], [256, *([1] * 40)], [200, 5, 3, 16, 32, 256, 88], [16] * 16])
def test_one_thread_gives_equal_bits_in_any_calls(engine: Engine, ids: list[int], calls: list[int]) -> None:
    whole = fresh_logits(engine, ids, [256, 256, 88])
    other = fresh_logits(engine, ids, calls)
    assert np.array_equal(whole[: len(other)], other)


def test_one_thread_gives_equal_bits_far_into_a_context(engine: Engine) -> None:
    """1,792 tokens in: 448 CSA entries are scored, more than one block of every product."""
    ids = np.random.default_rng(8).integers(0, engine.spec.config.vocab_size, 2040).tolist()
    whole = fresh_logits(engine, ids, [256] * 7 + [248])[1792:]
    other = fresh_logits(engine, ids, [256] * 7 + [100, *([1] * 20), 128])[1792:]
    assert np.array_equal(whole, other)


def test_the_start_up_probe_finds_one_thread_equal(engine: Engine) -> None:
    assert bits.rows_agree(engine)


def test_the_start_up_probe_sees_a_backend_that_rounds_by_row_count(engine: Engine) -> None:
    class Uneven:
        def __init__(self, backend: Any) -> None:
            self.backend = backend

        def run(self, feeds: Any) -> Any:
            outputs = dict(self.backend.run(feeds))
            if feeds["ids"].shape[1] == 2:
                outputs["logits"] = np.nextafter(outputs["logits"], np.float32(np.inf))
            return outputs

    backend, engine.backend = engine.backend, Uneven(engine.backend)
    try:
        assert not bits.rows_agree(engine)
    finally:
        engine.backend = backend


def test_a_used_slot_and_used_blocks_give_equal_bits(engine: Engine, ids: list[int]) -> None:
    first = fresh_logits(engine, ids, [256, 256, 88])
    fresh_logits(engine, ids[::-1], [256, 256, 88])  # leaves other rows behind in the same slot and blocks
    assert np.array_equal(first, fresh_logits(engine, ids, [256, 256, 88]))


def test_padding_and_a_second_sequence_change_no_bits(engine: Engine, ids: list[int]) -> None:
    """b = 2: the second sequence is shorter and padded at the end; each row equals its lone run."""
    a, b = engine.open(), engine.open()
    try:
        engine.prefill(a, ids[:256])
        engine.prefill(b, ids[100:200])
        lone_a = feeds_of(engine, a, ids[256:272])
        lone_b = feeds_of(engine, b, ids[200:209])
        padded = feeds_of(engine, b, [*ids[200:209], *([0] * 7)])
        padded["block_table"] = np.pad(padded["block_table"], ((0, 0), (0, 1)))
        both = {k: np.concatenate([lone_a[k], padded[k]]) for k in lone_a if k not in engine.pools and k != "rows_out"}
        both |= engine.pools | {"rows_out": np.arange(32)}
        together = engine.backend.run(both)["logits"]
        assert np.array_equal(together[:16], engine.backend.run(lone_a)["logits"])
        assert np.array_equal(together[16:25], engine.backend.run(lone_b)["logits"])
    finally:
        engine.close(a)
        engine.close(b)


def feeds_of(engine: Engine, seq: Any, ids: list[int]) -> dict[str, Any]:
    engine._grow(seq, seq.n_tokens + len(ids))
    return engine._feeds(seq, ids, range(len(ids)))


def test_two_threads_repeat_themselves_and_one_thread_or_say_so(
    tiny_checkpoint: Path, tmp_path: Path, engine: Engine, ids: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal calls give equal bits with two threads as well: that alone carries restored = uninterrupted."""
    two = quick_engine(tiny_checkpoint, tmp_path / "two", threads=2)
    calls = [256, 256, 88]
    first = fresh_logits(two, ids, calls)
    assert np.array_equal(first, fresh_logits(two, ids, calls))
    assert two.backend.arithmetic != engine.backend.arithmetic
    with capsys.disabled():
        same = np.array_equal(first, fresh_logits(engine, ids, calls))
        print(f"\n[contract] 1 and 2 threads, equal calls: {'equal' if same else 'different'} bits; "
              f"2 threads, m = 1, tail and 256 agree: {bits.rows_agree(two)}")  # fmt: skip
