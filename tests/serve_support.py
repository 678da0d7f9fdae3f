"""A toy engine, KV store and tokenizer for the tests of everything between a socket and the engine."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from appliance.model import BLOCK_TOKENS, ModelConfig, ModelSpec, RopeScaling
from appliance.wire import TENANT_SHARED, KvStatus
from runtime.chat.encoding import CONTROL_LITERALS, DSML, END_THINK, EOS, THINK
from runtime.kv.job import KvHit, Note, PutJob, PutResult, Sink
from runtime.tokenizer import Tokenizer

VOCAB = 384
EOS_ID = 1
_SHOWN = (THINK, END_THINK, DSML)  # as in the official file: added tokens that are not marked special


def byte_alphabet() -> list[str]:
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(256)
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def tokenizer_json(*, spelling: bool = False) -> dict:
    """Byte-level BPE: ids 2 … 257 are the bytes, a few merges, control tokens last (begin and end are 0 and 1).

    ``spelling`` adds what a hostile or careless file may hold: merges that build ``<think>`` letter by letter.
    """
    pieces = [*byte_alphabet(), "th", "the", "Ġthe", "in", "ing"]
    merges = [["t", "h"], ["th", "e"], ["Ġ", "the"], ["i", "n"], ["in", "g"]]
    if spelling:
        for end in range(2, len(THINK) + 1):
            merges.append([THINK[: end - 1], THINK[end - 1]])
            pieces.append(THINK[:end])
    controls = [lit for lit in CONTROL_LITERALS if lit not in ("<｜begin▁of▁sentence｜>", EOS, *pieces)]
    first = VOCAB - len(controls)
    ids = {"<｜begin▁of▁sentence｜>": 0, EOS: EOS_ID} | {lit: first + i for i, lit in enumerate(controls)}
    if spelling:
        ids[THINK] = 2 + pieces.index(THINK)
    vocab = {piece: 2 + i for i, piece in enumerate(pieces)} | ids
    added = [
        {"id": number, "content": lit, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": lit not in _SHOWN} for lit, number in ids.items()
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": not spelling},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": merges},
    }  # fmt: skip


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_json(), "tokenizer.json")


def model_spec(encoding: str = "dsv4-0731") -> ModelSpec:
    config = ModelConfig(
        hidden_size=8, num_hidden_layers=1, vocab_size=VOCAB, num_attention_heads=1, head_dim=8, qk_rope_head_dim=4,
        q_lora_rank=4, o_lora_rank=4, o_groups=1, sliding_window=128, index_n_heads=1, index_head_dim=8, index_topk=4,
        moe_intermediate_size=8, n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1, num_hash_layers=0,
        routed_scaling_factor=1.0, swiglu_limit=1.0, hc_mult=1, hc_sinkhorn_iters=1, hc_eps=1e-6, rms_norm_eps=1e-6,
        rope_theta=1e4, compress_rope_theta=1e4, rope_scaling=RopeScaling(1.0, 4096, 32.0, 1.0),
        max_position_embeddings=4096, bos_token_id=0, eos_token_id=EOS_ID, compress_ratios=(0,),
    )  # fmt: skip
    return ModelSpec("deepseek-v4-flash", config, (), encoding, "kv-v4", (), ())


@dataclass(eq=False)
class FakeSequence:
    ids: list[int] = field(default_factory=list)
    checkpoint: tuple[int, bytes] | None = None
    decoded: int = 0
    imported: list[list[int]] = field(default_factory=list)
    kept_tokens: int = 0

    @property
    def n_tokens(self) -> int:
        return len(self.ids)


class FakeEngine:
    """Logits follow from the whole history, or spell ``script`` (token ids, then the end token) for every request.

    ``calls`` records (name, start, length) of every call; ``hold`` makes calls wait until it is set; ``step_s`` slows
    each call down; ``broken`` is raised by the next prefill.
    """

    def __init__(
        self, script: list[int] | None = None, *, context_tokens: int = 4096, step_s: float = 0.0,
        encoding: str = "dsv4-0731", replay_tokens: int = 0,
    ) -> None:  # fmt: skip
        self.replay_tokens = replay_tokens
        self.spec, self.context_tokens = model_spec(encoding), context_tokens
        self.script, self.step_s = script, step_s
        self.calls: list[tuple[str, int, int]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.broken: Exception | None = None
        self.open_sequences = 0
        self.threads: set[int] = set()

    def open(self) -> FakeSequence:
        self.open_sequences += 1
        return FakeSequence()

    def close(self, seq: FakeSequence) -> None:
        self.open_sequences -= 1

    def _call(self, name: str, seq: FakeSequence, ids: list[int]) -> np.ndarray:
        self.threads.add(threading.get_ident())
        self.calls.append((name, seq.n_tokens, len(ids)))
        self.hold.wait(10)
        if self.broken:
            error, self.broken = self.broken, None
            raise error
        time.sleep(self.step_s)
        for token in ids:
            seq.ids.append(int(token))
            if seq.n_tokens % BLOCK_TOKENS == 0 and seq.n_tokens >= seq.kept_tokens:
                seq.checkpoint = (seq.n_tokens, json.dumps(seq.ids).encode())
        return self._logits(seq)

    def prefill(self, seq: FakeSequence, ids: list[int]) -> np.ndarray:
        assert 1 <= len(ids) <= BLOCK_TOKENS
        return self._call("prefill", seq, list(ids))

    def decode(self, seq: FakeSequence, token: int) -> np.ndarray:
        seq.decoded += 1
        return self._call("decode", seq, [token])

    def _logits(self, seq: FakeSequence) -> np.ndarray:
        if self.script is not None:
            logits = np.full(VOCAB, -10.0, np.float32)
            logits[self.script[seq.decoded] if seq.decoded < len(self.script) else EOS_ID] = 10.0
            return logits
        rng = np.random.default_rng([len(seq.ids), *seq.ids[-4:], sum(seq.ids) % 65521])
        logits = rng.standard_normal(VOCAB).astype(np.float32)
        logits[EOS_ID] = -20.0
        return logits

    def export_block(self, seq: FakeSequence, index: int) -> bytes:
        block = seq.ids[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
        assert len(block) == BLOCK_TOKENS
        return json.dumps(block).encode()

    def export_tail(self, seq: FakeSequence, logits: np.ndarray) -> bytes:
        assert np.array_equal(logits, self._logits(seq))
        return b"tail" + json.dumps(seq.ids).encode()

    def import_block(self, seq: FakeSequence, index: int, payload: memoryview) -> None:
        assert not seq.ids
        assert index <= len(seq.imported)
        seq.imported[index:] = [json.loads(bytes(payload))]

    def resume(self, seq: FakeSequence, tokens: int, *, checkpoint: bytes | None = None, tail: bytes | None = None,
               blocks: int) -> np.ndarray | None:  # fmt: skip
        assert not seq.ids
        assert len(seq.imported) >= blocks
        entries = [token for block in seq.imported[:blocks] for token in block]
        seq.ids, seq.kept_tokens = entries[:tokens], len(entries)
        if tail is not None:
            ids = json.loads(tail.removeprefix(b"tail"))
            assert (len(ids), len(ids) // BLOCK_TOKENS) == (tokens, blocks)
            seq.ids = ids
            return self._logits(seq)
        if checkpoint is not None:
            assert seq.ids == entries == json.loads(checkpoint)
            seq.checkpoint = (tokens, checkpoint)
        else:
            assert tokens == max(0, blocks * BLOCK_TOKENS - self.replay_tokens) or not blocks
        return None


class FakeKv:
    """Prefixes in dicts, by tenant and ids. ``puts`` records where each stored checkpoint lies, in order.

    ``failing`` is raised by every put; ``forget`` leaves blocks without their checkpoints; ``pinned`` counts.
    """

    def __init__(self) -> None:
        self.checkpoints: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self.blocks: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self.tails: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self.replays: dict[tuple[str, str], list[int]] = {}
        self.puts: list[int] = []
        self.jobs: list[PutJob] = []
        self.notes: list[Note] = []
        self.failing: Exception | None = None
        self.hold = threading.Event()  # puts wait for it
        self.hold.set()
        self.pinned = 0
        self._status = KvStatus(enabled=True, max_bytes=1 << 30)

    def lookup(self, tenant: str, ids: list[int], sink: Sink, *, replay_tokens: int = 0, tails: bool = False,
               shared_tokens: int = 0) -> KvHit:  # fmt: skip
        assert self.pinned
        whose = functools.partial(self._owner, tenant, shared_tokens)
        reach = 0
        while (whose(end := (reach + 1) * BLOCK_TOKENS), tuple(ids[:end])) in self.blocks and end <= len(ids):
            reach += 1
        for index in range(reach):  # all of them, as a store may that finds out late where it can begin
            end = (index + 1) * BLOCK_TOKENS
            sink(index, memoryview(self.blocks[whose(end), tuple(ids[:end])]))
        common = reach * BLOCK_TOKENS
        lengths = range(len(ids) - 1, 0, -1) if tails else ()
        tail = next((n for n in lengths if (tenant, tuple(ids[:n])) in self.tails), 0)
        boundary = BLOCK_TOKENS * ((len(ids) - 1) // BLOCK_TOKENS)
        ends = range(boundary, 0, -BLOCK_TOKENS)
        tokens = next((n for n in ends if (whose(n), tuple(ids[:n])) in self.checkpoints), 0)
        if tail > tokens:
            return KvHit(tail, tail // BLOCK_TOKENS, None, self.tails[tenant, tuple(ids[:tail])], False, "", common)
        reason = "" if tokens == boundary else "no-unit"
        if replay_tokens and (start := min(common, boundary) - replay_tokens) > tokens:
            return KvHit(start, min(common, boundary) // BLOCK_TOKENS, None, None, True, "no-unit", common)
        if tokens:
            checkpoint = self.checkpoints[whose(tokens), tuple(ids[:tokens])]
            return KvHit(tokens, tokens // BLOCK_TOKENS, checkpoint, None, False, reason, common)
        return KvHit(0, 0, None, None, False, "no-unit" if boundary else "too-short", common)

    @contextlib.contextmanager
    def pin(self, tenant: str, ids: list[int], shared_tokens: int = 0) -> Iterator[None]:
        self.pinned += 1
        try:
            yield
        finally:
            self.pinned -= 1

    def put_all(self, jobs: list[PutJob]) -> list[PutResult]:
        self.hold.wait(10)
        if self.failing:
            raise self.failing
        self.jobs += jobs
        return [self._put(job) for job in jobs]

    def _put(self, job: PutJob) -> PutResult:
        whose = functools.partial(self._owner, job.tenant, job.shared_tokens)
        for index, payload in job.blocks.items():
            end = (index + 1) * BLOCK_TOKENS
            assert json.loads(payload) == list(job.ids[end - BLOCK_TOKENS : end])
            assert self.blocks.setdefault((whose(end), tuple(job.ids[:end])), payload) == payload
        for unit in job.units:
            assert unit.tokens % BLOCK_TOKENS == 0 < unit.tokens
            assert json.loads(unit.payload) == list(job.ids[: unit.tokens])
            for end in range(BLOCK_TOKENS, unit.tokens + 1, BLOCK_TOKENS):
                assert (whose(end), tuple(job.ids[:end])) in self.blocks
            self.checkpoints[whose(unit.tokens), tuple(job.ids[: unit.tokens])] = unit.payload
            self.puts.append(unit.tokens)
        if job.tail is not None:
            self.tails[job.tenant, tuple(job.tail.ids)] = job.tail.payload
        if job.note is not None:
            self.notes.append(job.note)
        self.replays |= {(job.tenant, name): list(ids) for name, ids in job.replays.items()}
        return PutResult(True)

    def replay_ids(self, tenant: str, names: list[str]) -> dict[str, list[int]]:
        return {name: self.replays[tenant, name] for name in names if (tenant, name) in self.replays}

    @staticmethod
    def _owner(tenant: str, shared_tokens: int, end: int) -> str:
        return TENANT_SHARED if end <= shared_tokens else tenant

    def status(self) -> KvStatus:
        return self._status


def spell(text: str) -> list[int]:
    """Byte tokens of ``text``; literals of control tokens become those tokens."""
    ids: list[int] = []
    while text:
        literal = next((lit for lit in CONTROL_LITERALS if text.startswith(lit)), None)
        if literal:
            ids.append(tokenizer().control_id(literal))
            text = text[len(literal) :]
        else:
            ids += [2 + byte for byte in text[0].encode()]
            text = text[1:]
    return ids
