"""Matrix products on stored weights: FP8 128×128 blocks and FP4 per 32, plain or per group of rows (wo_a), and BF16.

Bodies dequantize to f32 and multiply by a 2-D constant; onnxruntime folds the weight once at load, and its packed
2-D constant product gives a row the same bits whatever the number of rows and threads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from exporter.ops.body import FLOAT, INT32, Body, OpFunction, function
from exporter.ops.codec import E2M1, E4M3, E8M0, FP4_GROUP, hadamard

FP8_BLOCK = 128
ROTATIONS = (0, 32, 64, 128)  # Hadamard blocks an input may be multiplied by; 0 = none


def _dequantize_fp8(body: Body, rows: int, columns: int) -> str:
    """codes u8 [N, K], scales u8 [⌈N/128⌉, ⌈K/128⌉] → f32 [N, K]; row n uses scale row n // 128."""
    values = body.op("Gather", body.const(E4M3), body.cast("codes", INT32))
    scale = body.op("Gather", body.const(E8M0), body.cast("scales", INT32))
    scale = body.op("Gather", scale, body.const(np.arange(rows) // FP8_BLOCK, np.int64), axis=0)
    scale = body.op("Gather", scale, body.const(np.arange(columns) // FP8_BLOCK, np.int64), axis=1)
    return str(body.op("Mul", values, scale))


def dequantize_fp4(body: Body, codes: str, scales: str, rows: int, columns: int) -> str:
    """codes u8 [E, rows·columns/2], scales u8 [E, rows·columns/32] → f32 [E·rows, columns]; rows 1: E matrix rows."""
    pairs = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], -1)
    values = body.op("Gather", body.const(pairs), body.cast(codes, INT32))  # low nibble = even k
    values = body.reshape(values, -1, rows * columns // FP4_GROUP, FP4_GROUP)
    scale = body.op("Gather", body.const(E8M0), body.unsqueeze(body.cast(scales, INT32), -1))
    return body.reshape(body.op("Mul", values, scale), -1, columns)


def _rotated(body: Body, block: int, *shape: int) -> str:
    """"x" f32 [..., K] → x·H of ``shape``; H = Sylvester's ±1 on each ``block`` of K, times block^−½ (0: no H).

    One product with a constant [block, block]: a row's bits do not change with the number of rows.
    """
    if not block:
        return "x"
    turned = body.op("MatMul", body.reshape("x", -1, block), body.const(hadamard(block)))
    return body.reshape(body.op("Mul", turned, body.const(np.float32(block**-0.5))), *shape)


def _matmul(op: str, overload: str, columns: int, rotate: int, weight: Callable[[Body], str]) -> OpFunction:
    """x f32 [T, K] times weight(body) f32 [N, K]ᵀ, rotated first where the op can be."""

    def build(body: Body) -> list[str]:
        turned = body.op("Transpose", weight(body), perm=[1, 0])
        return [body.op("MatMul", _rotated(body, rotate, -1, columns), turned)]

    attrs = {"rotate": rotate} if op.startswith("Fp4") else {}
    return function(op, overload, ["x", "codes", "scales"], attrs, build, ["y"])


def _grouped(
    op: str, overload: str, groups: int, rows: int, columns: int, rotate: int, weight: Callable[[Body], str]
) -> OpFunction:
    """x f32 [T, G, K] times weight(body) f32 [G·R, K]ᵀ, group g with rows g·R…(g+1)·R−1."""

    def build(body: Body) -> list[str]:
        turned = body.op("Transpose", weight(body), perm=[1, 0])
        x = _rotated(body, rotate, -1, groups, columns)
        if groups == 1:
            return [body.op("MatMul", body.reshape(x, 0, columns), turned)]
        weights = body.split(turned, [rows] * groups, axis=1)
        inputs = body.split(x, [1] * groups, axis=1)
        parts = [
            body.op("MatMul", body.reshape(part, 0, columns), w) for part, w in zip(inputs, weights, strict=True)
        ]  # one 2-D constant product per group: a batched one changes a row's bits with T
        return [body.op("Concat", *parts, axis=1)]

    attrs = {"groups": groups} | ({"rotate": rotate} if op.startswith("Fp4") else {})
    return function(op, overload, ["x", "codes", "scales"], attrs, build, ["y"])


def fp8_matmul(rows: int, columns: int) -> OpFunction:
    """Fp8MatMul: x f32 [T, K] · (codes, scales) [N, K]ᵀ → y f32 [T, N]."""
    return _matmul("Fp8MatMul", f"n{rows}k{columns}", columns, 0, lambda b: _dequantize_fp8(b, rows, columns))


def fp8_grouped_matmul(groups: int, rows: int, columns: int) -> OpFunction:
    """Fp8GroupedMatMul: x f32 [T, G, K] · codes [G·R, K] → y f32 [T, G·R]: group g of x meets rows g·R…(g+1)·R−1."""
    overload = f"g{groups}n{rows}k{columns}"
    return _grouped(
        "Fp8GroupedMatMul", overload, groups, rows, columns, 0, lambda b: _dequantize_fp8(b, groups * rows, columns)
    )


def fp4_matmul(rows: int, columns: int, *, rotate: int = 0) -> OpFunction:
    """Fp4MatMul: x f32 [T, K], codes u8 [N, K/2], scales u8 [N, K/32] → y f32 [T, N] = (x·H)·Wᵀ.

    ``rotate`` 0 (no H), 32, 64 or 128: H = block-diagonal Sylvester–Hadamard·rotate^−½; W is stored rotated.
    """
    return _matmul(
        "Fp4MatMul", f"n{rows}k{columns}" + _turn(rotate), columns, rotate,
        lambda b: dequantize_fp4(b, "codes", "scales", 1, columns),
    )  # fmt: skip


def fp4_grouped_matmul(groups: int, rows: int, columns: int, *, rotate: int = 0) -> OpFunction:
    """Fp4GroupedMatMul: x f32 [T, G, K], codes u8 [G·R, K/2], scales u8 [G·R, K/32] → y f32 [T, G·R]."""
    return _grouped(
        "Fp4GroupedMatMul", f"g{groups}n{rows}k{columns}" + _turn(rotate), groups, rows, columns, rotate,
        lambda b: dequantize_fp4(b, "codes", "scales", 1, columns),
    )  # fmt: skip


def _turn(rotate: int) -> str:
    """The overload's suffix; ValueError for a block that no rotation has."""
    if rotate not in ROTATIONS:
        raise ValueError(f"rotate {rotate}: expected one of {ROTATIONS}")
    return f"t{rotate}" if rotate else ""


def bf16_matmul(body: Body, x: str, weight: str) -> str:
    """x f32 [T, K] · weight BF16 [N, K]ᵀ in fp32, as plain nodes of the graph."""
    return str(body.op("MatMul", x, body.op("Transpose", body.cast(weight, FLOAT), perm=[1, 0])))
