"""How fast `build` writes a bundle's objects against a plain copy, how much memory it takes, and what kills do to it.

    python benchmarks/export.py [--scale 1.0] [--kills 0] [--work DIR]

Writes a random checkpoint with V4-Flash's own layer shapes (hidden size 4096, vocabulary 129,280, one layer of each
attention kind, 256 experts a layer times --scale), then copies it and builds it, each with the sources dropped from the
page cache before and everything fsynced at the end; 1 against 2 workers; and --kills times kill -9 at a random moment,
the build started again each time. The golden tokens, which need the engine, are left out. Scale 1 takes 12.6 GB for the
checkpoint and as much again for the copy or the bundle; all of it is removed. Other work on the machine slows the build
more than the copy, which needs hardly any CPU: the CPU seconds tell them apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

COPY_BYTES = 16 << 20
RATIO, MEMORY_BYTES = 0.60, 2 << 30  # the targets
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Run:
    """One child process: how it ended and what it took."""

    code: int
    wall_s: float
    cpu_s: float
    peak_bytes: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of 256 experts a layer (default: 1.0)")
    parser.add_argument("--kills", type=int, default=0, help="kill -9 that often at random moments (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--child", nargs=3, metavar=("CKPT", "OUT", "WORKERS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return build(Path(args.child[0]), Path(args.child[1]), int(args.child[2]))
    work = Path(tempfile.mkdtemp(prefix="export-", dir=args.work))
    try:
        return measure(work, args.scale, args.kills, args.seed)
    finally:
        shutil.rmtree(work)


def build(checkpoint: Path, out: Path, workers: int) -> int:
    """In a process of its own: everything `build` does but the golden tokens."""
    from exporter.build_profiles import open_profiles
    from exporter.checkpoint import Checkpoint
    from exporter.release import Release, write_bundle

    profiles = open_profiles(Checkpoint.open(checkpoint), None, [], [], None)
    release = Release("benchmark", "0", 1, "dsv4-0731", "kv-v4", profiles, None)
    write_bundle(release, out, workers=workers, find=lambda *_: ())
    return 0


def measure(work: Path, scale: float, kills: int, seed: int) -> int:
    from exporter.presets import SLICE
    from exporter.sample import write_random

    experts = max(round(256 * scale), SLICE.num_experts_per_tok)
    checkpoint = work / "checkpoint"
    config = dataclasses.replace(SLICE, n_routed_experts=experts, vocab_size=129_280)
    size = write_random(checkpoint, config, mtp=0)
    print(f"checkpoint: {size:,} bytes, 3 layers of {experts} experts; load {os.getloadavg()[0]:.1f}", flush=True)
    copies = [copy(checkpoint, work / "copy")]
    two, digest = timed_build(checkpoint, work / "bundle", 2)
    copies.append(copy(checkpoint, work / "copy"))
    one, other = timed_build(checkpoint, work / "bundle", 1)
    copied = [size / 1e6 / run.wall_s for run in copies]
    for label, run in (("copy", copies[0]), ("2 workers", two), ("copy", copies[1]), ("1 worker", one)):
        print(
            f"{label:10} {size / 1e6 / run.wall_s:6.0f} MB/s, {run.wall_s:6.1f} s, {run.cpu_s:5.1f} CPU-s"
            + (f", peak {run.peak_bytes / 1e6:,.0f} MB" if run.peak_bytes else "")
        )
    ratio = size / 1e6 / two.wall_s / (sum(copied) / 2)
    peak = max(one.peak_bytes, two.peak_bytes)
    print(f"build / copy: {ratio:.2f} (target ≥ {RATIO:.2f}); peak {peak:,} bytes (target ≤ {MEMORY_BYTES:,})")
    print(f"bundle {digest[:16]} by 2 workers, {other[:16]} by 1: {'equal' if digest == other else 'DIFFERENT'}")
    survived = kill_sweep(checkpoint, work / "bundle", kills, two.wall_s, digest, seed)
    good = ratio >= RATIO and peak <= MEMORY_BYTES and digest == other and survived
    print("all targets reached" if good else "a target was missed")
    return 0 if good else 1


def copy(source: Path, target: Path) -> Run:
    """Every file by large reads and writes, cold and fsynced."""
    drop(source)
    target.mkdir()
    buffer = memoryview(bytearray(COPY_BYTES))
    started_s, cpu_s = time.monotonic(), time.process_time()
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as reader, (target / path.name).open("wb", buffering=0) as writer:
            while count := reader.readinto(buffer):
                writer.write(buffer[:count])
            os.fsync(writer.fileno())
    run = Run(0, time.monotonic() - started_s, time.process_time() - cpu_s, 0)
    shutil.rmtree(target)
    return run


def drop(folder: Path) -> None:
    """Nothing of ``folder`` stays in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed_build(checkpoint: Path, out: Path, workers: int) -> tuple[Run, str]:
    drop(checkpoint)
    return child(checkpoint, out, workers), taken(out)


