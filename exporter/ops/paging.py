"""How bodies read paged state: ring rows oldest first, entries by block table, fresh entries in their columns.

Everything is addressed by absolute token or entry index; masks compare indices and choose with Where.
"""

from __future__ import annotations

import numpy as np

from exporter.ops.body import Body, OpFunction


def tokens(body: Body, pos: str, count: str) -> str:
    """pos i64 [b], count i64 [] → absolute positions i64 [b, count]: pos, pos+1, …"""
    return str(body.op("Add", body.unsqueeze(pos, 1), body.arange(count)))


def history(body: Body, ring: str, slots: str, pos: str, rows: int, width: int) -> str:
    """ring [slots, L, width] → [b, L, width]: row j is token pos − L + j, kept at row (pos − L + j) mod L."""
    age = body.op("Add", body.unsqueeze(pos, 1), body.const(np.arange(rows) - rows, np.int64))
    row = body.op("Mod", age, body.i64(rows))
    base = body.op("Mul", body.cast(slots, 7), body.i64(rows))
    flat = body.op("Add", row, body.unsqueeze(base, 1))
    return str(body.op("Gather", body.reshape(ring, -1, width), flat, axis=0))


def entries(body: Body, pool: str, block_table: str, fresh: str, pos: str, *, rows: int, width: int, ratio: int) -> str:
    """pool [blocks, R, width], block_table i32 [b, nb], fresh [b, c, width] → [b, nb·R, width].

    Entry s stands in column s: from the pages below pos // r, from ``fresh`` (candidate s − pos // r) from there on.
    Columns past the last candidate repeat it; masks never show them.
    """
    pages = body.op("Gather", pool, block_table, axis=0)  # [b, nb, R, width]
    count = body.op("Mul", body.dim(block_table, 1), body.i64(rows))
    stored = body.op("Reshape", pages, body.const([0, -1, width], np.int64))
    both = body.op("Concat", stored, fresh, axis=1)
    column = body.unsqueeze(body.arange(count), 0)
    first = body.unsqueeze(body.op("Div", pos, body.i64(ratio)), 1)
    candidate = body.op("Sub", body.op("Add", column, count), first)
    last = body.op("Sub", body.dim(both, 1), body.i64(1))
    index = body.op("Where", body.op("Less", column, first), column, body.op("Min", candidate, last))
    return body.rows_per_sequence(both, index, width, 2)


def visible_entries(body: Body, positions: str, columns: str, ratio: int) -> str:
    """positions [b, m], columns i64 [E] → bool [b, m, E]: entry s is visible to token t iff s < (t + 1) // r."""
    closed = body.op("Div", body.op("Add", positions, body.i64(1)), body.i64(ratio))
    return str(body.op("Less", body.unsqueeze(columns, 0, 1), body.unsqueeze(closed, 2)))


def unpack(body: Body, codec: OpFunction | None, rows: str, width: int, dim: int) -> str:
    """rows [b, n, width] → f32 [b, n, dim] through the row codec (none in kv-f32)."""
    if codec is None:
        return rows
    flat = body.call(codec, body.reshape(rows, -1, width))
    shape = body.op("Concat", body.op("Shape", rows, end=2), body.ints(dim), axis=0)
    return str(body.op("Reshape", flat, shape))
