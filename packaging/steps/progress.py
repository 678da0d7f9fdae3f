"""How long a step takes and how many bytes it moves, said while it runs. Standard library only."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

BEAT_S = 5.0  # a long step says something at least this often


def say(text: str = "") -> None:
    """One line, at once, whatever the terminal's encoding."""
    stream = sys.stdout
    encoding = stream.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


def megabytes(size_bytes: float) -> str:
    """Decimal megabytes with one digit, as download sizes are given."""
    return f"{size_bytes / 1e6:.1f} MB"


def tree_bytes(*roots: Path) -> int:
    """Bytes the files below ``roots`` take on disk; a file with two names counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                with contextlib.suppress(OSError):  # removed meanwhile
                    info = (Path(folder) / name).lstat()
                    if (info.st_dev, info.st_ino) not in seen:
                        seen.add((info.st_dev, info.st_ino))
                        total += info.st_blocks * 512
    return total


@contextlib.contextmanager
def heartbeat(describe: Callable[[], str]) -> Iterator[Callable[[str], None]]:
    """Says ``describe()`` whenever nothing was said for BEAT_S seconds. Yields the function to say lines with."""
    ended, said_s, started_s = threading.Event(), [time.monotonic()], time.monotonic()

    def line(text: str) -> None:
        said_s[0] = time.monotonic()
        say(f"    {text}")

    def beat() -> None:
        while not ended.wait(0.5):
            if time.monotonic() - said_s[0] >= BEAT_S:
                line(f"… {time.monotonic() - started_s:.0f} s, {describe()}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield line
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def talking(command: Sequence[str | Path], cwd: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A child whose stdout and stderr are read as lines from ``stdout``; ended with us when we are interrupted."""
    child = subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    with child:
        try:
            yield child
        except BaseException:
            child.terminate()
            raise
