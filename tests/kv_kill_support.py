"""kill -9 at a counted call: a warm process forks a child for each story and kills it at its N-th call.

Calls are counted in two ways: those of the store's ``Io`` (a write may then stop half way), or system calls that
change the disk, seen by ptrace, SQLite's included. ``python kv_kill_support.py`` is the warm process: a JSON task a
line in, a JSON result a line out. Linux on x86_64 and aarch64.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import platform
import random
import shutil
import signal
import struct
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from kv_fault_support import Acknowledged, done_lists, ever, problems
from kv_story_support import make_story, open_faulty, put_by_writer, put_directly, say, seeded, tell

from runtime.kv.files import Io

NEVER = 1 << 60
_TRACEME, _SYSCALL, _SET_OPTIONS, _SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_NO_PTRACE = 77
_OPTIONS = 1 | 0x100000  # system call stops are marked; the child dies with its tracer
_DISK_CALLS = {
    # write, pwrite64, pwritev, fsync, fdatasync, truncate, ftruncate, fallocate, rename, renameat, renameat2,
    # mkdir, mkdirat, link, linkat, unlink, unlinkat, openat
    "x86_64": {1, 18, 296, 74, 75, 76, 77, 285, 82, 264, 316, 83, 258, 86, 265, 87, 263, 257},
    "aarch64": {64, 68, 70, 82, 83, 45, 46, 47, 38, 276, 34, 37, 35, 56},
}


@dataclass(frozen=True, slots=True)
class Task:
    """``what``: tell a story, write it (by the writer), or open. ``count``: io or call. ``when``: before or after."""

    directory: str
    seed: int
    small: bool
    what: str = "tell"
    count: str = "call"
    at: int = NEVER
    when: str = "before"


@dataclass(frozen=True, slots=True)
class Result:
    """What the child said, the names (or numbers) of its calls (``unlink.kvs``: a segment), its status (−9: killed)."""

    lines: list[str]
    calls: list[str]
    status: int


class KillIo(Io):
    """Counts the store's calls and kills its own process at one, a write that is cut ``before`` its end half done."""

    def __init__(self, at: int, when: str) -> None:
        self.calls: list[str] = []
        self._at, self._when = at, when

    def _step(self, moment: str) -> bool:
        """True when the newest call is the one, and this the moment, to die at."""
        return len(self.calls) - 1 == self._at and moment == self._when


