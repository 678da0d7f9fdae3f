"""Row codecs as ops: KvPack/KvUnpack (attention rows) and IndexKeyPack/IndexKeyUnpack (FP4 index keys).

Opset 18 has no bit casts, so exponents are found by comparing with powers of two; every step is exact in fp32.

Attention row, u8: nope E4M3 codes | nope/64 E8M0 bytes | zeros up to a multiple of 8 scale bytes | 2·rope BF16 bytes
(little-endian). Index key row, u8: d/2 bytes of two FP4 codes (low nibble = even k) | d/32 E8M0 bytes.
"""

from __future__ import annotations

import numpy as np

from exporter import codec
from exporter.ops.body import BFLOAT16, FLOAT, INT32, UINT8, Array, Body, OpFunction, function

KV_GROUP = 64  # elements per E8M0 scale of an attention row (V4 spec: KV nope round trip)
FP4_GROUP = 32  # elements per E8M0 scale of FP4
E2M1 = codec.e2m1_decode(np.arange(16, dtype=np.uint8))
E8M0 = codec.e8m0_decode(np.arange(256, dtype=np.uint8))  # byte 255 is NaN in the format
E4M3 = codec.e4m3_decode(np.arange(256, dtype=np.uint8))  # 0x7f and 0xff are NaN


def _count(body: Body, x: str, thresholds: Array, compare: str) -> str:
    """How many thresholds x passes, f32, shape of x: Σ_i (x compare thresholds_i)."""
    hits = body.op(compare, body.unsqueeze(x, -1), body.const(thresholds, np.float32))
    return str(body.op("ReduceSum", body.cast(hits, FLOAT), body.ints(-1), keepdims=0))


def _exponent(body: Body, v: str, compare: str) -> tuple[str, str, str]:
    """Exponent of v in [2^−126, 2^127) in two steps of 16 octaves: (e + 126, v·2^(126−16a), b) as f32.

    ``GreaterOrEqual`` gives floor(log2 v), ``Greater`` gives ceil(log2 v); both exact.
    """
    coarse = _count(body, v, np.exp2(-126.0 + 16 * np.arange(1, 16)), compare)
    shift = body.op("Gather", body.const(np.exp2(126.0 - 16 * np.arange(16)), np.float32), body.cast(coarse, INT32))
    near = body.op("Mul", v, shift)  # in [1, 65536]
    steps = np.exp2(np.arange(0 if compare == "Greater" else 1, 16, dtype=np.float64))
    fine = _count(body, near, steps, compare)
    return str(body.op("Add", body.op("Mul", coarse, body.f32(16)), fine)), str(near), fine


def _scale_byte(body: Body, v: str) -> str:
    """E8M0 byte (as f32) of the power of two at or above v."""
    exponent, _, _ = _exponent(body, v, "Greater")
    return str(body.op("Add", exponent, body.f32(1)))  # (e + 126) + 1 = e + 127


def _power(body: Body, byte: str, sign: int) -> str:
    """2^(±(byte − 127)), f32 by table."""
    table = E8M0 if sign > 0 else np.ldexp(np.float32(1), 127 - np.arange(255)).astype(np.float32)
    return str(body.op("Gather", body.const(table), body.cast(byte, INT32)))


def _sign_bit(body: Body, x: str, bit: int) -> str:
    return str(body.op("Mul", body.cast(body.op("Less", x, body.f32(0)), FLOAT), body.f32(bit)))


