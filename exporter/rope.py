"""RoPE tables as V4-Flash was trained with them: f32 frequencies, f32 angle t·f, amplitude 1. numpy only.

V4 spec: layers without compression use ``rope_theta`` plain; layers with it use ``compress_rope_theta`` and YaRN for
everything in them. A frequency one ulp off is an angle 0.06 rad off at a million tokens, so the steps are fixed:
power in f64, rounded to f32, then f32 arithmetic. These are the trained frequencies bit for bit.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from appliance.model import ModelConfig

F32 = NDArray[np.float32]


def frequencies(config: ModelConfig, *, compressed: bool) -> F32:
    """Angles per token, f32 [rope/2], of the layers with (``compressed``) or without compression."""
    dims = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compressed else config.rope_theta
    plain = np.float32(1) / (theta ** (np.arange(0, dims, 2) / dims)).astype(np.float32)
    if not compressed:
        return np.asarray(plain, np.float32)
    scaling = config.rope_scaling

    def corner(rotations: float) -> float:
        """The dimension that turns ``rotations`` times over the original length."""
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dims * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(corner(scaling.beta_fast)), 0)
    high = min(math.ceil(corner(scaling.beta_slow)), dims - 1)
    width = np.float32(high - low if high > low else 0.001)
    ramp = np.clip((np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / width, np.float32(0), np.float32(1))
    smooth = np.float32(1) - ramp
    return np.asarray(plain / np.float32(scaling.factor) * (np.float32(1) - smooth) + plain * smooth, np.float32)


def tables(frequency: F32, positions: NDArray[np.int64]) -> tuple[F32, F32]:
    """cos and sin, f32 [..., rope/2], of ``positions`` [...]; within one ulp of the trained tables."""
    angles = positions.astype(np.float32)[..., None] * frequency
    return np.cos(angles), np.sin(angles)
