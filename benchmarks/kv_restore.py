"""How near to the disk's own speed a stored prefix comes back: cold, authenticated, decrypted, in the engine's pools.

    python benchmarks/kv_restore.py [--blocks 1000] [--rounds 5] [--dir DIR]

Writes a prefix of random payloads in V4-Flash's layout (901,120 bytes a block) below DIR, a temporary folder unless
given, and removes it. In every round, each after the page cache was dropped and found cold: the ceiling (the segments
front to back by preadv of 8 MiB, through the page cache and past it; the better one counts), the restore (lookup,
read, authenticate, decrypt, scatter into pools that are as large), and the same records as one file per block, as
other caches keep them. A shared machine moves all of them: the ratios within a round are what counts. Processor time,
and how long the calling thread was ready and waited for a processor that had something else to do, say where the rest
goes: a restore decrypts while it reads, and cannot where it gets no processor.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kv_support import MASTER_KEY, REAL, make_fingerprint, make_spec  # noqa: E402

from appliance.model import BLOCK_TOKENS  # noqa: E402
from runtime.kv import reading  # noqa: E402
from runtime.kv.layout import BlockWriter, KvLayout, scatter_checkpoint  # noqa: E402
from runtime.kv.record import Role, record_bytes  # noqa: E402
from runtime.kv.store import KvStore, Policy, PutJob, Unit  # noqa: E402

READ_BYTES = 8 << 20
GROUP = 64  # blocks written by one job
PROBES = 64  # places of a file looked at to say that it is cold
TRIES = 20
TENANT = "default"


def open_store(directory: Path, layout: KvLayout) -> KvStore:
    return KvStore.open(directory, layout=layout, fingerprint=make_fingerprint(layout), master_key=MASTER_KEY,
                        policy=Policy(max_bytes=1 << 40))  # fmt: skip


def fill(directory: Path, layout: KvLayout, blocks: int) -> list[int]:
    """Store one prefix of ``blocks`` blocks and its checkpoint; returns its token ids and one more."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, REAL.vocab_size, blocks * BLOCK_TOKENS + 1).tolist()
    store = open_store(directory, layout)
    for first in range(0, blocks, GROUP):
        stop = min(first + GROUP, blocks)
        payloads = {i: rng.bytes(layout.block_bytes) for i in range(first, stop)}
        last = [Unit(stop * BLOCK_TOKENS, Role.PROMPT, rng.bytes(layout.checkpoint_bytes))] if stop == blocks else []
        result = store.put(PutJob(TENANT, ids, payloads, last))
        assert result.stored, result.reason
    store.close()
    return ids


def split(segments: Path, pieces: Path, size_bytes: int) -> None:
    """The same bytes as one file per block."""
    pieces.mkdir()
    count = 0
    for path in sorted(segments.glob("*.kvs")):
        with path.open("rb") as file:
            while len(piece := file.read(size_bytes)) == size_bytes:
                (pieces / f"{count:06d}").write_bytes(piece)
                count += 1


def forget(*folders: Path) -> None:
    """Drop the files from the page cache; fail if the system keeps more than one place in twenty of a large one."""
    for path in (path for folder in folders for path in folder.iterdir() if path.is_file()):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # looking must not read ahead
            for _ in range(TRIES):  # pages on their way to the disk, or in another processor's hands, stay a moment
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                warm = warm_share(fd)
                if warm <= 0.05:
                    break
                time.sleep(0.1)
            assert warm <= 0.05, f"{path.name}: {100 * warm:.0f} % are still in memory"
        finally:
            os.close(fd)