def _pack_e4m3(body: Body, x: str, nope: int) -> tuple[str, str]:
    """x [N, nope] → codes f32 [N, nope], scale bytes f32 [N, nope/64]."""
    groups = body.reshape(x, 0, nope // KV_GROUP, KV_GROUP)
    amax = body.op("ReduceMax", body.op("Abs", groups), body.ints(-1), keepdims=0)
    floor = body.op("Max", amax, body.f32(1e-4))
    byte = _scale_byte(body, body.op("Mul", floor, body.const(np.float32(1) / np.float32(448))))
    scaled = body.op("Mul", groups, body.unsqueeze(_power(body, byte, -1), -1))
    magnitude = body.op("Min", body.op("Abs", scaled), body.f32(448))
    octave = _count(body, magnitude, np.exp2(np.arange(-5.0, 9.0)), "GreaterOrEqual")  # biased exponent − 1
    quantum = body.op("Gather", body.const(np.exp2(9.0 - np.arange(15)), np.float32), body.cast(octave, INT32))
    rounded = body.op("Round", body.op("Mul", magnitude, quantum))  # RNE; 16 carries into the next octave by itself
    code = body.op("Add", body.op("Mul", octave, body.f32(8)), rounded)
    return body.reshape(body.op("Add", code, _sign_bit(body, groups, 128)), 0, nope), byte


def _pack_bf16(body: Body, x: str, rope: int) -> str:
    """x [N, rope] → BF16 bytes f32 [N, 2·rope], little-endian; |v| < 2^−125 is stored as +0."""
    value = body.cast(body.cast(x, BFLOAT16), FLOAT)
    magnitude = body.op("Abs", value)
    tiny = np.float32(2.0**-125)
    exponent, near, fine = _exponent(body, body.op("Max", magnitude, body.const(tiny)), "GreaterOrEqual")
    unit = body.op("Gather", body.const(np.exp2(7.0 - np.arange(16)), np.float32), body.cast(fine, INT32))
    mantissa = body.op("Sub", body.op("Mul", near, unit), body.f32(128))
    biased = body.op("Mul", body.op("Add", exponent, body.f32(1)), body.f32(128))
    signed = body.op("Add", body.op("Add", biased, mantissa), _sign_bit(body, value, 32768))
    bits = body.op("Where", body.op("Less", magnitude, body.const(tiny)), body.f32(0), signed)
    high = body.op("Floor", body.op("Mul", bits, body.f32(1 / 256)))
    low = body.op("Sub", bits, body.op("Mul", high, body.f32(256)))
    pair = body.op("Concat", body.unsqueeze(low, -1), body.unsqueeze(high, -1), axis=-1)
    return body.reshape(pair, 0, 2 * rope)


def kv_pack(nope: int, rope: int) -> OpFunction:
    """KvPack: x f32 [N, nope + rope] → u8 [N, row] (E4M3 with scale 2^⌈log2(amax/448)⌉ per 64, BF16 rope)."""
    groups = nope // KV_GROUP
    padding = (groups + 7) // 8 * 8 - groups

    def build(body: Body) -> list[str]:
        nope_part, rope_part = body.split("x", (nope, rope))
        codes, scales = _pack_e4m3(body, nope_part, nope)
        if padding:
            scales = body.op("Pad", scales, body.ints(0, 0, 0, padding))
        return [body.cast(body.op("Concat", codes, scales, _pack_bf16(body, rope_part, rope), axis=-1), UINT8)]

    return function("KvPack", f"n{nope}r{rope}", ["x"], {"nope": nope, "rope": rope}, build, ["rows"])


def kv_unpack(nope: int, rope: int) -> OpFunction:
    """KvUnpack: u8 [N, row] → f32 [N, nope + rope]; exact inverse of the stored values."""
    groups = nope // KV_GROUP
    padding = (groups + 7) // 8 * 8 - groups
    high = np.where(np.arange(128) > 0, np.ldexp(1.0, 2 * np.arange(128) - 127), 0.0)  # 0 marks the stored zero
    low = np.array([np.ldexp(1 + (b & 127) / 128, b >> 7) for b in range(256)])

    def build(body: Body) -> list[str]:
        sizes = (nope, groups, *((padding,) if padding else ()), 2 * rope)
        parts = body.split(body.cast("rows", INT32), sizes)
        table = np.nan_to_num(E4M3, nan=0.0)  # a NaN code would poison whole rows; none is ever written
        values = body.reshape(body.op("Gather", body.const(table), parts[0]), 0, groups, KV_GROUP)
        scale = body.op("Gather", body.const(E8M0), body.unsqueeze(parts[1], -1))
        nope_part = body.reshape(body.op("Mul", values, scale), 0, nope)
        lo, hi = body.split(body.reshape(parts[-1], 0, rope, 2), (1, 1))
        sign_high = np.concatenate([high, -high]).astype(np.float32)
        value = body.op(
            "Mul", body.op("Gather", body.const(sign_high), hi), body.op("Gather", body.const(low, np.float32), lo)
        )
        return [body.op("Concat", nope_part, body.reshape(value, 0, rope), axis=-1)]

    return function("KvUnpack", f"n{nope}r{rope}", ["rows"], {"nope": nope, "rope": rope}, build, ["x"])


def hadamard(n: int) -> Array:
    """Sylvester's ±1 matrix [n, n], f32, unscaled."""
    h = np.ones((1, 1), np.float32)
    while h.shape[0] < n:
        h = np.block([[h, h], [h, -h]])
    return h


def index_key_pack(d: int) -> OpFunction:
    """IndexKeyPack: x f32 [N, d] → u8 [N, d/2 + d/32]: BF16(Hadamard(x)·d^−½), then E2M1 per 32, ties to even code."""
    thresholds = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    thresholds[1::2] = np.nextafter(thresholds[1::2], np.float32(0))  # a tie there belongs to the even code above

    def build(body: Body) -> list[str]:
        turned = body.op("Mul", body.op("MatMul", "x", body.const(hadamard(d))), body.const(np.float32(d**-0.5)))
        y = body.reshape(body.cast(body.cast(turned, BFLOAT16), FLOAT), 0, d // FP4_GROUP, FP4_GROUP)
        amax = body.op("ReduceMax", body.op("Abs", y), body.ints(-1), keepdims=0)
        floor = body.op("Max", amax, body.const(np.float32(6 * 2.0**-126)))
        byte = _scale_byte(body, body.op("Div", floor, body.f32(6)))
        scaled = body.op("Mul", body.op("Abs", y), body.unsqueeze(_power(body, byte, -1), -1))
        code = body.op("Add", _count(body, scaled, thresholds, "Greater"), _sign_bit(body, y, 8))
        even, odd = body.split(body.reshape(code, 0, d // 2, 2), (1, 1))
        pair = body.op("Add", even, body.op("Mul", odd, body.f32(16)))
        return [body.cast(body.op("Concat", body.reshape(pair, 0, d // 2), byte, axis=-1), UINT8)]

    return function("IndexKeyPack", f"d{d}", ["x"], {"dim": d}, build, ["rows"])


def index_key_unpack(d: int) -> OpFunction:
    """IndexKeyUnpack: u8 [N, d/2 + d/32] → f32 [N, d] (still Hadamard-turned: queries are turned alike)."""
    pairs = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], -1)  # [256, 2]

    def build(body: Body) -> list[str]:
        codes, scales = body.split(body.cast("rows", INT32), (d // 2, d // FP4_GROUP))
        values = body.reshape(body.op("Gather", body.const(pairs), codes), 0, d // FP4_GROUP, FP4_GROUP)
        scale = body.op("Gather", body.const(E8M0), body.unsqueeze(scales, -1))
        return [body.reshape(body.op("Mul", values, scale), 0, d)]

    return function("IndexKeyUnpack", f"d{d}", ["rows"], {"dim": d}, build, ["x"])
