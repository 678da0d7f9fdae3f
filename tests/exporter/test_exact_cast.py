"""MXFP4 to FP8 blocks and FP8 to BF16: the same values, or a refusal exactly where no common scale exists."""

from fractions import Fraction

import numpy as np
import pytest

from appliance.errors import CheckpointError
from exporter import codec
from exporter.exact_cast import fp8_to_bf16, mxfp4_to_fp8

E2M1 = [Fraction(v).limit_denominator() for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
E4M3 = {Fraction(float(v)) for v in codec.E4M3_VALUES if not np.isnan(v)}


def random_fp4(rng, rows, columns, spread, zeros=0.0):
    """Codes [rows, columns/2] and scales around 2^0 within ``spread`` powers of two; a share of zero groups."""
    codes = rng.integers(0, 16, (rows, columns), np.uint8)
    groups = rng.random((rows, columns // 32)) < zeros
    codes[np.repeat(groups, 32, axis=1)] = 0
    return codec.fp4_pack(codes), (127 + rng.integers(0, spread + 1, (rows, columns // 32))).astype(np.uint8)


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (70, 96), (130, 160), (1, 32)])
def test_values_are_the_same(shape):
    rng = np.random.Generator(np.random.PCG64(1))
    packed, scales = random_fp4(rng, *shape, spread=13, zeros=0.2)
    codes, blocks = mxfp4_to_fp8("w", packed, scales)
    assert codes.shape == shape
    assert blocks.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    expected = codec.fp4_dequantize(packed, scales)
    assert np.array_equal(codec.fp8_block_dequantize(codes, blocks), expected)
    assert np.array_equal(codes >> 7, codec.fp4_unpack(packed) >> 3)  # signs, of zeros too


def test_refused_exactly_where_no_common_scale_exists():
    """One block of two groups with one value each, all pairs of values and distances, against fractions."""
    seen = set()
    for distance in range(20):
        for low in range(1, 8):
            for high in range(1, 8):
                values = E2M1[low], E2M1[high] * 2**distance
                possible = any(all(v / Fraction(2) ** s in E4M3 for v in values) for s in range(-12, 30))
                codes = np.zeros((1, 64), np.uint8)
                codes[0, 0], codes[0, 32] = low, high
                scales = np.array([[100, 100 + distance]], np.uint8)
                try:
                    found, blocks = mxfp4_to_fp8("w", codec.fp4_pack(codes), scales)
                except CheckpointError:
                    assert not possible, (distance, low, high)
                else:
                    assert possible, (distance, low, high)
                    wanted = codec.fp4_dequantize(codec.fp4_pack(codes), scales)
                    assert np.array_equal(codec.fp8_block_dequantize(found, blocks), wanted)
                seen.add(possible)
    assert seen == {True, False}


def test_the_refusal_names_tensor_and_block():
    rng = np.random.Generator(np.random.PCG64(2))
    packed, scales = random_fp4(rng, 256, 256, spread=3)
    scales[140, 5] = 20
    with pytest.raises(CheckpointError, match=r"a\.weight: FP4 scales of rows 128…, columns 128… lie further apart"):
        mxfp4_to_fp8("a.weight", packed, scales)
    packed[140, 80:96] = 0  # columns 160 to 191: group 5
    assert mxfp4_to_fp8("a.weight", packed, scales)[1].shape == (2, 2)  # a group of zeros bounds nothing
    scales[0, 0] = 255
    with pytest.raises(CheckpointError, match="a scale is NaN"):
        mxfp4_to_fp8("a.weight", packed, scales)


@pytest.mark.parametrize("exponent", [0, 1, 3, 251, 252])
def test_scales_at_the_ends_of_e8m0(exponent):
    codes = np.tile(np.arange(16, dtype=np.uint8), (1, 2))
    packed, scales = codec.fp4_pack(codes), np.full((1, 1), exponent, np.uint8)
    found, blocks = mxfp4_to_fp8("w", packed, scales)
    assert np.array_equal(codec.fp8_block_dequantize(found, blocks), codec.fp4_dequantize(packed, scales))


def test_zeros_have_an_ordinary_scale():
    codes, blocks = mxfp4_to_fp8("w", np.zeros((128, 64), np.uint8), np.zeros((128, 4), np.uint8))
    assert not codes.any()
    assert blocks.tolist() == [[127]]


def test_fp8_to_bf16():
    codes = np.array([[c for c in range(256) if c & 127 != 127]], np.uint8)
    for exponent in (10, 127, 200):
        scales = np.full((1, 2), exponent, np.uint8)
        bits = fp8_to_bf16("head.weight", codes, scales)
        assert np.array_equal(codec.bf16_decode(bits), codec.fp8_block_dequantize(codes, scales))
    with pytest.raises(CheckpointError, match=r"head\.weight: row 0, column \d+ has no exact BF16 value"):
        fp8_to_bf16("head.weight", codes, np.zeros((1, 2), np.uint8))  # 2^-136 is below BF16
    with pytest.raises(CheckpointError, match="no exact BF16 value"):
        fp8_to_bf16("head.weight", np.full((1, 1), 127, np.uint8), np.full((1, 1), 127, np.uint8))
