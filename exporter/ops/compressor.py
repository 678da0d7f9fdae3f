"""Compressor: pools r tokens into one cache entry; CSA entries overlap by one block (V4 spec §2, Compressor).

kv and gate have w = coff·d columns: coff 1 for HCA, 2 for CSA (columns [0:d] serve the next entry, [d:2d] the own).
A ring row is kv ‖ gate + ape (width 2w), kept at token mod L with L = coff·r: partials and overlap carry in one.
Every call emits ⌈m/r⌉ candidates from entry pos // r on; the host commits those that closed.
"""

from __future__ import annotations

import numpy as np

from exporter.ops.body import Body, OpFunction, function
from exporter.ops.paging import history, tokens
from exporter.ops.rope import rope


def _slots(body: Body, rows: str, position: str, ratio: int, overlap: bool, d: int) -> tuple[str, str]:
    """rows [b, L + m, 2w] and position i64 [b, c, S] → kv, gate [b, c, S, d]; S = coff·r slots of one entry."""
    width = (4 if overlap else 2) * d
    picked = body.rows_per_sequence(rows, position, width, 3)
    if not overlap:
        kv, gate = body.split(picked, (d, d))
        return kv, gate
    before, own = body.split(picked, (ratio, ratio), axis=2)
    kv_a, _, gate_a, _ = body.split(before, (d, d, d, d))
    _, kv_b, _, gate_b = body.split(own, (d, d, d, d))
    return str(body.op("Concat", kv_a, kv_b, axis=2)), str(body.op("Concat", gate_a, gate_b, axis=2))


def _pool(body: Body, kv: str, gate: str, slots: int, d: int) -> str:
    """Softmax over the slots per channel, then the weighted sum: pairwise halving keeps bits whatever b and c."""
    weight = body.op("Exp", body.op("Sub", gate, body.op("ReduceMax", gate, body.ints(2), keepdims=1)))
    sums = body.op("Concat", body.op("Mul", weight, kv), weight, axis=3)  # [b, c, S, 2d]
    while slots > 1:
        slots //= 2
        first, second = body.split(sums, (slots, slots), axis=2)
        sums = body.op("Add", first, second)
    value, total = body.split(body.op("Squeeze", sums, body.ints(2)), (d, d))
    return str(body.op("Div", value, total))


def compressor(
    *, ratio: int, overlap: bool, dim: int, rope_dim: int, eps: float, pack: OpFunction | None, row: int
) -> OpFunction:
    """Compressor: kv, gate f32 [b, m, w], ape [r, w], norm [d], ring [slots, L, 2w], slots i32 [b], pos i64 [b],
    cos, sin f32 [b, c, rope/2] (positions (pos // r + k)·r) → candidates [b, c, row], ring rows f32 [b, m, 2w].
    """  # fmt: skip
    coff = 2 if overlap else 1
    length, slots, width = coff * ratio, coff * ratio, 2 * coff * dim

    def build(body: Body) -> list[str]:
        m = body.dim("kv", 1)
        at = tokens(body, "pos", m)
        ape = body.op("Gather", "ape", body.op("Mod", at, body.i64(ratio)), axis=0)
        fresh = body.op("Concat", "kv", body.op("Add", "gate", ape), axis=2)
        rows = body.op("Concat", history(body, "ring", "slots", "pos", length, width), fresh, axis=1)
        first = body.op("Div", "pos", body.i64(ratio))
        entry = tokens(body, first, body.dim("cos", 1))  # [b, c]
        start = body.op("Mul", body.op("Sub", entry, body.i64(coff - 1)), body.i64(ratio))
        token = body.op("Add", body.unsqueeze(start, 2), body.const(np.arange(slots), np.int64))  # [b, c, S]
        offset = body.op("Sub", token, body.unsqueeze("pos", 1, 2))
        last = body.op("Add", m, body.i64(length - 1))
        position = body.op("Max", body.op("Min", body.op("Add", offset, body.i64(length)), last), body.i64(0))
        kv, gate = _slots(body, rows, position, ratio, overlap, dim)
        real = body.unsqueeze(body.op("GreaterOrEqual", token, body.i64(0)), 3)
        kv = body.op("Where", real, kv, body.f32(0))
        gate = body.op("Where", real, gate, body.f32(-np.inf))
        pooled = body.rms_norm(_pool(body, kv, gate, slots, dim), "norm", eps)
        cos, sin = (body.reshape(name, -1, rope_dim // 2) for name in ("cos", "sin"))
        turned = body.call(rope(dim, rope_dim), body.reshape(pooled, -1, 1, dim), cos, sin)
        packed = body.reshape(turned, -1, dim)
        if pack is not None:
            packed = body.call(pack, packed)
        shape = body.op("Concat", body.op("Shape", entry), body.ints(row), axis=0)
        return [body.op("Reshape", packed, shape), fresh]

    attrs = {"ratio": ratio, "overlap": int(overlap)}
    inputs = ["kv", "gate", "ape", "norm", "ring", "slots", "pos", "cos", "sin"]
    kind = f"r{ratio}d{dim}" + (f"_{pack.op}" if pack else "")
    return function("Compressor", kind, inputs, attrs, build, ["candidates", "ring_rows"])
