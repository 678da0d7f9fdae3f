"""Matrix products on stored weights: FP8 128×128 blocks, plain or per group of rows (wo_a), and BF16.

Bodies dequantize to f32 and multiply by a 2-D constant; onnxruntime folds the weight once at load, and its packed
2-D constant product gives a row the same bits whatever the number of rows and threads.
"""

from __future__ import annotations

import numpy as np

from exporter.ops.body import FLOAT, INT32, Body, OpFunction, function
from exporter.ops.codec import E4M3, E8M0

FP8_BLOCK = 128


def _dequantize_fp8(body: Body, rows: int, columns: int) -> str:
    """codes u8 [N, K], scales u8 [⌈N/128⌉, ⌈K/128⌉] → f32 [N, K]; row n uses scale row n // 128."""
    values = body.op("Gather", body.const(E4M3), body.cast("codes", INT32))
    scale = body.op("Gather", body.const(E8M0), body.cast("scales", INT32))
    scale = body.op("Gather", scale, body.const(np.arange(rows) // FP8_BLOCK, np.int64), axis=0)
    scale = body.op("Gather", scale, body.const(np.arange(columns) // FP8_BLOCK, np.int64), axis=1)
    return str(body.op("Mul", values, scale))


def fp8_matmul(rows: int, columns: int) -> OpFunction:
    """Fp8MatMul: x f32 [T, K] · (codes, scales) [N, K]ᵀ → y f32 [T, N]."""

    def build(body: Body) -> list[str]:
        weight = body.op("Transpose", _dequantize_fp8(body, rows, columns), perm=[1, 0])
        return [body.op("MatMul", "x", weight)]

    return function("Fp8MatMul", f"n{rows}k{columns}", ["x", "codes", "scales"], {}, build, ["y"])


def fp8_grouped_matmul(groups: int, rows: int, columns: int) -> OpFunction:
    """Fp8GroupedMatMul: x f32 [T, G, K] · codes [G·R, K] → y f32 [T, G·R]: group g of x meets rows g·R…(g+1)·R−1."""

    def build(body: Body) -> list[str]:
        weight = body.op("Transpose", _dequantize_fp8(body, groups * rows, columns), perm=[1, 0])
        if groups == 1:
            return [body.op("MatMul", body.reshape("x", 0, columns), weight)]
        weights = body.split(weight, [rows] * groups, axis=1)
        inputs = body.split("x", [1] * groups, axis=1)
        parts = [
            body.op("MatMul", body.reshape(x, 0, columns), w) for x, w in zip(inputs, weights, strict=True)
        ]  # one 2-D constant product per group: a batched one changes a row's bits with T
        return [body.op("Concat", *parts, axis=1)]

    return function(
        "Fp8GroupedMatMul", f"g{groups}n{rows}k{columns}", ["x", "codes", "scales"], {"groups": groups}, build, ["y"]
    )


def bf16_matmul(body: Body, x: str, weight: str) -> str:
    """x f32 [T, K] · weight BF16 [N, K]ᵀ in fp32, as plain nodes of the graph."""
    return str(body.op("MatMul", x, body.op("Transpose", body.cast(weight, FLOAT), perm=[1, 0])))
