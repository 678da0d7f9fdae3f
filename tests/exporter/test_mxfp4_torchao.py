"""The MXFP4 codec against torchao's, with the same scale rule (floor)."""

from __future__ import annotations

import numpy as np
import pytest

from exporter import codec
from exporter.quantize import mxfp4

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def torchao_values():
    """w f32 [N, K] → what torchao's MXFP4 (floor scale) makes of it. Its wheel logs that it cannot load a .so built
    for another Python: a log line, not a warning, and nothing here uses it."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")

    def values(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        made = mx.MXTensor.to_mx(torch.from_numpy(w), torch.float4_e2m1fn_x2, 32)
        return made.scale.view(torch.uint8).numpy(), made.dequantize(torch.float32).numpy()

    return values


@pytest.mark.parametrize("spread", [0.01, 1.0, 60.0, 300.0])
def test_floor_rounding_is_torchao(torchao_values, spread):
    rng = np.random.default_rng(17)
    codes = codec.e4m3_encode((rng.normal(size=(256, 512)) * spread).astype(np.float32))
    scales = rng.integers(100, 130, (2, 4)).astype(np.uint8)
    packed, out = mxfp4.fp8_to_mxfp4_floor(codes, scales)
    their_scales, their_values = torchao_values(codec.fp8_block_dequantize(codes, scales))
    nonzero = codec.fp4_unpack(packed).reshape(256, 16, 32).any(-1)
    np.testing.assert_array_equal(out[nonzero], their_scales[nonzero])
    np.testing.assert_array_equal(codec.fp4_dequantize(packed, out), their_values)


def test_where_the_search_keeps_the_floor_the_codes_are_torchao(torchao_values):
    rng = np.random.default_rng(19)
    w = rng.normal(size=(512, 256)).astype(np.float32)
    packed, scales = mxfp4.float_to_mxfp4(w)
    their_scales, their_values = torchao_values(w)
    kept = np.repeat(scales == their_scales, 32, axis=1)
    assert 0.5 < kept.mean() < 1
    ours = codec.fp4_dequantize(packed, scales)
    np.testing.assert_array_equal(ours[kept], their_values[kept])
    error, theirs = np.square(ours - w)[~kept].sum(), np.square(their_values - w)[~kept].sum()
    assert error < theirs
