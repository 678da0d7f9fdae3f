"""What benchmarks/llamacpp.py measures, the same way on both sides: exactness, cost, damage, other weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llamacpp_sides import Logits, Restored, Side
from numpy.typing import NDArray

ZERO_BYTES, PAGE_BYTES = 64, 4096
_STEPS_AFTER_DAMAGE = 4
Outcome = dict[str, Any]


def prompt(vocab_size: int, tokens: int) -> list[int]:
    """The same ids for both sides."""
    return np.random.default_rng(7).integers(2, vocab_size, tokens).tolist()


def steps(side: Side, chat: Any, ids: Sequence[int]) -> Logits:
    """Logits f32 [len(ids), vocab] of ``ids`` fed one by one."""
    return np.stack([side.step(chat, token) for token in ids])


class Clock:
    """Seconds since it was made: of the wall, and of this process's CPU time in all its threads."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


Took = tuple[float, float]


def saved(side: Side, chat: Any, ids: Sequence[int], folder: Path) -> Took:
    """Save into an empty ``folder``; what the save alone took."""
    shutil.rmtree(folder, ignore_errors=True)
    saver = side.saver(folder)
    clock = Clock()
    side.save(saver, chat, ids)
    took = clock.read()
    side.done(saver)
    return took


def restored(side: Side, ids: Sequence[int], folder: Path) -> tuple[Any, Restored, Took, Took]:
    """A fresh chat with what ``folder`` gives of ``ids``; what opening and restoring took."""
    chat = side.start()
    clock = Clock()
    opened = side.opened(folder)
    opening, clock = clock.read(), Clock()
    result = side.restore(opened, chat, ids)
    took = clock.read()
    side.done(opened)
    return chat, result, opening, took


# -- exactness -------------------------------------------------------------------------------------------------------


def exactness(side: Side, ids: Sequence[int], n: int, count: int, folder: Path) -> Outcome:
    """``count`` further tokens after n: restored against uninterrupted, and as control a second cold run."""
    more = list(ids[n : n + count])
    chat = side.start()
    after_prompt = side.feed(chat, ids[:n])
    saved(side, chat, ids[:n], folder)
    through = steps(side, chat, more)
    side.close(chat)
    chat, result, _, _ = restored(side, ids[: n + 1], folder)
    assert result.tokens == n, f"{result.tokens} of {n} tokens restored: {result.reason}"
    again = steps(side, chat, more)
    side.close(chat)
    chat = side.start()
    side.feed(chat, ids[:n])
    control = steps(side, chat, more)
    side.close(chat)
    return {
        "tokens": n, "restored": largest(through, again), "control": largest(through, control),
        "deviation": float(through.std()), "prompt_logits": [float(x) for x in after_prompt],
    }  # fmt: skip


def largest(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """max |a − b|; infinite where one of them is not a number."""
    return float(np.nan_to_num(np.abs(a - b), nan=np.inf).max())


# -- cost ------------------------------------------------------------------------------------------------------------


def cost(side: Side, ids: Sequence[int], n: int, rounds: int, folder: Path) -> Outcome:
    """Bytes on disk, and what it takes to prefill, save, sync, open, restore and plainly read n tokens' state.

    ``seconds``: name → [median, best, median of CPU seconds].
    """
    chat, times = side.start(), Times()
    times.run("prefill", lambda: side.feed(chat, ids[:n]))
    for _ in range(rounds):
        times.add("save", saved(side, chat, ids[:n], folder))
        times.run("sync", lambda: sync(folder))
    side.close(chat)
    for temperature in ("cold", "warm"):
        settle = forget if temperature == "cold" else read_all
        for _ in range(rounds):
            settle(folder)
            fresh, result, opening, took = restored(side, ids[: n + 1], folder)
            side.close(fresh)
            assert result.tokens == n, result.reason
            times.add(f"open_{temperature}", opening)
            times.add(f"restore_{temperature}", took)
            settle(folder)
            times.run(f"read_{temperature}", lambda: read_all(folder))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files(folder)}
    return {"tokens": n, "bytes": sum(sizes.values()), "files": sizes, "seconds": times.summary()}


