"""What a process does to a directory, call by call: every write, resize, create, rename, unlink and sync below it.

strace sees the system calls, so SQLite's files are in it like the store's own. ``record`` proves its result: all
changes applied in order must give, byte for byte, the files that lie there afterwards.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from kv_disk_support import (
    ROOT_INODE,
    Change,
    Link,
    Recording,
    Rename,
    Resize,
    Say,
    Sync,
    Unlink,
    Write,
    after_all,
    paths,
    snapshot,
)
from trace_support import need_strace

_CALLS = (
    "open", "openat", "creat", "close", "dup", "dup2", "dup3", "fcntl", "lseek", "write", "pwrite64", "writev",
    "pwritev", "pwritev2", "sendfile", "copy_file_range", "truncate", "ftruncate", "fallocate", "rename", "renameat",
    "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "fsync",
    "fdatasync", "sync_file_range", "mmap", "io_uring_enter",
)  # fmt: skip
_LINE = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)(?:\(| resumed>)(.*)$", re.DOTALL)
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


def record(root: Path, command: list[str], env: Mapping[str, str]) -> Recording:
    """Run ``command``, which must succeed, and note what it changes below ``root`` (an existing directory)."""
    recording = snapshot(root)
    out = root.with_name(root.name + ".trace")
    wanted = "trace=" + ",".join("?" + name for name in _CALLS)
    strace = [need_strace(), "-f", "-qq", "-xx", "-s", str(1 << 26), "-e", wanted, "-e", "signal=none", "-o", str(out)]
    ended = subprocess.run([*strace, *command], env=dict(env), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    _Reader(recording, root).read(out)
    out.unlink()
    real = snapshot(root)
    assert paths(*after_all(recording)) == paths(real.tree, real.files), "the recorder missed a change"
    return recording


class _Reader:
    """Turns trace lines into changes. Anything it does not understand below the root is an error, never skipped."""

    def __init__(self, recording: Recording, root: Path) -> None:
        self._recording, self._root = recording, str(root)
        self._tree = {inode: dict(names) for inode, names in recording.tree.items()}
        self._sizes = {inode: len(data) for inode, data in recording.files.items()}
        self._next = 1 + max([*self._tree, *self._sizes])
        self._fds: dict[int, list[int]] = {}  # fd → [inode, position, append]

    def read(self, trace: Path) -> None:
        begun: dict[tuple[str, str], tuple[int, str]] = {}
        with trace.open() as lines:
            for number, line in enumerate(lines):
                found = _LINE.match(line.rstrip("\n"))
                if not found:
                    continue
                pid, call, rest = found.groups()
                if rest.endswith("<unfinished ...>"):
                    begun[pid, call] = number, rest.removesuffix("<unfinished ...>")
                    continue
                begin, first = begun.pop((pid, call), (number, ""))
                arguments, _, result = (first + rest).rpartition(" = ")
                if not result.startswith(("-1", "?")):
                    self._call(call, arguments.rstrip().removesuffix(")"), int(result.split()[0], 0), begin, number)
        self._recording.changes.sort(key=lambda change: change.begin)

    def _call(self, call: str, arguments: str, result: int, begin: int, end: int) -> None:
        strings = [bytes.fromhex(s.replace("\\x", "")) for s in _STRING.findall(arguments)]
        plain = [a.strip() for a in _STRING.sub("$", arguments).split(",")]
        method = getattr(self, "_on_" + call, None)
        if method:
            method(strings, plain, result, begin, end)
        elif self._below(strings) or (plain[0].isdecimal() and int(plain[0]) in self._fds):
            raise AssertionError(f"the recorder does not know {call}({arguments[:200]})")

    def _below(self, strings: list[bytes]) -> bool:
        return any(os.fsdecode(s).startswith(self._root) for s in strings)

    def _place(self, raw: bytes, at: str = "AT_FDCWD") -> tuple[int, str] | None:
        """(directory, name) of a path below the root; the root itself is (ROOT_INODE, ""); None elsewhere."""
        path = os.fsdecode(raw)
        if not path.startswith("/") and at != "AT_FDCWD":
            if int(at) not in self._fds:
                return None
            folder, parts = self._fds[int(at)][0], path.split("/")
        elif path == self._root or path.startswith(self._root + "/"):
            folder, parts = ROOT_INODE, path[len(self._root) + 1 :].split("/")
        else:
            return None
        for part in parts[:-1]:
            folder = self._tree[folder][part]
        return folder, parts[-1]

    def _inode(self, place: tuple[int, str]) -> int | None:
        return self._tree[place[0]].get(place[1]) if place[1] else place[0]

    def _add(self, change: Change) -> None:
        self._recording.changes.append(change)

    def _make(self, place: tuple[int, str], folder: bool, begin: int, end: int) -> int:
        inode, self._next = self._next, self._next + 1
        self._tree[place[0]][place[1]] = inode
        if folder:
            self._tree[inode] = {}
            self._recording.tree[inode] = {}
        else:
            self._sizes[inode] = 0
            self._recording.files[inode] = b""
        self._add(Link(begin, end, *place, inode))
        return inode

    # -- names

    def _opened(self, place, flags, fd, begin, end):
        if place is None or place[1].endswith("-shm"):
            self._fds.pop(fd, None)
            return
        inode = self._inode(place)
        if inode is None:
            inode = self._make(place, False, begin, end)
        elif "O_TRUNC" in flags and self._sizes[inode]:
            self._resize(inode, 0, begin, end)
        self._fds[fd] = [inode, 0, "O_APPEND" in flags]

    def _on_openat(self, strings, plain, fd, begin, end):
        self._opened(self._place(strings[0], plain[0]), plain[2], fd, begin, end)

    def _on_open(self, strings, plain, fd, begin, end):
        self._opened(self._place(strings[0]), plain[1], fd, begin, end)

    def _on_close(self, strings, plain, result, begin, end):
        self._fds.pop(int(plain[0]), None)

    def _on_dup(self, strings, plain, fd, begin, end):
        if int(plain[0]) in self._fds:
            self._fds[fd] = self._fds[int(plain[0])]

    _on_dup2 = _on_dup3 = _on_dup

    def _on_fcntl(self, strings, plain, result, begin, end):
        if plain[1].startswith("F_DUPFD"):
            self._on_dup(strings, plain, result, begin, end)

    def _on_mkdir(self, strings, plain, result, begin, end):
        place = self._place(strings[0])
        if place:
            self._make(place, True, begin, end)

    def _on_mkdirat(self, strings, plain, result, begin, end):
        place = self._place(strings[0], plain[0])
        if place:
            self._make(place, True, begin, end)

    def _removed(self, place, begin, end):
        if place and not place[1].endswith("-shm"):
            del self._tree[place[0]][place[1]]
            self._add(Unlink(begin, end, *place))

    def _on_unlink(self, strings, plain, result, begin, end):
        self._removed(self._place(strings[0]), begin, end)

    _on_rmdir = _on_unlink

    def _on_unlinkat(self, strings, plain, result, begin, end):
        self._removed(self._place(strings[0], plain[0]), begin, end)

    def _moved(self, old, new, begin, end):
        assert (old is None) == (new is None), "a rename into or out of the recorded directory"
        if old and new:
            self._tree[new[0]][new[1]] = self._tree[old[0]].pop(old[1])
            self._add(Rename(begin, end, *old, *new))

    def _on_rename(self, strings, plain, result, begin, end):
        self._moved(self._place(strings[0]), self._place(strings[1]), begin, end)

    def _on_renameat(self, strings, plain, result, begin, end):
        self._moved(self._place(strings[0], plain[0]), self._place(strings[1], plain[2]), begin, end)

    _on_renameat2 = _on_renameat

    def _linked(self, old, new, begin, end):
        assert (old is None) == (new is None), "a link into or out of the recorded directory"
        if old and new:
            inode = self._tree[old[0]][old[1]]
            self._tree[new[0]][new[1]] = inode
            self._add(Link(begin, end, *new, inode))

    def _on_link(self, strings, plain, result, begin, end):
        self._linked(self._place(strings[0]), self._place(strings[1]), begin, end)

    def _on_linkat(self, strings, plain, result, begin, end):
        self._linked(self._place(strings[0], plain[0]), self._place(strings[1], plain[2]), begin, end)

    # -- contents

    def _wrote(self, inode, offset, data, begin, end):
        self._sizes[inode] = max(self._sizes[inode], offset + len(data))
        self._add(Write(begin, end, inode, offset, data))

    def _on_write(self, strings, plain, result, begin, end):
        self._stream(int(plain[0]), strings[0][:result] if strings else b"", begin, end)

    def _on_writev(self, strings, plain, result, begin, end):
        self._stream(int(plain[0]), b"".join(strings)[:result], begin, end)

    def _stream(self, fd, data, begin, end):
        if fd == 1:
            for text in data.decode().splitlines():
                self._add(Say(begin, end, text))
        elif fd in self._fds:
            entry = self._fds[fd]
            offset = self._sizes[entry[0]] if entry[2] else entry[1]
            self._wrote(entry[0], offset, data, begin, end)
            entry[1] = offset + len(data)

    def _on_pwrite64(self, strings, plain, result, begin, end):
        if int(plain[0]) in self._fds:
            self._wrote(self._fds[int(plain[0])][0], int(plain[-1]), strings[0][:result], begin, end)

    def _on_pwritev(self, strings, plain, result, begin, end):
        if int(plain[0]) in self._fds:
            self._wrote(self._fds[int(plain[0])][0], int(plain[-1]), b"".join(strings)[:result], begin, end)

    def _on_lseek(self, strings, plain, result, begin, end):
        if int(plain[0]) in self._fds:
            self._fds[int(plain[0])][1] = result

    def _resize(self, inode, size_bytes, begin, end):
        self._sizes[inode] = size_bytes
        self._add(Resize(begin, end, inode, size_bytes))

    def _on_ftruncate(self, strings, plain, result, begin, end):
        if int(plain[0]) in self._fds:
            self._resize(self._fds[int(plain[0])][0], int(plain[1]), begin, end)

    def _on_truncate(self, strings, plain, result, begin, end):
        place = self._place(strings[0])
        if place:
            self._resize(self._inode(place), int(plain[1]), begin, end)

    def _on_fsync(self, strings, plain, result, begin, end):
        if int(plain[0]) in self._fds:
            self._add(Sync(begin, end, self._fds[int(plain[0])][0]))

    _on_fdatasync = _on_fsync

    def _on_mmap(self, strings, plain, result, begin, end):
        shared = "MAP_SHARED" in plain[3] and "PROT_WRITE" in plain[2]
        assert not (shared and plain[4].isdecimal() and int(plain[4]) in self._fds), "written through shared memory"
