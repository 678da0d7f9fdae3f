"""Ten forks of one long chat on disk: their bytes, the time until each is back, and the time until a purge works.

    python benchmarks/kv_forks.py [--tokens 60000] [--forks 10] [--own 256] [--rounds 2] [--dir DIR]

Writes a chat of random payloads in V4-Flash's real layout (899,648 bytes a block, 3,644,416 a checkpoint) through the
real store below DIR, a temporary directory unless given, then forks of it that end in ``--own`` tokens of their own,
each with its checkpoint. Every file counts: segments, index, its log, keys. Restores begin with a cold page cache and
end when every block has been authenticated and copied out; "of the disk" compares with reading the same bytes from the
same files in order, cold too. The purge is another process's: only its key file goes, no segment is touched.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kv_support import MASTER_KEY, REAL, make_fingerprint, make_spec  # noqa: E402

from runtime.kv.job import KvHit, PutJob, Unit  # noqa: E402
from runtime.kv.layout import KvLayout  # noqa: E402
from runtime.kv.policy import Policy  # noqa: E402
from runtime.kv.record import Role  # noqa: E402
from runtime.kv.store import KvStore  # noqa: E402

BLOCK_TOKENS = 256
AT_ONCE = 32  # blocks a job: little memory
_PURGE = """
import sys, time
from pathlib import Path
from runtime.kv.files import Io
from runtime.kv.tenants import Tenants
tenants = Tenants(Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), Io())
begin = time.monotonic()
assert tenants.purge("default")
print(time.monotonic() - begin)
"""


def open_store(directory: Path, layout: KvLayout) -> KvStore:
    return KvStore.open(directory, layout=layout, fingerprint=make_fingerprint(layout), master_key=MASTER_KEY,
                        policy=Policy(max_bytes=1 << 40))  # fmt: skip


def files_bytes(directory: Path) -> int:
    """Bytes of every file below ``directory``, as a listing shows them."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def prompt(fork: int, tokens: int, own_tokens: int) -> list[int]:
    """The chat (fork 0), or a fork of it that differs in its last ``own_tokens`` tokens."""
    ids = [i * 31 % REAL.vocab_size for i in range(tokens)]
    return ids if not fork else ids[: tokens - own_tokens] + [fork] * own_tokens


def write(store: KvStore, layout: KvLayout, ids: list[int], first: int) -> None:
    """Store blocks from ``first`` on and the checkpoint at the end; ``ids`` is a multiple of 256 long."""
    count = len(ids) // BLOCK_TOKENS
    for start in range(first, count, AT_ONCE):
        stop = min(start + AT_ONCE, count)
        blocks = {i: os.urandom(layout.block_bytes) for i in range(start, stop)}
        state = [Unit(len(ids), Role.PROMPT, os.urandom(layout.checkpoint_bytes))] if stop == count else []
        result = store.put(PutJob("default", ids, blocks, state))
        assert result.stored, result.reason


