"""BF16 to FP8 per 128×128 against float64 arithmetic and the codec's own quantizer."""

from __future__ import annotations

import numpy as np
import pytest

from appliance.errors import CheckpointError
from exporter import codec
from exporter.quantize import fp8

FINITE = np.array([v for v in codec.E4M3_VALUES.astype(np.float64) if np.isfinite(v)])
GRID = np.unique(FINITE)  # −0 and +0 are one
ODD = (codec.e4m3_encode(GRID.astype(np.float32)) & 1) == 1


def nearest(x: np.ndarray) -> np.ndarray:
    """Nearest E4M3 value, saturating; a tie to the even code."""
    x = np.clip(x, -448, 448)
    upper = np.clip(np.searchsorted(GRID, x), 1, len(GRID) - 1)
    low, high = GRID[upper - 1], GRID[upper]
    to_high = (high - x < x - low) | ((high - x == x - low) & ODD[upper - 1])
    return np.where(to_high, high, low)


def bf16(values: np.ndarray) -> np.ndarray:
    return codec.bf16_encode(values.astype(np.float32))


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (300, 160), (5, 384)])
def test_each_block_takes_the_best_of_three_scales(rows, columns):
    rng = np.random.default_rng(rows)
    bits = bf16(rng.normal(size=(rows, columns)) * np.exp(rng.normal(size=(rows, columns)) * 2) * 2.0**-7)
    codes, scales = fp8.bf16_to_fp8(bits)
    values = codec.bf16_decode(bits).astype(np.float64)
    for i, j in np.ndindex(scales.shape):
        block = np.s_[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
        least = int(np.ceil(np.log2(np.abs(values[block]).max() / 448)))
        errors = {s: np.square(nearest(values[block] / 2.0 ** (least + s)) * 2.0 ** (least + s) - values[block]).sum()
                  for s in (0, 1, -1)}  # fmt: skip
        taken = int(scales[i, j]) - 127
        assert errors[taken - least] == min(errors.values())
        decoded = codec.E4M3_VALUES[codes[block]] * 2.0**taken
        np.testing.assert_array_equal(decoded, nearest(values[block] / 2.0**taken) * 2.0**taken)


def test_where_nothing_is_gained_it_is_the_codec():
    bits = bf16(np.random.default_rng(5).normal(size=(256, 256)))
    ours, theirs = fp8.bf16_to_fp8(bits), codec.fp8_block_quantize(codec.bf16_decode(bits))
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_array_equal(ours[0], theirs[0])


def test_zero_blocks_and_tiny_values():
    bits = np.zeros((128, 256), np.uint16)
    bits[:, 128:] = bf16(np.full((128, 128), 2.0**-120))
    codes, scales = fp8.bf16_to_fp8(bits)
    assert scales[0, 0] == 127
    assert not codes[:, :128].any()
    decoded = codec.fp8_block_dequantize(codes, scales)
    np.testing.assert_array_equal(decoded[:, 128:], codec.bf16_decode(bits)[:, 128:])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_by_name(bad):
    bits = bf16(np.ones((4, 128)))
    bits[2, 3] = np.float32(bad).view(np.uint32) >> 16
    with pytest.raises(CheckpointError, match=r"head\.weight: holds NaN or infinity"):
        fp8.bf16_to_fp8(bits, name="head.weight")