def child(
    checkpoint: Path, out: Path, workers: int, kill_after_s: float | None = None, *, once_writing: bool = False
) -> Run:
    """One build. Killed after ``kill_after_s`` (from its first new journal line on, if ``once_writing``) unless it was
    faster. Memory is that of the whole process tree."""
    command = [sys.executable, __file__, "--child", str(checkpoint), str(out), str(workers)]
    journal, peak = out.with_name(out.name + ".partial") / "journal.jsonl", 0
    started_s, written = time.monotonic(), size_bytes(journal)
    clock_s = started_s
    with tempfile.TemporaryFile() as errors, subprocess.Popen(command, stderr=errors) as process:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, tree_peak_bytes(process.pid))
            if once_writing and size_bytes(journal) == written:
                clock_s = time.monotonic()
            if kill_after_s is not None and time.monotonic() - clock_s >= kill_after_s:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, -signal.SIGKILL):
            errors.seek(0)
            sys.exit(f"the build ended with {process.returncode}:\n{errors.read()[-2000:].decode(errors='replace')}")
    return Run(process.returncode, time.monotonic() - started_s, usage.ru_utime + usage.ru_stime, peak)


def size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def tree_peak_bytes(pid: int) -> int:
    """The most resident bytes so far of a process, and of each below it, added up."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return own + sum(tree_peak_bytes(int(one)) for one in below)


def kill_sweep(checkpoint: Path, out: Path, kills: int, build_s: float, digest: str, seed: int) -> bool:
    """``kills`` times kill -9 at a random moment; every bundle that comes out must be that of the undisturbed run."""
    moments, done, same = random.Random(seed), 0, True
    partial = out.with_name(out.name + ".partial")
    while done < kills:
        writing = done % 4 != 3  # every fourth kill falls anywhere, into the start or the check of what is there
        after_s = moments.uniform(0, 2 * build_s / kills if writing else build_s / 2)
        run = child(checkpoint, out, 2, after_s, once_writing=writing)
        if run.code == -signal.SIGKILL:
            done += 1
            kept = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else 0
            print(f"kill {done:2} after {run.wall_s:5.2f} s, {kept:,} bytes kept", flush=True)
        if out.exists():  # it was faster than its killer
            same = taken(out) == digest and same
    if kills:
        if not out.exists():
            child(checkpoint, out, 2)
        same = taken(out) == digest and same
        print(f"{kills} kills: {'every bundle equal' if same else 'A BUNDLE DIFFERS'}")
    return same


def taken(out: Path) -> str:
    """The bundle's digest; the bundle is removed."""
    from appliance.bundle import BuiltBundle

    digest = BuiltBundle.open(out).manifest.digest
    shutil.rmtree(out)
    return digest


if __name__ == "__main__":
    sys.exit(main())
