"""The dense linears of a layer, FP8 → MXFP4 ("D4"): plain, weighted by activations, GPTQ, or GPTQ on rotated inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from appliance.errors import UsageError
from exporter.codec import F32, U8, fp4_dequantize
from exporter.quantize import gptq, mxfp4, rotation
from exporter.statistics import Statistics
from exporter.view import View

LINEARS = (
    "attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b",
    "ffn.shared_experts.w1", "ffn.shared_experts.w2", "ffn.shared_experts.w3",
)  # fmt: skip
GROUPED = "attn.wo_a"  # its rows fall into o_groups sections, each with inputs of its own
_ERROR_ROWS = 1024  # at a time


@dataclass(frozen=True, slots=True)
class Method:
    """``kind``: "rtn" (scale search, weighted where statistics are given), "gptq" or "mr-gptq" (``block`` > 0)."""

    kind: str = "rtn"
    block: int = 0
    damping: float = gptq.DAMPING
    act_order: bool = False


@dataclass(frozen=True, slots=True)
class Quantized:
    """One linear: packed FP4 u8 [N, K/2], E8M0 u8 [N, K/32]; errors are mean squares over mean squares."""

    codes: U8
    scales: U8
    weight_error: float
    output_error: float | None  # by the inputs observed; None without statistics


def wanted(view: View, layer: int, only: Sequence[str]) -> Iterator[str]:
    """Names (without ".weight") of the FP8 linears of ``layer`` that ``only`` (glob patterns, none = all) takes.

    A pattern is matched against "attn.wq_a" and "layers.3.attn.wq_a". What is FP4 already is left alone.
    """
    for part in LINEARS:
        name = f"layers.{layer}.{part}"
        chosen = not only or any(fnmatchcase(part, p) or fnmatchcase(name, p) for p in only)
        if chosen and view.has(f"{name}.weight") and view.info(f"{name}.weight").dtype == "F8_E4M3":
            yield name


def quantize_linear(view: View, name: str, method: Method, statistics: Statistics | None) -> Quantized:
    """The FP8 linear ``name`` ("layers.3.attn.wq_a") of ``view``. UsageError if the statistics lack what it needs."""
    layer, part = int(name.split(".")[1]), name.split(".", 2)[2]
    sections = view.config.o_groups if part == GROUPED else 1
    importance = _moments(statistics, layer, part, sections)
    if method.kind == "rtn":
        weight, scale = view.read(f"{name}.weight"), view.read(f"{name}.scale")
        codes, scales = mxfp4.fp8_to_mxfp4(weight, scale, importance, name=f"{name}.weight")
        w = view.float32(f"{name}.weight")
        return _judged(w, codes, scales, None if importance is None else importance[:, None])
    hessian = _hessian(statistics, layer, name, part, sections)
    w = view.float32(f"{name}.weight")
    if method.kind == "mr-gptq":
        w = rotation.rotate(w, method.block, name=f"{name}.weight")
        hessian = np.stack([rotation.rotate_hessian(h, method.block, name=f"{name}.weight") for h in hessian])
    codes, scales = np.empty((len(w), w.shape[1] // 2), np.uint8), np.empty((len(w), w.shape[1] // 32), np.uint8)
    for number, rows in enumerate(_sections(len(w), sections)):
        codes[rows], scales[rows] = gptq.gptq(
            w[rows], hessian[number], damping=method.damping, act_order=method.act_order, name=f"{name}.weight"
        )
    return _judged(w, codes, scales, hessian)


def _sections(rows: int, sections: int) -> list[slice]:
    size = rows // sections
    return [slice(at, at + size) for at in range(0, rows, size)]


def _moments(statistics: Statistics | None, layer: int, part: str, sections: int) -> F32 | None:
    """Mean of x² per input, f32 [sections, K], or None."""
    found = None if statistics is None else statistics.tensor(layer, f"x2.{part}")
    return None if found is None else found.astype(np.float32).reshape(sections, -1)


def _hessian(statistics: Statistics | None, layer: int, name: str, part: str, sections: int) -> F32:
    """Mean x·xᵀ, f32 [sections, B, n, n]; UsageError if it was not observed."""
    found = None if statistics is None else statistics.tensor(layer, f"hessian.{part}")
    if found is None:
        raise UsageError(f"{name}: no Hessian in the statistics; run `observe --hessian 4096` and give --stats")
    return found.astype(np.float32).reshape(sections, -1, *found.shape[1:])


def _judged(w: F32, codes: U8, scales: U8, seen: F32 | None) -> Quantized:
    """``seen``: mean x² [sections, 1, K], or Hessians [sections, B, n, n], of the inputs that w [N, K] meets."""
    weight = np.zeros(2)
    output = np.zeros(2)
    sections = _sections(len(w), 1 if seen is None else len(seen))
    for number, section in enumerate(sections):
        for start in range(section.start, section.stop, _ERROR_ROWS):
            rows = slice(start, min(start + _ERROR_ROWS, section.stop))
            lost = w[rows] - fp4_dequantize(codes[rows], scales[rows])
            weight += np.square(lost, dtype=np.float64).sum(), np.square(w[rows], dtype=np.float64).sum()
            if seen is not None:
                output += _energy(lost, seen[number]), _energy(w[rows], seen[number])
    errors = [float(pair[0] / max(pair[1], 1e-300)) for pair in (weight, output)]
    return Quantized(codes, scales, errors[0], None if seen is None else errors[1])


def _energy(rows: F32, seen: F32) -> float:
    """Mean square of the outputs of rows [n, K], summed over them."""
    if seen.ndim == 2:
        return float(np.square(rows, dtype=np.float64).sum(0) @ seen[0].astype(np.float64))
    parts = rows.reshape(len(rows), len(seen), -1)
    return float(sum(np.sum((parts[:, b] @ block) * parts[:, b], dtype=np.float64) for b, block in enumerate(seen)))
