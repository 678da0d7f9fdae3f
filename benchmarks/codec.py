"""Weights per CPU-second of the quantizer, beside torch in the same run, one thread each.

    OPENBLAS_NUM_THREADS=1 python benchmarks/codec.py [--rows 4096] [--columns 4096] [--seconds 2]

Peers start from f32, as they must: torchao's MXTensor.to_mx (if installed) and plain torch (scale by the group's
largest, bucketize). Prints each side's best of several rounds and the ratio; asserts nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from exporter import codec  # noqa: E402
from exporter.quantize import fp8, gptq, int8, mxfp4  # noqa: E402

_EDGES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def rate(work: Callable[[], object], weights: int, seconds: float) -> float:
    """Mweights per CPU-second, best of the rounds that fit ``seconds``."""
    work()
    best, left = float("inf"), seconds
    while left > 0:
        started = time.process_time()
        work()
        spent = time.process_time() - started
        best, left = min(best, spent), left - spent
    return weights / best / 1e6


def torch_floor(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """OCP MX floor of groups f32 [G, 32]: E2M1 codes u8 and exponents, by floats and bucketize."""
    exponents = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True).clamp_min(2.0**-120))) - 2
    codes = torch.bucketize((groups * torch.exp2(-exponents)).abs(), _EDGES, out_int32=True).to(torch.uint8)
    return codes | (groups < 0).to(torch.uint8) << 3, exponents


def torch_search(groups: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """The three-scale search of groups f32 [G, 32], importance [G, 32], in floats: exponents [G]."""
    _, floor = torch_floor(groups)
    losses = []
    for step in (0, 1, -1):
        scale = torch.exp2(floor + step)
        rounded = _VALUES[torch.bucketize((groups / scale).abs(), _EDGES)] * scale
        losses.append(((groups.abs() - rounded).square() * importance).sum(-1))
    return torch.stack(losses).argmin(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU-seconds for each line (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, shape = np.random.default_rng(0), (args.rows, args.columns)
    codes = codec.e4m3_encode((rng.normal(size=shape) * 100).astype(np.float32))
    scales = rng.integers(110, 118, tuple(-(-n // 128) for n in shape)).astype(np.uint8)
    importance = rng.exponential(size=args.columns).astype(np.float32)
    w = codec.fp8_block_dequantize(codes, scales)
    packed, out = mxfp4.fp8_to_mxfp4(codes, scales, importance)
    bits = codec.bf16_encode(w)
    groups = torch.from_numpy(w).reshape(-1, 32)
    spread = torch.from_numpy(importance).reshape(-1, 32).repeat(args.rows, 1)
    peers: dict[str, Callable[[], object]] = {
        "torch, plain: f32 → MXFP4 floor": lambda: torch_floor(groups),
        "torch, plain: weighted best of 3 (scales only)": lambda: torch_search(groups, spread),
    }
    if importlib.util.find_spec("torchao") is not None:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        peers["torchao to_mx: f32 → MXFP4 floor"] = lambda: MXTensor.to_mx(groups, torch.float4_e2m1fn_x2, 32)
    ours: dict[str, Callable[[], object]] = {
        "FP8 → MXFP4 floor (RTN)": lambda: mxfp4.fp8_to_mxfp4_floor(codes, scales),
        "FP8 → MXFP4 best of 3": lambda: mxfp4.fp8_to_mxfp4(codes, scales),
        "FP8 → MXFP4 best of 3, weighted": lambda: mxfp4.fp8_to_mxfp4(codes, scales, importance),
        "f32 → MXFP4 best of 3, weighted": lambda: mxfp4.float_to_mxfp4(w, importance),
        "BF16 → FP8 128×128 best of 3": lambda: fp8.bf16_to_fp8(bits),
        "MXFP4 → int8 (exact)": lambda: int8.mxfp4_to_int8(packed, out),
    }
    hessian = (np.eye(args.columns, dtype=np.float32) + 0.1)[None]
    rates = {name: rate(work, w.size, args.seconds) for name, work in (peers | ours).items()}
    started = time.process_time()
    gptq.gptq(w, hessian)
    rates["GPTQ (one round)"] = w.size / (time.process_time() - started) / 1e6
    floor = max(rates[name] for name in peers if "floor" in name)
    search = rates["torch, plain: weighted best of 3 (scales only)"]
    for name, value in rates.items():
        peer = floor if "floor" in name else search if "best of 3" in name and "FP8 128" not in name else 0
        ratio = f"{value / peer:6.1f} × the peer" if peer and name in ours else ""
        print(f"{name:48} {value:8.1f} Mweights per CPU-second {ratio}")


if __name__ == "__main__":
    main()
