"""The engine: one loaded model and its sequences. It owns all state; the graph reads it and hands back fresh rows.

A :class:`Sequence` is one timeline: a slot of the per-sequence pools, a table of 256-token blocks, a length. Every
call runs the graph once and then commits what was accepted: ring rows at token mod L, closed entries into the open
blocks. A commit that crosses a multiple of 256 stops there and copies the state checkpoint out first.

Block 0 and slot 0 are reserved, zero, never written. A call never has b·m = 1: onnxruntime's one-row products round
differently, so a lone token is followed by a padding token that is never committed.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from appliance.errors import EngineError
from appliance.model import ModelSpec, StateTensor
from appliance.wire import FULL
from runtime.backends.base import Arrays, Backend
from runtime.kv.layout import (
    BlockWriter,
    KvLayout,
    Payload,
    gather_block,
    gather_checkpoint,
    reset_slot,
    scatter_checkpoint,
)
from runtime.kv.replay import replay_tokens
from runtime.kv.tail import gather_tail, scatter_tail
from runtime.rope import RopeTables

Logits = npt.NDArray[np.float32]
_NUMPY = {"u8": np.uint8, "f32": np.float32}


@dataclass(slots=True, eq=False)
class Sequence:
    """One timeline. ``checkpoint`` is the newest copy at a multiple of 256: (tokens, payload).

    ``kept_tokens``: entries of the tokens below it were imported and stay as they are; above ``n_tokens`` only during
    an exact replay.
    """

    slot: int
    blocks: list[int] = field(default_factory=list)
    n_tokens: int = 0
    checkpoint: tuple[int, bytes] | None = None
    kept_tokens: int = 0


class Engine:
    """Runs ``spec`` on ``backend`` for up to ``max_sequences`` sequences of ``context_tokens`` tokens each.

    ``profile`` names whose graph the backend has.
    """

    reuse_mixed = False  # True once runtime.bits has seen that m = 1, a tail and 256 give equal bits here

    def __init__(
        self, spec: ModelSpec, backend: Backend, *, context_tokens: int, max_sequences: int = 1, profile: str = FULL
    ) -> None:  # fmt: skip
        if not 2 <= context_tokens <= spec.config.max_position_embeddings:
            most = spec.config.max_position_embeddings
            raise EngineError(f"context_tokens {context_tokens} is not between 2 and the model's {most}")
        self.spec, self.backend, self.context_tokens, self.profile = spec, backend, context_tokens, profile
        self.layout = KvLayout.from_spec(spec)
        replay = replay_tokens(spec.config, spec.chunk_tokens)
        self._replay_tokens = replay if replay < context_tokens else 0
        self._rope = RopeTables(spec.config)
        self._ratios = sorted({r for r in spec.config.compress_ratios if r})
        blocks = max_sequences * -(-context_tokens // spec.block_tokens) + 1
        self.pools = {s.name: self._pool(s, blocks if s.paged else max_sequences + 1) for s in spec.states}
        self._block_writer = BlockWriter(self.pools, self.layout)
        self._free_slots = list(range(max_sequences, 0, -1))
        self._free_blocks = list(range(blocks - 1, 0, -1))

    @staticmethod
    def _pool(state: StateTensor, count: int) -> npt.NDArray[Any]:
        pool: npt.NDArray[Any] = np.empty((count, state.rows, state.width), _NUMPY[state.dtype])
        pool.fill(0)  # written, so that the memory is there: a restore would wait for it longer than for decryption
        if state.kind in ("ring", "iring"):
            pool[:, :, state.width // 2 :] = -np.inf  # gates of tokens before the first
        return pool

    # -- sequences ---------------------------------------------------------------------------------------------------

    def open(self) -> Sequence:
        """A new sequence in a clean slot; EngineError when all slots are taken."""
        if not self._free_slots:
            raise EngineError("every sequence slot is in use; close one first")
        seq = Sequence(self._free_slots.pop())
        reset_slot(self.pools, self.spec, seq.slot)
        return seq

    def close(self, seq: Sequence) -> None:
        """Give slot and blocks back; the sequence must not be used again."""
        self._free_slots.append(seq.slot)
        self._free_blocks.extend(reversed(seq.blocks))
        seq.blocks, seq.n_tokens, seq.checkpoint, seq.kept_tokens = [], 0, None, 0

    def _grow(self, seq: Sequence, tokens: int) -> None:
        """Blocks for ``tokens`` tokens in all."""
        if tokens > self.context_tokens:
            raise EngineError(f"{tokens} tokens do not fit the context of {self.context_tokens}")
        while len(seq.blocks) * self.spec.block_tokens < tokens:
            if not self._free_blocks:
                raise EngineError("the KV pool is full; close a sequence or raise engine.context_tokens")
            seq.blocks.append(self._free_blocks.pop())

    # -- calls -------------------------------------------------------------------------------------------------------

    def prefill(self, seq: Sequence, ids: Ids[int]) -> Logits:
        """Append ``ids`` in ONE call; logits f32 [vocab] after the last of them."""
        row: Logits = self.forward(seq, ids, rows=[len(ids) - 1])[0]
        return row

    def decode(self, seq: Sequence, token: int) -> Logits:
        """Append one token; logits f32 [vocab]."""
        row: Logits = self.forward(seq, [token], rows=[0])[0]
        return row

    def forward(self, seq: Sequence, ids: Ids[int], *, rows: Ids[int]) -> Logits:
        """Append ``ids`` [m ≥ 1] in one call; logits f32 [len(rows), vocab] of the named ones."""
        if not ids or min(ids) < 0 or max(ids) >= self.spec.config.vocab_size:
            raise EngineError(f"a call takes 1 or more token ids below {self.spec.config.vocab_size}")
        if seq.n_tokens < seq.kept_tokens and len(ids) != self.spec.chunk_tokens:
            raise EngineError(f"a replay goes by whole chunks of {self.spec.chunk_tokens} tokens, not by {len(ids)}")
        self._grow(seq, seq.n_tokens + len(ids))
        padded = [*ids, 0] if len(ids) == 1 else list(ids)
        outputs = self.backend.run(self._feeds(seq, padded, rows))
        self._commit(seq, len(ids), outputs)
        logits: Logits = outputs["logits"]
        return logits

    def _feeds(self, seq: Sequence, ids: list[int], rows: Ids[int]) -> dict[str, npt.NDArray[Any]]:
        start, m = seq.n_tokens, len(ids)
        needed = -(-(start + m) // self.spec.block_tokens)  # no more: the table's width moves bits, also in a replay
        feeds: dict[str, npt.NDArray[Any]] = {
            "ids": np.array([ids], np.int64),
            "pos": np.array([start], np.int64),
            "slots": np.array([seq.slot], np.int32),
            "block_table": np.array([seq.blocks[:needed]], np.int32),
            "rows_out": np.array(rows, np.int64),
        }
        at = np.arange(start, start + m, dtype=np.int64)[None]
        for name in ("main", "comp"):
            feeds[f"cos_{name}"], feeds[f"sin_{name}"] = self._rope.rows(name, at)
        for ratio in self._ratios:
            entry = start // ratio + np.arange(-(-m // ratio), dtype=np.int64)[None]
            feeds[f"cos_c{ratio}"], feeds[f"sin_c{ratio}"] = self._rope.rows("comp", entry * ratio)
        return feeds | self.pools

    # -- commit ------------------------------------------------------------------------------------------------------

    def _commit(self, seq: Sequence, count: int, outputs: Arrays) -> None:
        """Accept the first ``count`` fresh rows; stop at each multiple of 256 for the checkpoint.

        During a replay entries stay as imported, and nothing before its end is exact enough for a checkpoint.
        """
        start, end, block = seq.n_tokens, seq.n_tokens + count, self.spec.block_tokens
        while seq.n_tokens < end:
            stop = min(end, (seq.n_tokens // block + 1) * block)
            for state in self.spec.states:
                fresh = outputs[f"{state.name}.new"][0]
                if not state.paged:
                    self._commit_ring(seq, state, fresh, start, stop)
                elif stop > seq.kept_tokens:
                    self._commit_entries(seq, state, fresh, start, stop)
            seq.n_tokens = stop
            if stop % block == 0 and stop >= seq.kept_tokens:
                seq.checkpoint = (stop, gather_checkpoint(self.pools, self.layout, seq.slot))

    def _commit_ring(self, seq: Sequence, state: StateTensor, fresh: npt.NDArray[Any], start: int, stop: int) -> None:
        """Tokens seq.n_tokens … stop − 1 to rows token mod L; fresh row i is token start + i."""
        first = max(seq.n_tokens, stop - state.rows)
        tokens = np.arange(first, stop)
        self.pools[state.name][seq.slot, tokens % state.rows] = fresh[first - start : stop - start]

    def _commit_entries(
        self, seq: Sequence, state: StateTensor, fresh: npt.NDArray[Any], start: int, stop: int
    ) -> None:  # fmt: skip
        """Entries that closed: seq.n_tokens // r … stop // r − 1; candidate k is entry start // r + k."""
        entries = np.arange(seq.n_tokens // state.ratio, stop // state.ratio)
        if entries.size:
            pages = np.array(seq.blocks)[entries // state.rows]
            self.pools[state.name][pages, entries % state.rows] = fresh[entries - start // state.ratio]

    # -- persistence -------------------------------------------------------------------------------------------------

    def export_block(self, seq: Sequence, index: int) -> bytes:
        """Payload of the sequence's full block ``index`` (tokens 256·index … 256·index + 255)."""
        if not 0 <= index < seq.n_tokens // self.spec.block_tokens:
            raise EngineError(f"block {index} of a sequence of {seq.n_tokens} tokens is not full")
        return gather_block(self.pools, self.layout, seq.blocks[index])

    def export_tail(self, seq: Sequence, logits: Logits) -> bytes:
        """The exact tail after all tokens of ``seq``; ``logits`` f32 [vocab] are those of its last token."""
        if not seq.n_tokens or seq.n_tokens < seq.kept_tokens:
            raise EngineError("a sequence without tokens, or in a replay, has no tail")
        open_block = seq.blocks[seq.n_tokens // self.spec.block_tokens :]
        return gather_tail(
            self.pools, self.layout, seq.slot, open_block[0] if open_block else 0, seq.n_tokens, logits
        )  # fmt: skip

    def import_block(self, seq: Sequence, index: int, payload: Payload) -> None:
        """Put a stored block's payload into block ``index`` of a fresh sequence: 0, 1, 2 … in turn, or one again.

        Fits a store's sink; the payload is copied. The sequence stays fresh until :meth:`resume`. Raises EngineError
        where the order, the context or the pool does not allow it, StoreError for a payload of a wrong length.
        """
        if seq.n_tokens or not 0 <= index <= len(seq.blocks):
            raise EngineError(f"block {index} cannot follow {len(seq.blocks)} blocks and {seq.n_tokens} tokens")
        self._grow(seq, (max(index + 1, len(seq.blocks))) * self.spec.block_tokens)
        self._block_writer.write(seq.blocks[index], payload)

    def resume(
        self, seq: Sequence, tokens: int, *, checkpoint: Payload | None = None, tail: Payload | None = None, blocks: int
    ) -> Logits | None:  # fmt: skip
        """Put a fresh sequence at ``tokens`` on top of its first ``blocks`` imported blocks; the others are dropped.

        ``checkpoint``: the state after 256·blocks = tokens tokens, as if just computed. ``tail``: the state after any
        number of tokens in block ``blocks``; returns its logits f32 [vocab]. Neither: an exact replay. The caller then
        prefills from ``tokens`` on by whole chunks; entries below 256·blocks stay, no checkpoint is taken before that,
        and what is computed from there on is exact (runtime.kv.replay says why).
        """
        end = blocks * self.spec.block_tokens
        if seq.n_tokens or not 0 <= blocks <= len(seq.blocks):
            raise EngineError(f"{blocks} blocks of {len(seq.blocks)} cannot be resumed after {seq.n_tokens} tokens")
        if checkpoint is not None and tokens == end > 0 and tail is None:
            scatter_checkpoint(self.pools, self.layout, seq.slot, checkpoint)
            seq.checkpoint = (tokens, bytes(checkpoint))
        elif tail is not None and tokens // self.spec.block_tokens == blocks and tokens and checkpoint is None:
            return self._resume_tail(seq, tokens, tail, blocks)
        elif checkpoint is not None or tail is not None or not self._replays(tokens, end):
            raise EngineError(f"{tokens} tokens do not go with {blocks} blocks and what else was given")
        self._drop(seq, blocks)
        seq.n_tokens, seq.kept_tokens = tokens, end
        return None

    def _resume_tail(self, seq: Sequence, tokens: int, tail: Payload, blocks: int) -> Logits:
        self._drop(seq, blocks)
        self._grow(seq, tokens)
        open_block = seq.blocks[-1] if len(seq.blocks) > blocks else 0
        logits = scatter_tail(self.pools, self.layout, seq.slot, open_block, tokens, tail)
        seq.n_tokens, seq.kept_tokens = tokens, blocks * self.spec.block_tokens
        if tokens == seq.kept_tokens:
            seq.checkpoint = (tokens, gather_checkpoint(self.pools, self.layout, seq.slot))
        return logits

    def _drop(self, seq: Sequence, blocks: int) -> None:
        """Give all but the first ``blocks`` blocks back."""
        self._free_blocks.extend(reversed(seq.blocks[blocks:]))
        del seq.blocks[blocks:]

    @property
    def replay_tokens(self) -> int:
        """R: an exact replay begins that many tokens before the end of the stored blocks; 0: it would never pay."""
        return self._replay_tokens

    def _replays(self, tokens: int, end: int) -> bool:
        """Whether a replay from ``tokens`` on is exact from ``end`` on."""
        if tokens % self.spec.chunk_tokens or tokens > end:
            return False
        return tokens == 0 or 0 < self._replay_tokens <= end - tokens
