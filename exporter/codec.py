"""Number formats of V4-Flash in numpy: E8M0, E4M3 (fn), E2M1, BF16, and the rows of the KV cache.

Everything here is bit-exact against the trained formats (V4 spec: checkpoint formats, numeric modes):

- E8M0 byte b = 2^(b−127), 255 = NaN.
- FP8 weight [N, K] = E4M3 code · scale[n // 128, k // 128]; ragged last blocks allowed.
- FP4 weight [N, K]: one byte holds k = 2i (low nibble) and 2i+1; value · scale[n, k // 32].
- attention row u8 = nope E4M3 codes | nope/64 E8M0 | zeros up to a multiple of 8 scale bytes | rope BF16 (LE).
- index-key row u8 = d/2 FP4 bytes of the Hadamard-rotated key | d/32 E8M0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]

WEIGHT_BLOCK = 128
FP4_GROUP = 32
KV_GROUP = 64
E4M3_MAX = np.float32(448.0)
KV_FLUSH = np.float32(2.0**-125)  # rope values below it are stored as +0
_ACT_FLOOR = np.float32(1e-4)
_FP4_FLOOR = np.float32(6.0 * 2.0**-126)
_INVERSE_448 = np.float32(1.0 / 448.0)
E2M1_VALUES: F32 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_E2M1_EDGES: F32 = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)  # between neighbouring codes

_E2M1_PAIRS: NDArray[np.uint64] = (  # the two values of each byte as one word: one lookup a byte
    np.stack([np.tile(E2M1_VALUES, 16), np.repeat(E2M1_VALUES, 16)], axis=-1).view(np.uint64)[:, 0].copy()
)

def _e4m3_table() -> F32:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    subnormal = mantissa * 2.0**-9
    values = np.where(exponent == 0, subnormal, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -values, values).astype(np.float32)


E4M3_VALUES = _e4m3_table()
_E8M0_VALUES: F32 = np.append(2.0 ** np.arange(-127.0, 128.0), np.nan).astype(np.float32)


def ceil_log2(x: F32) -> NDArray[np.int32]:
    """ceil(log2(x)) of positive normal f32, from the exponent bits (+1 if the mantissa is not 0)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.int32)
    exponents: NDArray[np.int32] = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).astype(np.int32)
    return exponents


def e8m0_encode(exponents: NDArray[Any]) -> U8:
    """Exponents e (2^e) to E8M0 bytes, −127 … 127."""
    return (exponents + 127).astype(np.uint8)


def e8m0_decode(codes: U8) -> F32:
    """E8M0 bytes to f32 (2^(b−127); 255 is NaN)."""
    return _E8M0_VALUES[codes]


def e4m3_encode(x: F32) -> U8:
    """f32 to E4M3 (fn) codes: nearest, ties to even, saturating at ±448; the sign bit is set iff x < 0."""
    x = np.asarray(x, np.float32)
    size = np.minimum(np.abs(x), E4M3_MAX)
    exponent = np.maximum((np.ascontiguousarray(size).view(np.int32) >> 23) - 127, -6)
    rounded = np.ldexp(np.rint(np.ldexp(size, 3 - exponent)), exponent - 3).astype(np.float32)
    normal = (rounded.view(np.int32) >> 20) - (120 << 3)
    code = np.where(rounded < np.float32(2.0**-6), np.rint(rounded * np.float32(512)).astype(np.int32), normal)
    signed: U8 = (code | np.where(x < 0, 128, 0)).astype(np.uint8)
    return signed


def e4m3_decode(codes: U8) -> F32:
    """E4M3 (fn) codes to f32; 0x7f and 0xff are NaN."""
    return E4M3_VALUES[codes]


def bf16_encode(x: F32) -> U16:
    """f32 to BF16 bits, nearest, ties to even (finite input)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


def bf16_decode(bits: U16) -> F32:
    """BF16 bits to f32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_round(x: F32) -> F32:
    """f32 rounded to BF16 and back."""
    return bf16_decode(bf16_encode(x))


def e2m1_encode(x: F32) -> U8:
    """f32 to E2M1 codes 0…15: nearest, ties to the even code, saturating at ±6; bit 3 set iff x < 0."""
    size = np.abs(np.asarray(x, np.float32))
    code = np.zeros(size.shape, np.uint8)
    for lower, edge in enumerate(_E2M1_EDGES):
        code += (size > edge) | ((size == edge) & bool(lower & 1))
    return (code | np.where(x < 0, 8, 0).astype(np.uint8)).astype(np.uint8)


def e2m1_decode(codes: U8) -> F32:
    """E2M1 codes 0…15 to f32."""
    return E2M1_VALUES[codes]


def fp4_pack(codes: U8) -> U8:
    """Codes [..., K] to bytes [..., K/2], low nibble = even k."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def fp4_unpack(packed: U8) -> U8:
    """Bytes [..., K/2] to codes [..., K]."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def _grouped(x: F32, group: int) -> F32:
    x = np.ascontiguousarray(x, np.float32)
    if x.shape[-1] % group:
        raise CheckpointError(f"codec: last axis {x.shape[-1]} is not a multiple of the scale group {group}")
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def act_quant(x: F32, group: int = 128) -> tuple[U8, U8]:
    """x [..., K] f32 to E4M3 codes [..., K] and E8M0 [..., K/group] (V4 spec: ``act_quant``)."""
    groups = _grouped(x, group)
    exponents = ceil_log2(np.maximum(np.abs(groups).max(-1), _ACT_FLOOR) * _INVERSE_448)
    return e4m3_encode(np.ldexp(groups, -exponents[..., None])).reshape(x.shape), e8m0_encode(exponents)


