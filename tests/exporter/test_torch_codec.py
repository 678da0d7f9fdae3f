"""P0a and P0b in torch: bit for bit the golden vectors, and bit for bit the numpy codecs on other input."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from exporter import codec, rope, torch_codec  # noqa: E402
from exporter import reference_math as maths  # noqa: E402
from exporter.presets import V4_FLASH  # noqa: E402

pytestmark = pytest.mark.torch

OPS = Path(__file__).parents[1] / "golden/ops.npz"


@pytest.fixture(scope="module")
def ops():
    with np.load(OPS) as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def bf16(ops, key):
    return ops[key].view(torch.bfloat16).to(torch.float32)


def as_bf16_bits(x):
    return x.to(torch.bfloat16).view(torch.int16)


def wide(shape, seed):
    """Values over many orders of magnitude, with zeros, ties and subnormals."""
    draw = np.random.default_rng(seed)
    x = draw.normal(0, 1, shape) * np.exp2(draw.integers(-130, 20, shape))
    x[..., ::7] = draw.integers(-13, 13, x[..., ::7].shape) / 4
    x[0], x[1] = 0, draw.normal(0, 1, shape[-1])
    return x.astype(np.float32)


def test_golden_vectors(ops):
    restored = torch_codec.act_dequant(*torch_codec.act_quant(bf16(ops, "kvq_in_u16"), 64))
    assert torch.equal(as_bf16_bits(restored), ops["kvq_out_u16"])
    codes, scales = torch_codec.act_quant(bf16(ops, "aq_in_u16"))
    assert torch.equal(codes, ops["aq_codes_u8"])
    assert torch.equal(torch_codec.power_of_two(scales.to(torch.int32) - 127), ops["aq_scale_f32"])
    rotated = torch_codec.hadamard(bf16(ops, "had_in_u16"))
    assert torch.equal(as_bf16_bits(rotated), ops["had_out_u16"])
    restored = torch_codec.fp4_dequantize(*torch_codec.fp4_quantize(bf16(ops, "had_out_u16")))
    assert torch.equal(as_bf16_bits(restored), ops["fp4_out_u16"])
    rounded = torch.from_numpy(codec.E2M1_VALUES)[torch_codec.e2m1_encode(ops["e2m1_round_in"]).long()]
    assert torch.equal(rounded, ops["e2m1_round_out"])


@pytest.mark.parametrize("seed", range(3))
def test_attention_rows_equal_numpy(seed):
    x = wide((64, 512), seed)
    rows = codec.attention_row_pack(x, 64)
    assert torch_codec.attention_row_pack(torch.from_numpy(x), 64).numpy().tobytes() == rows.tobytes()
    unpacked = torch_codec.attention_row_unpack(torch.from_numpy(rows), 512, 64).numpy()
    assert unpacked.tobytes() == codec.attention_row_unpack(rows, 512, 64).tobytes()


@pytest.mark.parametrize("seed", range(3))
def test_index_rows_equal_numpy(seed):
    x = wide((64, 128), seed)
    rows = codec.index_row_pack(x)
    assert torch_codec.index_row_pack(torch.from_numpy(x)).numpy().tobytes() == rows.tobytes()
    unpacked = torch_codec.index_row_unpack(torch.from_numpy(rows)).numpy()
    assert unpacked.tobytes() == codec.index_row_unpack(rows).tobytes()


def test_act_round_trip_equals_numpy():
    x = wide((32, 256), 5)
    expected = codec.act_dequant(*codec.act_quant(x, 128))
    assert torch_codec.act_round_trip(torch.from_numpy(x)).numpy().tobytes() == expected.tobytes()


def test_e4m3_equals_torchs_own_cast():
    x = np.clip(wide((400, 256), 6), -448, 448)
    x = np.where(x == 0, np.float32(0), x)  # ours stores −0 as +0
    expected = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert codec.e4m3_encode(x).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("name", "compressed"), [("main", False), ("compress", True)])
def test_rope_tables_bit_exact(ops, name, compressed):
    frequency = torch.from_numpy(rope.frequencies(V4_FLASH, compressed=compressed))
    cos, sin = maths.rope_tables(frequency, ops["rope_positions"])
    assert torch.equal(cos, ops[f"rope_{name}_cos"])
    assert torch.equal(sin, ops[f"rope_{name}_sin"])


def test_hyper_connection_coefficients_bit_exact(ops):
    pre, post, comb = maths.hc_split(ops["hc_mixes"], ops["hc_scale"], ops["hc_base"], 4, 20, 1e-6)
    assert torch.equal(pre, ops["hc_pre"])
    assert torch.equal(post, ops["hc_post"])
    assert torch.equal(comb, ops["hc_comb"])


def test_rope_is_undone_by_its_inverse_and_turns_pairs():
    frequency = torch.from_numpy(rope.frequencies(V4_FLASH, compressed=True))
    table = maths.rope_tables(frequency, torch.tensor([0, 5, 4095]))
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (3, 2, 512)).astype(np.float32))
    turned = maths.rope(x, table)
    assert torch.equal(turned[0], x[0])
    assert torch.equal(turned[..., :448], x[..., :448])
    assert (maths.unrope(turned, table) - x).abs().max() < 1e-6
    cos, sin = (t[1, 3] for t in table)  # pair 3 of position 5: dims 448 + 6 and 448 + 7
    assert torch.equal(turned[1, 0, 454], x[1, 0, 454] * cos - x[1, 0, 455] * sin)


def test_equal_scores_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, -0.0, 0.0, 0.0]])
    assert maths.top_k(scores, 3)[1].tolist() == [[1, 2, 4], [0, 1, 2]]
