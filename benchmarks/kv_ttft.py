"""First token after a restart against a cold prompt, on the model with V4-Flash's own cache geometry; and the bits.

    python benchmarks/kv_ttft.py [--tokens 8192 …] [--work DIR]

For each length n (a multiple of 256) one process computes a prompt of n + 128 tokens from nothing and decodes 64 more;
a second one puts its state into a store. A third, with the store's files dropped from the page cache, takes the same
prompt from there: look up, restore, compute the 128 tokens that are left. Printed are both times to the first token
and their ratio, the same for the worst tail (256 tokens), and whether all 65 rows of logits agree bit for bit. Loading
the model is in neither time. A cold prompt of 65,536 tokens takes over an hour of one core (stopped, it
goes on with --work and --keep); weights are random (`sample
--preset kv-true`: 43 layers, head 512, hidden size 256), so seconds say nothing about a card, and ratios little.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402

TAIL, WORST_TAIL, DECODED = 128, 256, 64
SAVED_TOKENS = 1024  # a cold run may be stopped and goes on from the last multiple of these
STATE, DONE = "state.bin", "cold-so-far.json"
WANTED = {8192: 20.0, 65536: 150.0}  # cold / restored, at a tail of 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="multiples of 256")
    parser.add_argument("--work", type=Path, help="where to write (default: a temporary folder, removed)")
    parser.add_argument("--keep", action="store_true", help="what is finished in --work is kept and not repeated")
    parser.add_argument("--child", nargs=3, metavar=("HALF", "N", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        half, tokens, folder = args.child
        return {"cold": cold, "stored": stored, "restored": restored}[half](int(tokens), Path(folder))
    if args.keep and args.work:
        return measure(args.work, args.tokens)
    work = Path(tempfile.mkdtemp(prefix="kv-ttft-", dir=args.work))
    try:
        return measure(work, args.tokens)
    finally:
        shutil.rmtree(work)


def measure(work: Path, lengths: list[int]) -> int:
    from exporter.sample import write_sample

    if not (work / "checkpoint").exists():
        write_sample(work / "checkpoint", "kv-true", seed=0)
    missed = 0
    for tokens in lengths:
        folder = work / str(tokens)
        folder.mkdir(exist_ok=True)
        for half in ("cold", "stored", "restored"):
            if not (folder / f"{half}.json").exists():
                subprocess.run([sys.executable, __file__, "--child", half, str(tokens), str(folder)], check=True)
        missed += not report(folder, tokens)
    return 1 if missed else 0


def report(folder: Path, tokens: int) -> bool:
    first, second = (json.loads((folder / f"{half}.json").read_text()) for half in ("cold", "restored"))
    equal = np.array_equal(*(np.load(folder / f"{half}.npy").view(np.uint32) for half in ("cold", "restored")))
    assert second["hit_tokens"] == tokens, second
    stored_bytes = second["stored_bytes"]
    print(f"{tokens:,} tokens, {stored_bytes:,} bytes stored ({stored_bytes / tokens:,.1f} a token)")
    for tail in (TAIL, WORST_TAIL):
        before_s, after_s = first[f"ttft_{tail}_s"], second[f"ttft_{tail}_s"]
        print(f"  tail {tail}: cold {before_s:9.2f} s, after a restart {after_s:7.3f} s: {before_s / after_s:8.1f} x")
    print(f"  of which look up, read, decrypt and put into place: {second['restore_s']:.3f} s")
    quiet = first["prefix_cpu_s"] / second[f"ttft_{TAIL}_s"]  # other work slows the long cold run more: its CPU time
    print(f"  the cold prefix took {first['prefix_cpu_s']:.0f} CPU seconds: {quiet:.0f} x the whole restored start")
    print(f"  {DECODED + 1} rows of logits: {'equal bit for bit' if equal else 'DIFFERENT'}")
    ratio = first[f"ttft_{TAIL}_s"] / second[f"ttft_{TAIL}_s"]
    wanted = WANTED.get(tokens, 0.0)
    if ratio < wanted:
        print(f"  NOT REACHED: {ratio:.1f}, wanted {wanted:.0f}")
    return equal and ratio >= wanted


def prompt(tokens: int, vocab_size: int) -> list[int]:
    return np.random.default_rng(tokens).integers(0, vocab_size, tokens + WORST_TAIL).tolist()


def loaded(folder: Path, tokens: int) -> Any:
    """The engine as the server would load it, with room for the prompt and what is decoded after it."""
    from graph_support import quick_engine

    context_tokens = tokens + WORST_TAIL + DECODED + 1
    return quick_engine(folder.parent / "checkpoint", folder / "bundle", context_tokens=context_tokens)


def opened(folder: Path, engine: Any) -> Any:
    """The store below ``folder``."""
    from kv_restore_support import open_store

    return open_store(folder / "kv", engine)


def decoded(engine: Any, seq: Any, logits: Any) -> list[Any]:
    """The logits of DECODED greedy tokens after ``logits``, those first."""
    rows = [logits]
    for _ in range(DECODED):
        rows.append(engine.decode(seq, int(rows[-1].argmax())))
    return rows


def cold(tokens: int, folder: Path) -> int:
    """From nothing; the worst tail is computed on a second sequence that takes over the first one's state in memory."""
    engine = loaded(folder, tokens)
    ids = prompt(tokens, engine.spec.config.vocab_size)
    seq, done = begun(engine, folder)
    while seq.n_tokens < tokens:
        started_s, started_cpu_s = time.monotonic(), time.process_time()
        while seq.n_tokens < min(tokens, done["tokens"] + SAVED_TOKENS):
            engine.prefill(seq, ids[seq.n_tokens : seq.n_tokens + 256])
        done["prefix_s"] += time.monotonic() - started_s
        done["prefix_cpu_s"] += time.process_time() - started_cpu_s
        save(engine, seq, folder, done)
        rate = seq.n_tokens / done["prefix_s"]
        print(f"  cold: {seq.n_tokens:,} of {tokens:,} tokens, {rate:.1f} a second", flush=True)
    state, checkpoint = (folder / STATE).read_bytes(), seq.checkpoint[1]
    started_s = time.monotonic()
    first = engine.prefill(seq, ids[tokens : tokens + TAIL])
    times = {f"ttft_{TAIL}_s": done["prefix_s"] + time.monotonic() - started_s, "prefix_cpu_s": done["prefix_cpu_s"]}
    rows = decoded(engine, seq, first)
    engine.close(seq)
    again = taken_over(engine, state, checkpoint)
    started_s = time.monotonic()
    engine.prefill(again, ids[tokens:])
    times[f"ttft_{WORST_TAIL}_s"] = done["prefix_s"] + time.monotonic() - started_s
    return keep(folder, "cold", times, rows)


