"""The MXFP4 codec against slow float64 arithmetic: every byte at every shift, the scale search, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import CheckpointError
from exporter import codec
from exporter.quantize import int8, mxfp4

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(x: float) -> float:
    """E2M1 by definition: nearest of 16 values, a tie to the one whose mantissa bit is 0 (even index)."""
    distance = np.abs(np.abs(x) - GRID)
    best = [i for i in range(8) if distance[i] == distance.min()]
    return float(np.copysign(GRID[best[0] if len(best) == 1 else next(i for i in best if i % 2 == 0)], x))


def plain_error(group: np.ndarray, exponent: int, importance: np.ndarray) -> float:
    scale = 2.0**exponent
    return float(sum(w * (x - nearest(x / scale) * scale) ** 2 for x, w in zip(group, importance, strict=True)))


def floor_exponent(group: np.ndarray) -> int:
    return int(np.floor(np.log2(np.abs(group).max()))) - 2


def fp8_matrix(rng: np.random.Generator, rows: int, columns: int, spread: float = 60.0):
    """Random E4M3 codes (no NaN), E8M0 scales, and their values in float64."""
    codes = codec.e4m3_encode((rng.normal(size=(rows, columns)) * spread).astype(np.float32))
    scales = rng.integers(110, 125, (-(-rows // 128), -(-columns // 128))).astype(np.uint8)
    return codes, scales, codec.fp8_block_dequantize(codes, scales).astype(np.float64)


def check_against_brute_force(values, importance, packed, scales):
    """Codes are the nearest at their scale; the scale is the best of three, or as good as the best counted so.

    Returns how many groups it has checked.
    """
    decoded = codec.fp4_dequantize(packed, scales).astype(np.float64)
    for n, g in np.ndindex(scales.shape):
        group, taken = values[n, g * 32 : g * 32 + 32], int(scales[n, g]) - 127
        if not group.any():
            assert scales[n, g] == 127
            assert not decoded[n, g * 32 : g * 32 + 32].any()
            continue
        floor, weights = floor_exponent(group), importance[n, g * 32 : g * 32 + 32]
        weights = weights / weights.max() if weights.max() > 0 else np.ones(32)
        assert taken - floor in (-1, 0, 1)
        expected = [nearest(x / 2.0**taken) * 2.0**taken for x in group]
        np.testing.assert_array_equal(decoded[n, g * 32 : g * 32 + 32], expected)
        errors = [plain_error(group, floor + step, weights) for step in (0, 1, -1)]
        # counted in 1/1024 of importance and 2^-12 of (2^E)²: 32 terms, each off by a half unit of either
        slack = 32 * (2.0**-12 + 21 / 2048) * 4.0**floor
        assert errors[(0, 1, -1).index(taken - floor)] <= min(errors) + slack
        ranked = sorted(errors)
        if ranked[1] - ranked[0] > slack:
            assert errors.index(ranked[0]) == (0, 1, -1).index(taken - floor)
    return scales.size


@pytest.mark.parametrize("weighted", [False, True])
def test_the_scale_search_is_the_brute_force_search(weighted):
    rng = np.random.default_rng(3)
    codes, scales, values = fp8_matrix(rng, 24, 192)
    importance = rng.exponential(size=192).astype(np.float32) ** 2 if weighted else None
    packed, out = mxfp4.fp8_to_mxfp4(codes, scales, importance)
    rows = np.ones((24, 192)) if importance is None else np.tile(importance.astype(np.float64), (24, 1))
    assert check_against_brute_force(values, rows, packed, out) == 24 * 192 // 32


def test_without_importance_the_choice_is_exact():
    rng = np.random.default_rng(5)
    codes, scales, values = fp8_matrix(rng, 64, 256, spread=40)
    _, out = mxfp4.fp8_to_mxfp4(codes, scales)
    differing = 0
    for n, g in np.ndindex(out.shape):
        group = values[n, g * 32 : g * 32 + 32]
        floor = floor_exponent(group)
        errors = [plain_error(group, floor + step, np.ones(32)) / 4.0**floor for step in (0, 1, -1)]
        ranked = np.sort(errors)
        if ranked[1] - ranked[0] > 32 * 2.0**-12:
            assert (0, 1, -1)[int(np.argmin(errors))] == int(out[n, g]) - 127 - floor
            differing += int(np.argmin(errors) != 0)
    assert differing > 20  # the search is not idle


def test_importance_moves_the_scale_towards_what_matters():
    group = np.full(32, 0.7, np.float32)
    group[0] = 7.0  # saturates at 6 under 2^0; 8 at 2^1
    everything = np.ones(32, np.float32)
    only_small = np.where(group < 1, 1.0, 1e-3).astype(np.float32)
    only_large = np.where(group > 1, 1.0, 1e-3).astype(np.float32)
    taken = [int(mxfp4.float_to_mxfp4(group[None], w)[1][0, 0]) - 127 for w in (everything, only_small, only_large)]
    best = [
        min((0, 1, -1), key=lambda step, w=w: plain_error(group.astype(np.float64), step, w))
        for w in (everything, only_small, only_large)
    ]
    assert taken == best
    assert len(set(taken)) > 1


@pytest.mark.parametrize("weighted", [False, True])
def test_fp8_and_float_give_equal_bytes(weighted):
    rng = np.random.default_rng(7)
    for spread in (0.01, 1.0, 60.0, 300.0):
        codes, scales, values = fp8_matrix(rng, 40, 384, spread)
        importance = rng.exponential(size=384).astype(np.float32) if weighted else None
        from_fp8 = mxfp4.fp8_to_mxfp4(codes, scales, importance)
        from_float = mxfp4.float_to_mxfp4(values.astype(np.float32), importance)
        np.testing.assert_array_equal(from_fp8[0], from_float[0])
        np.testing.assert_array_equal(from_fp8[1], from_float[1])


def test_every_byte_at_every_shift():
    """Each FP8 byte beside each possible largest magnitude, floor and searched, against E2M1 by definition."""
    finite = [b for b in range(256) if b & 127 != 127]
    for largest in range(1, 127):
        below = np.array([b for b in finite if (b & 127) <= largest], np.uint8)
        rows = -(-len(below) // 31)
        codes = np.zeros((rows, 32), np.uint8)
        codes[:, 0] = largest
        codes[:, 1:].flat[: len(below)] = below
        scales = np.full((1, 1), 120, np.uint8)
        values = codec.E4M3_VALUES[codes].astype(np.float64) * 2.0**-7
        for convert in (mxfp4.fp8_to_mxfp4_floor, mxfp4.fp8_to_mxfp4):
            packed, out = convert(codes, scales)
            decoded = codec.fp4_dequantize(packed, out)
            exponents = out[:, 0].astype(int) - 127
            floor = floor_exponent(values[0])
            assert set(exponents - floor) <= ({0} if convert is mxfp4.fp8_to_mxfp4_floor else {0, 1, -1})
            for n in range(rows):
                scale = 2.0 ** exponents[n]
                np.testing.assert_array_equal(decoded[n], [nearest(v / scale) * scale for v in values[n]])


def test_values_that_are_mxfp4_already_do_not_move():
    rng = np.random.default_rng(11)
    packed = rng.integers(0, 256, (64, 96), dtype=np.uint8)
    scales = rng.integers(2, 250, (64, 6), dtype=np.uint8)
    packed[3, :16] = 0
    values = codec.fp4_dequantize(packed, scales)
    for convert in (mxfp4.float_to_mxfp4, lambda w: mxfp4.float_to_mxfp4(w, rng.exponential(size=192))):
        once = convert(values)
        np.testing.assert_array_equal(codec.fp4_dequantize(*once), values)
        np.testing.assert_array_equal(mxfp4.float_to_mxfp4(codec.fp4_dequantize(*once))[0], once[0] & unsigned(once[0]))


def unsigned(packed: np.ndarray) -> np.ndarray:
    """A mask that drops the sign of −0: values cannot tell it."""
    low, high = packed & 15, packed >> 4
    return (np.where(low == 8, 0, 15) | np.where(high == 8, 0, 240)).astype(np.uint8)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_is_refused_by_tensor_name(code):
    codes = np.zeros((256, 128), np.uint8)
    codes[200, 77] = code
    scales = np.full((2, 1), 120, np.uint8)
    for convert in (mxfp4.fp8_to_mxfp4, mxfp4.fp8_to_mxfp4_floor):
        with pytest.raises(CheckpointError, match=r"layers\.3\.attn\.wq_a\.weight: holds NaN"):
            convert(codes, scales, name="layers.3.attn.wq_a.weight")


def test_wrong_input_is_named():
    codes, scales = np.zeros((4, 64), np.uint8), np.full((1, 1), 120, np.uint8)
    with pytest.raises(CheckpointError, match="w: its scale holds NaN"):
        mxfp4.fp8_to_mxfp4(codes, np.full((1, 1), 255, np.uint8), name="w")
    with pytest.raises(CheckpointError, match=r"w: scale \[2, 1\], expected \[1, 1\]"):
        mxfp4.fp8_to_mxfp4(codes, np.zeros((2, 1), np.uint8), name="w")
    with pytest.raises(CheckpointError, match="w: 48 inputs, expected a multiple of 32"):
        mxfp4.float_to_mxfp4(np.zeros((4, 48), np.float32), name="w")
    with pytest.raises(CheckpointError, match=r"w: importance \[1, 32\], expected 64"):
        mxfp4.fp8_to_mxfp4(codes, scales, np.ones(32, np.float32), name="w")
    with pytest.raises(CheckpointError, match="w: importance"):
        mxfp4.fp8_to_mxfp4(codes, scales, np.full(64, np.nan, np.float32), name="w")
    with pytest.raises(CheckpointError, match="w: 4 rows do not divide into the 3"):
        mxfp4.fp8_to_mxfp4(codes, scales, np.ones((3, 64), np.float32), name="w")
    for bad in (np.nan, np.inf):
        with pytest.raises(CheckpointError, match="w: holds NaN or infinity"):
            mxfp4.float_to_mxfp4(np.full((1, 32), bad, np.float32), name="w")


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (129, 160), (300, 96), (128, 128), (5, 4096)])
def test_ragged_blocks(rows, columns):
    rng = np.random.default_rng(rows)
    codes, scales, values = fp8_matrix(rng, rows, columns)
    packed, out = mxfp4.fp8_to_mxfp4(codes, scales)
    assert packed.shape == (rows, columns // 2)
    assert out.shape == (rows, columns // 32)
    np.testing.assert_array_equal(packed, mxfp4.float_to_mxfp4(values.astype(np.float32))[0])


def test_each_section_of_rows_has_its_own_importance():
    rng = np.random.default_rng(13)
    codes, scales, _ = fp8_matrix(rng, 96, 128)
    importance = rng.exponential(size=(3, 128)).astype(np.float32) ** 3
    packed, out = mxfp4.fp8_to_mxfp4(codes, scales, importance)
    for section in range(3):
        rows = slice(section * 32, section * 32 + 32)
        alone = mxfp4.fp8_to_mxfp4(codes[rows], scales, importance[section])
        np.testing.assert_array_equal(packed[rows], alone[0])
        np.testing.assert_array_equal(out[rows], alone[1])
    assert (out != mxfp4.fp8_to_mxfp4(codes, scales, importance[0])[1]).any()


def test_extreme_scales_stay_in_range():
    codes = np.array([[0x7E] + [0x01] * 31, [0x01] * 32], np.uint8)
    for byte in (0, 1, 5, 250, 254):
        packed, out = mxfp4.fp8_to_mxfp4(codes, np.full((1, 1), byte, np.uint8))
        assert out.min() >= 1
        assert out.max() <= 254
        assert codec.fp4_unpack(packed)[0, 0] in (6, 7)  # 448 is 4 or 6 times its scale, saturated or not


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-100, 100), st.floats(0.1, 3.0))
def test_any_floats(seed, exponent, power):
    rng = np.random.default_rng(seed)
    w = (np.sign(rng.normal(size=(2, 64))) * rng.exponential(size=(2, 64)) ** power * 2.0**exponent).astype(np.float32)
    importance = (rng.exponential(size=64) ** power).astype(np.float32)
    packed, scales = mxfp4.float_to_mxfp4(w, importance)
    rows = np.tile(importance.astype(np.float64), (2, 1))
    assert check_against_brute_force(w.astype(np.float64), rows, packed, scales) == 4


def test_int8_is_the_same_number_for_every_code_and_scale():
    codes = np.tile(np.arange(256, dtype=np.uint8), (254, 1))  # [254, 256] bytes: every pair of codes at every scale
    scales = np.repeat(np.arange(1, 255, dtype=np.uint8)[:, None], 16, axis=1)
    values, halved = int8.mxfp4_to_int8(codes, scales)
    assert values.dtype == np.int8
    exact = np.ldexp(values.astype(np.float64), np.repeat(halved.astype(int) - 127, 32, axis=1))
    expected = np.array([nearest_code(c) for c in range(16)])[codec.fp4_unpack(codes)]
    np.testing.assert_array_equal(exact, np.ldexp(expected, np.repeat(scales.astype(int) - 127, 32, axis=1)))
    assert set(np.unique(np.abs(values))) == {0, 1, 2, 3, 4, 6, 8, 12}


def nearest_code(code: int) -> float:
    return float(np.copysign(GRID[code & 7], -1 if code & 8 else 1))


def test_int8_refuses_what_has_no_exact_form():
    packed, zero = np.full((1, 16), 0x11, np.uint8), np.zeros((1, 1), np.uint8)
    with pytest.raises(CheckpointError, match="w: a block's scale is"):
        int8.mxfp4_to_int8(packed, zero, name="w")
    with pytest.raises(CheckpointError, match="w: its scale holds NaN"):
        int8.mxfp4_to_int8(packed, np.full((1, 1), 255, np.uint8), name="w")
    values, scales = int8.mxfp4_to_int8(np.zeros((1, 16), np.uint8), zero)
    assert not values.any()
    assert scales.tolist() == [[0]]


def test_a_hair_beside_a_midpoint_is_no_tie():
    """Floats that differ from a midpoint in one bit of 23 round to the nearer neighbour."""
    for midpoint in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):
        bits = int(np.float32(midpoint).view(np.uint32))
        near = np.array([bits + sign * (1 << k) for k in range(20) for sign in (1, -1)], np.uint32).view(np.float32)
        for x in np.concatenate((near, -near, [midpoint, -midpoint])).astype(np.float32):
            assert nearest_code(int(mxfp4.encode(x[None])[0])) == nearest(float(x))
