"""For the restore tests: small models with every kind of layer, runs that store what they compute, pools made dirty.

``python kv_restore_support.py MODEL KV N …`` resumes prompts of N tokens from the store KV, in a process that has
computed nothing else, and prints a line of JSON: {N: [hit tokens, calls, SHA-256 of the rows of ``go_on``]}.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from graph_support import quick_engine

from appliance.model import ModelConfig, ModelSpec, state_tensors
from exporter.presets import KV_TRUE, TINY
from exporter.sample import write_random
from runtime.backends.ort import OrtBackend
from runtime.engine import Engine, Sequence
from runtime.kv.fingerprint import fingerprint
from runtime.kv.record import Role
from runtime.kv.store import KvStore, Policy, PutJob, TailUnit, Unit
from runtime.schedule import prompt_boundary, prompt_calls

STEPS = 64  # tokens decoded after the prompt
EDGES = (1, 3, 4, 5, 127, 128, 129, 130, 255, 256, 257, 383, 384, 385, 511, 512, 513)
TENANT = "default"

# Windows of 32, HCA of 16: small enough for long prompts. R = 512.
MINI = dataclasses.replace(
    TINY, num_hidden_layers=4, compress_ratios=(0, 4, 16, 4), max_position_embeddings=16384
)  # fmt: skip
# The real cache geometry (584-byte rows, window 128, ratios 4 and 128) in four layers.
SHALLOW = dataclasses.replace(KV_TRUE, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4))


def make_engine(config: ModelConfig, folder: Path, context_tokens: int) -> Engine:
    """A random model of this config; the folder keeps its graph and objects."""
    write_random(folder / "checkpoint", config)
    return quick_engine(folder / "checkpoint", folder / "bundle", context_tokens=context_tokens)


def load_engine(config: ModelConfig, folder: Path, context_tokens: int) -> Engine:
    """What ``make_engine`` left in ``folder``."""
    spec = ModelSpec("test", config, state_tensors(config, "kv-v4"), "dsv4-0731", "kv-v4", (), ())
    return Engine(spec, OrtBackend(folder / "bundle" / "model.onnx", threads=1), context_tokens=context_tokens)


def open_store(folder: Path, engine: Engine) -> KvStore:
    identity = fingerprint(
        objects=["00"], graphs=["11"], profile="full", tokenizer_sha256="22", encoding="dsv4-0731",
        numerics=engine.spec.numerics, layout_id=engine.layout.layout_id, arithmetic=engine.backend.arithmetic,
    )  # fmt: skip
    return KvStore.open(folder, layout=engine.layout, fingerprint=identity, master_key=bytes(32),
                        policy=Policy(max_bytes=1 << 30))  # fmt: skip


def prompt_of(engine: Engine, n: int, seed: int | None = None) -> list[int]:
    rng = np.random.default_rng(n if seed is None else seed)
    return [int(i) for i in rng.integers(0, engine.spec.config.vocab_size, n)]


def dirty(engine: Engine) -> None:
    """Every page and slot but the reserved ones full of what must not be read."""
    for pool in engine.pools.values():
        pool[1:] = 255 if pool.dtype == np.uint8 else 1e30


def go_on(engine: Engine, seq: Sequence, logits: Any, steps: int = STEPS) -> np.ndarray:
    """``logits`` and those after each of ``steps`` greedy tokens: f32 [steps + 1, vocab]."""
    rows = [np.array(logits)]
    for _ in range(steps):
        rows.append(engine.decode(seq, int(rows[-1].argmax())))
    return np.stack(rows)


@dataclass
class Cold:
    """What an uninterrupted run gave: the rows of ``go_on``, and the state after the prompt's calls."""

    rows: np.ndarray
    blocks: dict[int, bytes]  # full ones at the prompt's end
    checkpoints: dict[int, bytes]  # tokens → payload
    tail: bytes
    calls: list[int]

    def job(self, ids: list[int], *, unit: int = 0, tail: bool = False) -> PutJob:
        """Blocks of the prompt, with the checkpoint at ``unit`` tokens or with the tail where asked for."""
        blocks = {i: payload for i, payload in self.blocks.items() if tail or i < unit // 256}
        units = [Unit(unit, Role.PROMPT, self.checkpoints[unit])] if unit else []
        return PutJob(TENANT, ids, blocks, units, tail=TailUnit(ids, self.tail) if tail else None)


def run_cold(engine: Engine, ids: list[int], steps: int = STEPS) -> Cold:
    """Prefill ``ids`` in a new sequence, keep its state, then ``steps`` greedy tokens; the pools end dirty."""
    seq, checkpoints, calls = engine.open(), {}, []
    for call in prompt_calls(ids):
        logits = engine.prefill(seq, call)
        calls.append(len(call))
        if seq.checkpoint:
            checkpoints[seq.checkpoint[0]] = seq.checkpoint[1]
    blocks = {i: engine.export_block(seq, i) for i in range(len(ids) // 256)}
    tail = engine.export_tail(seq, logits)
    rows = go_on(engine, seq, logits, steps)
    engine.close(seq)
    dirty(engine)
    return Cold(rows, blocks, checkpoints, tail, calls)


def check_promises(engine: Engine, folder: Path, ids: list[int], steps: int = STEPS) -> None:
    """Hit = cold and restored = uninterrupted at c(n): exact hit, exact calls, equal bits of every further token."""
    boundary = prompt_boundary(len(ids))
    cold = run_cold(engine, ids, steps)
    store = open_store(folder, engine)
    try:
        if boundary:
            assert store.put(cold.job(ids, unit=boundary)).stored
        warm, calls, hit = run_warm(engine, store, ids, steps)
    finally:
        store.close()
    assert (hit.tokens, hit.blocks, hit.replay, hit.tail) == (boundary, boundary // 256, False, None)
    assert hit.reason == ("" if boundary else "too-short")
    assert calls == cold.calls[boundary // 256 :] == [len(ids) - boundary]
    assert np.array_equal(cold.rows.view(np.uint32), warm.view(np.uint32))


def run_warm(
    engine: Engine, store: KvStore, ids: list[int], steps: int = STEPS, **lookup: Any
) -> tuple[np.ndarray, list[int], Any]:
    """Look up, resume, prefill what is left and go on → (rows of ``go_on``, tokens of each prefill call, the hit)."""
    seq = engine.open()
    hit = store.lookup(TENANT, ids, functools.partial(engine.import_block, seq), **lookup)
    logits = engine.resume(seq, hit.tokens, checkpoint=hit.checkpoint, tail=hit.tail, blocks=hit.blocks)
    calls = []
    for call in prompt_calls(ids, seq.n_tokens):
        logits = engine.prefill(seq, call)
        calls.append(len(call))
    rows = go_on(engine, seq, logits, steps)
    engine.close(seq)
    dirty(engine)
    return rows, calls, hit


def digest(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()


def main(model: Path, kv: Path, lengths: list[int]) -> None:
    engine = load_engine(MINI, model, max(lengths) + STEPS)
    store, found = open_store(kv, engine), {}
    for n in lengths:
        rows, calls, hit = run_warm(engine, store, prompt_of(engine, n))
        found[n] = [hit.tokens, calls, digest(rows)]
    store.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(n) for n in sys.argv[3:]])
