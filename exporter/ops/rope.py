"""Rope: rotary embedding of the last dims, interleaved pairs (2i, 2i+1); rows of cos and sin come from the host.

With ``norm`` the weightless per-head RMS of the query comes first; ``inverse`` turns back (conjugate). V4 spec §2.
"""

from __future__ import annotations

import numpy as np

from exporter.ops.body import Body, OpFunction, function


def _swap_matrix(rope: int, inverse: bool) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """P with (x·P)[2i] = −x[2i+1], (x·P)[2i+1] = x[2i] (signs swapped for the inverse); products are exact."""
    p = np.zeros((rope, rope), np.float32)
    even = np.arange(0, rope, 2)
    sign = -1.0 if inverse else 1.0
    p[even + 1, even], p[even, even + 1] = -sign, sign
    return p


def rotate(body: Body, x: str, cos: str, sin: str, rope: int, inverse: bool) -> str:
    """x [T, H, rope], cos and sin [T, rope/2] → [T, H, rope]: x·cos + swap(x)·sin."""
    twice = body.const(np.repeat(np.arange(rope // 2), 2), np.int64)
    c = body.unsqueeze(body.op("Gather", cos, twice, axis=1), 1)
    s = body.unsqueeze(body.op("Gather", sin, twice, axis=1), 1)
    swapped = body.op("MatMul", x, body.const(_swap_matrix(rope, inverse)))
    return str(body.op("Add", body.op("Mul", x, c), body.op("Mul", swapped, s)))


def rope(dim: int, dims: int, *, inverse: bool = False, norm_eps: float | None = None) -> OpFunction:
    """Rope: x f32 [T, H, dim], cos, sin f32 [T, dims/2] → y f32 [T, H, dim]."""
    flavour = "i" if inverse else "q" if norm_eps is not None else ""
    attrs: dict[str, object] = {"dims": dims, "inverse": int(inverse)}
    if norm_eps is not None:
        attrs["norm_eps"] = norm_eps

    def build(body: Body) -> list[str]:
        x = "x" if norm_eps is None else body.rms_norm("x", None, norm_eps)
        if dim == dims:
            return [rotate(body, x, "cos", "sin", dims, inverse)]
        rest, turned = body.split(x, (dim - dims, dims))
        return [body.op("Concat", rest, rotate(body, turned, "cos", "sin", dims, inverse), axis=-1)]

    return function("Rope", f"d{dim}r{dims}{flavour}", ["x", "cos", "sin"], attrs, build, ["y"])
