"""The stored linears of a view as nodes: the op follows from the weight's dtype, its rotation from the overlay."""

from __future__ import annotations

from appliance.errors import CheckpointError
from exporter.ops.body import Body, OpFunction
from exporter.ops.linear import bf16_matmul, fp4_grouped_matmul, fp4_matmul, fp8_grouped_matmul, fp8_matmul
from exporter.view import View

FP8, FP4, BF16 = "F8_E4M3", "I8", "BF16"


def linear(body: Body, view: View, x: str, name: str, rows: int, columns: int) -> str:
    """x f32 [T, K] times the stored weight ``name`` [N, K] → [T, N]; FP4 (I8) or FP8, as the view has it."""
    fp4 = fp4_matmul(rows, columns, rotate=view.rotation(name))
    return _call(body, view, x, name, fp8_matmul(rows, columns), fp4)


def grouped_linear(body: Body, view: View, x: str, name: str, groups: int, rows: int, columns: int) -> str:
    """x f32 [T, G, K] times ``name`` [G·N, K], group by group → [T, G·N]."""
    fp4 = fp4_grouped_matmul(groups, rows, columns, rotate=view.rotation(name))
    return _call(body, view, x, name, fp8_grouped_matmul(groups, rows, columns), fp4)


def head(body: Body, view: View, x: str) -> str:
    """x f32 [T, D] → logits [T, V]; head.weight is BF16, or FP8 once quantized."""
    info = view.info("head.weight")
    if info.dtype == BF16:
        return bf16_matmul(body, x, "head.weight")
    return linear(body, view, x, "head", view.config.vocab_size, view.config.hidden_size)


def is_coded(view: View, linear_name: str) -> bool:
    """True if ``linear_name``.weight is stored as codes and has a ``.scale`` beside it."""
    return view.info(f"{linear_name}.weight").dtype in (FP8, FP4)


def _call(body: Body, view: View, x: str, name: str, fp8: OpFunction, fp4: OpFunction) -> str:
    info = view.info(f"{name}.weight")
    if info.dtype not in (FP8, FP4):
        raise CheckpointError(f"{info.file}: {name}.weight is {info.dtype}, expected F8_E4M3 or I8 (packed FP4)")
    if info.dtype == FP8 and view.rotation(name):
        raise CheckpointError(f"{info.file}: {name} is listed as rotated and stored as FP8; only FP4 can be rotated")
    return str(body.call(fp4 if info.dtype == FP4 else fp8, x, f"{name}.weight", f"{name}.scale"))
