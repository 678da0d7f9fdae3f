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
    KvLayout,
    gather_block,
    gather_checkpoint,
    reset_slot,
    scatter_block,
    scatter_checkpoint,
)
from runtime.rope import RopeTables

Logits = npt.NDArray[np.float32]
_NUMPY = {"u8": np.uint8, "f32": np.float32}


@dataclass(slots=True, eq=False)
class Sequence:
    """One timeline. ``checkpoint`` is the newest copy at a multiple of 256: (tokens, payload)."""

    slot: int
    blocks: list[int] = field(default_factory=list)
    n_tokens: int = 0
    checkpoint: tuple[int, bytes] | None = None


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
        self._rope = RopeTables(spec.config)
        self._ratios = sorted({r for r in spec.config.compress_ratios if r})
        blocks = max_sequences * -(-context_tokens // spec.block_tokens) + 1
        self.pools = {s.name: self._pool(s, blocks if s.paged else max_sequences + 1) for s in spec.states}
        self._free_slots = list(range(max_sequences, 0, -1))
        self._free_blocks = list(range(blocks - 1, 0, -1))

    @staticmethod
    def _pool(state: StateTensor, count: int) -> npt.NDArray[Any]:
        pool: npt.NDArray[Any] = np.zeros((count, state.rows, state.width), _NUMPY[state.dtype])
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
        seq.blocks, seq.n_tokens, seq.checkpoint = [], 0, None

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
        self._grow(seq, seq.n_tokens + len(ids))
        padded = [*ids, 0] if len(ids) == 1 else list(ids)
        outputs = self.backend.run(self._feeds(seq, padded, rows))
        self._commit(seq, len(ids), outputs)
        logits: Logits = outputs["logits"]
        return logits

    def _feeds(self, seq: Sequence, ids: list[int], rows: Ids[int]) -> dict[str, npt.NDArray[Any]]:
        start, m = seq.n_tokens, len(ids)
        feeds: dict[str, npt.NDArray[Any]] = {
            "ids": np.array([ids], np.int64),
            "pos": np.array([start], np.int64),
            "slots": np.array([seq.slot], np.int32),
            "block_table": np.array([seq.blocks], np.int32),  # as many as the real tokens need: width moves bits
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
        """Accept the first ``count`` fresh rows; stop at each multiple of 256 for the checkpoint."""
        start, end, block = seq.n_tokens, seq.n_tokens + count, self.spec.block_tokens
        while seq.n_tokens < end:
            stop = min(end, (seq.n_tokens // block + 1) * block)
            for state in self.spec.states:
                fresh = outputs[f"{state.name}.new"][0]
                if state.paged:
                    self._commit_entries(seq, state, fresh, start, stop)
                else:
                    self._commit_ring(seq, state, fresh, start, stop)
            seq.n_tokens = stop
            if stop % block == 0:
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

    def restore(self, seq: Sequence, blocks: Ids[bytes], checkpoint: bytes) -> None:
        """Put a fresh sequence at 256·len(blocks) tokens, as if it had just been computed up to there."""
        if seq.n_tokens:
            raise EngineError("only a fresh sequence can be restored")
        tokens = len(blocks) * self.spec.block_tokens
        self._grow(seq, tokens)
        for block, payload in zip(seq.blocks, blocks, strict=True):
            scatter_block(self.pools, self.layout, block, payload)
        scatter_checkpoint(self.pools, self.layout, seq.slot, checkpoint)
        seq.n_tokens, seq.checkpoint = tokens, (tokens, checkpoint)