def forget(directory: Path) -> None:
    """Ask the system to drop the segments from its page cache."""
    for path in directory.glob("*.kvs"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def restore(store: KvStore, ids: list[int]) -> tuple[KvHit, float]:
    """Look one fork up; every block is copied out, as the engine does. The hit and the seconds it took."""
    memory = bytearray(1 << 20)

    def sink(index: int, payload: memoryview) -> None:
        memory[: len(payload)] = payload

    begin = time.perf_counter()
    hit = store.lookup("default", [*ids, 1], sink)
    return hit, time.perf_counter() - begin


def read_s(directory: Path, size_bytes: int) -> float:
    """Seconds to read that many bytes of the segments in order into one buffer."""
    buffer, left = bytearray(8 << 20), size_bytes
    begin = time.perf_counter()
    for path in sorted(directory.glob("*.kvs")):
        with path.open("rb", buffering=0) as file:
            while left > 0 and (got := file.readinto(buffer)):
                left -= got
    return time.perf_counter() - begin


def print_restores(directory: Path, layout: KvLayout, prompts: list[list[int]], rounds: int) -> None:
    """Each fork restored cold ``rounds`` times, alternating with plain reads."""
    size_bytes = len(prompts[0]) // BLOCK_TOKENS * layout.block_bytes + layout.checkpoint_bytes
    restores, reads = [], []
    for _ in range(rounds):
        for ids in prompts:
            store = open_store(directory, layout)
            forget(directory)
            hit, taken_s = restore(store, ids)
            assert (hit.tokens, hit.reason) == (len(ids), ""), hit
            restores.append(taken_s)
            store.close()
            forget(directory)
            reads.append(read_s(directory, size_bytes))
    median_s, read_median_s = statistics.median(restores), statistics.median(reads)
    print(f"restore     {median_s:.3f} s median of {len(restores)} ({min(restores):.3f} … {max(restores):.3f}), "
          f"{size_bytes / median_s / 1e6:,.0f} MB/s, {100 * read_median_s / median_s:.0f} % of the disk")  # fmt: skip


def print_purge(directory: Path, layout: KvLayout, ids: list[int]) -> None:
    """Another process purges the tenant while the store is open."""
    store = open_store(directory, layout)
    assert restore(store, ids)[0].tokens == len(ids)
    command = [sys.executable, "-c", _PURGE, str(directory), MASTER_KEY.hex()]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    hit, taken_s = restore(store, ids)
    assert (hit.tokens, hit.blocks) == (0, 0), hit
    print(f"purge       {float(ended.stdout) * 1000:.1f} ms in the other process, the next lookup here misses after "
          f"{taken_s * 1000:.1f} ms ({hit.reason})")  # fmt: skip
    store.close()


def measure(directory: Path, tokens: int, forks: int, own_tokens: int, rounds: int) -> None:
    """Write, weigh, restore, purge."""
    layout = KvLayout.from_spec(make_spec(REAL))
    tokens -= tokens % BLOCK_TOKENS
    prompts = [prompt(fork, tokens, own_tokens) for fork in range(forks + 1)]
    store = open_store(directory, layout)
    write(store, layout, prompts[0], 0)
    store.close()
    chat = files_bytes(directory)
    store = open_store(directory, layout)
    for ids in prompts[1:]:
        write(store, layout, ids, (tokens - own_tokens) // BLOCK_TOKENS)
    store.close()
    total, blocks = files_bytes(directory), tokens // BLOCK_TOKENS
    state = layout.checkpoint_bytes
    bound = blocks * layout.block_bytes + (1 + forks) * state
    own = forks * -(-own_tokens // BLOCK_TOKENS) * layout.block_bytes
    print(f"one chat    {tokens:,} tokens, {blocks} blocks: {chat:,} B on disk, "
          f"{(chat - state) / tokens:,.1f} B a token beside its checkpoint")  # fmt: skip
    print(f"{forks} forks    {total - chat:,} B more, of which their own {own_tokens} tokens are {own:,}: "
          f"{(total - chat - own) / forks:,.0f} B a checkpoint")  # fmt: skip
    print(f"all         {total:,} B = {total / bound:.4f} x payload of one chat and its and {forks} checkpoints"
          f" = {total / (chat + forks * state):.4f} x the chat as it lies there and {forks} checkpoints")  # fmt: skip
    print_restores(directory, layout, prompts[1:], rounds)
    print_purge(directory, layout, prompts[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--forks", type=int, default=10)
    parser.add_argument("--own", type=int, default=256, help="tokens of its own at the end of each fork")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dir", type=Path)
    options = parser.parse_args()
    if options.own % BLOCK_TOKENS or not 0 < options.own <= options.tokens // BLOCK_TOKENS * BLOCK_TOKENS:
        parser.error("--own is a multiple of 256, no longer than the chat")
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        measure(Path(name) / "kv", options.tokens, options.forks, options.own, options.rounds)


if __name__ == "__main__":
    main()
