"""For the KV tests: real and tiny shapes, a store with known contents, and IO that fails at a chosen call."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from appliance.model import ModelConfig, ModelSpec, RopeScaling, state_tensors
from runtime.kv.files import Io
from runtime.kv.fingerprint import Arithmetic, Fingerprint, fingerprint
from runtime.kv.layout import KvLayout
from runtime.kv.record import Role
from runtime.kv.store import KvHit, KvStore, Policy, PutJob, PutResult, TailUnit, Unit
from runtime.kv.tail import tail_bytes

REAL = ModelConfig(
    hidden_size=4096, num_hidden_layers=43, vocab_size=129280, num_attention_heads=64, head_dim=512,
    qk_rope_head_dim=64, q_lora_rank=1024, o_lora_rank=1024, o_groups=8, sliding_window=128, index_n_heads=64,
    index_head_dim=128, index_topk=512, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
    num_experts_per_tok=6, num_hash_layers=3, routed_scaling_factor=1.5, swiglu_limit=10.0, hc_mult=4,
    hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6, rope_theta=10000.0, compress_rope_theta=160000.0,
    rope_scaling=RopeScaling(16.0, 65536, 32.0, 1.0), max_position_embeddings=1048576, bos_token_id=0, eos_token_id=1,
    compress_ratios=tuple(0 if i < 2 else 4 if i % 2 == 0 else 128 for i in range(43)),
)  # fmt: skip

TINY = dataclasses.replace(
    REAL, num_hidden_layers=5, head_dim=128, qk_rope_head_dim=64, sliding_window=16, index_head_dim=32,
    compress_ratios=(0, 4, 128, 4, 32),
)  # fmt: skip


def make_spec(config: ModelConfig, numerics: str = "kv-v4") -> ModelSpec:
    return ModelSpec(
        name="kv-test", config=config, states=state_tensors(config, numerics), encoding="dsv4-0731",
        numerics=numerics, profiles=(), goldens=(),
    )  # fmt: skip


def make_pools(spec: ModelSpec, count: int = 4, seed: int | None = None) -> dict[str, np.ndarray]:
    """Pools of ``count`` blocks and slots: zeros, or random bytes and floats where a seed is given."""
    rng = None if seed is None else np.random.default_rng(seed)
    pools: dict[str, np.ndarray] = {}
    for state in spec.states:
        shape = (count, state.rows, state.width)
        if rng is None:
            pools[state.name] = np.zeros(shape, np.uint8 if state.dtype == "u8" else np.float32)
        elif state.dtype == "u8":
            pools[state.name] = rng.integers(0, 256, shape, np.uint8)
        else:
            pools[state.name] = rng.standard_normal(shape).astype(np.float32)
    return pools


ARITHMETIC = Arithmetic("ort", "1.31.1", "bodies-1", "x86_64 avx512_vnni", "intra=2", 256)
MASTER_KEY = bytes(range(32))
QUOTA = 1 << 30
SEGMENT_BYTES = 128 * 1024  # a few tiny records, so that stores of the tests have several segments


def make_fingerprint(layout: KvLayout, **changes: object) -> Fingerprint:
    """F of the tests; a change may name any piece, or a field of ``Arithmetic``."""
    fields = {f.name for f in dataclasses.fields(Arithmetic)}
    arithmetic = dataclasses.replace(ARITHMETIC, **{k: v for k, v in changes.items() if k in fields})
    pieces = {
        "objects": ["aa" * 32, "bb" * 32], "graphs": ["cc" * 32], "profile": "full", "tokenizer_sha256": "dd" * 32,
        "encoding": "dsv4-0731", "numerics": "kv-v4", "layout_id": layout.layout_id,
    }  # fmt: skip
    pieces |= {k: v for k, v in changes.items() if k not in fields}
    return fingerprint(**pieces, arithmetic=arithmetic)


@functools.cache
def tiny_layout() -> KvLayout:
    return KvLayout.from_spec(make_spec(TINY))


def open_store(directory: Path, *, master_key: bytes = MASTER_KEY, max_bytes: int = QUOTA, io: Io | None = None,
               segment_bytes: int = SEGMENT_BYTES, policy: Policy | None = None,
               clock: Callable[[], float] = time.time, **changes: object) -> KvStore:  # fmt: skip
    """The tests' store; a change may name any piece of its fingerprint."""
    layout = tiny_layout()
    return KvStore.open(directory, layout=layout, fingerprint=make_fingerprint(layout, **changes),
                        master_key=master_key, policy=policy or Policy(max_bytes=max_bytes), io=io,
                        segment_bytes=segment_bytes, clock=clock)  # fmt: skip


class Clock:
    """A store's time, moved by hand."""

    def __init__(self, start_s: float) -> None:
        self.now_s = float(start_s)

    def __call__(self) -> float:
        return self.now_s


