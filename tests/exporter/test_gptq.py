"""GPTQ against the textbook (inverse Hessian, weight by weight, float64); rotation against Sylvester's formula."""

from __future__ import annotations

import numpy as np
import pytest
from quantize_support import correlated, second_moments

from appliance.errors import CheckpointError, UsageError
from exporter import codec
from exporter.quantize import gptq, mxfp4, rotation

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(x: float) -> float:
    distance = np.abs(abs(x) - GRID)
    best = np.flatnonzero(distance == distance.min())
    return float(np.copysign(GRID[best[0] if len(best) == 1 else best[best % 2 == 0][0]], x))


def textbook(w: np.ndarray, hessian: np.ndarray, damping: float) -> np.ndarray:
    """GPTQ as published, one weight at a time: what is left of the row moves by the inverse Hessian; of three scales a
    group takes the one whose loss is least."""
    size = len(hessian)
    damped = hessian.astype(np.float64) + np.eye(size) * damping * np.trace(hessian) / size
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    out = np.zeros(w.shape)
    for n in range(len(w)):
        row = w[n].astype(np.float64)
        for start in range(0, size, 32):
            floor = int(np.floor(np.log2(np.abs(row[start : start + 32]).max()))) - 2
            best = None
            for exponent in (floor, floor + 1, floor - 1):
                left, loss, rounded = row.copy(), 0.0, []
                for k in range(start, start + 32):
                    rounded.append(nearest(left[k] / 2.0**exponent) * 2.0**exponent)
                    error = (left[k] - rounded[-1]) / upper[k, k]
                    left[k + 1 :] -= error * upper[k, k + 1 :]
                    loss += error**2
                if best is None or loss < best[0]:
                    best = loss, left, rounded
            row, out[n, start : start + 32] = best[1], best[2]
    return out


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(29)
    return rng.normal(size=(48, 128)).astype(np.float32) / 8, second_moments(correlated(rng, 128))


def loss(w: np.ndarray, rounded: np.ndarray, hessian: np.ndarray) -> float:
    difference = (w - rounded).astype(np.float64)
    return float(np.einsum("nk,kj,nj->", difference, hessian.astype(np.float64), difference))


def test_it_is_the_textbook_algorithm(case):
    w, hessian = case
    ours = codec.fp4_dequantize(*gptq.gptq(w, hessian[None]))
    theirs = textbook(w, hessian, gptq.DAMPING)
    assert (ours == theirs).all(1).mean() > 0.9  # f32 against f64: a row whose rounding ties goes its own way
    assert loss(w, ours, hessian) == pytest.approx(loss(w, theirs, hessian), rel=0.02)


def test_outputs_are_nearer_than_by_rounding_alone(case):
    w, hessian = case
    plain = codec.fp4_dequantize(*mxfp4.float_to_mxfp4(w))
    weighted = codec.fp4_dequantize(*mxfp4.float_to_mxfp4(w, np.diagonal(hessian)))
    rounded = codec.fp4_dequantize(*gptq.gptq(w, hessian[None]))
    rotated = codec.fp4_dequantize(
        *gptq.gptq(rotation.rotate(w, 64), rotation.rotate_hessian(hessian[None], 64))
    )  # fmt: skip
    losses = [loss(w, x, hessian) for x in (plain, weighted, rounded, rotation.rotate(rotated, 64))]
    assert losses[1] < losses[0]
    assert losses[2] < 0.6 * losses[1]
    assert losses[3] < 0.6 * losses[1]


def test_inputs_that_do_not_correlate_are_rounded_one_by_one(case):
    w, hessian = case
    diagonal = np.diag(np.diagonal(hessian)).astype(np.float32)
    natural = gptq.gptq(w, diagonal[None], damping=0.0)
    ordered = gptq.gptq(w, diagonal[None], damping=0.0, act_order=True)
    np.testing.assert_array_equal(natural[0], ordered[0])
    np.testing.assert_array_equal(natural[1], ordered[1])
    weighted = mxfp4.float_to_mxfp4(w, np.diagonal(hessian))
    same = (natural[1] == weighted[1]).mean()  # the scale search counts in steps, GPTQ in floats
    assert same > 0.99


