"""Which bytes of the state make a 256-token block and a state checkpoint (docs/kv-format.md, "Payloads").

Everything follows from ``ModelSpec.states``. A block is immutable and holds every compressed layer's entries of 256
tokens. A checkpoint is taken at a multiple of 256 and holds what is left of the past there: each window, and of the
overlapping (CSA) compressors the last group's a-half. At such a position no group of any ratio is half full, so the
HCA rings and the other ring cells hold nothing that a fresh sequence does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from appliance.errors import BundleError, EngineError, StoreError
from appliance.model import ModelSpec, StateTensor

LAYOUT_VERSION = 2  # of the three payloads; the tail (runtime.kv.tail) follows from states and vocab_size
DTYPES: dict[str, np.dtype[Any]] = {"u8": np.dtype("u1"), "f32": np.dtype("<f4")}

Pools = Mapping[str, npt.NDArray[Any]]
Payload = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Part:
    """One run of payload bytes: ``rows`` of the page or slot, ``columns`` side by side, row-major, little-endian.

    ``offset`` and ``size_bytes`` are in bytes from the start of the payload, ``rows`` and every pair of ``columns``
    half-open ranges in elements, ``shape`` = (number of rows, sum of the columns' lengths).
    """

    state_name: str
    offset: int
    size_bytes: int
    shape: tuple[int, int]
    dtype: str  # "u8" | "f32"
    rows: tuple[int, int]
    columns: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Blocks and checkpoints of one model; ``layout_id`` (64 hex digits) names the exact byte order."""

    block_tokens: int
    states: tuple[StateTensor, ...]
    block_parts: tuple[Part, ...]
    checkpoint_parts: tuple[Part, ...]
    block_bytes: int
    checkpoint_bytes: int
    vocab_size: int
    layout_id: str

    @staticmethod
    def from_spec(spec: ModelSpec) -> KvLayout:
        """Derive both payloads; raises BundleError where 256 is not a multiple of a ratio, a window or a ring."""
        for state in spec.states:
            _check_state(state, spec.block_tokens)
        block = _lay_out([(s, (0, s.rows), ((0, s.width),)) for s in spec.states if s.paged])
        checkpoint = _lay_out(_checkpoint_pieces(spec))
        return KvLayout(
            spec.block_tokens, spec.states, block, checkpoint, _total(block), _total(checkpoint),
            spec.config.vocab_size, _layout_id(spec, block, checkpoint),
        )  # fmt: skip


_Piece = tuple[StateTensor, tuple[int, int], tuple[tuple[int, int], ...]]


def _check_state(state: StateTensor, block_tokens: int) -> None:
    if state.paged and state.rows * state.ratio != block_tokens:
        raise BundleError(
            f"model.json: state {state.name} has {state.rows} rows of {state.ratio} tokens, not {block_tokens} tokens "
            "a block; build the bundle again"
        )
    if not state.paged and block_tokens % state.rows:
        raise BundleError(
            f"model.json: {block_tokens} is not a multiple of the {state.rows} rows of {state.name}; "
            "this model cannot be cached, build the bundle again"
        )


def _checkpoint_pieces(spec: ModelSpec) -> list[_Piece]:
    pieces: list[_Piece] = []
    for state in spec.states:
        if state.kind == "win":
            pieces.append((state, (0, state.rows), ((0, state.width),)))
        elif not state.paged and spec.config.layer_kind(state.layer) == "C":
            # A ring row of an overlapping compressor is kv a | kv b | gate a | gate b, each d wide; entry s needs the
            # a-halves of group s-1 and the b-halves of its own group: at a boundary only the former are alive, and
            # 256 mod 2r = 0 puts them in the ring's second half.
            d = state.width // 4
            pieces.append((state, (state.rows // 2, state.rows), ((0, d), (2 * d, 3 * d))))
    return pieces


def _lay_out(pieces: Sequence[_Piece]) -> tuple[Part, ...]:
    parts: list[Part] = []
    offset = 0
    for state, rows, columns in pieces:
        shape = (rows[1] - rows[0], sum(stop - start for start, stop in columns))
        size_bytes = shape[0] * shape[1] * DTYPES[state.dtype].itemsize
        parts.append(Part(state.name, offset, size_bytes, shape, state.dtype, rows, columns))
        offset += size_bytes
    return tuple(parts)


def _total(parts: tuple[Part, ...]) -> int:
    return sum(part.size_bytes for part in parts)


def _layout_id(spec: ModelSpec, block: tuple[Part, ...], checkpoint: tuple[Part, ...]) -> str:
    def rows(parts: tuple[Part, ...]) -> list[list[Any]]:
        return [[p.state_name, p.offset, p.size_bytes, p.dtype, list(p.rows), [list(c) for c in p.columns]]
                for p in parts]  # fmt: skip

    described = {"block": rows(block), "block_tokens": spec.block_tokens, "checkpoint": rows(checkpoint),
                 "version": LAYOUT_VERSION, "vocab_size": spec.config.vocab_size}  # fmt: skip
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def gather_block(pools: Pools, layout: KvLayout, block_id: int) -> bytes:
    """Copy page ``block_id`` of every [blocks, rows, width] pool out; ``layout.block_bytes`` bytes."""
    return _gather(pools, layout.block_parts, layout.block_bytes, block_id)


def gather_checkpoint(pools: Pools, layout: KvLayout, slot: int) -> bytes:
    """Copy the checkpoint of ``slot`` out of the [slots, rows, width] pools; its position must be a multiple of 256."""
    return _gather(pools, layout.checkpoint_parts, layout.checkpoint_bytes, slot)


def scatter_block(pools: Pools, layout: KvLayout, block_id: int, payload: Payload) -> None:
    """Write a block payload into page ``block_id``; nothing is written when length or pools do not fit (StoreError)."""
    BlockWriter(pools, layout).write(block_id, payload)


class BlockWriter:
    """Writes block payloads into the pages of ``pools``, which are checked once and must stay where they are.

    A page is contiguous in its pool and in the payload: each part is one copy, and a block costs hardly more than its
    bytes do.
    """

    def __init__(self, pools: Pools, layout: KvLayout) -> None:
        check_pools(pools, [state for state in layout.states if state.paged], 1)
        self._block_bytes = layout.block_bytes
        self._count = min(len(pools[part.state_name]) for part in layout.block_parts) if layout.block_parts else 2
        self._runs = [
            (pools[part.state_name].data.cast("B"), part.offset, part.size_bytes) for part in layout.block_parts
        ]

    def write(self, block_id: int, payload: Payload) -> None:
        """Copy ``payload`` into page ``block_id``; StoreError for a wrong length, EngineError for a page not there."""
        _check_payload(payload, self._block_bytes)
        _check_index(block_id)
        if block_id >= self._count:
            raise EngineError(f"block {block_id} is not one of {self._count} pages")
        view = memoryview(payload)
        for page, offset, size_bytes in self._runs:
            page[block_id * size_bytes : (block_id + 1) * size_bytes] = view[offset : offset + size_bytes]


def scatter_checkpoint(pools: Pools, layout: KvLayout, slot: int, payload: Payload) -> None:
    """Write a checkpoint into ``slot``; every ring cell outside it becomes as for a fresh sequence."""
    _check_payload(payload, layout.checkpoint_bytes)
    check_pools(pools, [s for s in layout.states if not s.paged], slot)
    reset_states(pools, layout.states, slot)
    _scatter(pools, layout.checkpoint_parts, slot, payload)


def reset_slot(pools: Pools, spec: ModelSpec, slot: int) -> None:
    """Make ``slot`` as new: windows zero, rings kv 0 and gate −inf (the first and second half of their columns)."""
    _check_index(slot)
    reset_states(pools, spec.states, slot)


def reset_states(pools: Pools, states: Sequence[StateTensor], slot: int) -> None:
    """As reset_slot, of a slot that was checked."""
    for state in states:
        if state.paged:
            continue
        cells = pools[state.name][slot]
        cells[...] = 0
        if state.kind != "win":
            cells[:, state.width // 2 :] = -np.inf


def _check_index(index: int) -> None:
    if index < 1:
        raise EngineError(f"block or slot {index} is reserved and never written; ask for 1 or more")


def _check_payload(payload: Payload, size_bytes: int) -> None:
    if len(payload) != size_bytes:
        raise StoreError(f"KV payload has {len(payload)} bytes, the layout says {size_bytes}; delete the kv directory")


def check_pools(pools: Pools, states: Sequence[StateTensor], index: int) -> None:
    """EngineError unless page or slot ``index`` of each state is there, of its shape and dtype, and not reserved."""
    _check_index(index)
    for state in states:
        pool = pools.get(state.name)
        wanted = (state.rows, state.width)
        if pool is None or pool.shape[1:] != wanted or index >= pool.shape[0] or pool.dtype != DTYPES[state.dtype]:
            found = "missing" if pool is None else f"{pool.dtype} {list(pool.shape)}"
            raise EngineError(f"state pool {state.name} is {found}: no {state.dtype} {list(wanted)} at {index}")


def _gather(pools: Pools, parts: tuple[Part, ...], size_bytes: int, index: int) -> bytes:
    _check_index(index)
    payload = np.empty(size_bytes, np.uint8)
    for part in parts:
        cells = payload[part.offset : part.offset + part.size_bytes].view(DTYPES[part.dtype]).reshape(part.shape)
        page, at = pools[part.state_name][index, part.rows[0] : part.rows[1]], 0
        for start, stop in part.columns:
            cells[:, at : at + stop - start] = page[:, start:stop]
            at += stop - start
    return payload.tobytes()


def _scatter(pools: Pools, parts: tuple[Part, ...], index: int, payload: Payload) -> None:
    stored = np.frombuffer(payload, np.uint8)
    for part in parts:
        cells = stored[part.offset : part.offset + part.size_bytes].view(DTYPES[part.dtype]).reshape(part.shape)
        page, at = pools[part.state_name][index, part.rows[0] : part.rows[1]], 0
        for start, stop in part.columns:
            page[:, start:stop] = cells[:, at : at + stop - start]
            at += stop - start
