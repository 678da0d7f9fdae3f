"""Values rounded to the stored formats, f32 in, f32 out, on any device: no 8-bit or 4-bit torch dtype is needed.

A number format with power-of-two scales is a grid whose step is a power of two near each value. Adding and taking
away 1.5 · 2^23 steps rounds to that grid, ties to even, exactly as the codecs of :mod:`exporter.codec` do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

E2M1_MAX, E4M3_MAX = 6.0, 448.0
FP4_GROUP, ROW_GROUP, BLOCK = 32, 64, 128
_MAGIC = 1.5 * 2.0**23
_EXPONENT_BITS = 0x7F800000
_E4M3_FLOOR = 1e-4  # smallest absolute maximum a scale is made for (V4 spec: act_quant)
_E2M1_FLOOR = 6 * 2.0**-126
_ROW_FLUSH = 2.0**-125  # smaller rope values are stored as 0


def ceil_power_of_two(x: Tensor) -> Tensor:
    """2^ceil(log2 x) of positive normal f32, by exponent bits."""
    bits = x.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return (exponent << 23).view(torch.float32)


def floor_power_of_two(x: Tensor) -> Tensor:
    """2^floor(log2 |x|) of f32; 0 for 0 and subnormals."""
    return (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)


def to_steps(x: Tensor, step: Tensor) -> Tensor:
    """The multiple of ``step`` (powers of two, overwritten) nearest to ``x``, ties to the even multiple."""
    magic = step.mul_(_MAGIC)
    return (x + magic).sub_(magic)


def clip(x: Tensor, limit: Tensor) -> Tensor:
    """``x``, overwritten, between ±``limit``, which broadcasts (where ``clamp`` is four times as slow)."""
    torch.minimum(x, limit, out=x)
    return torch.maximum(x, -limit, out=x)


def e2m1(x: Tensor, scale: Tensor) -> Tensor:
    """Nearest of ±{0, .5, 1, 1.5, 2, 3, 4, 6} · ``scale`` (a power of two that broadcasts over ``x``)."""
    step = torch.maximum(floor_power_of_two(x), scale).mul_(0.5)
    return clip(to_steps(x, step), scale * E2M1_MAX)


def e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """Nearest E4M3 number times ``scale`` (a power of two that broadcasts over ``x``), at most 448 · scale."""
    step = torch.maximum(floor_power_of_two(x), scale * 2.0**-6).mul_(2.0**-3)
    return clip(to_steps(x, step), scale * E4M3_MAX)


def e2m1_scale(largest: Tensor) -> Tensor:
    """The scale that holds an absolute maximum without clipping: 2^ceil(log2(largest / 6))."""
    return ceil_power_of_two(largest.clamp_min(_E2M1_FLOOR) / E2M1_MAX)


def e4m3_scale(largest: Tensor) -> Tensor:
    """2^ceil(log2(largest / 448)), the reciprocal in f32 as the trained kernels have it."""
    return ceil_power_of_two(largest.clamp_min(_E4M3_FLOOR) * (1 / E4M3_MAX))


def round_fp4_groups(x: Tensor, group: int = FP4_GROUP) -> Tensor:
    """x [..., K] in E2M1 with one power-of-two scale per ``group`` of the last axis."""
    groups = x.unflatten(-1, (-1, group))
    return e2m1(groups, e2m1_scale(groups.abs().amax(-1, keepdim=True))).flatten(-2)


def round_e4m3_groups(x: Tensor, group: int = ROW_GROUP) -> Tensor:
    """x [..., K] in E4M3 with one power-of-two scale per ``group`` of the last axis."""
    groups = x.unflatten(-1, (-1, group))
    return e4m3(groups, e4m3_scale(groups.abs().amax(-1, keepdim=True))).flatten(-2)


def round_fp8_blocks(w: Tensor) -> Tensor:
    """A matrix [N, K] in E4M3 with one power-of-two scale per 128×128 block (ragged blocks at the edges)."""
    rows, columns = w.shape
    padded = F.pad(w, (0, -columns % BLOCK, 0, -rows % BLOCK)) if rows % BLOCK or columns % BLOCK else w
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    rounded = e4m3(blocks, e4m3_scale(blocks.abs().amax((1, 3), keepdim=True)))
    return rounded.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous()


def round_bf16(x: Tensor) -> Tensor:
    """x in BF16, nearest, ties to even."""
    return x.to(torch.bfloat16).to(torch.float32)


class StraightThrough(torch.autograd.Function):
    """The value of the second argument, the gradient to the first."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of ``rounded`` (computed without gradient), the gradient of ``x``."""
    value: Tensor = StraightThrough.apply(x, rounded)
    return value


def round_row(x: Tensor, rope: int) -> Tensor:
    """A cache row [..., d] as kv-v4 stores it: E4M3 in groups of 64 before the rope part, BF16 in the rope part."""
    with torch.no_grad():
        tail = x[..., -rope:]
        tail = torch.where(tail.abs() < _ROW_FLUSH, torch.zeros_like(tail), tail)
        rounded = torch.cat([round_e4m3_groups(x[..., :-rope]), round_bf16(tail)], -1)
    return straight_through(x, rounded)


def round_index_row(x: Tensor) -> Tensor:
    """An index query or key [..., d], already Hadamard-rotated, as kv-v4 stores it: BF16, then E2M1 per 32."""
    with torch.no_grad():
        rounded = round_fp4_groups(round_bf16(x))
    return straight_through(x, rounded)