def prompt(chat: int, tokens: int) -> list[int]:
    """Token ids of one of the tests' chats; a longer one begins with the shorter."""
    return [(chat * 7919 + i * 31 + i // 256) % 129280 for i in range(tokens)]


def block_payload(chat: int, i: int) -> bytes:
    """What the tests store as block ``i``: bytes that follow from their names alone."""
    return _noise(f"block {chat} {i}", tiny_layout().block_bytes)


def checkpoint_payload(chat: int, tokens: int) -> bytes:
    return _noise(f"checkpoint {chat} {tokens}", tiny_layout().checkpoint_bytes)


@functools.cache
def _noise(name: str, size_bytes: int) -> bytes:
    return hashlib.shake_128(name.encode()).digest(size_bytes)


def tail_payload(chat: int, tokens: int) -> bytes:
    return _noise(f"tail {chat} {tokens}", tail_bytes(tiny_layout(), tokens))


def blocks_of(chat: int, tokens: int, first: int = 0) -> dict[int, bytes]:
    """Index → payload of a chat's whole blocks from ``first`` on."""
    return {i: block_payload(chat, i) for i in range(first, tokens // 256)}


def job(chat: int, tokens: int, tenant: str = "default", role: Role = Role.PROMPT, **more: object) -> PutJob:
    """All blocks of ``tokens`` tokens of a chat and the checkpoint at their end."""
    units = [Unit(tokens, role, checkpoint_payload(chat, tokens))]
    return PutJob(tenant, prompt(chat, tokens), blocks_of(chat, tokens), units, **more)


def put(store: KvStore, chat: int, tokens: int, tenant: str = "default", role: Role = Role.PROMPT) -> PutResult:
    return store.put(job(chat, tokens, tenant, role))


def put_tail(store: KvStore, chat: int, tokens: int, tenant: str = "default") -> PutResult:
    """The exact tail after ``tokens`` tokens of a chat, with the blocks before it."""
    ids = prompt(chat, tokens)
    return store.put(PutJob(tenant, ids, blocks_of(chat, tokens), tail=TailUnit(ids, tail_payload(chat, tokens))))


def look_up(
    store: KvStore, ids: Sequence[int], tenant: str = "default", **options: object
) -> tuple[KvHit, list[bytes]]:  # fmt: skip
    """A lookup and the blocks it gave that count; the sink checks that they come in order, from 0 up."""
    seen: list[bytes] = []

    def sink(index: int, payload: memoryview) -> None:
        assert index == len(seen)
        seen.append(bytes(payload))

    hit = store.lookup(tenant, ids, sink, **options)
    assert len(seen) >= hit.blocks
    return hit, seen[: hit.blocks]


def reason(store: KvStore, ids: Sequence[int], tenant: str = "default") -> str:
    return look_up(store, ids, tenant)[0].reason


def assert_hit(store: KvStore, chat: int, tokens: int, more: int = 1, tenant: str = "default") -> None:
    """The lookup of ``tokens + more`` tokens gives exactly the stored boundary ``tokens``, bit by bit."""
    hit, blocks = look_up(store, prompt(chat, tokens + more), tenant)
    assert (hit.tokens, hit.blocks, hit.replay, hit.tail) == (tokens, tokens // 256, False, None)
    assert hit.reason == "" if more <= 256 else hit.reason in ("no-unit", "evicted")
    assert hit.checkpoint == checkpoint_payload(chat, tokens)
    assert blocks == [block_payload(chat, i) for i in range(tokens // 256)]


def assert_miss(store: KvStore, chat: int, tokens: int, why: str, tenant: str = "default") -> None:
    hit, blocks = look_up(store, prompt(chat, tokens), tenant)
    assert (hit.tokens, blocks, hit.checkpoint, hit.tail, hit.reason) == (0, [], None, None, why)


def disk_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.kvs"))


class FaultIo(Io):
    """Counts the store's calls; from call ``at`` on each raises ``error``, writes going half way first."""

    def __init__(self, at: int = 1 << 60, error: OSError | None = None, only: str = "") -> None:
        self.calls: list[str] = []
        self.at, self.error, self.only = at, error, only

    def _call(self, name: str) -> bool:
        """Note a call; True when it must fail."""
        if not self.only or name == self.only:
            self.calls.append(name)
            return len(self.calls) > self.at
        return False

    def pwrite(self, fd: int, data: bytes, offset: int) -> None:
        if self._call("pwrite"):
            super().pwrite(fd, data[: len(data) // 2], offset)
            self.fail()
        super().pwrite(fd, data, offset)
        self.after()

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        if self._call("preadv"):
            self.fail()
        return super().preadv(fd, buffer, offset)

    def fdatasync(self, fd: int) -> None:
        if self._call("fdatasync"):
            self.fail()
        super().fdatasync(fd)
        self.after()

    def sync_directory(self, path: Path) -> None:
        if self._call("sync_directory"):
            self.fail()
        super().sync_directory(path)
        self.after()

    def commit(self, connection: sqlite3.Connection) -> None:
        if self._call("commit"):
            self.fail()
        super().commit(connection)
        self.after()

    def fail(self) -> None:
        assert self.error is not None
        raise self.error

    def after(self) -> None:
        """A call succeeded."""


# (chat, tokens) in the order they are stored: new prefixes, longer turns of old ones, several segments.
STORY = ((0, 256), (1, 512), (0, 768), (2, 256), (1, 1024), (3, 512), (2, 512))
