"""The cache-row codecs of :mod:`exporter.codec` in torch, bit for bit the same; used by reference and training."""

from __future__ import annotations

import torch

from exporter.codec import E2M1_VALUES, FP4_GROUP, KV_GROUP

_ACT_FLOOR = 1e-4
_FP4_FLOOR = 6.0 * 2.0**-126
_KV_FLUSH = 2.0**-125
_E2M1_EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def ceil_log2(x: torch.Tensor) -> torch.Tensor:
    """ceil(log2(x)) int32 of positive normal f32, from the exponent bits."""
    bits = x.contiguous().view(torch.int32)
    return (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).to(torch.int32)


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2^e in f32, exact, for int32 e from −126 to 127."""
    return ((exponents + 127) << 23).to(torch.int32).view(torch.float32)


def e4m3_encode(x: torch.Tensor) -> torch.Tensor:
    """f32 to E4M3 codes u8: nearest even, saturating at ±448, sign bit iff x < 0 (−0 becomes +0)."""
    clamped = torch.where(x == 0, torch.zeros_like(x), x.clamp(-448.0, 448.0))
    return clamped.to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_decode(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 codes u8 to f32."""
    return codes.contiguous().view(torch.float8_e4m3fn).to(torch.float32)


def act_quant(x: torch.Tensor, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """x f32 [..., K] to E4M3 codes u8 [..., K] and E8M0 u8 [..., K/group]."""
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    scaled_max = groups.abs().amax(-1).clamp_min(_ACT_FLOOR) * torch.tensor(1.0 / 448.0, dtype=torch.float32)
    exponents = ceil_log2(scaled_max)
    codes = e4m3_encode(groups * power_of_two(-exponents)[..., None])
    return codes.reshape(x.shape), (exponents + 127).to(torch.uint8)


def act_dequant(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes [..., K] · E8M0 [..., K/group] to f32."""
    values = e4m3_decode(codes).reshape(*scales.shape, codes.shape[-1] // scales.shape[-1])
    return (values * power_of_two(scales.to(torch.int32) - 127)[..., None]).reshape(codes.shape)


def act_round_trip(x: torch.Tensor, group: int = 128) -> torch.Tensor:
    """The values a quantised linear sees of its input x [..., K]."""
    return act_dequant(*act_quant(x, group))


def e2m1_encode(x: torch.Tensor) -> torch.Tensor:
    """f32 to E2M1 codes u8 0…15: nearest, ties to the even code, saturating at ±6, bit 3 iff x < 0."""
    size = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for lower, edge in enumerate(_E2M1_EDGES):
        code += (size >= edge) if lower & 1 else (size > edge)
    return code | ((x < 0).to(torch.uint8) << 3)


def fp4_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x f32 [..., K] to packed E2M1 u8 [..., K/2] (low nibble even) and E8M0 u8 [..., K/32]."""
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // FP4_GROUP, FP4_GROUP)
    exponents = ceil_log2(groups.abs().amax(-1).clamp_min(_FP4_FLOOR) / 6.0)
    codes = e2m1_encode(groups * power_of_two(-exponents)[..., None]).reshape(x.shape)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponents + 127).to(torch.uint8)


def fp4_dequantize(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Packed E2M1 [..., K/2] · E8M0 [..., K/32] to f32 [..., K]."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(*scales.shape, FP4_GROUP)
    values = torch.from_numpy(E2M1_VALUES)[codes.long()] * power_of_two(scales.to(torch.int32) - 127)[..., None]
    return values.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Sylvester–Hadamard transform of the last axis times d^-0.5, f32, in the order of :func:`codec.hadamard`."""
    width, half, y = x.shape[-1], 1, x
    while half < width:
        pairs = y.reshape(*x.shape[:-1], width // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((first + second, first - second), dim=-2)
        half *= 2
    return y.reshape(x.shape) * torch.tensor(width**-0.5, dtype=torch.float32)


def attention_row_pack(x: torch.Tensor, rope_dims: int) -> torch.Tensor:
    """x f32 [..., head_dim] to cache rows u8 [..., nope + pad8(nope/64) + 2·rope]."""
    nope = x.shape[-1] - rope_dims
    codes, scales = act_quant(x[..., :nope], KV_GROUP)
    padding = torch.zeros(*scales.shape[:-1], -scales.shape[-1] % 8, dtype=torch.uint8)
    tail = x[..., nope:]
    tail = torch.where(tail.abs() < _KV_FLUSH, torch.zeros_like(tail), tail)
    rope = tail.to(torch.bfloat16).contiguous().view(torch.uint8)
    return torch.cat((codes, scales, padding, rope), dim=-1)


def attention_row_unpack(rows: torch.Tensor, head_dim: int, rope_dims: int) -> torch.Tensor:
    """Cache rows u8 [..., row] to f32 [..., head_dim]."""
    nope = head_dim - rope_dims
    head = act_dequant(rows[..., :nope], rows[..., nope : nope + nope // KV_GROUP])
    tail = rows[..., rows.shape[-1] - 2 * rope_dims :].contiguous().view(torch.bfloat16).to(torch.float32)
    return torch.cat((head, tail), dim=-1)


def index_row_pack(x: torch.Tensor) -> torch.Tensor:
    """Index key or query f32 [..., d] to rows u8 [..., d/2 + d/32]: Hadamard, BF16, FP4 per 32."""
    packed, scales = fp4_quantize(hadamard(x).to(torch.bfloat16).to(torch.float32))
    return torch.cat((packed, scales), dim=-1)


def index_row_unpack(rows: torch.Tensor) -> torch.Tensor:
    """Index rows u8 [..., d/2 + d/32] to f32 [..., d], still rotated."""
    half = rows.shape[-1] * 16 // 17
    return fp4_dequantize(rows[..., :half], rows[..., half:])
