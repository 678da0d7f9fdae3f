"""MXFP4 to int8 without a changed value, for cards whose matrix unit has no FP4 (Atlas 300I, 310P and 910B).

Twice an E2M1 value is one of 0, ±1, ±2, ±3, ±4, ±6, ±8, ±12, so value · 2^e = int8 · 2^(e−1): the block keeps its own
scale, one exponent lower, and the product is the same number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError
from exporter.codec import FP4_GROUP, U8, fp4_unpack

I8 = NDArray[np.int8]

DOUBLED: I8 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def mxfp4_to_int8(packed: U8, scales: U8, *, name: str = "weight") -> tuple[I8, U8]:
    """Packed FP4 u8 [..., K/2] and E8M0 [..., K/32] to int8 [..., K] and E8M0 [..., K/32]: int8 · scale, exactly.

    A block of zeros may carry scale byte 0 and keeps it. CheckpointError names ``name`` for a scale without a half.
    """
    if scales.shape != (*packed.shape[:-1], packed.shape[-1] * 2 // FP4_GROUP):
        raise CheckpointError(f"{name}: scale {list(scales.shape)} does not fit FP4 codes {list(packed.shape)}")
    if (scales == 255).any():
        raise CheckpointError(f"{name}: its scale holds NaN (E8M0 byte 255); copy the checkpoint again")
    values = DOUBLED[fp4_unpack(packed)]
    zero = ~values.reshape(*scales.shape, FP4_GROUP).any(-1)
    if ((scales == 0) & ~zero).any():
        raise CheckpointError(f"{name}: a block's scale is 2^−127, half of it is not an E8M0 scale; use the FP4 form")
    return values, np.where(scales == 0, 0, scales - 1).astype(np.uint8)