class Times:
    """What repeated calls took, by name."""

    def __init__(self) -> None:
        self._taken: dict[str, list[Took]] = {}

    def add(self, name: str, took: Took) -> None:
        self._taken.setdefault(name, []).append(took)

    def run(self, name: str, call: Callable[[], object]) -> None:
        clock = Clock()
        call()
        self.add(name, clock.read())

    def summary(self) -> dict[str, list[float]]:
        """Name → median and best of the wall, median of the CPU."""
        columns = {name: list(zip(*taken, strict=True)) for name, taken in self._taken.items()}
        return {name: [statistics.median(wall), min(wall), statistics.median(cpu)]
                for name, (wall, cpu) in columns.items()}  # fmt: skip


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def sync(folder: Path) -> None:
    for path in files(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def forget(folder: Path) -> None:
    """Ask the system to drop the folder's files from its page cache."""
    for path in files(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_all(folder: Path) -> None:
    """A plain sequential read: what a restore cannot be faster than."""
    buffer = bytearray(8 << 20)
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# -- damage ----------------------------------------------------------------------------------------------------------


def damage(side: Side, ids: Sequence[int], n: int, places: int, folder: Path) -> Outcome:
    """Outcomes of restoring from damaged copies of what is in ``folder``, each in a process of its own."""
    more = list(ids[n : n + _STEPS_AFTER_DAMAGE])
    chat, result, _, _ = restored(side, ids[: n + 1], folder)
    assert result.tokens == n, result.reason
    right = steps(side, chat, more)
    side.close(chat)
    rng = np.random.default_rng(11)
    size_bytes = sum(path.stat().st_size for path in files(folder))
    offsets = [int(x) for x in rng.integers(0, size_bytes - PAGE_BYTES, places)]
    cases: dict[str, list[tuple[int, bytes]]] = {
        "64 bytes zeroed": [(at, bytes(ZERO_BYTES)) for at in offsets],
        "random 4 KiB page": [(at // PAGE_BYTES * PAGE_BYTES, rng.bytes(PAGE_BYTES)) for at in offsets],
    }
    outcomes: Outcome = {}
    for name, changes in cases.items():
        each = [tried(side, ids, right, folder, lambda copy, c=change: overwrite(copy, *c)) for change in changes]
        outcomes[name] = summary(each)
    cuts = (2 / 3, 0.9999, 1 / 3, 0.01)
    each = [tried(side, ids, right, folder, lambda copy, s=share: cut(copy, s)) for share in cuts]
    outcomes["truncated"] = summary(each)
    again = tried(side, ids, right, folder, lambda copy: cut(copy, cuts[0]), recompute=True)
    outcomes["truncated"]["recomputed"] = again.get("recomputed")
    return outcomes


def tried(
    side: Side, ids: Sequence[int], right: Logits, folder: Path, change: Callable[[Path], None], *,
    recompute: bool = False,
) -> Outcome:  # fmt: skip
    """One damaged copy in a child process: what ``attempt`` gives, or {died}."""
    copy = folder.with_name("damaged")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    change(copy)
    return in_child(lambda: attempt(side, ids, right, copy, recompute=recompute))


def attempt(side: Side, ids: Sequence[int], right: Logits, folder: Path, *, recompute: bool = False) -> Outcome:
    """Restore and go on; ``logits`` is the largest change of them where all tokens were taken as restored.

    ``recompute``: where they were not, the rest of the prompt is computed and ``recomputed`` is the largest change.
    """
    n = len(ids) - len(right)
    chat, result, _, _ = restored(side, ids[: n + 1], folder)
    outcome: Outcome = {"tokens": result.tokens, "reason": result.reason}
    if result.tokens == n:
        outcome["logits"] = largest(right, steps(side, chat, ids[n:]))
    elif recompute:
        if not result.tokens:
            side.clear(chat)
        side.feed(chat, ids[result.tokens : n])
        outcome["recomputed"] = largest(right, steps(side, chat, ids[n:]))
    return outcome


def in_child(call: Callable[[], Outcome]) -> Outcome:
    """``call`` in a fork of this process: a library that aborts ends the child, not the measurement."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: other threads may hold locks
        child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(answer_of(call)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    if text:
        answer: Outcome = json.loads(text)
        return answer
    return {"died": signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "exit"}


def answer_of(call: Callable[[], Outcome]) -> Outcome:
    """An exception is a refusal as well."""
    try:
        return call()
    except Exception as error:
        return {"tokens": 0, "reason": f"{type(error).__name__}: {error}"}


def overwrite(folder: Path, at: int, content: bytes) -> None:
    """Put ``content`` at byte ``at`` of the folder's files, counted one after another."""
    for path in files(folder):
        size_bytes = path.stat().st_size
        if at < size_bytes:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(content[: size_bytes - at])
            return
        at -= size_bytes


def cut(folder: Path, share: float) -> None:
    """Cut the largest file to ``share`` of its length."""
    path = max(files(folder), key=lambda path: path.stat().st_size)
    os.truncate(path, int(path.stat().st_size * share))


def summary(outcomes: Sequence[Outcome]) -> Outcome:
    """How many were refused, were accepted with other logits or with the same, or ended the process."""
    accepted = [outcome["logits"] for outcome in outcomes if "logits" in outcome]
    refused = [outcome for outcome in outcomes if "logits" not in outcome and "died" not in outcome]
    return {
        "tried": len(outcomes), "refused": len(refused), "died": sum("died" in outcome for outcome in outcomes),
        "accepted_wrong": sum(change > 0 for change in accepted),
        "accepted_same": sum(change == 0 for change in accepted),
        "largest_change": max(accepted, default=0.0),
        "reasons": sorted({str(outcome["reason"]) for outcome in refused}),
    }  # fmt: skip
