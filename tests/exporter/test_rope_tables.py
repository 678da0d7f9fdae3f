"""P0b in numpy: RoPE frequencies bit-exact, tables within one ulp; mHC coefficients as plain numpy, to 1.2e-7."""

from pathlib import Path

import numpy as np
import pytest

from exporter import rope
from exporter.presets import V4_FLASH

OPS = Path(__file__).parents[1] / "golden/ops.npz"
ONE_ULP = 1.2e-7


@pytest.fixture(scope="module")
def ops():
    with np.load(OPS) as stored:
        return {key: stored[key] for key in stored.files}


@pytest.mark.parametrize(("name", "compressed"), [("main", False), ("compress", True)])
def test_tables_of_the_real_config(ops, name, compressed):
    frequency = rope.frequencies(V4_FLASH, compressed=compressed)
    assert frequency.tobytes() == ops[f"rope_{name}_inv_freq"].tobytes()
    cos, sin = rope.tables(frequency, ops["rope_positions"])
    assert cos.dtype == sin.dtype == np.float32
    assert np.abs(cos - ops[f"rope_{name}_cos"]).max() <= ONE_ULP
    assert np.abs(sin - ops[f"rope_{name}_sin"]).max() <= ONE_ULP


def test_f64_tables_are_not_the_trained_ones(ops):
    """Exact maths is 1e-2 off at a million tokens: the f32 product is part of the model."""
    exact = 160000.0 ** (-np.arange(0, 64, 2) / 64)
    scaled = np.cos(ops["rope_positions"][-1] * exact[:15])
    assert np.abs(scaled - ops["rope_compress_cos"][-1, :15]).max() > 1e-3


def test_hyper_connection_coefficients(ops):
    """The formulas of V4's mHC in numpy f32: sigmoids, softmax, 20 Sinkhorn steps that end on columns."""
    mixes, scale, base, eps = ops["hc_mixes"], ops["hc_scale"], ops["hc_base"], np.float32(1e-6)

    def sigmoid(x):
        return (1 / (1 + np.exp(-x))).astype(np.float32)

    assert np.abs(sigmoid(mixes[:, :4] * scale[0] + base[:4]) + eps - ops["hc_pre"]).max() <= ONE_ULP
    assert np.abs(2 * sigmoid(mixes[:, 4:8] * scale[1] + base[4:8]) - ops["hc_post"]).max() <= ONE_ULP
    logits = (mixes[:, 8:] * scale[2] + base[8:]).reshape(-1, 4, 4)
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    comb = raised / raised.sum(-1, keepdims=True) + eps
    comb = comb / (comb.sum(-2, keepdims=True) + eps)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdims=True) + eps)
        comb = comb / (comb.sum(-2, keepdims=True) + eps)
    assert comb.dtype == np.float32
    assert np.abs(comb - ops["hc_comb"]).max() <= ONE_ULP
    assert np.abs(comb.sum(-2) - 1).max() < 2e-6