def warm_share(fd: int) -> float:
    """Share of up to 64 places of a segment that are in memory; 0 for small files, which are not looked at."""
    size_bytes = os.fstat(fd).st_size
    offsets = range(0, size_bytes - 4096, max(4096, size_bytes // PROBES // 4096 * 4096))
    return sum(in_memory(fd, offset) for offset in offsets) / len(offsets) if size_bytes > READ_BYTES else 0.0


def in_memory(fd: int, offset: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(4096)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


def read_through(directory: Path, flags: int, buffer: memoryview) -> None:
    """Every segment front to back; with O_DIRECT in ``flags`` past the page cache."""
    for path in sorted(directory.glob("*.kvs")):
        fd, at = os.open(path, os.O_RDONLY | flags), 0
        while got := os.preadv(fd, [buffer], at):
            at += got
        os.close(fd)


def make_pools(layout: KvLayout, blocks: int) -> dict[str, np.ndarray]:
    pools = {}
    for state in layout.states:
        count = blocks + 1 if state.paged else 2
        pools[state.name] = np.empty((count, state.rows, state.width), np.uint8 if state.dtype == "u8" else np.float32)
        pools[state.name].fill(0)  # as the engine does
    return pools


class Passes:
    """The passes over one store; each restores or reads all of it once."""

    def __init__(self, folder: Path, blocks: int) -> None:
        self.layout = KvLayout.from_spec(make_spec(REAL))
        self.segments, self.pieces, self.blocks = folder / "kv", folder / "pieces", blocks
        self.ids = fill(self.segments, self.layout, blocks)
        split(self.segments, self.pieces, record_bytes(self.layout.block_bytes))
        self.pools = make_pools(self.layout, blocks)
        self._writer = BlockWriter(self.pools, self.layout)
        self._buffer = memoryview(mmap.mmap(-1, READ_BYTES))
        self._store = open_store(self.segments, self.layout)
        self.size_bytes = sum(path.stat().st_size for path in self.segments.glob("*.kvs"))

    def buffered(self) -> None:
        read_through(self.segments, 0, self._buffer)

    def direct(self) -> None:
        read_through(self.segments, os.O_DIRECT, self._buffer)

    def restore(self) -> None:
        hit = self._store.lookup(TENANT, self.ids, lambda index, payload: self._writer.write(index + 1, payload))
        assert hit.tokens == len(self.ids) - 1
        scatter_checkpoint(self.pools, self.layout, 1, hit.checkpoint)

    def opened_only(self) -> None:
        """Without the pools."""
        assert self._store.lookup(TENANT, self.ids, lambda index, payload: None).blocks == self.blocks

    def file_per_block(self) -> None:
        """One open and read a block, in order; nothing decrypted, nothing scattered: the reading alone."""
        for path in sorted(self.pieces.iterdir()):
            fd = os.open(path, os.O_RDONLY)
            os.preadv(fd, [self._buffer], 0)
            os.close(fd)

    def all(self) -> dict[str, Callable[[], None]]:
        return {"ceiling, buffered": self.buffered, "ceiling, O_DIRECT": self.direct, "restore": self.restore,
                "restore without pools": self.opened_only, "file per block": self.file_per_block}  # fmt: skip

    def scatter_s(self) -> float:
        """Processor seconds of copying one block into its pages."""
        payload = memoryview(bytearray(self.layout.block_bytes))
        begin = time.process_time()
        for index in range(self.blocks):
            self._writer.write(index + 1, payload)
        return (time.process_time() - begin) / self.blocks

    def decrypt_s(self) -> float:
        """Processor seconds of authenticating and decrypting one block, in memory."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        cipher, out = AESGCM(bytes(32)), bytearray(self.layout.block_bytes)
        sealed = cipher.encrypt(bytes(12), bytes(out), bytes(128))
        begin = time.process_time()
        for _ in range(self.blocks):
            cipher.decrypt_into(bytes(12), sealed, bytes(128), out)
        return (time.process_time() - begin) / self.blocks


def queued_s() -> float:
    """How long the calling thread has waited for a processor so far."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def rounds_of(passes: Passes, rounds: int) -> Iterator[dict[str, tuple[float, float, float]]]:
    """Per round: name → (wall s, processor s, s waited for a processor)."""
    for _ in range(rounds):
        taken = {}
        for name, call in passes.all().items():
            forget(passes.segments, passes.pieces)
            wall, processor, queued = time.perf_counter(), time.process_time(), queued_s()
            call()
            taken[name] = (time.perf_counter() - wall, time.process_time() - processor, queued_s() - queued)
        yield taken


def report(passes: Passes, taken: list[dict[str, tuple[float, float, float]]]) -> None:
    size = passes.size_bytes
    print(f"{passes.blocks} blocks, {size / 1e6:,.0f} MB, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; "
          f"reads of {reading.SPAN_BYTES >> 20} MiB by {reading.READERS} threads")  # fmt: skip
    print(f"{'':<22} {'MB/s median':>12} {'best':>7} {'processor s':>12} {'waited s':>9}   % of the round's ceiling")
    for name in taken[0]:
        walls = [one[name][0] for one in taken]
        busy, queued = (statistics.median(one[name][i] for one in taken) for i in (1, 2))
        shares = [min(one["ceiling, buffered"][0], one["ceiling, O_DIRECT"][0]) / one[name][0] for one in taken]
        each = " ".join(f"{100 * share:.0f}" for share in shares)
        median, best = size / statistics.median(walls) / 1e6, size / min(walls) / 1e6
        print(f"{name:<22} {median:>12,.0f} {best:>7,.0f} {busy:>12.2f} {queued:>9.2f}   "
              f"{100 * statistics.median(shares):.0f} % ({each})")  # fmt: skip
    decrypt, scatter = passes.decrypt_s(), passes.scatter_s()
    print(f"processor time of a block in memory: decrypt {1e6 * decrypt:,.0f} µs, scatter {1e6 * scatter:,.0f} µs; "
          f"{passes.blocks * (decrypt + scatter):.2f} s of all")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        passes = Passes(Path(name), options.blocks)
        report(passes, list(rounds_of(passes, options.rounds)))


if __name__ == "__main__":
    main()
