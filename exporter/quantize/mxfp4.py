"""FP8 (E4M3 per 128×128) and floats to MXFP4 (E2M1, one E8M0 per 32), by one rule that is the same on every machine.

**The rule.** m = the group's largest magnitude, E = floor(log2 m) − 2 (OCP MX: "floor"). Three scales are tried, 2^E,
2^(E+1) and 2^(E−1); values round to the nearest E2M1, ties to even, saturating at ±6. The scale with the smallest
Σ importance · error² wins; E before E+1 before E−1 where equal. The sums are of integers, so no order of summation, no
instruction set and no thread count can change a bit:

- errors count in units of (2^E)², the difference to that of 2^E rounded to 2^−12;
- importance counts in 1/1024 of the group's largest, at least 1 (all equal where none is given or all are 0).

A group of zeros gets scale byte 127. Scale bytes stay within 1 … 254.

**FP8 without float math per weight.** All scales are powers of two, so everything is integers: the largest magnitude is
a maximum over ``byte & 0x7f``, both differences of error are one table entry [exponent of m][byte], two FP4 codes at a
time are one table entry [shift][two bytes].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError
from exporter.codec import (
    E4M3_VALUES,
    F32,
    FP4_GROUP,
    U8,
    WEIGHT_BLOCK,
    bf16_decode,
    e2m1_decode,
    e2m1_encode,
    fp4_pack,
)

I64 = NDArray[np.int64]

ERROR_UNIT = 2.0**-12  # of (2^E)²
IMPORTANCE_STEPS = 1024
ZERO_SCALE, MIN_SCALE, MAX_SCALE = 127, 1, 254  # E8M0 bytes; 255 is NaN, 0 has no half in E8M0
_FIELD = 31  # low bits of a table entry: difference of E+1; above: of E−1. |sums| < 32·3·2^22 and < 32·21·2^22
_LEAST_SHIFT, _MOST_SHIFT = -12, 7  # FP4 exponent − FP8 exponent: floor(log2 2^−9) − 2 − 1 … floor(log2 448) − 2 + 1
_BLOCK_WEIGHTS = 1 << 18  # at a time: the index arrays stay in the second-level cache


def fp8_to_mxfp4(codes: U8, scales: U8, importance: F32 | None = None, *, name: str = "weight") -> tuple[U8, U8]:
    """FP8 codes [N, K] and E8M0 [⌈N/128⌉, ⌈K/128⌉] to packed FP4 u8 [N, K/2] and E8M0 u8 [N, K/32].

    ``importance`` f32 [K] or [G, K] (row n takes row n·G//N): mean of x² per input. CheckpointError names ``name``.
    """
    weights = _weights(importance, codes, name)
    _check_scales(codes, scales, name)
    packed, out = _outputs(codes.shape)
    columns = np.arange(codes.shape[1] // FP4_GROUP) // (WEIGHT_BLOCK // FP4_GROUP)
    for rows in row_blocks(codes.shape, len(weights)):
        source = scales[np.arange(rows.start, rows.stop)[:, None] // WEIGHT_BLOCK, columns]  # [n, K/32]
        section = weights[rows.start * len(weights) // len(codes)]
        packed[rows], out[rows] = _fp8_rows(np.ascontiguousarray(codes[rows]), source, section, name)
    return packed, out


def fp8_to_mxfp4_floor(codes: U8, scales: U8, *, name: str = "weight") -> tuple[U8, U8]:
    """As :func:`fp8_to_mxfp4` with 2^E alone (OCP MX), no search: the fastest and the plainest."""
    _check_scales(codes, scales, name)
    _weights(None, codes, name)
    packed, out = _outputs(codes.shape)
    columns = np.arange(codes.shape[1] // FP4_GROUP) // (WEIGHT_BLOCK // FP4_GROUP)
    for rows in row_blocks(codes.shape):
        source = scales[np.arange(rows.start, rows.stop)[:, None] // WEIGHT_BLOCK, columns]
        block = np.ascontiguousarray(codes[rows])
        largest = _largest(block, name)
        packed[rows], out[rows] = _encode(block, source, largest, _floor_table()[largest])
    return packed, out


def float_to_mxfp4(w: F32, importance: F32 | None = None, *, name: str = "weight") -> tuple[U8, U8]:
    """f32 [N, K] to packed FP4 u8 [N, K/2] and E8M0 u8 [N, K/32], by the same rule; see :func:`fp8_to_mxfp4`."""
    weights = _weights(importance, w, name)
    packed, out = _outputs(w.shape)
    for rows in row_blocks(w.shape, len(weights)):
        groups = np.asarray(w[rows], np.float32).reshape(rows.stop - rows.start, -1, FP4_GROUP)
        section = weights[rows.start * len(weights) // len(w)]
        exponents = best_exponents(groups, section, name=name)
        packed[rows] = fp4_pack(encode_at(groups, exponents).reshape(len(groups), -1))
        out[rows] = scale_bytes(groups, exponents)
    return packed, out


def floor_exponents(groups: F32, *, name: str = "weight") -> NDArray[np.int32]:
    """E = floor(log2 max|x|) − 2 of groups f32 [..., 32], within the scales allowed; of zeros the least."""
    largest = np.abs(groups).max(-1)
    if not np.isfinite(largest).all():
        raise CheckpointError(f"{name}: holds NaN or infinity; it cannot be written as FP4, train or copy it again")
    exponents = np.where(largest > 0, np.frexp(largest)[1] - 3, MIN_SCALE - 127)
    found: NDArray[np.int32] = np.clip(exponents, MIN_SCALE - 127, MAX_SCALE - 127).astype(np.int32)
    return found


def best_exponents(groups: F32, weights: I64, *, name: str = "weight") -> NDArray[np.int32]:
    """The exponent of each group of f32 [N, G, 32] by the rule above; ``weights`` i64 [G, 32] in 1/1024."""
    floor = floor_exponents(groups, name=name)
    scaled = groups * power(-floor)[..., None]
    index = _table_index(scaled)
    sums = [np.einsum("ngk,gk->ng", _differences(scaled, index, step), weights) for step in (1, -1)]
    chosen: NDArray[np.int32] = np.clip(floor + _choose(*sums), MIN_SCALE - 127, MAX_SCALE - 127).astype(np.int32)
    return chosen


def encode_at(groups: F32, exponents: NDArray[np.int32]) -> U8:
    """E2M1 codes of groups f32 [..., 32] at the scales 2^exponents [...]."""
    return encode(groups * power(-exponents)[..., None])


def encode(x: F32) -> U8:
    """E2M1 codes of f32 values, as :func:`exporter.codec.e2m1_encode`, several times faster. No NaN."""
    return _code_table().take(_table_index(x))


def power(exponents: NDArray[np.int32]) -> F32:
    """2^e as f32, exact for −149 … 127; a product with it is exact where the result is a normal f32."""
    powers: F32 = np.ldexp(np.float32(1), exponents)
    return powers


def scale_bytes(groups: F32, exponents: NDArray[np.int32]) -> U8:
    """E8M0 bytes of the exponents; a group of zeros gets 127."""
    return np.where(np.abs(groups).max(-1) > 0, exponents + 127, ZERO_SCALE).astype(np.uint8)


def importance_steps(importance: F32 | None, columns: int, *, name: str = "weight") -> I64:
    """Importance f32 [K] or [G, K] ≥ 0, or None, as integers i64 [G, K/32, 32] of 1 … 1024 within each group."""
    if columns % FP4_GROUP:
        raise CheckpointError(f"{name}: {columns} inputs, expected a multiple of {FP4_GROUP} (FP4 scale group)")
    if importance is None:
        return np.full((1, columns // FP4_GROUP, FP4_GROUP), IMPORTANCE_STEPS, np.int64)
    values = np.atleast_2d(np.asarray(importance, np.float64))
    if values.shape[1] != columns or not np.isfinite(values).all() or (values < 0).any():
        raise CheckpointError(
            f"{name}: importance {list(values.shape)}, expected {columns} finite values of at least 0 a row; "
            "run observe again"
        )
    groups = values.reshape(len(values), -1, FP4_GROUP)
    largest = groups.max(-1, keepdims=True)
    share = np.divide(groups, largest, out=np.ones_like(groups), where=largest > 0)
    steps: I64 = np.maximum(np.rint(share * IMPORTANCE_STEPS), 1).astype(np.int64)
    return steps


def row_blocks(shape: tuple[int, ...], sections: int = 1) -> Iterator[slice]:
    """Slices of rows of about a quarter of a million weights; none crosses a border of the N/sections sections."""
    rows, columns = shape
    step, section = max(1, _BLOCK_WEIGHTS // max(columns, 1)), rows // sections
    for start in range(0, rows, section or 1):
        end = start + section
        yield from (slice(at, min(at + step, end)) for at in range(start, end, step))


def _outputs(shape: tuple[int, ...]) -> tuple[U8, U8]:
    rows, columns = shape
    return np.empty((rows, columns // 2), np.uint8), np.empty((rows, columns // FP4_GROUP), np.uint8)


def _weights(importance: F32 | None, w: NDArray[np.generic], name: str) -> I64:
    if w.ndim != 2:
        raise CheckpointError(f"{name}: shape {list(w.shape)}, expected a matrix [outputs, inputs]")
    weights = importance_steps(importance, w.shape[1], name=name)
    if len(w) % len(weights):
        raise CheckpointError(f"{name}: {len(w)} rows do not divide into the {len(weights)} of its importance")
    return weights


def _check_scales(codes: U8, scales: U8, name: str) -> None:
    expected = tuple(-(-n // WEIGHT_BLOCK) for n in codes.shape)
    if scales.shape != expected:
        raise CheckpointError(f"{name}: scale {list(scales.shape)}, expected {list(expected)} (one per 128×128)")
    if scales.size and int(scales.max()) == 255:
        raise CheckpointError(f"{name}: its scale holds NaN (E8M0 byte 255); copy the checkpoint again")


def _fp8_rows(codes: U8, source: U8, weights: I64, name: str) -> tuple[U8, U8]:
    """One block of rows: codes [n, K], FP8 scale bytes [n, K/32], weights [K/32, 32]."""
    largest = _largest(codes, name)
    rows = (largest.astype(np.uint16) << 8)[..., None]  # [n, K/32, 1]: row of the table, by largest magnitude
    index = np.add(rows, codes.reshape(*largest.shape, FP4_GROUP)).astype(np.intp)
    sums = np.einsum("ngk,gk->ng", _difference_table().take(index), weights)
    upper = (sums << (64 - _FIELD)) >> (64 - _FIELD)  # sign-extended low field
    return _encode(codes, source, largest, _floor_table()[largest] + _choose(upper, (sums - upper) >> _FIELD))


def _largest(codes: U8, name: str) -> U8:
    """Largest magnitude (code without sign) per group, [n, K/32]: long vectors instead of many short maxima."""
    quarters = (codes & 0x7F).view(np.uint64).reshape(-1, 4)
    eighths = np.ascontiguousarray(quarters.T).view(np.uint8).max(0)  # [groups · 8]
    largest = np.ascontiguousarray(eighths.reshape(-1, 8).T).max(0)
    if largest.size and int(largest.max()) == 0x7F:
        raise CheckpointError(f"{name}: holds NaN (FP8 code 0x7f or 0xff); copy the checkpoint again")
    found: U8 = largest.reshape(len(codes), -1)
    return found


def _encode(codes: U8, source: U8, largest: U8, relative: I64) -> tuple[U8, U8]:
    """Codes [n, K] at FP4 exponents ``relative`` [n, K/32] to those of the FP8 scales ``source``."""
    base = source.astype(np.int64)
    scale = np.where(largest > 0, np.clip(base + relative, MIN_SCALE, MAX_SCALE), ZERO_SCALE)
    shift = np.clip(scale - base, _LEAST_SHIFT, _MOST_SHIFT) - _LEAST_SHIFT
    pairs = codes.view("<u2").reshape(*source.shape, FP4_GROUP // 2)
    index = np.bitwise_or((shift << 16).astype(np.uint32)[..., None], pairs).astype(np.intp)
    return _pair_table().take(index).reshape(len(codes), -1), scale.astype(np.uint8)


def _choose(upper: I64, lower: I64) -> I64:
    """0, +1 or −1 by the differences of error to that of 2^E."""
    above = (upper < 0) & (upper <= lower)
    chosen: I64 = np.where(above, 1, np.where((lower < 0) & ~above, -1, 0))
    return chosen


def _differences(scaled: F32, index: NDArray[np.intp], step: int) -> I64:
    """Error² at 2^step minus error² at 1 of values f32 |x| < 8, in units of 2^−12; ``index`` = _table_index of them."""
    other, floor = (np.square(scaled - _rounded_table(at).take(index)) for at in (step, 0))
    units: I64 = np.rint((other - floor) * np.float32(1 / ERROR_UNIT)).astype(np.int64)
    return units


def _table_index(x: F32) -> NDArray[np.intp]:
    """The upper 16 bits of f32 values, the last one set if any bit below is: every midpoint of E2M1 stays apart."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    index: NDArray[np.intp] = ((bits >> 16) | ((bits & 0xFFFF) != 0)).astype(np.intp)
    return index


@functools.cache
def _code_table() -> U8:
    """[65536] by :func:`_table_index`: E2M1 code."""
    return e2m1_encode(np.nan_to_num(bf16_decode(np.arange(65536).astype(np.uint16))))


@functools.cache
def _rounded_table(step: int) -> F32:
    """[65536] by :func:`_table_index`: the value at the scale 2^step."""
    values = np.clip(np.nan_to_num(bf16_decode(np.arange(65536).astype(np.uint16))), -64, 64)
    rounded: F32 = np.ldexp(e2m1_decode(e2m1_encode(np.ldexp(values, -step))), step)
    return rounded


@functools.cache
def _floor_table() -> I64:
    """E relative to the FP8 scale, [128] by largest magnitude (of 0 as of the least)."""
    values = E4M3_VALUES[:128].copy()
    values[0], values[127] = values[1], values[126]
    exponents: I64 = np.frexp(values)[1].astype(np.int64) - 3
    return exponents


@functools.cache
def _difference_table() -> I64:
    """[128 · 256] by largest magnitude and byte: difference of E+1 plus difference of E−1 · 2^31."""
    table = np.zeros((128, 256), np.int64)
    for exponent in np.unique(_floor_table()):
        values = np.clip(np.ldexp(np.nan_to_num(E4M3_VALUES), -exponent), -8, 8).astype(np.float32)
        upper, lower = (_differences(values, _table_index(values), step) for step in (1, -1))
        table[_floor_table() == exponent] = upper + (lower << _FIELD)
    return table.reshape(-1)


@functools.cache
def _pair_table() -> U8:
    """[20 · 65536] by shift and two FP8 bytes: two FP4 codes, low nibble first."""
    tables = []
    for shift in range(_LEAST_SHIFT, _MOST_SHIFT + 1):
        codes = e2m1_encode(np.ldexp(np.nan_to_num(E4M3_VALUES), -shift).astype(np.float32))
        tables.append(codes[None, :] | (codes[:, None] << 4))  # little-endian: the first byte is the low one
    return np.stack(tables).astype(np.uint8).reshape(-1)
