"""Committed cache bytes, engine against the torch reference, both kv-v4: one layer of each kind, n = 600.

A byte may differ where a value lies on a rounding edge, and then by one code; 99.9 % must be identical. A rotated
value near zero is the small difference of two products: there fp32 noise of 1e-6 can be two BF16 codes, no more.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from graph_support import Recorder, committed_rows, quick_engine

from exporter import codec
from exporter.checkpoint import Checkpoint
from exporter.presets import TINY
from exporter.sample import write_random
from runtime.engine import Engine

pytestmark = pytest.mark.torch
N = 600
CALLS = {"whole chunks": [256, 256, 88], "ragged": [5, 3, 16, 33, 2, 1, 7, 64, 256, 213], "one by one": [1] * N}
RATIOS = {"S": 0, "C": 4, "H": 16}
MIN_IDENTICAL = 0.999
NEAR_ZERO = 1e-6


@pytest.fixture(scope="module", params=RATIOS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """→ engine with a recorder, ids, the reference's rows by state name. One layer; hash-routed, so routers agree."""
    from exporter.reference import Reference

    folder = tmp_path_factory.mktemp(request.param)
    config = dataclasses.replace(
        TINY, num_hidden_layers=1, num_hash_layers=1, compress_ratios=(RATIOS[request.param],), index_topk=16
    )
    write_random(folder / "checkpoint", config, seed=11, mtp=0)
    ids = np.random.default_rng(2).integers(0, config.vocab_size, N).tolist()
    reference = Reference.from_checkpoint(Checkpoint.open(folder / "checkpoint"), kv_sim=True)
    state = reference.new_state(keep_all=True)
    logits = reference.forward(ids, state).numpy()
    engine = quick_engine(folder / "checkpoint", folder / "bundle", wrap=Recorder)
    rows = {s.name: state.rows(0, s.kind) for s in engine.spec.states if s.kind not in ("ring", "iring")}
    return engine, ids, rows, logits


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], engine: Engine) -> None:
    """Every state: equal row counts, ≥ 99.9 % identical bytes, the others one code apart (two in a BF16's low byte)."""
    for name, expected in theirs.items():
        found = ours[name]
        assert found.shape == expected.shape, name
        differing = found != expected
        assert differing.mean() <= 1 - MIN_IDENTICAL, f"{name}: {differing.mean():.4%} of bytes differ"
        assert (code_distance(found, expected, name, engine)[differing] <= 1).all(), name


def code_distance(a: np.ndarray, b: np.ndarray, name: str, engine: Engine) -> np.ndarray:
    """How many codes apart, per byte: FP4 nibbles, E4M3 magnitudes, E8M0 and little-endian BF16 as integers."""
    if name.endswith(".ient"):
        half = engine.spec.config.index_head_dim // 2
        nibbles = [np.abs((a >> s & 15).astype(int) - (b >> s & 15).astype(int)) for s in (0, 4)]
        codes = np.maximum(*nibbles)
        codes[:, half:] = np.abs(a[:, half:].astype(int) - b[:, half:].astype(int))
        return codes
    rope = 2 * engine.spec.config.qk_rope_head_dim
    distance = np.abs(a.astype(int) - b.astype(int))
    words = [np.ascontiguousarray(x[:, -rope:]).view("<u2") for x in (a, b)]
    apart = np.abs(words[0].astype(int) - words[1].astype(int))
    noise = np.abs(codec.bf16_decode(words[0]) - codec.bf16_decode(words[1])) <= NEAR_ZERO
    distance[:, -rope:] = np.repeat(np.where((apart == 2) & noise, 1, apart), 2, axis=1)
    return distance


@pytest.mark.parametrize("calls", CALLS)
def test_committed_rows_are_the_reference_s(case: tuple, calls: str) -> None:
    engine, ids, expected, _ = case
    compare(committed_rows(engine, ids, CALLS[calls]), expected, engine)


def test_logits_are_the_reference_s(case: tuple) -> None:
    engine, ids, _, expected = case
    seq = engine.open()
    logits = np.concatenate([engine.forward(seq, ids[i : i + 256], rows=range(len(ids[i : i + 256])))
                             for i in range(0, N, 256)])  # fmt: skip
    engine.close(seq)
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() >= 0.99


def swap_scale(rows: dict[str, np.ndarray], engine: Engine) -> None:
    nope = engine.spec.config.head_dim - engine.spec.config.qk_rope_head_dim
    rows["layers.0.win"][:, nope] += 1


def swap_page_row(rows: dict[str, np.ndarray], engine: Engine) -> None:
    name = next((n for n in rows if n.endswith(".ent")), "layers.0.win")
    rows[name][[3, 4]] = rows[name][[4, 3]]


def swap_nibbles(rows: dict[str, np.ndarray], engine: Engine) -> None:
    name = next((n for n in rows if n.endswith(".ient")), "layers.0.win")
    rows[name] = (rows[name] >> 4) | (rows[name] << 4)


@pytest.mark.parametrize("change", [swap_scale, swap_page_row, swap_nibbles])
def test_the_comparison_sees_a_swapped_scale_row_or_nibble(case: tuple, change: object) -> None:
    engine, _ids, expected, _ = case
    rows = {name: value.copy() for name, value in expected.items()}
    change(rows, engine)
    with pytest.raises(AssertionError):
        compare(rows, expected, engine)
