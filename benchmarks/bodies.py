"""Load, memory, prefill and decode of a checkpoint on the graph's function bodies, beside transformers if it is here.

    python benchmarks/bodies.py [--preset kv-true] [--tokens 512] [--steps 32]

Prints absolute figures and the ratio to the peer in the same run; asserts nothing. transformers runs the same weights
in fp32 with its own cache; each side runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def measure(load: Callable[[], Any], prefill: Callable[[Any], Any], decode: Callable[[Any], None], args: Any) -> None:
    """One side: seconds and rates as a JSON line."""
    started = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    state = prefill(model)
    prefilled = time.perf_counter()
    for _ in range(args.steps):
        decode(state)
    done = time.perf_counter()
    rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({
        "load_s": loaded - started, "prefill_tok_s": args.tokens / (prefilled - loaded),
        "decode_tok_s": args.steps / (done - prefilled), "peak_rss_bytes": rss_bytes,
    }))  # fmt: skip


def run_engine(args: Any) -> None:
    from graph_support import quick_engine

    ids = prompt(args)
    folder = Path(args.folder)

    def prefill(engine: Any) -> Any:
        seq = engine.open()
        for at in range(0, len(ids), 256):
            engine.prefill(seq, ids[at : at + 256])
        return engine, seq

    def decode(state: Any) -> None:
        state[0].decode(state[1], 7)

    measure(lambda: quick_engine(folder / "checkpoint", folder / "bundle", threads=args.threads,
                                 context_tokens=args.tokens + args.steps + 2), prefill, decode, args)  # fmt: skip


def run_transformers(args: Any) -> None:
    import hf_support
    import torch

    from exporter.checkpoint import Checkpoint
    from exporter.reference import CheckpointWeights

    torch.set_num_threads(args.threads)
    ids = prompt(args)

    def load() -> Any:
        checkpoint = Checkpoint.open(Path(args.folder) / "checkpoint")
        return hf_support.hf_model(CheckpointWeights(checkpoint), checkpoint.config)

    def prefill(model: Any) -> Any:
        with torch.no_grad():
            return model, model(torch.tensor([ids]), use_cache=True).past_key_values

    def decode(state: Any) -> None:
        with torch.no_grad():
            state[0](torch.tensor([[7]]), past_key_values=state[1], use_cache=True)

    measure(load, prefill, decode, args)


def prompt(args: Any) -> list[int]:
    return np.random.default_rng(0).integers(2, 500, args.tokens).tolist()


def side(name: str, args: Any) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", name, "--folder", args.folder, "--tokens", str(args.tokens),
               "--steps", str(args.steps), "--threads", str(args.threads)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def report(args: Any) -> None:
    from exporter.sample import write_sample

    with tempfile.TemporaryDirectory(prefix="solocard-bench-") as folder:
        args.folder = folder
        write_sample(Path(folder) / "checkpoint", args.preset)
        ours = side("engine", args)
        peer = None
        try:
            import transformers

            peer = side("transformers", args)
            print(f"peer: transformers {transformers.__version__}, fp32, {args.threads} thread(s)")
        except ImportError:
            print("peer: transformers is not installed (packaging/check --torch installs it)")
    print(f"preset {args.preset}, {args.tokens} prompt tokens, {args.steps} decoded, {args.threads} thread(s)")
    for key, unit, scale in (("load_s", "s", 1), ("peak_rss_bytes", "MB", 1e-6), ("prefill_tok_s", "tok/s", 1),
                             ("decode_tok_s", "tok/s", 1)):  # fmt: skip
        line = f"{key:16} bodies {ours[key] * scale:9.1f} {unit}"
        if peer:
            line += f"   transformers {peer[key] * scale:9.1f} {unit}   ratio {ours[key] / peer[key]:.2f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="kv-true", choices=["tiny", "kv-true"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    {"engine": run_engine, "transformers": run_transformers}.get(args.side, report)(args)


if __name__ == "__main__":
    main()
