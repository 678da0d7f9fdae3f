"""A toy engine, KV store and tokenizer for the tests of everything between a socket and the engine."""

from __future__ import annotations

import itertools
import json
import threading
import time
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from appliance.model import BLOCK_TOKENS, ModelConfig, ModelSpec, RopeScaling
from appliance.wire import KvStatus
from runtime.chat.encoding import CONTROL_LITERALS, DSML, END_THINK, EOS, THINK
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
        encoding: str = "dsv4-0731",
    ) -> None:  # fmt: skip
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
            if seq.n_tokens % BLOCK_TOKENS == 0:
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

    def restore(self, seq: FakeSequence, blocks: list[bytes], checkpoint: bytes) -> None:
        assert not seq.ids
        seq.ids = [token for block in blocks for token in json.loads(block)]
        assert seq.ids == json.loads(checkpoint)
        seq.checkpoint = (len(seq.ids), checkpoint)


@dataclass
class FakeHit:
    tokens: int
    blocks: list[bytes]
    checkpoint: bytes | None
    reason: str


class FakeKv:
    """Prefixes in a dict. Blocks are kept once; ``puts`` records how many tokens each put covered."""

    def __init__(self) -> None:
        self.checkpoints: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self.blocks: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self.puts: list[int] = []
        self.failing: Exception | None = None
        self._status = KvStatus(enabled=True, max_bytes=1 << 30)

    def lookup(self, tenant: str, ids: list[int]) -> FakeHit:
        for tokens in range(BLOCK_TOKENS * ((len(ids) - 1) // BLOCK_TOKENS), 0, -BLOCK_TOKENS):
            checkpoint = self.checkpoints.get((tenant, tuple(ids[:tokens])))
            if checkpoint is not None:
                ends = range(BLOCK_TOKENS, tokens + 1, BLOCK_TOKENS)
                return FakeHit(tokens, [self.blocks[tenant, tuple(ids[:end])] for end in ends], checkpoint, "")
        return FakeHit(0, [], None, "no-unit" if len(ids) > BLOCK_TOKENS else "too-short")

    def put(self, tenant: str, ids: list[int], block, checkpoint: bytes) -> None:
        if self.failing:
            raise self.failing
        assert len(ids)
        assert len(ids) % BLOCK_TOKENS == 0
        self.puts.append(len(ids))
        for index in range(len(ids) // BLOCK_TOKENS):
            key = (tenant, tuple(ids[: (index + 1) * BLOCK_TOKENS]))
            if key not in self.blocks:
                self.blocks[key] = block(index)
        self.checkpoints[tenant, tuple(ids)] = checkpoint

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