def _counted(name):
    real = getattr(Io, name)

    def call(self, *arguments):
        self.calls.append(name + arguments[0].suffix if name == "unlink" else name)
        if self._step("before"):
            if name == "pwrite":
                fd, data, offset = arguments
                real(self, fd, bytes(data)[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(self, *arguments)
        if self._step("after"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


IO_CALLS = [name for name in vars(Io) if not name.startswith("_") and name not in ("preadv", "free_bytes")]
for _name in IO_CALLS:
    setattr(KillIo, _name, _counted(_name))


# -- the warm process


def _child(task: Task, out: int) -> None:
    os.dup2(out, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    io = KillIo(task.at, task.when) if task.count == "io" else KillIo(NEVER, "")
    status = 1
    try:
        story = make_story(task.seed, small=task.small)
        with seeded(task.seed):
            if task.what == "open":
                open_faulty(Path(task.directory), story, io).close()
            else:
                tell(Path(task.directory), story, io, put=put_by_writer if task.what == "write" else put_directly)
        status = 0
        if task.count == "io":
            say(" ".join(("calls", *io.calls)))
    except BaseException:  # the child must never come back into its parent's code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(task: Task) -> Result:
    """Fork, run the task, kill as it says."""
    out = os.memfd_create("said")
    pid = os.fork()
    if not pid:
        if task.count == "call":
            if ctypes.CDLL(None).ptrace(_TRACEME, 0, None, None):
                os._exit(_NO_PTRACE)
            os.kill(os.getpid(), signal.SIGSTOP)
        _child(task, out)
    calls, status = _trace(pid, task) if task.count == "call" else ([], os.waitpid(pid, 0)[1])
    lines = os.pread(out, 1 << 26, 0).decode(errors="replace").splitlines()
    os.close(out)
    if lines and lines[-1].startswith("calls"):
        calls = lines.pop().split()[1:]
    return Result(lines, calls, os.waitstatus_to_exitcode(status))


def _trace(pid: int, task: Task) -> tuple[list[str], int]:
    """Follow the child from call to call; it is killed before or after disk call number ``task.at``."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    wanted, info = _DISK_CALLS[platform.machine()], ctypes.create_string_buffer(88)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        return [], status
    ptrace(_SET_OPTIONS, pid, 0, _OPTIONS)
    calls, inside, pass_on = list[str](), False, 0
    while True:
        ptrace(_SYSCALL, pid, 0, pass_on)
        status, pass_on = os.waitpid(pid, 0)[1], 0
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            return calls, status
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            pass_on = os.WSTOPSIG(status)
            continue
        if inside:
            inside, moment = False, "after"
        else:
            ptrace(_SYSCALL_INFO, pid, len(info), ctypes.addressof(info))
            entry, number = struct.unpack_from("<B23xQ", info.raw)
            if entry != 1 or number not in wanted:
                continue
            inside, moment = True, "before"
            calls.append(str(number))
        if len(calls) - 1 == task.at and moment == task.when:
            os.kill(pid, signal.SIGKILL)


def serve() -> None:
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(run(Task(**json.loads(line))))), flush=True)


# -- the test's side of it


class Warm:
    """The warm process, as a context manager; the imports are paid once."""

    def __enter__(self) -> Warm:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def run(self, task: Task) -> Result:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(dataclasses.asdict(task)) + "\n")
        self._process.stdin.flush()
        return Result(**json.loads(self._process.stdout.readline()))

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)  # the end of its input is the end of it


class Kills:
    """One story, its undisturbed telling, and what is wrong after a kill at one of its calls."""

    def __init__(self, warm: Warm, folder: Path, seed: int, small: bool) -> None:
        self._warm, self._folder, self._seed, self._small = warm, folder, seed, small
        self.story = make_story(seed, small=small)
        whole = {count: self._run("whole " + count, "tell", count) for count in ("io", "call")}
        self.calls = {count: result.calls for count, result in whole.items()}
        self.undisturbed = done_lists(whole["io"].lines)
        assert len(self.undisturbed) == len(self.story.steps)
        assert self.undisturbed == done_lists(whole["call"].lines)
        shutil.rmtree(folder / "whole call")

    def kill(self, count: str, at: int, when: str) -> list[str]:
        """Kill a telling there and look at what is left."""
        told = self.leave(count, at, when, "killed")
        return self._problems("killed", f"{count} {at} {when}", told)

    def kill_writer(self, at: int, when: str) -> list[str]:
        """The same while the writer's thread writes; calls of the store only, system calls are not followed there."""
        told = self.leave("io", at, when, "killed", "write")
        return self._problems("killed", f"writer {at} {when}", told)

    def leave(self, count: str, at: int, when: str, name: str, what: str = "tell") -> Acknowledged:
        """Kill a telling there; what it left lies in directory ``name``."""
        result = self._run(name, what, count, at, when)
        return Acknowledged.read(result.lines, self.story, self.undisturbed)

    def kill_opening(self, begin: str, rng: random.Random, told: Acknowledged, rebuilt: bool = False) -> list[str]:
        """Copy the directory ``begin``, kill an opening of it at a chosen call, look at what is left."""
        shutil.copytree(self._folder / begin, self._folder / "counted")
        count = rng.choice(["io", "call"])
        calls = self._run("counted", "open", count).calls
        shutil.rmtree(self._folder / "counted")
        shutil.copytree(self._folder / begin, self._folder / "killed")
        if not calls:
            count, calls = "call", ["there is always one"]
        at, when = rng.randrange(len(calls)), rng.choice(["before", "after"])
        self._run("killed", "open", count, at, when)
        return self._problems("killed", f"opening {begin} {count} {at} {when}", told, rebuilt)

    def _run(self, name: str, what: str, count: str, at: int = NEVER, when: str = "before") -> Result:
        directory = str(self._folder / name)
        result = self._warm.run(Task(directory, self._seed, self._small, what, count, at, when))
        assert result.status != _NO_PTRACE, "this system lets no process trace its child (ptrace)"
        assert result.status == (0 if at == NEVER else -9), result
        return result

    def _problems(self, name: str, what: str, told: Acknowledged, rebuilt: bool = False) -> list[str]:
        found = problems(self._folder / name, self.story, told, rebuilt=rebuilt)
        shutil.rmtree(self._folder / name, ignore_errors=True)
        return [f"story {self._seed} {what}: {problem}" for problem in found]


class Sweep:
    """Kills of one story, even seeds under a small quota; ``found`` has what was wrong."""

    def __init__(self, warm: Warm, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(f"sweep {seed}")
        self.kills, self.found = Kills(warm, folder, seed, small=seed % 2 == 0), list[str]()

    def while_told(self, count: int) -> None:
        for number in range(count):
            unit = ("io", "call")[number % 2]
            at = self.rng.randrange(len(self.kills.calls[unit]))
            self.found += self.kills.kill(unit, at, self.rng.choice(["before", "after"]))

    def while_recovering(self, count: int) -> None:
        """Kill a telling, then the opening of what it left."""
        for number in range(count):
            calls, unit = self.kills.calls, ("io", "call")[number % 2]
            told = self.kills.leave(unit, self.rng.randrange(len(calls[unit])), "after", "left")
            self.found += self.kills.kill_opening("left", self.rng, told)
            shutil.rmtree(self.folder / "left")

    def while_rebuilding(self, count: int) -> None:
        """Kill the opening of a finished story whose index is lost."""
        begin, lists = self.folder / "no index", self.kills.undisturbed
        if not begin.exists():
            shutil.copytree(self.folder / "whole io", begin)
            for path in begin.glob("index.sqlite3*"):
                path.unlink()
        told = Acknowledged(len(lists), lists[-1], ever(self.kills.story, lists))
        for _ in range(count):
            self.found += self.kills.kill_opening("no index", self.rng, told, rebuilt=True)


if __name__ == "__main__":
    serve()