def taken_over(engine: Any, state: bytes, checkpoint: bytes) -> Any:
    """A sequence with the blocks of ``state`` and the checkpoint after them."""
    seq, size_bytes = engine.open(), engine.layout.block_bytes
    count = len(state) // size_bytes
    for index in range(count):
        engine.import_block(seq, index, memoryview(state)[index * size_bytes : (index + 1) * size_bytes])
    engine.resume(seq, 256 * count, checkpoint=checkpoint, blocks=count)
    return seq


def begun(engine: Any, folder: Path) -> tuple[Any, dict[str, float]]:
    """A cold run that was stopped goes on where it was saved, with its seconds: restored is the same, bit for bit."""
    if not (folder / DONE).exists():
        (folder / STATE).unlink(missing_ok=True)
        return engine.open(), {"tokens": 0, "prefix_s": 0.0, "prefix_cpu_s": 0.0}
    done = json.loads((folder / DONE).read_text())
    state = (folder / STATE).read_bytes()[: done["tokens"] // 256 * engine.layout.block_bytes]
    return taken_over(engine, state, (folder / f"checkpoint-{done['tokens']}").read_bytes()), done


def save(engine: Any, seq: Any, folder: Path, done: dict[str, float]) -> None:
    first = int(done["tokens"]) // 256
    with (folder / STATE).open("ab") as file:
        file.truncate(first * engine.layout.block_bytes)
        for index in range(first, seq.n_tokens // 256):
            file.write(engine.export_block(seq, index))
    (folder / f"checkpoint-{seq.n_tokens}").write_bytes(seq.checkpoint[1])
    done["tokens"] = seq.n_tokens
    fresh = folder / f"{DONE}.new"
    fresh.write_text(json.dumps(done))
    fresh.replace(folder / DONE)


def stored(tokens: int, folder: Path) -> int:
    """What the cold process left into the store."""
    from runtime.kv.record import Role
    from runtime.kv.store import PutJob, Unit

    engine = loaded(folder, tokens)
    store, ids = opened(folder, engine), prompt(tokens, engine.spec.config.vocab_size)
    state, size_bytes = (folder / STATE).read_bytes(), engine.layout.block_bytes
    blocks = {i: state[i * size_bytes : (i + 1) * size_bytes] for i in range(tokens // 256)}
    unit = Unit(tokens, Role.PROMPT, (folder / f"checkpoint-{tokens}").read_bytes())
    result = store.put(PutJob("default", ids[:tokens], blocks, [unit]))
    store.close()
    assert result.stored, result.reason
    (folder / "stored.json").write_text(json.dumps({"written_bytes": result.written_bytes}))
    return 0


def restored(tokens: int, folder: Path) -> int:
    """From the store alone."""
    engine = loaded(folder, tokens)
    store, ids = opened(folder, engine), prompt(tokens, engine.spec.config.vocab_size)
    found: dict[str, Any] = {"stored_bytes": sum(path.stat().st_size for path in (folder / "kv").rglob("*.*"))}
    rows: list[Any] = []
    for tail in (WORST_TAIL, TAIL):
        drop_cached(folder / "kv")
        seq, started_s = engine.open(), time.monotonic()
        wanted = ids[: tokens + tail]
        hit = store.lookup("default", wanted, functools.partial(engine.import_block, seq))
        engine.resume(seq, hit.tokens, checkpoint=hit.checkpoint, blocks=hit.blocks)
        found["restore_s"], found["hit_tokens"] = time.monotonic() - started_s, hit.tokens
        logits = engine.prefill(seq, wanted[hit.tokens :])
        found[f"ttft_{tail}_s"] = time.monotonic() - started_s
        if tail == TAIL:
            rows = decoded(engine, seq, logits)
        engine.close(seq)
    store.close()
    return keep(folder, "restored", found, rows)


def keep(folder: Path, half: str, found: dict[str, Any], rows: list[Any]) -> int:
    np.save(folder / f"{half}.npy", np.stack(rows))
    (folder / f"{half}.json").write_text(json.dumps(found))
    return 0


def drop_cached(folder: Path) -> None:
    """Ask the system to forget the segments' pages, as after a restart of the machine."""
    for path in folder.glob("*.kvs"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
