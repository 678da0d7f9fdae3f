"""Rotary tables the host feeds to the graph: rows of cos and sin for absolute positions, f32 [n, rope/2].

The angle is the fp32 product of position and frequency, as the model was trained (V4 spec §5: exact maths differs by
1.5e-2 at t = 1,048,575); cos and sin of that product are correctly rounded.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from appliance.model import ModelConfig, RopeScaling

F32 = npt.NDArray[np.float32]


def frequencies(dims: int, theta: float, scaling: RopeScaling | None) -> F32:
    """theta^(−2i/dims), i < dims/2; with ``scaling`` YaRN's ramp between f and f/factor, no amplitude change."""
    power = (theta ** (np.arange(0, dims, 2) / dims)).astype(np.float32)  # f64 power: one ulp is 0.06 rad at 1M tokens
    f: F32 = (np.float32(1) / power).astype(np.float32)
    if scaling is None:
        return f

    def correction(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(scaling.beta_fast)), 0)
    high = min(math.ceil(correction(scaling.beta_slow)), dims - 1)
    span = np.float32(high - low if high != low else 0.001)
    ramp = np.clip((np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / span, 0, 1).astype(np.float32)
    smooth = np.float32(1) - ramp
    mixed: F32 = (f / np.float32(scaling.factor) * (np.float32(1) - smooth) + f * smooth).astype(np.float32)
    return mixed


class RopeTables:
    """Both tables of a model: ``main`` for S layers, ``comp`` (theta 160000, YaRN) for everything in C and H layers."""

    def __init__(self, config: ModelConfig) -> None:
        dims = config.qk_rope_head_dim
        self._f = {
            "main": frequencies(dims, config.rope_theta, None),
            "comp": frequencies(dims, config.compress_rope_theta, config.rope_scaling),
        }

    def rows(self, table: str, positions: npt.NDArray[np.int64]) -> tuple[F32, F32]:
        """positions i64 [...] → cos, sin f32 [..., rope/2]."""
        angle = (positions.astype(np.float32)[..., None] * self._f[table]).astype(np.float64)
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
