"""Bytes of the KV cache on disk against the arithmetic of the model's shapes, and how fast a prefix comes back.

    python benchmarks/kv_bytes.py [--blocks 96] [--rounds 6] [--dir DIR]

Writes a prefix of random payloads (real V4-Flash shapes, 901,120 bytes a block) below DIR, a temporary directory
unless given, and removes it. Restore (index, read, authenticate, decrypt) alternates with two plain reads of the same
files: into one buffer, and into memory that is kept, which restore needs too. Only the ratios mean something on a
shared machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kv_support import MASTER_KEY, REAL, TINY, make_fingerprint, make_spec  # noqa: E402

from appliance.model import BLOCK_TOKENS, ModelConfig  # noqa: E402
from runtime.kv.layout import KvLayout  # noqa: E402
from runtime.kv.record import Role, record_bytes  # noqa: E402
from runtime.kv.store import KvStore, Policy, PutJob, Unit  # noqa: E402

READ_BYTES = 8 * 1024 * 1024


def arithmetic(config: ModelConfig) -> tuple[int, int]:
    """Bytes of a block and of a checkpoint from the ratios alone, in kv-v4 formats, without the layout's code."""
    nope, d, index = config.head_dim - config.qk_rope_head_dim, config.head_dim, config.index_head_dim
    row, index_row = nope + (nope // 64 + 7) // 8 * 8 + 2 * config.qk_rope_head_dim, index // 2 + index // 32
    block = checkpoint = 0
    for ratio in config.compress_ratios:
        checkpoint += config.sliding_window * row
        if ratio:
            block += BLOCK_TOKENS // ratio * row
        if ratio == 4:
            block += BLOCK_TOKENS // ratio * index_row
            checkpoint += ratio * (2 * d + 2 * index) * 4
    return block, checkpoint


def fill(directory: Path, layout: KvLayout, blocks: int) -> list[int]:
    """Store one prefix of ``blocks`` blocks; returns its token ids and one more."""
    ids = [i % REAL.vocab_size for i in range(blocks * BLOCK_TOKENS + 1)]
    store = open_store(directory, layout)
    state = os.urandom(layout.checkpoint_bytes)
    for at in range(blocks):  # one block a job: little memory
        units = [Unit(blocks * BLOCK_TOKENS, Role.PROMPT, state)] if at == blocks - 1 else []
        result = store.put(PutJob("default", ids[:-1], {at: os.urandom(layout.block_bytes)}, units))
        assert result.stored, result.reason
    store.close()
    return ids


def open_store(directory: Path, layout: KvLayout) -> KvStore:
    return KvStore.open(directory, layout=layout, fingerprint=make_fingerprint(layout), master_key=MASTER_KEY,
                        policy=Policy(max_bytes=1 << 40))  # fmt: skip


def print_bytes(name: str, config: ModelConfig, directory: Path, blocks: int) -> list[int]:
    """Print the table's row of one model; returns the ids stored."""
    layout = KvLayout.from_spec(make_spec(config))
    block, checkpoint = arithmetic(config)
    assert (layout.block_bytes, layout.checkpoint_bytes) == (block, checkpoint), "layout differs from the arithmetic"
    ids = fill(directory, layout, blocks)
    segments = sum(path.stat().st_size for path in directory.glob("*.kvs"))
    index = (directory / "index.sqlite3").stat().st_size
    tokens, on_disk = blocks * BLOCK_TOKENS, record_bytes(checkpoint)
    assert segments == blocks * record_bytes(block) + on_disk
    per_token = (segments - on_disk + index) / tokens
    print(f"{name}: {blocks} blocks = {tokens} tokens")
    print(f"  block       {block:>10,} B payload {record_bytes(block):>10,} B on disk")
    print(f"  token       {block / BLOCK_TOKENS:>10,.2f} B payload {per_token:>10,.2f} B on disk, index included"
          f"   x {per_token * BLOCK_TOKENS / block:.4f}")  # fmt: skip
    print(f"  checkpoint  {checkpoint:>10,} B payload {on_disk:>10,} B on disk   x {on_disk / checkpoint:.4f}")
    return ids


def read_all(directory: Path) -> int:
    """Read every segment front to back into one buffer; bytes read."""
    total, buffer = 0, bytearray(READ_BYTES)
    for path in sorted(directory.glob("*.kvs")):
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                total += got
    return total


def read_and_keep(directory: Path) -> list[bytes]:
    """Read every segment in pieces of a block's size and keep them all, as a restore has to."""
    kept: list[bytes] = []
    for path in sorted(directory.glob("*.kvs")):
        with path.open("rb", buffering=0) as file:
            while piece := file.read(901_120):
                kept.append(piece)
    return kept


def forget(directory: Path) -> None:
    """Ask the system to drop the segments from its page cache."""
    for path in directory.glob("*.kvs"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def print_speed(directory: Path, ids: list[int], rounds: int) -> None:
    """Restore against plain reads, alternating; medians and bests of ``rounds``."""
    layout = KvLayout.from_spec(make_spec(REAL))
    store = open_store(directory, layout)
    size = store.status().used_bytes

    def restore() -> None:
        kept: list[bytes] = []
        assert store.lookup("default", ids, lambda _, payload: kept.append(bytes(payload))).tokens == len(ids) - 1

    calls: dict[str, Callable[[], object]] = {
        "sequential read": lambda: read_all(directory),
        "read and keep": lambda: read_and_keep(directory),
        "restore": restore,
    }
    for cold in (True, False):
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                if cold:
                    forget(directory)
                times[name].append(seconds(call))
        print(f"{'disk' if cold else 'page cache'}, MB/s, median of {rounds} (best):")
        for name, taken in times.items():
            share = statistics.median(taken) / statistics.median(times["restore"])
            speed, best = size / statistics.median(taken) / 1e6, size / min(taken) / 1e6
            note = "" if name == "restore" else f"   restore is {100 * share:.0f} % of it"
            print(f"  {name:<16} {speed:>6,.0f} ({best:,.0f}){note}")
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dir", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        ids = print_bytes("V4-Flash, kv-v4", REAL, Path(name) / "real", options.blocks)
        print_bytes("tiny, kv-v4", TINY, Path(name) / "tiny", options.blocks)
        print_speed(Path(name) / "real", ids, options.rounds)


if __name__ == "__main__":
    main()
