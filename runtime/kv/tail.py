"""The exact tail: what is left of a sequence after any number of tokens n ≥ 1 (docs/kv-format.md, "Exact tail").

Blocks below 256·⌊n/256⌋ are stored as usual. The tail has the rest, live rows only: of each window the tokens that
still exist, of each ring the half full group (and with overlap the a-half of the group before), the closed entries of
the open block, and the logits after token n − 1, so that nothing need be computed to go on. At a multiple of 256 that
is a checkpoint and the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from appliance.errors import EngineError, StoreError
from appliance.model import StateTensor
from runtime.kv.layout import DTYPES, KvLayout, Payload, Pools, check_pools, reset_states

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TailPart:
    """One run of payload bytes: ``rows`` of the slot (or, of a paged state, of the open block's page) in this order,
    ``columns`` (half-open ranges) side by side, little-endian. ``offset`` and ``size_bytes`` in bytes.
    """  # fmt: skip

    state_name: str
    paged: bool
    dtype: str
    offset: int
    size_bytes: int
    rows: tuple[int, ...]
    columns: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, sum of the columns' lengths)."""
        return len(self.rows), sum(stop - start for start, stop in self.columns)


def tail_bytes(layout: KvLayout, tokens: int) -> int:
    """Payload size of the tail after ``tokens`` ≥ 1 tokens, logits included."""
    parts = tail_parts(layout, tokens)
    return parts[-1].offset + parts[-1].size_bytes + 4 * layout.vocab_size


def tail_parts(layout: KvLayout, tokens: int) -> tuple[TailPart, ...]:
    """The parts of the tail after ``tokens`` ≥ 1 tokens, without the logits, which follow the last."""
    if tokens < 1:
        raise EngineError(f"a tail is taken after 1 or more tokens, not {tokens}")
    ratios = {state.layer: state.ratio for state in layout.states if state.paged}
    parts: list[TailPart] = []
    offset = 0
    for state in layout.states:
        for rows, columns in _live(state, ratios.get(state.layer, 1), layout.block_tokens, tokens):
            if rows:
                part = TailPart(state.name, state.paged, state.dtype, offset, 0, tuple(rows), columns)
                size_bytes = part.shape[0] * part.shape[1] * DTYPES[state.dtype].itemsize
                parts.append(TailPart(state.name, state.paged, state.dtype, offset, size_bytes, part.rows, columns))
                offset += size_bytes
    return tuple(parts)


_Rows = tuple[list[int], tuple[tuple[int, int], ...]]


def _live(state: StateTensor, ratio: int, block_tokens: int, tokens: int) -> Iterator[_Rows]:
    """Rows and columns of ``state`` that a later token can still read, oldest first."""
    everything = ((0, state.width),)
    if state.paged:
        first, stop = tokens // block_tokens * block_tokens // ratio, tokens // ratio
        yield [entry % state.rows for entry in range(first, stop)], everything
    elif state.kind == "win":
        yield [token % state.rows for token in range(max(0, tokens - state.rows), tokens)], everything
    else:
        group = tokens // ratio * ratio  # first token of the group that is not closed
        if state.rows == 2 * ratio:  # overlap: a ring row is kv a | kv b | gate a | gate b
            d = state.width // 4
            yield [t % state.rows for t in range(max(0, group - ratio), group)], ((0, d), (2 * d, 3 * d))
        yield [token % state.rows for token in range(group, tokens)], everything


def gather_tail(pools: Pools, layout: KvLayout, slot: int, block_id: int, tokens: int, logits: Logits) -> bytes:
    """The tail of the sequence in ``slot`` whose open block is ``block_id`` (not looked at when nothing is open)."""
    if logits.shape != (layout.vocab_size,) or logits.dtype != np.float32:
        raise EngineError(f"a tail takes logits f32 [{layout.vocab_size}], not {logits.dtype} {list(logits.shape)}")
    payload = np.empty(tail_bytes(layout, tokens), np.uint8)
    for part in tail_parts(layout, tokens):
        cells, page = _cells(payload, part), pools[part.state_name][block_id if part.paged else slot]
        at = 0
        for start, stop in part.columns:
            cells[:, at : at + stop - start] = page[list(part.rows), start:stop]
            at += stop - start
    payload[-4 * layout.vocab_size :].view("<f4")[:] = logits
    return payload.tobytes()


def scatter_tail(pools: Pools, layout: KvLayout, slot: int, block_id: int, tokens: int, payload: Payload) -> Logits:
    """Write a tail into ``slot`` and page ``block_id``; every other cell of the slot becomes as for a fresh sequence.

    Returns the logits. Nothing is written when length or pools do not fit (StoreError, EngineError).
    """
    parts, size_bytes = tail_parts(layout, tokens), tail_bytes(layout, tokens)
    if len(payload) != size_bytes:
        raise StoreError(f"KV tail of {tokens} tokens has {len(payload)} bytes, the layout says {size_bytes}")
    check_pools(pools, [state for state in layout.states if not state.paged], slot)
    if any(part.paged for part in parts):
        check_pools(pools, [state for state in layout.states if state.paged], block_id)
    reset_states(pools, layout.states, slot)
    stored = np.frombuffer(payload, np.uint8)
    for part in parts:
        cells, page = _cells(stored, part), pools[part.state_name][block_id if part.paged else slot]
        at = 0
        for start, stop in part.columns:
            page[list(part.rows), start:stop] = cells[:, at : at + stop - start]
            at += stop - start
    return stored[-4 * layout.vocab_size :].view("<f4").astype(np.float32)


def _cells(payload: npt.NDArray[np.uint8], part: TailPart) -> npt.NDArray[Any]:
    """The part's bytes as an array of its shape; unaligned f32 is fine for numpy."""
    return payload[part.offset : part.offset + part.size_bytes].view(DTYPES[part.dtype]).reshape(part.shape)
