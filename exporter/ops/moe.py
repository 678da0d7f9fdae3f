"""The routers and the FP4 experts (V4 spec §2, MoE).

Expert record, u8 [R]: w1 codes [I, D/2] | w3 codes | w2 codes [D, I/2] | w1 scales [I, D/32] | w3 scales |
w2 scales [D, I/32], padded with zeros to a multiple of 4096. The body runs every expert on every token with zero
weights for the others: right and simple for small models; the kernel reads the routed ones only.
"""

from __future__ import annotations

import numpy as np

from exporter.ops.body import FLOAT, INT32, INT64, Body, OpFunction, function
from exporter.ops.codec import E2M1, E8M0, FP4_GROUP

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


def _scores(body: Body) -> str:
    """x [T, D], gate BF16 [E, D] → sqrt(softplus(x·gateᵀ)) f32 [T, E]."""
    gate = body.op("Transpose", body.cast("gate", FLOAT), perm=[1, 0])
    return str(body.op("Sqrt", _softplus(body, body.op("MatMul", "x", gate))))


def _weights(body: Body, scores: str, ids: str, scale: float) -> list[str]:
    """ids i64 [T, k] → (ids i32 ascending, weights f32 [T, k] = s[ids]/Σ·scale)."""
    picked = body.op("GatherElements", scores, ids, axis=1)
    total = body.op("ReduceSum", picked, body.ints(1), keepdims=1)
    return [body.cast(ids, INT32), body.op("Mul", body.op("Div", picked, total), body.f32(scale))]


def _ascending(body: Body, ids: str, k: int) -> str:
    return str(body.op("TopK", ids, body.ints(k), n=2, axis=-1, largest=0, sorted=1)[0])


def gating_topk(k: int, scale: float) -> OpFunction:
    """MoeGatingTopK: x [T, D], gate [E, D], bias f32 [E], n_kept i64 [] → ids i32 [T, k] ascending, weights [T, k].

    Selection by score + bias among experts below n_kept (lower id wins a tie); weights from the scores alone.
    """

    def build(body: Body) -> list[str]:
        scores = _scores(body)
        kept = body.op("Less", body.arange(body.dim("bias", 0)), "n_kept")
        ranked = body.op("Where", kept, body.op("Add", scores, "bias"), body.f32(-np.inf))
        _, ids = body.op("TopK", ranked, body.ints(k), n=2, axis=-1, largest=1, sorted=1)
        return _weights(body, scores, _ascending(body, ids, k), scale)

    attrs = {"k": k, "scale": scale}
    return function("MoeGatingTopK", f"k{k}", ["x", "gate", "bias", "n_kept"], attrs, build, ["ids", "weights"])


def gating_topk_hash(k: int, scale: float) -> OpFunction:
    """MoeGatingTopKHash: x, gate, tid2eid i64 [V, k], input_ids i64 [T] → ids i32 [T, k] ascending, weights [T, k]."""

    def build(body: Body) -> list[str]:
        ids = _ascending(body, body.op("Gather", "tid2eid", "input_ids", axis=0), k)
        return _weights(body, _scores(body), ids, scale)

    attrs = {"k": k, "scale": scale}
    inputs = ["x", "gate", "tid2eid", "input_ids"]
    return function("MoeGatingTopKHash", f"k{k}", inputs, attrs, build, ["ids", "weights"])


def _dequantize_fp4(body: Body, codes: str, scales: str, rows: int, columns: int) -> str:
    """codes u8 [E, rows·columns/2], scales u8 [E, rows·columns/32] → f32 [E·rows, columns]."""
    pairs = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], -1)
    values = body.op("Gather", body.const(pairs), body.cast(codes, INT32))  # low nibble = even k
    values = body.reshape(values, -1, rows * columns // FP4_GROUP, FP4_GROUP)
    scale = body.op("Gather", body.const(E8M0), body.unsqueeze(body.cast(scales, INT32), -1))
    return body.reshape(body.op("Mul", values, scale), -1, columns)


def moe_fp4(experts: int, hidden: int, inter: int, swiglu_limit: float) -> OpFunction:
    """MoeFp4: x [T, D], experts u8 [E, R], ids i32 [T, k], weights f32 [T, k] → y [T, D], terms in ids order.

    act = weight·silu(min(w1·x, limit))·clamp(w3·x, ±limit), then w2 (V4 spec: the weight comes before w2).
    """

    def build(body: Body) -> list[str]:
        sizes = [rows * width for _, (rows, width) in record_parts(hidden, inter)]
        padding = record_bytes(hidden, inter) - sum(sizes)
        w1, w3, w2, s1, s3, s2 = body.split("experts", [*sizes, *([padding] if padding else [])], axis=1)[:6]

        def up(codes: str, scales: str) -> str:  # → [T, E, I]
            weight = body.op("Transpose", _dequantize_fp4(body, codes, scales, inter, hidden), perm=[1, 0])
            return body.reshape(body.op("MatMul", "x", weight), 0, experts, inter)

        gated = body.op("Min", up(w1, s1), body.f32(swiglu_limit))
        clamped = body.op("Clip", up(w3, s3), body.f32(-swiglu_limit), body.f32(swiglu_limit))
        act = body.op("Mul", body.op("Mul", gated, body.op("Sigmoid", gated)), clamped)
        zeros = body.op(
            "Expand", body.f32(0), body.op("Concat", body.op("Shape", "x", end=1), body.ints(experts), axis=0)
        )
        dense = body.op("ScatterElements", zeros, body.cast("ids", INT64), "weights", axis=1, reduction="add")
        act = body.reshape(body.op("Mul", act, body.unsqueeze(dense, 2)), 0, experts * inter)
        down = body.reshape(_dequantize_fp4(body, w2, s2, hidden, inter), experts, hidden, inter)
        down = body.reshape(body.op("Transpose", down, perm=[0, 2, 1]), experts * inter, hidden)
        return [body.op("MatMul", act, down)]

    attrs = {"inter": inter, "swiglu_limit": swiglu_limit}
    inputs = ["x", "experts", "ids", "weights"]
    return function("MoeFp4", f"e{experts}d{hidden}i{inter}", inputs, attrs, build, ["y"])
