"""GPTQ for MXFP4: each weight is rounded to make up for the errors of those before it on the inputs that occur.

With H = mean x·xᵀ (damped) = R·Rᵀ, R upper triangular, the loss of a row is ‖(w − q)·R‖², and term c of it holds only
inputs 0 … c: input c aims at t = w_c + Σ_{j<c} (w_j − q_j)·R_jc / R_cc, and what rounding adds to the loss is
(R_cc·(t − q_c))² (GPTQ, arXiv 2210.17323, read as Babai's nearest plane: one Cholesky factor, no inverse). So the scale
of a group of 32 is not guessed from its weights: all three candidates of :mod:`exporter.quantize.mxfp4` are run through
the group and the one with the smallest loss is kept, row by row.

Bits follow from BLAS here: equal machine, equal thread count, equal bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError
from exporter.codec import F32, FP4_GROUP, U8, e2m1_decode, fp4_pack
from exporter.quantize import mxfp4

F64 = NDArray[np.float64]
Index = NDArray[np.intp]

DAMPING = 0.01  # of the mean of H's diagonal, added to it
_MOST_DAMPING = 10.0
_ROWS = 4096  # at a time: rows do not depend on each other
_STEPS = np.array([0, 1, -1], np.int32)[:, None]


def gptq(
    w: F32, hessian: F32, *, damping: float = DAMPING, act_order: bool = False, name: str = "weight"
) -> tuple[U8, U8]:
    """w f32 [N, K] to packed FP4 u8 [N, K/2] and E8M0 u8 [N, K/32].

    ``hessian`` f32 [B, n, n], B·n = K: mean x·xᵀ of the inputs, block-diagonal. ``act_order``: groups with the largest
    inputs first, and within a group the largest input first. CheckpointError names ``name``.
    """
    codes, scales = np.empty(w.shape, np.uint8), np.empty((len(w), w.shape[1] // FP4_GROUP), np.uint8)
    size = check_hessian(w, hessian, name)
    for number, block in enumerate(hessian):
        at = number * size
        order = _order(block) if act_order else np.arange(size)
        factor, diagonal = factorize(block.astype(np.float64)[np.ix_(order, order)], damping, name)
        groups = at // FP4_GROUP + order[::FP4_GROUP] // FP4_GROUP
        for start in range(0, len(w), _ROWS):
            rows = slice(start, start + _ROWS)
            part = np.ascontiguousarray(w[rows, at : at + size][:, order], np.float32)
            found, exponents = _round_rows(part, factor, diagonal, name)
            codes[rows, at + order] = found
            scales[rows, groups] = exponents
    zero = ~(codes.reshape(*scales.shape, FP4_GROUP) & 7).any(-1)
    scales[zero] = mxfp4.ZERO_SCALE
    return fp4_pack(codes), scales


def factorize(hessian: F64, damping: float, name: str) -> tuple[F32, F32]:
    """(R_jc / R_cc, R_cc) f32 of H + damping · mean diagonal = R·Rᵀ; more damping where H is singular to rounding."""
    mean = float(np.trace(hessian)) / len(hessian)
    mean = mean if mean > 0 else 1.0
    while damping <= _MOST_DAMPING:
        damped = hessian + np.eye(len(hessian)) * (damping * mean)
        try:
            upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping = max(damping * 10, 1e-6)
            continue
        diagonal = np.diagonal(upper).copy()
        return (upper / diagonal).astype(np.float32), diagonal.astype(np.float32)
    raise CheckpointError(f"{name}: its Hessian is not positive definite even when damped; run observe again")


def check_hessian(w: F32, hessian: F32, name: str) -> int:
    """The side n of the blocks [B, n, n] of a Hessian that fits w [N, K]."""
    shape = hessian.shape
    fits = hessian.ndim == 3 and shape[1] == shape[2] and shape[0] * shape[1] == w.shape[1]
    if not fits or shape[1] % FP4_GROUP:
        raise CheckpointError(
            f"{name}: Hessian {list(shape)} does not fit {w.shape[1]} inputs in blocks of a multiple of {FP4_GROUP}; "
            "run observe again"
        )
    if not np.isfinite(hessian).all():
        raise CheckpointError(f"{name}: its Hessian holds NaN or infinity; run observe again")
    return int(shape[1])


def output_error(w: F32, rounded: F32, hessian: F32 | None) -> float:
    """Mean squared error of the outputs over their mean square, by H [B, n, n] or, without, as if inputs were white."""
    if hessian is None:
        return float(np.square(w - rounded, dtype=np.float64).sum() / max(np.square(w, dtype=np.float64).sum(), 1e-300))
    lost = whole = 0.0
    size = hessian.shape[1]
    for number, block in enumerate(hessian):
        columns = slice(number * size, (number + 1) * size)
        for start in range(0, len(w), _ROWS):
            part = w[start : start + _ROWS, columns]
            difference = part - rounded[start : start + _ROWS, columns]
            lost += float(np.einsum("nk,nk->", difference @ block, difference, dtype=np.float64))
            whole += float(np.einsum("nk,nk->", part @ block, part, dtype=np.float64))
    return lost / max(whole, 1e-300)


def _order(block: F32) -> Index:
    """A permutation of the inputs that keeps each group of 32 together."""
    groups = np.diagonal(block).reshape(-1, FP4_GROUP)
    inner = np.argsort(-groups, axis=1, kind="stable") + np.arange(len(groups))[:, None] * FP4_GROUP
    order: Index = inner[np.argsort(-groups.sum(1), kind="stable")].reshape(-1)
    return order


def _round_rows(w: F32, factor: F32, diagonal: F32, name: str) -> tuple[U8, U8]:
    """E2M1 codes [n, K] and scale bytes [n, K/32] of rows w [n, K]; ``factor`` [K, K], ``diagonal`` [K]."""
    rows, inputs = w.shape
    error = np.zeros((inputs, rows), np.float32)  # w − q, by input: each step reads and writes whole rows of it
    codes, scales = np.empty((rows, inputs), np.uint8), np.empty((rows, inputs // FP4_GROUP), np.uint8)
    for start in range(0, inputs, FP4_GROUP):
        group = slice(start, start + FP4_GROUP)
        original = np.ascontiguousarray(w[:, group].T)  # [32, n]
        target = original + factor[:start, group].T @ error[:start]
        floor = mxfp4.floor_exponents(target.T, name=name)
        exponents = np.clip(floor + _STEPS, mxfp4.MIN_SCALE - 127, mxfp4.MAX_SCALE - 127)  # [3, n]
        found, errors, losses = _round_group(original, target, factor[group, group], diagonal[group], exponents)
        best = losses.argmin(0)
        each = np.arange(rows)
        codes[:, group] = found[:, best, each].T
        error[group] = errors[:, best, each]
        scales[:, start // FP4_GROUP] = exponents[best, each] + 127
    return codes, scales


def _round_group(
    original: F32, target: F32, factor: F32, diagonal: F32, exponents: NDArray[np.int32]
) -> tuple[U8, F32, F32]:
    """One group at each candidate scale: codes u8 [32, C, n], w − q f32 [32, C, n], losses f32 [C, n].

    ``original`` and ``target`` [32, n]: the weights, and what they aim at for errors before the group.
    """
    scale, inverse = mxfp4.power(exponents), mxfp4.power(-exponents)
    codes = np.empty((FP4_GROUP, *exponents.shape), np.uint8)
    errors, losses = np.empty(codes.shape, np.float32), np.zeros(exponents.shape, np.float32)
    for c in range(FP4_GROUP):
        aim = target[c] + np.einsum("j,jcn->cn", factor[:c, c], errors[:c])
        codes[c] = mxfp4.encode(aim * inverse)
        rounded = e2m1_decode(codes[c]) * scale
        errors[c] = original[c] - rounded
        losses += np.square(diagonal[c] * (aim - rounded))
    return codes, errors, losses
