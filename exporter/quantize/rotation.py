"""Block Hadamard rotation of a linear's inputs: outliers spread over a block, so that FP4 groups hold them better.

y = x·Wᵀ = (x·H)·(W·H)ᵀ with H block-diagonal, blocks of Sylvester's matrix times block^−0.5 (its own inverse): W·H is
what is stored, x·H an op of the graph (MR-GPTQ, arXiv 2509.23202).
"""

from __future__ import annotations

import numpy as np

from appliance.errors import UsageError
from exporter.codec import F32, hadamard

BLOCKS = (32, 64, 128)


def rotate(w: F32, block: int, *, name: str = "weight") -> F32:
    """W·H of w f32 [..., K]; twice gives w again (to rounding). UsageError if the block does not divide K."""
    if block not in BLOCKS or w.shape[-1] % block:
        raise UsageError(f"{name}: {w.shape[-1]} inputs in Hadamard blocks of {block}; take one of {BLOCKS} that fits")
    return hadamard(w.reshape(*w.shape[:-1], -1, block)).reshape(w.shape)


def rotate_hessian(hessian: F32, block: int, *, name: str = "weight") -> F32:
    """Hᵀ·E[x·xᵀ]·H: mean of the rotated inputs' products, blocks f32 [B, n, n]."""
    once = rotate(hessian, block, name=name)
    return rotate(np.ascontiguousarray(once.swapaxes(-1, -2)), block, name=name)
