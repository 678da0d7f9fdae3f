"""``parity`` (torch reference against the engine) and ``logits`` (the engine alone): both run the serving engine."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from appliance.bundle import BuiltBundle
from appliance.errors import EngineError, UsageError
from appliance.wire import FULL
from exporter.bundle_weights import BundleWeights
from exporter.engine_process import engine_logits, run_logits

Logits = npt.NDArray[np.float32]
MAX_ERROR_F32 = 1e-4  # kv-f32: of a logit, every chunking
MIN_TOP1_V4 = 0.98  # kv-v4 rounds cache rows: a code that flips moves logits, so agreement is counted


@dataclass(frozen=True, slots=True)
class Parity:
    """One comparison: largest logit difference, share of equal top-1 tokens, mean KL(reference ‖ engine) in nats."""

    max_error: float
    top1: float
    mean_kl: float

    @staticmethod
    def of(reference: Logits, engine: Logits) -> Parity:
        p, q = _log_softmax(reference), _log_softmax(engine)
        kl = float((np.exp(p) * (p - q)).sum(-1).mean())
        same = float((reference.argmax(-1) == engine.argmax(-1)).mean())
        return Parity(float(np.abs(reference - engine).max()), same, kl)

    def passed(self, numerics: str) -> bool:
        return self.max_error <= MAX_ERROR_F32 if numerics == "kv-f32" else self.top1 >= MIN_TOP1_V4


def _log_softmax(x: Logits) -> npt.NDArray[np.float64]:
    wide = x.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return result


def add_commands(commands: Any) -> None:
    """Add ``parity`` and ``logits``."""
    parser = commands.add_parser("parity", help="compare a bundle's engine with the torch reference")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--profile", default=FULL, metavar="ID", help="the bundle's profile to compare (default: full)")
    parser.add_argument("--tokens", type=int, default=300, help="length of the random prompt (default: 300)")
    parser.add_argument("--ids", type=Path, help=".npy of token ids to use instead")
    parser.set_defaults(func=run_parity)
    parser = commands.add_parser("logits", help="the engine's logits for token ids")
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--ids", required=True, metavar="FILE", help=".npy of token ids, [n] or [p, n] padded with -1")
    parser.add_argument("--out", required=True, metavar="FILE", help=".npy to write: f32 [n, vocab] or [p, n, vocab]")
    parser.add_argument("--profile", default=FULL, metavar="ID", help="the bundle's profile to run (default: full)")
    parser.add_argument("--chunks", metavar="LIST", help="tokens per call, e.g. 5,3,16,1 (default: 256 at a time)")
    parser.add_argument("--generate", default="0", metavar="N", help="append N greedy tokens")
    parser.add_argument("--threads", default="1", metavar="N", help="engine threads (default: 1)")
    parser.set_defaults(func=_run_logits)


def _run_logits(args: argparse.Namespace) -> int:
    options = ["--ids", args.ids, "--out", args.out, "--generate", args.generate, "--threads", args.threads]
    options += ["--profile", args.profile]
    run_logits([args.bundle, *options, *(["--chunks", args.chunks] if args.chunks is not None else [])])
    return 0


def run_parity(args: argparse.Namespace) -> int:
    """Exit 0 when every chunking agrees; EngineError with the figures otherwise."""
    bundle = BuiltBundle.open(args.bundle)
    reference = _reference()
    config, numerics = bundle.spec.config, bundle.spec.numerics
    if args.tokens < 1:
        raise UsageError(f"--tokens {args.tokens}: expected 1 or more")
    if args.ids is None:
        rng = np.random.Generator(np.random.PCG64(7))
        ids = [int(i) for i in rng.integers(0, config.vocab_size, args.tokens)]
    else:
        ids = read_ids(args.ids, config.vocab_size)
    weights = BundleWeights(bundle.graph(args.profile), config)
    model = reference(weights, config, kv_sim=numerics == "kv-v4", arrangement=weights.arrangement)
    expected = model.forward(ids, model.new_state()).numpy()
    failed = []
    chunkings = {"256-token chunks": [], "5,3,16,1 then 256": [5, 3, 16, 1], "one by one": [1] * len(ids)}
    for name, chunks in chunkings.items():
        result = Parity.of(expected, engine_logits(bundle.root, [ids], chunks=chunks, profile=args.profile)[0])
        passed = result.passed(numerics)
        failed += [] if passed else [name]
        print(
            f"{name}: max |Δlogit| {result.max_error:.2e}, top-1 {result.top1:.4f}, KL {result.mean_kl:.2e}: "
            f"{'ok' if passed else 'TOO FAR'}"
        )
    if failed:
        what = f"{bundle.bundle_id} ({args.profile}, {numerics})"
        raise EngineError(f"{what} does not agree with the reference: {', '.join(failed)}")
    return 0


def read_ids(path: Path, vocab_size: int) -> list[int]:
    """One prompt's token ids from an .npy [n]; UsageError names the file and what is wrong."""
    try:
        with path.open("rb") as file:
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, MemoryError) as error:
        raise UsageError(f"{path}: not a readable .npy of token ids ({error})") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size or ids.min() < 0 or ids.max() >= vocab_size:
        raise UsageError(f"{path}: {ids.dtype} {list(ids.shape)}, expected integers [n] of 0 … {vocab_size - 1}")
    return [int(i) for i in ids]


def _reference() -> Any:
    try:
        from exporter.reference import Reference
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError("parity needs torch: pip install 'solocard[distill]' (CPU build: about 200 MB)") from None
    return Reference