def act_dequant(codes: U8, scales: U8) -> F32:
    """Inverse of :func:`act_quant`: codes [..., K] · scales [..., K/group]."""
    group = codes.shape[-1] // scales.shape[-1]
    values = e4m3_decode(codes).reshape(*scales.shape, group) * e8m0_decode(scales)[..., None]
    return values.reshape(codes.shape)


def fp4_quantize(x: F32) -> tuple[U8, U8]:
    """x [..., K] f32 to packed E2M1 u8 [..., K/2] and E8M0 u8 [..., K/32] (V4 spec: ``fp4_act_quant``)."""
    groups = _grouped(x, FP4_GROUP)
    exponents = ceil_log2(np.maximum(np.abs(groups).max(-1), _FP4_FLOOR) / np.float32(6))
    codes = e2m1_encode(np.ldexp(groups, -exponents[..., None]))
    return fp4_pack(codes.reshape(x.shape)), e8m0_encode(exponents)


def fp4_dequantize(packed: U8, scales: U8) -> F32:
    """Packed E2M1 [..., K/2] · E8M0 [..., K/32] to f32 [..., K]."""
    pairs = np.take(_E2M1_PAIRS, packed).view(np.float32).reshape(*scales.shape, FP4_GROUP)
    pairs *= e8m0_decode(scales)[..., None]
    return pairs.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def fp8_block_quantize(weight: F32) -> tuple[U8, U8]:
    """weight [N, K] f32 to E4M3 codes [N, K] and E8M0 [ceil(N/128), ceil(K/128)]."""
    rows, columns = weight.shape
    n, k = -(-rows // WEIGHT_BLOCK), -(-columns // WEIGHT_BLOCK)
    padded = np.zeros((n * WEIGHT_BLOCK, k * WEIGHT_BLOCK), np.float32)
    padded[:rows, :columns] = np.abs(weight)
    amax = padded.reshape(n, WEIGHT_BLOCK, k, WEIGHT_BLOCK).max((1, 3))
    exponents = ceil_log2(np.maximum(amax, _ACT_FLOOR) * _INVERSE_448)
    return e4m3_encode(np.ldexp(weight, -_spread(exponents, rows, columns))), e8m0_encode(exponents)


def fp8_block_dequantize(codes: U8, scales: U8) -> F32:
    """E4M3 codes [N, K] · E8M0 [ceil(N/128), ceil(K/128)] to f32 [N, K]."""
    values: F32 = e4m3_decode(codes) * _spread(e8m0_decode(scales), *codes.shape)
    return values


def _spread(blocks: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """One value per 128×128 block to one per element, cut to [rows, columns]."""
    return np.repeat(np.repeat(blocks, WEIGHT_BLOCK, 0)[:rows], WEIGHT_BLOCK, 1)[:, :columns]


def hadamard(x: F32) -> F32:
    """Sylvester–Hadamard transform of the last axis (a power of two), times d^-0.5, in f32."""
    width = x.shape[-1]
    y: F32 = np.array(x, np.float32)
    half = 1
    while half < width:
        pairs = y.reshape(*x.shape[:-1], width // (2 * half), 2, half)
        y = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        half *= 2
    scaled: F32 = y.reshape(x.shape) * np.float32(width**-0.5)
    return scaled


def attention_row_pack(x: F32, rope_dims: int) -> U8:
    """x f32 [..., head_dim] (rope last) to cache rows u8 [..., nope + pad8(nope/64) + 2·rope]."""
    nope = x.shape[-1] - rope_dims
    codes, scales = act_quant(x[..., :nope], KV_GROUP)
    padding = np.zeros((*scales.shape[:-1], -scales.shape[-1] % 8), np.uint8)
    tail = np.asarray(x[..., nope:], np.float32)
    tail = np.where(np.abs(tail) < KV_FLUSH, np.float32(0), tail)
    rope = np.ascontiguousarray(bf16_encode(tail).astype("<u2")).view(np.uint8)
    return np.concatenate([codes, scales, padding, rope], axis=-1)


def attention_row_unpack(rows: U8, head_dim: int, rope_dims: int) -> F32:
    """Cache rows u8 [..., row] to f32 [..., head_dim]; the pad bytes are not read."""
    nope = head_dim - rope_dims
    groups = nope // KV_GROUP
    head = act_dequant(rows[..., :nope], rows[..., nope : nope + groups])
    tail = np.ascontiguousarray(rows[..., rows.shape[-1] - 2 * rope_dims :]).view("<u2").astype(np.uint16)
    return np.concatenate([head, bf16_decode(tail)], axis=-1)


def index_row_pack(x: F32) -> U8:
    """Index key or query x f32 [..., d] to rows u8 [..., d/2 + d/32]: Hadamard, BF16, FP4 per 32."""
    packed, scales = fp4_quantize(bf16_round(hadamard(x)))
    return np.concatenate([packed, scales], axis=-1)


def index_row_unpack(rows: U8) -> F32:
    """Index rows u8 [..., d/2 + d/32] to f32 [..., d], still Hadamard-rotated (q and k both are)."""
    d = rows.shape[-1] * 32 // 17
    return fp4_dequantize(rows[..., : d // 2], rows[..., d // 2 :])
