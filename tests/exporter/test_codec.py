"""P0a in numpy: every number format against the golden vectors, bit for bit, and the row layouts byte by byte."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import CheckpointError
from appliance.model import attention_row_width, index_row_width
from exporter import codec
from exporter.presets import TINY, V4_FLASH

OPS = Path(__file__).parents[1] / "golden/ops.npz"


@pytest.fixture(scope="module")
def ops():
    with np.load(OPS) as stored:
        return {key: stored[key] for key in stored.files}


def bf16(ops, key):
    return codec.bf16_decode(ops[key].view(np.uint16))


def same_bits(found, expected):
    found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    return found.shape == expected.shape and found.tobytes() == expected.tobytes()


def test_kv_round_trip(ops):
    restored = codec.act_dequant(*codec.act_quant(bf16(ops, "kvq_in_u16"), codec.KV_GROUP))
    assert same_bits(codec.bf16_encode(restored), ops["kvq_out_u16"].view(np.uint16))


def test_act_quant(ops):
    codes, scales = codec.act_quant(bf16(ops, "aq_in_u16"), 128)
    assert same_bits(codes, ops["aq_codes_u8"])
    assert same_bits(codec.e8m0_decode(scales), ops["aq_scale_f32"])


def test_hadamard_and_fp4(ops):
    rotated = codec.hadamard(bf16(ops, "had_in_u16"))
    assert same_bits(codec.bf16_encode(rotated), ops["had_out_u16"].view(np.uint16))
    restored = codec.fp4_dequantize(*codec.fp4_quantize(bf16(ops, "had_out_u16")))
    assert same_bits(codec.bf16_encode(restored), ops["fp4_out_u16"].view(np.uint16))


def test_index_row_is_hadamard_then_fp4(ops):
    rows = codec.index_row_pack(bf16(ops, "had_in_u16"))
    assert rows.shape == (16, 68)
    assert same_bits(codec.bf16_encode(codec.index_row_unpack(rows)), ops["fp4_out_u16"].view(np.uint16))


def test_e2m1_rounding(ops):
    assert same_bits(codec.e2m1_decode(codec.e2m1_encode(ops["e2m1_round_in"])), ops["e2m1_round_out"])


def test_e4m3_code_table():
    assert codec.E4M3_VALUES[[0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0x81, 0xFE]].tolist() == [
        0.0, 2.0**-9, 7 * 2.0**-9, 2.0**-6, 1.0, 448.0, -(2.0**-9), -448.0,
    ]
    assert np.isnan(codec.E4M3_VALUES[[0x7F, 0xFF]]).all()
    finite = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0x80, 0xFF])  # −0 encodes as +0
    assert same_bits(codec.e4m3_encode(codec.e4m3_decode(finite)), finite)


def test_e4m3_ties_saturation_and_signs():
    halfway = np.array([2.0**-10, 3 * 2.0**-10, 1.0625, 1.1875, 17.0, 400.0, 432.0], np.float32)
    assert codec.e4m3_encode(halfway).tolist() == [0x00, 0x02, 0x38, 0x3A, 0x58, 0x7C, 0x7E]
    edges = np.array([464.0, 1e9, -1e9, -1e-30, -0.0], np.float32)
    assert codec.e4m3_encode(edges).tolist() == [0x7E, 0x7E, 0xFE, 0x80, 0x00]


def test_e8m0_range():
    assert codec.e8m0_decode(np.array([0, 1, 127, 254], np.uint8)).tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert np.isnan(codec.e8m0_decode(np.array([255], np.uint8))[0])
    exponents = np.arange(-127, 128)
    assert same_bits(codec.e8m0_encode(exponents), np.arange(255, dtype=np.uint8))


@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_ceil_log2(x):
    exponent = int(codec.ceil_log2(np.array([x], np.float32))[0])
    assert 2.0 ** (exponent - 1) < x <= 2.0**exponent


def test_bf16_rounds_to_even():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000], np.uint32)
    assert codec.bf16_encode(bits.view(np.float32)).tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF80]


def test_fp4_weight_bytes_of_the_real_checkpoint():
    packed, scale = np.frombuffer(bytes.fromhex("a0a8ec4a"), np.uint8), np.array([0x78], np.uint8)
    row = codec.fp4_dequantize(np.pad(packed, (0, 12)), scale)
    assert row[:6].tolist() == [0, -0.0078125, -0.0, -0.0078125, -0.015625, -0.03125]


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (96, 320), (1, 1), (129, 127)])
def test_fp8_blocks_with_ragged_ends(shape):
    weight = np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)
    codes, scales = codec.fp8_block_quantize(weight)
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    restored = codec.fp8_block_dequantize(codes, scales)
    assert np.abs(restored - weight).max() <= np.abs(weight).max() / 16
    again, same_scales = codec.fp8_block_quantize(restored)
    assert same_bits(codec.fp8_block_dequantize(again, same_scales), restored)


def test_fp4_low_nibble_is_even_k():
    codes = np.array([[1, 2, 3, 4]], np.uint8)
    assert codec.fp4_pack(codes).tolist() == [[0x21, 0x43]]
    assert same_bits(codec.fp4_unpack(codec.fp4_pack(codes)), codes)


@pytest.mark.parametrize("config", [V4_FLASH, TINY])
def test_attention_row_layout(config):
    d, rope = config.head_dim, config.qk_rope_head_dim
    nope, groups = d - rope, (d - rope) // 64
    x = np.random.default_rng(1).normal(0, 1, (5, d)).astype(np.float32)
    rows = codec.attention_row_pack(x, rope)
    assert rows.dtype == np.uint8
    assert rows.shape == (5, attention_row_width(config, "kv-v4"))
    codes, scales = codec.act_quant(x[:, :nope], 64)
    assert same_bits(rows[:, :nope], codes)
    assert same_bits(rows[:, nope : nope + groups], scales)
    assert not rows[:, nope + groups : nope + (groups + 7) // 8 * 8].any()
    assert same_bits(rows[:, -2 * rope :], codec.bf16_encode(x[:, nope:]).astype("<u2").view(np.uint8))
    unpacked = codec.attention_row_unpack(rows, d, rope)
    assert np.abs(unpacked - x).max() < np.abs(x).max() / 16
    rows[:, nope + groups : nope + (groups + 7) // 8 * 8] = 0xFF
    assert same_bits(codec.attention_row_unpack(rows, d, rope), unpacked)  # the pad is not read


def test_rope_part_flushes_what_a_graph_cannot_round():
    x = np.zeros((1, 128), np.float32)
    x[0, 64:70] = [2.0**-125, -(2.0**-125), 2.0**-126, -(2.0**-126), -0.0, -1e-45]
    tail = codec.attention_row_pack(x, 64)[0, -128:].view("<u2")
    assert tail[:6].tolist() == [0x0100, 0x8100, 0, 0, 0, 0]


def test_scale_floor_of_an_empty_row():
    row = codec.attention_row_pack(np.zeros((1, 128), np.float32), 64)[0]
    assert row[64] == 127 - 22  # 2^ceil(log2(1e-4 / 448))
    assert row[:64].tolist() == [0] * 64
    assert codec.index_row_pack(np.zeros((1, 128), np.float32))[0, 64:].tolist() == [1] * 4  # 2^-126


@pytest.mark.parametrize("width", [32, 64, 128])
def test_index_row_layout(width):
    x = np.random.default_rng(2).normal(0, 1, (3, width)).astype(np.float32)
    rows = codec.index_row_pack(x)
    assert rows.shape == (3, width // 2 + width // 32)
    if width == 128:
        assert rows.shape[1] == index_row_width(V4_FLASH, "kv-v4")
    packed, scales = codec.fp4_quantize(codec.bf16_round(codec.hadamard(x)))
    assert same_bits(rows, np.concatenate([packed, scales], axis=1))


def test_hadamard_is_sylvester_and_orthogonal():
    signs = np.sign(codec.hadamard(np.eye(4, dtype=np.float32))).astype(int)
    assert signs.tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    x = np.random.default_rng(3).normal(0, 1, (2, 128)).astype(np.float32)
    assert np.abs(codec.hadamard(codec.hadamard(x)) - x).max() < 1e-6


def test_wrong_group_is_an_error():
    with pytest.raises(CheckpointError, match="last axis 100 is not a multiple of the scale group 64"):
        codec.act_quant(np.zeros((1, 100), np.float32), 64)