def test_act_order_rounds_large_inputs_first_and_puts_them_back(case):
    w, hessian = case
    packed, scales = gptq.gptq(w, hessian[None], act_order=True)
    ordered = codec.fp4_dequantize(packed, scales)
    plain = codec.fp4_dequantize(*mxfp4.float_to_mxfp4(w))
    assert loss(w, ordered, hessian) < 0.7 * loss(w, plain, hessian)
    assert np.abs(ordered - w).max() < 3 * np.abs(plain - w).max() + np.abs(w).max()
    assert np.corrcoef(ordered.ravel(), w.ravel())[0, 1] > 0.95  # every column is where it was


def test_blocks_of_the_hessian_are_independent(case):
    w, hessian = case
    blocks = np.stack([hessian[:64, :64], hessian[64:, 64:]])
    packed, scales = gptq.gptq(w, blocks)
    for half in range(2):
        alone = gptq.gptq(w[:, half * 64 : half * 64 + 64], blocks[half : half + 1])
        np.testing.assert_array_equal(packed[:, half * 32 : half * 32 + 32], alone[0])
        np.testing.assert_array_equal(scales[:, half * 2 : half * 2 + 2], alone[1])


def test_singular_and_empty_hessians_still_give_a_rounding(case):
    w, _ = case
    x = np.random.default_rng(3).normal(size=(4, 128)).astype(np.float32)  # rank 4
    for hessian in (second_moments(x), np.zeros((128, 128), np.float32)):
        rounded = codec.fp4_dequantize(*gptq.gptq(w, hessian[None], damping=0.0))
        assert np.isfinite(rounded).all()
        assert np.square(rounded - w).sum() < np.square(w).sum()
    zero = gptq.gptq(np.zeros((2, 128), np.float32), np.eye(128, dtype=np.float32)[None])
    assert (zero[1] == 127).all()


def test_what_does_not_fit_is_named(case):
    w, hessian = case
    with pytest.raises(CheckpointError, match=r"w: Hessian \[1, 64, 64\] does not fit 128 inputs"):
        gptq.gptq(w, hessian[None, :64, :64], name="w")
    bad = hessian.copy()
    bad[5, 5] = np.nan
    with pytest.raises(CheckpointError, match="w: its Hessian holds NaN"):
        gptq.gptq(w, bad[None], name="w")
    with pytest.raises(CheckpointError, match="w: its Hessian is not positive definite"):
        gptq.gptq(w, -100 * np.eye(128, dtype=np.float32)[None] + 90 * np.ones((1, 128, 128), np.float32), name="w")
    with pytest.raises(UsageError, match="w: 128 inputs in Hadamard blocks of 48"):
        rotation.rotate(w, 48, name="w")


def test_output_error_is_that_of_the_outputs():
    rng = np.random.default_rng(31)
    x, w = correlated(rng, 64), rng.normal(size=(16, 64)).astype(np.float32)
    rounded = codec.fp4_dequantize(*mxfp4.float_to_mxfp4(w))
    expected = np.square(x @ (w - rounded).T).sum() / np.square(x @ w.T).sum()
    assert gptq.output_error(w, rounded, second_moments(x)[None]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("block", rotation.BLOCKS)
def test_rotation_is_sylvesters_matrix(block):
    """H[i, j] = (−1)^popcount(i & j) / √block."""
    rng = np.random.default_rng(block)
    signs = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    matrix = np.kron(np.eye(256 // block), np.array(signs) / np.sqrt(block))
    w, x = rng.normal(size=(8, 256)).astype(np.float32), correlated(rng, 256)
    np.testing.assert_allclose(rotation.rotate(w, block), w @ matrix, atol=1e-5)
    np.testing.assert_allclose(rotation.rotate(x, block) @ rotation.rotate(w, block).T, x @ w.T, rtol=1e-3, atol=1e-3)
    moments = second_moments(x)
    np.testing.assert_allclose(
        rotation.rotate_hessian(moments[None], block)[0], matrix.T @ moments @ matrix, rtol=1e-3, atol=1e-3
    )
