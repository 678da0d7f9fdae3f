"""BF16 to FP8 (E4M3, one E8M0 per 128×128) by integer tables: the head.

m = the block's largest magnitude, E = ⌈log2(m / 448)⌉ (nothing saturates). 2^E, 2^(E+1) and 2^(E−1) are tried as for
FP4, sums of squared errors in integers (units of (2^E)² / 2^28); a block of zeros gets scale byte 127.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError
from exporter.codec import E4M3_VALUES, U8, U16, WEIGHT_BLOCK, bf16_decode, ceil_log2, e4m3_encode

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

ERROR_UNIT = 2.0**-28
_INFINITY = 0x7F80  # BF16 bits without sign from here on: infinity, NaN
_INVERSE_448 = np.float32(1 / 448)


def bf16_to_fp8(bits: U16, *, name: str = "weight") -> tuple[U8, U8]:
    """BF16 bits [N, K] to E4M3 codes u8 [N, K] and E8M0 u8 [⌈N/128⌉, ⌈K/128⌉]. CheckpointError names ``name``."""
    rows, columns = bits.shape
    codes = np.empty(bits.shape, np.uint8)
    scales = np.empty((-(-rows // WEIGHT_BLOCK), -(-columns // WEIGHT_BLOCK)), np.uint8)
    for number in range(len(scales)):
        part = slice(number * WEIGHT_BLOCK, (number + 1) * WEIGHT_BLOCK)
        codes[part], scales[number] = band_to_fp8(bits[part], name=name)
    return codes, scales


def band_to_fp8(bits: U16, *, name: str = "weight") -> tuple[U8, U8]:
    """One band of at most 128 rows: BF16 bits [n, K] to codes [n, K] and scale bytes [⌈K/128⌉]."""
    rows, columns = bits.shape
    blocks = -(-columns // WEIGHT_BLOCK)
    padded = np.zeros((rows, blocks * WEIGHT_BLOCK), np.uint16)
    padded[:, :columns] = bits
    band = padded.reshape(rows, blocks, WEIGHT_BLOCK)
    largest = (band & 0x7FFF).max((0, 2))
    if int(largest.max(initial=0)) >= _INFINITY:
        raise CheckpointError(f"{name}: holds NaN or infinity; copy the checkpoint again")
    normal = np.maximum(largest, 0x0080)  # the least normal BF16: below it is zero to FP8
    exponents = ceil_log2(np.asarray(bf16_decode(normal) * _INVERSE_448, np.float32)).astype(np.int32)
    exponents = np.clip(exponents, 1 - 127, 254 - 127)
    index = _index(band, exponents)
    sums = [_difference_table(step).take(index).sum((0, 2)) for step in (1, -1)]
    step = np.where((sums[0] < 0) & (sums[0] <= sums[1]), 1, np.where(sums[1] < 0, -1, 0))
    chosen = np.clip(exponents + step, 1 - 127, 254 - 127).astype(np.int32)
    codes = _code_table().take(_index(band, chosen)).reshape(rows, -1)[:, :columns]
    return codes, np.where(largest > 0, chosen + 127, 127).astype(np.uint8)


def _index(band: U16, exponents: I32) -> NDArray[np.intp]:
    """BF16 bits [n, B, 128] of the values over 2^exponents [B]; what is below 2^−126 becomes zero."""
    size = (band & 0x7FFF).astype(np.int32) - (exponents << 7)[:, None]
    size = np.where((band & 0x7FFF) > 0, np.clip(size, 0, _INFINITY - 1), 0)
    index: NDArray[np.intp] = (size | (band & 0x8000)).astype(np.intp)
    return index


@functools.cache
def _code_table() -> U8:
    """[65536] by BF16 bits: E4M3 code, −0 as +0."""
    return e4m3_encode(_values().astype(np.float32))


@functools.cache
def _difference_table(step: int) -> I64:
    """[65536] by BF16 bits of a value over 2^E: error² at 2^(E+step) minus error² at 2^E."""

    def squared_error(step: int) -> F64:
        scaled = np.ldexp(_values(), -step).astype(np.float32)
        found: F64 = np.square(_values() - np.ldexp(E4M3_VALUES[e4m3_encode(scaled)].astype(np.float64), step))
        return found

    units: I64 = np.rint((squared_error(step) - squared_error(0)) / ERROR_UNIT).astype(np.int64)
    return units


def _values() -> F64:
    """[65536] by BF16 bits, those beyond ±448 (which no block holds once scaled) as ±448."""
    values = np.nan_to_num(bf16_decode(np.arange(65536).astype(np.uint16)))
    clipped: F64 = np.clip(values, -448, 448).astype(np.float64)
    return clipped
