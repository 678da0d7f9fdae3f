"""Function bodies through stock onnxruntime against the primitive vectors (P0a bit for bit, P0b to 1.2e-7)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from graph_support import GOLDEN, run_function

from appliance.model import RopeScaling
from exporter import codec as numpy_codec
from exporter.ops import codec, hyper, linear, moe
from exporter.ops.body import function
from runtime.rope import frequencies

OPS = np.load(GOLDEN / "ops.npz")
YARN = RopeScaling(16, 65536, 32, 1)


def bf16(name: str) -> np.ndarray:
    return (OPS[name].view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def test_kv_rows_round_trip_as_the_official_code_does() -> None:
    x = bf16("kvq_in_u16")
    padded = np.concatenate([x, np.zeros((len(x), 64), np.float32)], axis=1)
    (rows,) = run_function(codec.kv_pack(448, 64), x=padded)
    (back,) = run_function(codec.kv_unpack(448, 64), rows=rows)
    assert rows.shape == (16, 584)
    assert np.array_equal(back[:, :448], bf16("kvq_out_u16"))


def test_index_keys_turn_and_round_as_the_official_code_does() -> None:
    (rows,) = run_function(codec.index_key_pack(128), x=bf16("had_in_u16"))
    (back,) = run_function(codec.index_key_unpack(128), rows=rows)
    assert rows.shape == (16, 68)
    assert np.array_equal(back, bf16("fp4_out_u16"))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 50.0, 1e4])
def test_kv_rows_have_the_bytes_of_the_numpy_codec(scale: float) -> None:
    x = (np.random.default_rng(3).standard_normal((64, 192)) * scale).astype(np.float32)
    x[0], x[1, 128:] = 0, [0.0, -0.0, 2.0**-125, -(2.0**-126), 1e30, -3e38, *([-1e-40] * 58)]
    (rows,) = run_function(codec.kv_pack(128, 64), x=x)
    expected = numpy_codec.attention_row_pack(x, 64)
    assert np.array_equal(rows, expected)
    (back,) = run_function(codec.kv_unpack(128, 64), rows=rows)
    assert np.array_equal(back, numpy_codec.attention_row_unpack(rows, 192, 64))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_index_keys_have_the_bytes_of_the_numpy_codec(scale: float) -> None:
    x = (np.random.default_rng(4).standard_normal((64, 128)) * scale).astype(np.float32)
    x[0] = 0
    (rows,) = run_function(codec.index_key_pack(128), x=x)
    differing = (rows != numpy_codec.index_row_pack(x)).mean()
    assert differing < 2e-3  # the Hadamard sums run in another order: a value on a rounding edge may flip


def test_fp8_weights_multiply_as_the_format_says() -> None:
    rng = np.random.default_rng(6)
    x, codes = rng.standard_normal((3, 192)).astype(np.float32), rng.integers(0, 126, (256, 192)).astype(np.uint8)
    scales = rng.integers(118, 126, (2, 2)).astype(np.uint8)
    (y,) = run_function(linear.fp8_matmul(256, 192), x=x, codes=codes, scales=scales)
    exact = x.astype(np.float64) @ numpy_codec.fp8_block_dequantize(codes, scales).astype(np.float64).T
    assert np.abs(y - exact).max() <= 1e-5 * np.abs(exact).max()


def test_sinkhorn_and_stream_mixes_match() -> None:
    mixes, scale, base = OPS["hc_mixes"], OPS["hc_scale"], OPS["hc_base"]
    spread = np.repeat(np.arange(3), (4, 4, 16))
    logits = (mixes * scale[spread] + base)[:, 8:]
    body = function("Sinkhorn", "t", ["x"], {}, lambda b: [hyper.sinkhorn(b, "x", 4, 20, 1e-6)], ["y"])
    (comb,) = run_function(body, x=logits.astype(np.float32))
    assert np.abs(comb.reshape(-1, 4, 4) - OPS["hc_comb"]).max() <= 1.2e-7


def test_softplus_series_is_within_two_ulp() -> None:
    x = np.linspace(-40, 40, 4001).astype(np.float32)
    body = function("Softplus", "t", ["x"], {}, lambda b: [moe._softplus(b, "x")], ["y"])
    (y,) = run_function(body, x=x)
    exact = np.logaddexp(0, x.astype(np.float64))
    assert (np.abs(y - exact) / exact).max() < 2.4e-7


@pytest.mark.parametrize(("table", "theta", "scaling"), [("main", 10000.0, None), ("compress", 160000.0, YARN)])
def test_rope_tables_of_the_real_config(table: str, theta: float, scaling: RopeScaling | None) -> None:
    inv_freq = frequencies(64, theta, scaling)
    expected = OPS[f"rope_{table}_inv_freq"]
    assert np.array_equal(inv_freq, expected)
    angle = (OPS["rope_positions"].astype(np.float32)[:, None] * expected).astype(np.float64)
    for name, value in (("cos", np.cos(angle)), ("sin", np.sin(angle))):
        assert np.abs(value.astype(np.float32) - OPS[f"rope_{table}_{name}"]).max() <= 1.2e-7


def test_wrong_yarn_is_seen() -> None:
    wrong = frequencies(64, 160000.0, dataclasses.replace(YARN, factor=8))
    assert (np.abs(wrong - OPS["rope_compress_inv_freq"]) / OPS["rope_compress_inv_freq"]).max() > 1e-2
