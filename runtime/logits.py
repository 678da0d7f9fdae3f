"""``python -m runtime logits BUNDLE``: the engine's own logits for given token ids, for parity and golden search.

Takes a built bundle (every object checked against its manifest, then "unsigned" is printed) and opens neither socket
nor KV store. ``--ids`` is an .npy of token ids [n] or [p, n] (rows end at the first −1); every chunk is one call.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from appliance.bundle import BuiltBundle
from appliance.errors import UsageError
from runtime.engine import Engine
from runtime.load import load_engine
from runtime.schedule import prompt_calls

Logits = npt.NDArray[np.float32]


def run(args: argparse.Namespace) -> int:
    """Exit 0; raises UsageError naming the file or option that is wrong, BundleError for a damaged bundle."""
    bundle = BuiltBundle.open(args.bundle)
    print(f"{bundle.bundle_id}: unsigned", file=sys.stderr)
    if args.generate < 0 or args.threads < 1:
        raise UsageError(f"--generate {args.generate} --threads {args.threads}: expected 0 and 1 or more")
    if not args.out.absolute().parent.is_dir():
        raise UsageError(f"--out {args.out}: there is no such folder")
    prompts, single = read_prompts(args.ids)
    chunks = parse_chunks(args.chunks)
    longest = max(len(prompt) for prompt in prompts) + args.generate
    engine = load_engine(bundle, profile=args.profile, threads=args.threads, context_tokens=max(longest, 2))
    results = [sequence_logits(engine, prompt, chunks, args.generate) for prompt in prompts]
    rows = max(len(result) for result in results)
    out = np.zeros((len(results), rows, results[0].shape[1]), np.float32)
    for index, result in enumerate(results):
        out[index, : len(result)] = result
    np.save(args.out, out[0] if single else out)
    print(f"wrote {args.out}: {engine.backend.description}", file=sys.stderr)
    return 0


def read_prompts(path: Path) -> tuple[list[list[int]], bool]:
    """→ prompts, and whether the file held a single one [n]."""
    try:
        with path.open("rb") as file:
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, MemoryError) as error:
        raise UsageError(f"{path}: not a readable .npy of token ids ({error})") from None
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu" or ids.size == 0:
        raise UsageError(f"{path}: {ids.dtype} {list(ids.shape)}, expected integers [n] or [p, n]")
    if int(ids.max()) > np.iinfo(np.int32).max:
        raise UsageError(f"{path}: {int(ids.max())} is no token id")
    rows = np.atleast_2d(ids).astype(np.int64)
    prompts = [row[: int(np.argmax(row < 0)) if (row < 0).any() else len(row)].tolist() for row in rows]
    if not all(prompts):
        raise UsageError(f"{path}: a prompt is empty")
    return prompts, ids.ndim == 1


def parse_chunks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        chunks = [int(part) for part in text.split(",")]
    except ValueError:
        chunks = []
    if not chunks or min(chunks) < 1:
        raise UsageError(f"--chunks {text!r}: expected positive numbers like 5,3,16,1")
    return chunks


def sequence_logits(engine: Engine, ids: list[int], chunks: list[int] | None, generate: int) -> Logits:
    """Logits f32 [len(ids) + generate, vocab]; chunks that end early are followed by calls of 256."""
    seq, parts = engine.open(), []
    try:
        for call in _calls(ids, chunks):
            parts.append(engine.forward(seq, call, rows=range(len(call))))
        for _ in range(generate):
            parts.append(engine.decode(seq, int(parts[-1][-1].argmax()))[None])
    finally:
        engine.close(seq)
    return np.concatenate(parts)


def _calls(ids: list[int], chunks: list[int] | None) -> list[list[int]]:
    if chunks is None:
        return [list(call) for call in prompt_calls(ids)]
    calls, at = [], 0
    for size in chunks:
        calls.append(ids[at : at + size])
        at += size
    calls.extend(list(call) for call in prompt_calls(ids[at:]))
    return [call for call in calls if call]
