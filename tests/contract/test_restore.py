"""Restored = uninterrupted, bit for bit: state through the store, into an engine with fresh pools, then the same calls.

For n ≤ 256 the expected hit is 0; for more it is exactly c(n), and only the tail is prefilled.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from graph_support import quick_engine

from exporter.sample import write_sample
from runtime.engine import Engine
from runtime.kv.fingerprint import fingerprint
from runtime.kv.record import Role
from runtime.kv.store import KvStore, Policy, PutJob, Unit
from runtime.schedule import prompt_boundary, prompt_calls

LENGTHS = (1, 5, 128, 255, 256, 257, 383, 384, 385, 511, 512, 513, 1025)
STEPS = 4  # decoded after the prompt


def open_store(folder: Path, engine: Engine) -> KvStore:
    identity = fingerprint(
        objects=["00"], graphs=["11"], profile="full", tokenizer_sha256="22", encoding="dsv4-0731",
        numerics=engine.spec.numerics, layout_id=engine.layout.layout_id, arithmetic=engine.backend.arithmetic,
    )  # fmt: skip
    return KvStore.open(folder, layout=engine.layout, fingerprint=identity, master_key=bytes(32),
                        policy=Policy(max_bytes=1 << 30))  # fmt: skip


def prefill(engine: Engine, seq: object, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    """Prompt from wherever ``seq`` stands, then STEPS greedy tokens → all logits, and the calls made."""
    logits, calls = [], []
    for call in prompt_calls(ids, seq.n_tokens):
        logits = [engine.prefill(seq, call)]
        calls.append(len(call))
    for _ in range(STEPS):
        logits.append(engine.decode(seq, int(logits[-1].argmax())))
    return np.stack(logits), calls


def check_length(engine: Engine, store: KvStore, ids: list[int]) -> None:
    """A cold run that stores, then a hit on clean pools: equal logits, exact hit, only the tail prefilled."""
    boundary = prompt_boundary(len(ids))
    seq = engine.open()
    for call in prompt_calls(ids):
        tail = engine.prefill(seq, call)
        if seq.n_tokens == boundary and boundary:
            checkpoint = seq.checkpoint
            assert checkpoint is not None
            assert checkpoint[0] == boundary
            blocks = {i: engine.export_block(seq, i) for i in range(boundary // 256)}
            units = [Unit(boundary, Role.PROMPT, checkpoint[1])]
            assert store.put(PutJob("default", ids[:boundary], blocks, units)).stored
    cold = [tail]
    for _ in range(STEPS):
        cold.append(engine.decode(seq, int(cold[-1].argmax())))
    engine.close(seq)
    for pool in engine.pools.values():
        pool[...] = 255 if pool.dtype == np.uint8 else 1e30  # nothing of the first run may be read
    for name in engine.pools:
        engine.pools[name][0] = 0

    seq = engine.open()
    hit = store.lookup("default", ids, functools.partial(engine.import_block, seq))
    assert hit.tokens == boundary
    engine.resume(seq, hit.tokens, checkpoint=hit.checkpoint, blocks=hit.blocks)
    warm, calls = prefill(engine, seq, ids)
    engine.close(seq)
    assert calls == [len(ids) - boundary]
    assert np.abs(np.stack(cold) - warm).max() == 0.0


@pytest.mark.parametrize("n", LENGTHS)
def test_tiny_restores_bit_for_bit(n: int, tiny_engine: Engine, tmp_path: Path) -> None:
    ids = np.random.default_rng(n).integers(0, tiny_engine.spec.config.vocab_size, n).tolist()
    store = open_store(tmp_path / "kv", tiny_engine)
    try:
        check_length(tiny_engine, store, ids)
    finally:
        store.close()


@pytest.fixture(scope="module")
def tiny_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return quick_engine(tiny_checkpoint, tmp_path_factory.mktemp("restore") / "tiny")


@pytest.fixture(scope="module")
def true_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("kv-true")
    write_sample(folder / "checkpoint", "kv-true", seed=0)
    return quick_engine(folder / "checkpoint", folder / "bundle", context_tokens=8192)


@pytest.mark.parametrize("n", [257, 383, 384, 385, 511, 512, 513, 1025])
def test_kv_true_restores_bit_for_bit(n: int, true_engine: Engine, tmp_path: Path) -> None:
    """Real KV geometry: 43 layers, head_dim 512, window 128."""
    ids = np.random.default_rng(n).integers(0, true_engine.spec.config.vocab_size, n).tolist()
    store = open_store(tmp_path / "kv", true_engine)
    try:
        check_length(true_engine, store, ids)
    finally:
        store.close()


@pytest.mark.slow
@pytest.mark.parametrize("n", [4095, 4096, 4097])
def test_kv_true_restores_bit_for_bit_at_4k(n: int, true_engine: Engine, tmp_path: Path) -> None:
    test_kv_true_restores_bit_for_bit(n, true_engine, tmp_path)


# -- every stored byte counts ----------------------------------------------------------------------------------------


def flipped(engine: Engine, ids: list[int], change: str) -> float:
    """Largest logit change of the token after 1,024 restored ones when one stored value is changed first."""
    seq = engine.open()
    for call in prompt_calls(ids[:1024]):
        engine.prefill(seq, call)
    blocks = [bytearray(engine.export_block(seq, i)) for i in range(4)]
    checkpoint = bytearray(seq.checkpoint[1])
    engine.close(seq)

    def logits() -> np.ndarray:
        again = engine.open()
        engine.restore(again, [bytes(b) for b in blocks], bytes(checkpoint))
        row = engine.prefill(again, ids[1024:1030])
        engine.close(again)
        return row

    before = logits()
    CHANGES[change](engine, blocks, checkpoint)
    return float(np.abs(before - logits()).max())


def part_of(parts: tuple, kind: str, engine: Engine, layer_kind: str) -> object:
    states = {s.name: s for s in engine.spec.states}
    wanted = (p for p in parts if states[p.state_name].kind == kind)
    return next(p for p in wanted if engine.spec.config.layer_kind(states[p.state_name].layer) == layer_kind)


def flip_sign(payload: bytearray, start: int, nope: int) -> None:
    """The sign bit of the first nonzero E4M3 code of a row."""
    at = next(i for i in range(start, start + nope) if payload[i] & 0x7F)
    payload[at] ^= 0x80


def change_row(kind: str, layer_kind: str, row: int) -> object:
    def change(engine: Engine, blocks: list, checkpoint: bytearray) -> None:
        config = engine.spec.config
        nope = config.head_dim - config.qk_rope_head_dim
        parts = engine.layout.checkpoint_parts if kind == "win" else engine.layout.block_parts
        part = part_of(parts, kind, engine, layer_kind)
        for payload in [checkpoint] if kind == "win" else blocks:
            rows = range(part.shape[0]) if row < 0 else [row % part.shape[0]]
            for index in rows:
                flip_sign(payload, part.offset + index * part.shape[1], nope)

    return change


def change_carry(column_half: int) -> object:
    """One kv (0) or gate (1) value of the CSA carry: the last row of the a-half."""

    def change(engine: Engine, blocks: list, checkpoint: bytearray) -> None:
        part = part_of(engine.layout.checkpoint_parts, "ring", engine, "C")
        cells = np.frombuffer(checkpoint, np.float32, part.size_bytes // 4, part.offset).reshape(part.shape)
        cells[-1, column_half * part.shape[1] // 2] += 1.0

    return change


def change_pad(engine: Engine, blocks: list, checkpoint: bytearray) -> None:
    """The unused scale byte of the last window row: part of no number."""
    config = engine.spec.config
    nope = config.head_dim - config.qk_rope_head_dim
    part = part_of(engine.layout.checkpoint_parts, "win", engine, "S")
    checkpoint[part.offset + (part.shape[0] - 1) * part.shape[1] + nope + nope // 64] ^= 0xFF


CHANGES = {
    "window row": change_row("win", "S", -1),
    "HCA row": change_row("ent", "H", -1),
    "CSA row": change_row("ent", "C", -1),
    "carry kv": change_carry(0),
    "carry gate": change_carry(1),
    "pad byte": change_pad,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_stored_value_changes_the_logits(change: str, tiny_engine: Engine) -> None:
    ids = np.random.default_rng(9).integers(0, tiny_engine.spec.config.vocab_size, 1100).tolist()
    delta = flipped(tiny_engine, ids, change)
    assert (delta == 0.0) if change == "pad byte" else (delta > 0.0), delta
