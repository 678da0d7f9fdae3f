"""Casts between stored formats that change no value, checked in integers; refused by tensor name where one would.

MXFP4 (E2M1 · 2^e per 32) to FP8 (E4M3 · 2^s per 128×128): every E2M1 value is an E4M3 value as long as all the groups
of a block lie within E4M3's reach of one s. FP8 to BF16: 4 significant bits into 8, exact while no exponent runs out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError
from exporter import codec

BLOCK, GROUP = codec.WEIGHT_BLOCK, codec.FP4_GROUP
_NONE = 1 << 10  # of a zero code: bounds nothing
# E2M1 value v (by code & 7) times 2^(e − s) is an E4M3 value iff v·2^(e−s) ≤ 448 and it is a multiple of 2^−9:
# s ≥ e + _LEAST and s ≤ e + _MOST. Values 0, .5, 1, 1.5, 2, 3, 4, 6.
_LEAST = np.array([-_NONE, -9, -8, -8, -7, -7, -6, -6], np.int16)
_MOST = np.array([_NONE, 8, 9, 8, 10, 9, 11, 10], np.int16)
_SHIFTS = range(-11, 10)  # e − s that any value allows


def _tables() -> NDArray[np.uint8]:
    """[shift + 11, code] → E4M3 code of E2M1 code · 2^shift; what is not exact there is never looked up."""
    values = codec.E2M1_VALUES[:8]
    rows = [codec.e4m3_encode(np.ldexp(values, shift)) for shift in _SHIFTS]
    return np.concatenate([rows, np.array(rows) | 0x80], axis=1).astype(np.uint8)


_E4M3_OF = _tables()


def mxfp4_to_fp8(name: str, packed: codec.U8, scales: codec.U8) -> tuple[codec.U8, codec.U8]:
    """packed u8 [N, K/2], E8M0 u8 [N, K/32] → E4M3 codes [N, K], E8M0 [⌈N/128⌉, ⌈K/128⌉], the same values.

    Groups of zeros bound nothing. CheckpointError names ``name`` and the block whose scales lie too far apart.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    out = np.empty((rows, columns), np.uint8)
    blocks = np.empty((-(-rows // BLOCK), -(-columns // BLOCK)), np.uint8)
    if (scales == 255).any():
        raise CheckpointError(f"{name}: a scale is NaN (E8M0 255); quantize it again")
    for index in range(blocks.shape[0]):
        part = slice(index * BLOCK, (index + 1) * BLOCK)
        codes, exponents = codec.fp4_unpack(packed[part]), scales[part].astype(np.int16)
        chosen = _block_scales(name, index, codes, exponents)
        blocks[index] = chosen
        shift = exponents - np.repeat(chosen, BLOCK // GROUP)[: exponents.shape[1]]
        table = np.repeat(np.clip(shift - _SHIFTS.start, 0, len(_SHIFTS) - 1), GROUP, axis=1)
        out[part] = _E4M3_OF[table, codes]
    return out, blocks


def _block_scales(name: str, index: int, codes: codec.U8, exponents: NDArray[np.int16]) -> NDArray[np.int16]:
    """The E8M0 byte of each block of one row of blocks: the least that holds its largest value."""
    groups = (codes & 7).reshape(*exponents.shape, GROUP)
    least = (exponents + _LEAST[groups].max(-1)).max(0)
    most = (exponents + _MOST[groups].min(-1)).min(0)
    starts = np.arange(0, exponents.shape[1], BLOCK // GROUP)
    least, most = np.maximum.reduceat(least, starts), np.minimum.reduceat(most, starts)
    empty = least < -_NONE // 2
    chosen = np.where(empty, 127, np.maximum(least, 0))
    bad = np.flatnonzero((chosen > np.minimum(most, 254)) & ~empty)
    if bad.size:
        block = int(bad[0])
        raise CheckpointError(
            f"{name}: FP4 scales of rows {index * BLOCK}…, columns {block * BLOCK}… lie further apart than one FP8 "
            "block holds, so it has no exact official form; leave this linear in FP8, or ship the model as a bundle"
        )
    return chosen.astype(np.int16)


def fp8_to_bf16(name: str, codes: codec.U8, scales: codec.U8) -> NDArray[np.uint16]:
    """E4M3 codes [N, K] · E8M0 [⌈N/128⌉, ⌈K/128⌉] → BF16 bits [N, K], the same values; CheckpointError if not."""
    values = codec.fp8_block_dequantize(codes, scales)
    bits: NDArray[np.uint16] = codec.bf16_encode(values)
    same: NDArray[Any] = codec.bf16_decode(bits) == values
    if not same.all():
        row, column = (int(i) for i in np.argwhere(~same)[0])
        raise CheckpointError(f"{name}: row {row}, column {column} has no exact BF16 value; quantize it again")
    return bits
