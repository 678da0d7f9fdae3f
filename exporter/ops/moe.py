"""The routers and the FP4 experts (V4 spec §2, MoE).

Expert record, u8 [R]: w1 codes [I, D/2] | w3 codes | w2 codes [D, I/2] | w1 scales [I, D/32] | w3 scales |
w2 scales [D, I/32], padded with zeros to a multiple of 4096. The body runs every expert on every token with zero
weights for the others: right and simple for small models; the kernel reads the routed ones only.
"""

from __future__ import annotations

import numpy as np

from exporter.ops.body import FLOAT, INT32, INT64, Body, OpFunction, function
from exporter.ops.codec import FP4_GROUP
from exporter.ops.linear import dequantize_fp4

RECORD_ALIGN_BYTES = 4096


def record_parts(hidden: int, inter: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    """The record's pieces in order: name and u8 shape (rows, bytes per row)."""
    return (
        ("w1.weight", (inter, hidden // 2)), ("w3.weight", (inter, hidden // 2)), ("w2.weight", (hidden, inter // 2)),
        ("w1.scale", (inter, hidden // FP4_GROUP)), ("w3.scale", (inter, hidden // FP4_GROUP)),
        ("w2.scale", (hidden, inter // FP4_GROUP)),
    )  # fmt: skip


def record_bytes(hidden: int, inter: int) -> int:
    """R: the record's size, padded."""
    used = sum(rows * width for _, (rows, width) in record_parts(hidden, inter))
    return -(-used // RECORD_ALIGN_BYTES) * RECORD_ALIGN_BYTES


def _softplus(body: Body, x: str) -> str:
    """max(x, 0) + log1p(e^−|x|), log1p by the atanh series: onnxruntime's Log and Softplus change bits with T.

    log1p(u) = 2·atanh(z), z = u/(2 + u) ≤ 1/3; eight terms leave a relative error below 3e−9.
    """
    u = body.op("Exp", body.op("Neg", body.op("Abs", x)))
    z = body.op("Div", u, body.op("Add", u, body.f32(2)))
    square = body.op("Mul", z, z)
    series = body.f32(1 / 17)
    for power in range(15, 0, -2):
        series = body.op("Add", body.op("Mul", series, square), body.f32(1 / power))
    log1p = body.op("Mul", body.op("Mul", z, series), body.f32(2))
    return str(body.op("Add", body.op("Max", x, body.f32(0)), log1p))


def _order(body: Body, ranked: bool) -> str:
    """official i64 [K] → the ranks by ascending official id, i64 [K]; "" where rows are in that order already."""
    return _argsort(body, "official") if ranked else ""


def _argsort(body: Body, keys: str) -> str:
    """Indices that sort i64 [K] ascending (no two are equal)."""
    return str(body.op("TopK", keys, body.op("Shape", keys), n=2, axis=-1, largest=0, sorted=1)[1])


def _rows(body: Body, table: str, order: str) -> str:
    """The rows of ``table`` in ``order``: sums and ties see the official order, whatever the ranking."""
    return str(body.op("Gather", table, order, axis=0)) if order else table


def _scores(body: Body, order: str) -> str:
    """x [T, D], gate BF16 [E, D] → sqrt(softplus(x·gateᵀ)) f32 [T, E], columns in ``order``."""
    gate = body.op("Transpose", body.cast(_rows(body, "gate", order), FLOAT), perm=[1, 0])
    return str(body.op("Sqrt", _softplus(body, body.op("MatMul", "x", gate))))


def _weights(body: Body, scores: str, columns: str, order: str, scale: float) -> list[str]:
    """Chosen columns i64 [T, k], ascending → (their ids i32 [T, k], weights f32 [T, k] = s/Σs·scale)."""
    picked = body.op("GatherElements", scores, columns, axis=1)
    total = body.op("ReduceSum", picked, body.ints(1), keepdims=1)
    ids = body.cast(_rows(body, order, columns) if order else columns, INT32)
    return [ids, body.op("Mul", body.op("Div", picked, total), body.f32(scale))]


def _ascending(body: Body, ids: str, k: int) -> str:
    return str(body.op("TopK", ids, body.ints(k), n=2, axis=-1, largest=0, sorted=1)[0])


def gating_topk(k: int, scale: float, *, ranked: bool = False) -> OpFunction:
    """MoeGatingTopK: x [T, D], gate [E, D], bias f32 [E], n_kept i64 [] → ids i32 [T, k] ascending, weights [T, k].

    Selection by score + bias among experts below n_kept (lower id wins a tie); weights from the scores alone. A ranked
    one has ``official`` i64 [E], each row's official id: ids come in ascending official id, which also decides ties.
    """

    def build(body: Body) -> list[str]:
        order = _order(body, ranked)
        scores = _scores(body, order)
        kept = body.op("Less", order or body.arange(body.dim("bias", 0)), "n_kept")
        biased = body.op("Where", kept, body.op("Add", scores, _rows(body, "bias", order)), body.f32(-np.inf))
        _, columns = body.op("TopK", biased, body.ints(k), n=2, axis=-1, largest=1, sorted=1)
        return _weights(body, scores, _ascending(body, columns, k), order, scale)

    attrs = {"k": k, "scale": scale}
    inputs = ["x", "gate", "bias", "n_kept", *_official(ranked)]
    return function("MoeGatingTopK", f"k{k}" + _suffix(ranked), inputs, attrs, build, ["ids", "weights"])


def gating_topk_hash(k: int, scale: float, *, ranked: bool = False) -> OpFunction:
    """MoeGatingTopKHash: x, gate, tid2eid i64 [V, k], input_ids i64 [T] → ids i32 [T, k] ascending, weights [T, k].

    A ranked one has ``official`` i64 [E] and orders the ids by it, as :func:`gating_topk` does.
    """

    def build(body: Body) -> list[str]:
        order = _order(body, ranked)
        ids = body.op("Gather", "tid2eid", "input_ids", axis=0)
        columns = body.op("Gather", _argsort(body, order), ids) if order else ids
        columns = _ascending(body, columns, k)
        return _weights(body, _scores(body, order), columns, order, scale)

    attrs = {"k": k, "scale": scale}
    inputs = ["x", "gate", "tid2eid", "input_ids", *_official(ranked)]
    return function("MoeGatingTopKHash", f"k{k}" + _suffix(ranked), inputs, attrs, build, ["ids", "weights"])


def _official(ranked: bool) -> list[str]:
    return ["official"] if ranked else []


def _suffix(ranked: bool) -> str:
    return "o" if ranked else ""


def moe_fp4(experts: int, hidden: int, inter: int, swiglu_limit: float, *, ranked: bool = False) -> OpFunction:
    """MoeFp4: x [T, D], experts u8 [E, R], ids i32 [T, k], weights f32 [T, k] → y [T, D], terms in ids order.

    act = weight·silu(min(w1·x, limit))·clamp(w3·x, ±limit), then w2 (V4 spec: the weight comes before w2). The body
    adds all experts in the order of the records; a ranked one lays them out by ``official`` i64 [E] first, which is
    the ids order that the ranked routers give. A kernel that follows ids needs no ``official``.
    """

    def build(body: Body) -> list[str]:
        order = _order(body, ranked)
        sizes = [rows * width for _, (rows, width) in record_parts(hidden, inter)]
        padding = record_bytes(hidden, inter) - sum(sizes)
        records = _rows(body, "experts", order)
        w1, w3, w2, s1, s3, s2 = body.split(records, [*sizes, *([padding] if padding else [])], axis=1)[:6]

        def up(codes: str, scales: str) -> str:  # → [T, E, I]
            weight = body.op("Transpose", dequantize_fp4(body, codes, scales, inter, hidden), perm=[1, 0])
            return body.reshape(body.op("MatMul", "x", weight), 0, experts, inter)

        gated = body.op("Min", up(w1, s1), body.f32(swiglu_limit))
        clamped = body.op("Clip", up(w3, s3), body.f32(-swiglu_limit), body.f32(swiglu_limit))
        act = body.op("Mul", body.op("Mul", gated, body.op("Sigmoid", gated)), clamped)
        zeros = body.op(
            "Expand", body.f32(0), body.op("Concat", body.op("Shape", "x", end=1), body.ints(experts), axis=0)
        )
        dense = body.op("ScatterElements", zeros, body.cast("ids", INT64), "weights", axis=1, reduction="add")
        dense = body.op("Gather", dense, order, axis=1) if order else dense
        act = body.reshape(body.op("Mul", act, body.unsqueeze(dense, 2)), 0, experts * inter)
        down = body.reshape(dequantize_fp4(body, w2, s2, hidden, inter), experts, hidden, inter)
        down = body.reshape(body.op("Transpose", down, perm=[0, 2, 1]), experts * inter, hidden)
        return [body.op("MatMul", act, down)]

    attrs = {"inter": inter, "swiglu_limit": swiglu_limit}
    inputs = ["x", "experts", "ids", "weights", *_official(ranked)]
    overload = f"e{experts}d{hidden}i{inter}" + _suffix(ranked)
    return function("MoeFp4", overload, inputs, attrs, build, ["y"])
