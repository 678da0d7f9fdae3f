"""The two promises, bit for bit, over 64 further tokens: hit = cold, and restored = uninterrupted.

A cold run computes a prompt of n tokens and goes on; blocks and the checkpoint at c(n) go through the store. Then, on
pools full of other bytes, the same prompt must be found at exactly c(n), only its tail of n − c(n) tokens may be
computed, and every further token's logits must have the same bits. Exact tails: test_restore_tail; replay: test_replay.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kv_restore_support import (
    EDGES,
    MINI,
    check_promises,
    digest,
    dirty,
    open_store,
    prompt_of,
    run_cold,
)

from runtime.engine import Engine
from runtime.kv.layout import Part
from runtime.schedule import prompt_boundary, prompt_calls

QUICK = (1, 4, 256, 257, 385, 513)
TRUE = (3, 130, 256, 257, 385, 513, 1025)
_random = np.random.default_rng(4)
RANDOM_SHORT = sorted(_random.integers(1, 1025, 40).tolist())
RANDOM_LONG = sorted(_random.integers(1025, 8193, 10).tolist())


@pytest.mark.parametrize("n", QUICK)
def test_mini_keeps_both_promises(n: int, mini_engine: Engine, tmp_path: Path) -> None:
    check_promises(mini_engine, tmp_path / "kv", prompt_of(mini_engine, n))


def test_the_real_cache_geometry_keeps_both_promises(shallow_engine: Engine, tmp_path: Path) -> None:
    check_promises(shallow_engine, tmp_path / "kv", prompt_of(shallow_engine, 384))


@pytest.mark.slow
@pytest.mark.parametrize("n", [*(n for n in EDGES if n not in QUICK), 4095, 4096, 4097])
def test_mini_keeps_both_promises_at_every_edge(n: int, mini_engine: Engine, tmp_path: Path) -> None:
    check_promises(mini_engine, tmp_path / "kv", prompt_of(mini_engine, n))


@pytest.mark.slow
@pytest.mark.parametrize("i", range(50))
def test_mini_keeps_both_promises_at_random_lengths(i: int, mini_engine: Engine, tmp_path: Path) -> None:
    """40 lengths up to 1,024 and 10 up to 8,192."""
    n = [*RANDOM_SHORT, *RANDOM_LONG][i]
    check_promises(mini_engine, tmp_path / "kv", prompt_of(mini_engine, n, seed=1000 + i))


@pytest.mark.slow
@pytest.mark.parametrize("n", EDGES)
def test_the_real_cache_geometry_keeps_both_promises_at_every_edge(
    n: int, shallow_engine: Engine, tmp_path: Path
) -> None:  # fmt: skip
    check_promises(shallow_engine, tmp_path / "kv", prompt_of(shallow_engine, n))


@pytest.mark.slow
@pytest.mark.parametrize("n", TRUE)
def test_kv_true_keeps_both_promises(n: int, true_engine: Engine, tmp_path: Path) -> None:
    """All 43 layers. 64 further tokens at one length, 8 at the others: a token costs a quarter of a second."""
    check_promises(true_engine, tmp_path / "kv", prompt_of(true_engine, n), steps=64 if n == 385 else 8)


def test_a_new_process_restores_the_same_bits(mini_engine: Engine, mini_folder: Path, tmp_path: Path) -> None:
    lengths, expected = (3, 300), {}
    store = open_store(tmp_path / "kv", mini_engine)
    for n in lengths:
        ids, boundary = prompt_of(mini_engine, n), prompt_boundary(n)
        cold = run_cold(mini_engine, ids)
        assert not boundary or store.put(cold.job(ids, unit=boundary)).stored
        expected[str(n)] = [boundary, [n - boundary], digest(cold.rows)]
    store.close()
    here = Path(__file__).parents[1]
    command = [sys.executable, "-W", "error", str(here / "kv_restore_support.py"), str(mini_folder),
               str(tmp_path / "kv"), *map(str, lengths)]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


# -- every stored value counts ---------------------------------------------------------------------------------------


def changed(engine: Engine, change: str) -> float:
    """Largest logit change of the token after 512 restored ones when one stored value is changed first."""
    ids = prompt_of(engine, 600)
    seq = engine.open()
    for call in prompt_calls(ids[:512]):
        engine.prefill(seq, call)
    blocks = [bytearray(engine.export_block(seq, i)) for i in range(2)]
    checkpoint = bytearray(seq.checkpoint[1])
    engine.close(seq)

    def logits() -> np.ndarray:
        dirty(engine)
        again = engine.open()
        for index, payload in enumerate(blocks):
            engine.import_block(again, index, payload)
        engine.resume(again, 512, checkpoint=checkpoint, blocks=2)
        row = engine.prefill(again, ids[512:518])
        engine.close(again)
        return row

    before = logits()
    assert np.array_equal(before, logits())
    CHANGES[change](blocks, checkpoint, engine)
    return float(np.abs(before - logits()).max())


def part_of(parts: tuple[Part, ...], kind: str, layer_kind: str, engine: Engine) -> Part:
    states = {s.name: s for s in engine.spec.states}
    wanted = (p for p in parts if states[p.state_name].kind == kind)
    return next(p for p in wanted if engine.spec.config.layer_kind(states[p.state_name].layer) == layer_kind)


def flip_sign(payload: bytearray, start: int) -> None:
    """The sign bit of the first nonzero E4M3 code of a row."""
    at = next(i for i in range(start, start + 64) if payload[i] & 0x7F)
    payload[at] ^= 0x80


def change_row(kind: str, layer_kind: str) -> object:
    """The last row of a window, or every entry of a page in every block (the indexer need not choose one of them)."""

    def change(blocks: list, checkpoint: bytearray, engine: Engine) -> None:
        parts = engine.layout.checkpoint_parts if kind == "win" else engine.layout.block_parts
        part = part_of(parts, kind, layer_kind, engine)
        rows = range(part.shape[0])
        for payload, row in [(checkpoint, rows[-1])] if kind == "win" else itertools.product(blocks, rows):
            flip_sign(payload, part.offset + row * part.shape[1])

    return change


def change_carry(column_half: int) -> object:
    """One kv (0) or gate (1) value of the CSA carry: the last row of the a-half."""

    def change(blocks: list, checkpoint: bytearray, engine: Engine) -> None:
        part = part_of(engine.layout.checkpoint_parts, "ring", "C", engine)
        cells = np.frombuffer(checkpoint, np.float32, part.size_bytes // 4, part.offset).reshape(part.shape)
        cells[-1, column_half * part.shape[1] // 2] += 1.0

    return change


def change_pad(blocks: list, checkpoint: bytearray, engine: Engine) -> None:
    """The unused scale byte of the last window row: part of no number."""
    part = part_of(engine.layout.checkpoint_parts, "win", "S", engine)
    nope = MINI.head_dim - MINI.qk_rope_head_dim
    checkpoint[part.offset + (part.shape[0] - 1) * part.shape[1] + nope + nope // 64] ^= 0xFF


CHANGES = {
    "window row": change_row("win", "S"),
    "HCA row": change_row("ent", "H"),
    "CSA row": change_row("ent", "C"),
    "carry kv": change_carry(0),
    "carry gate": change_carry(1),
    "pad byte": change_pad,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_stored_value_changes_the_logits(change: str, mini_engine: Engine) -> None:
    delta = changed(mini_engine, change)
    assert (delta == 0.0) if change == "pad byte" else (delta > 0.0), delta
