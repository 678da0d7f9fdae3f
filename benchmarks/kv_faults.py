"""Faults of the KV store in numbers: kills, power cuts, flipped bits, failing disks, and what they cost.

    python benchmarks/kv_faults.py [--kills 1000] [--cuts 1000] [--flips 600] [--index-flips 400] [--failures 200]

Needs strace for the power cuts. Nothing but zeros may stand under "lost" (acknowledged and not served), "bad" (served
and wrong) and "other" (a refusal, a miscount, an error). The slow tests tests/hostile/test_kv_*.py do the same sweeps
with other seeds.
"""

from __future__ import annotations

import argparse
import collections
import errno
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kv_corruption_support import Vault, flip  # noqa: E402
from kv_fault_support import memory_folder  # noqa: E402
from kv_full_support import WRITING, FailIo, endure  # noqa: E402
from kv_kill_support import Sweep, Warm  # noqa: E402
from kv_scene_support import Scene  # noqa: E402
from kv_story_support import make_story  # noqa: E402

FIRST_SEED = 100
PER_STORY = 100  # kills or cuts of one story
NEVER = 1 << 60
Faults = Iterator[list[str]]  # what was wrong after each fault


def kills(count: int) -> Faults:
    """70 in 100 while a story is told, 15 while what a kill left is opened, 15 while a lost index is made again."""
    with Warm() as warm:
        for number in range(-(-count // PER_STORY)):
            with memory_folder() as folder:
                sweep = Sweep(warm, folder, FIRST_SEED + number)
                phases = (sweep.while_told, 70), (sweep.while_recovering, 15), (sweep.while_rebuilding, 15)
                for phase, share in phases:
                    for _ in range(share):
                        sweep.found.clear()
                        phase(1)
                        yield list(sweep.found)


def cuts(count: int) -> Faults:
    """85 in 100 while a story is told, 15 while what a cut left is opened or its index is made again."""
    for number in range(-(-count // PER_STORY)):
        with memory_folder() as folder:
            scene, rng = Scene(folder, FIRST_SEED + number), random.Random(number)
            for _ in range(85):
                yield scene.cuts(1, str(rng.random()))
            for k in range(5):
                found = scene.cuts_of_opening(rng, 3, rebuild=k == 4)
                yield from ([], [], found)


def flips(count: int) -> Faults:
    """One bit of a record: any region of any record, padding included."""
    with memory_folder() as folder:
        vault, rng = Vault(folder, FIRST_SEED + 1), random.Random("flips")
        stored = [record for record in vault.records if vault.what(record)]
        for _ in range(count):
            record = rng.choice(stored)
            yield vault.check_flip(record, rng.choice(list(record.regions)), rng)


def index_flips(count: int) -> Faults:
    """One bit of the index; whatever it costs, nothing wrong is served and nothing breaks."""
    with memory_folder() as folder:
        vault, rng = Vault(folder, FIRST_SEED + 1), random.Random("index flips")
        size_bytes = (vault.origin / "index.sqlite3").stat().st_size
        for _ in range(count):
            flip(vault.copy() / "index.sqlite3", rng.randrange(size_bytes), rng.randrange(8))
            yield vault.served_right()[0]


def failures(count: int) -> Faults:
    """A full or failing disk at any call that writes, once or for good."""
    rng = random.Random("failures")
    with memory_folder() as folder:
        for number in range(count):
            story = make_story(FIRST_SEED + number % 10, small=number % 2 == 0)
            code, more = rng.choice([errno.ENOSPC, errno.EIO]), rng.choice([0, NEVER])
            yield list(endure(folder / "kv", story, FailIo(code, rng.randrange(60), more, WRITING)))
            shutil.rmtree(folder / "kv")


def kind_of(problem: str) -> str:
    """lost: acknowledged and not served; bad: served and wrong; other: refused, miscounted, an error."""
    return "lost" if "lost:" in problem else "bad" if "bad " in problem else "other"


def sweep(name: str, faults: Callable[[int], Faults], count: int) -> bool:
    """Run one kind and print its line; True when nothing was wrong."""
    found: collections.Counter[str] = collections.Counter()
    begin_s, done = time.monotonic(), 0
    for problems in faults(count):
        done += 1
        for problem in problems:
            found[kind_of(problem)] += 1
            print(f"  {name}: {problem}", flush=True)
        if sys.stderr.isatty():
            print(f"\r{name} {done}", end="", file=sys.stderr)
        if done == count:
            break
    took_s = time.monotonic() - begin_s
    print(f"{name:<14}{done:>7}{found['lost']:>7}{found['bad']:>7}{found['other']:>7}{took_s:>9.0f}", flush=True)
    return not found


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults of the KV store, swept.")
    kinds = {"kills": (kills, 1000), "cuts": (cuts, 1000), "flips": (flips, 600),
             "index-flips": (index_flips, 400), "failures": (failures, 200)}  # fmt: skip
    for name, (_, count) in kinds.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    asked = vars(parser.parse_args())
    print(f"{'fault':<14}{'count':>7}{'lost':>7}{'bad':>7}{'other':>7}{'seconds':>9}")
    counts = {name: asked[name.replace("-", "_")] for name in kinds}
    fine = [sweep(name, faults, counts[name]) for name, (faults, _) in kinds.items() if counts[name]]
    return int(not all(fine))


if __name__ == "__main__":
    sys.exit(main())
