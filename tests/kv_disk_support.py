"""A directory as a list of changes: inodes, names and contents, with what each call did to them.

``kv_recording_support`` makes such lists of a running process, ``kv_powercut_support`` the states a disk may be in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT_INODE = 0


@dataclass(frozen=True, slots=True)
class Change:
    """``begin``: from this line of the trace on it may be on disk; ``end``: the line on which the call returned."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Write(Change):
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize(Change):
    inode: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Link(Change):
    """A new name: a file or directory made."""

    folder: int
    name: str
    inode: int


@dataclass(frozen=True, slots=True)
class Unlink(Change):
    folder: int
    name: str


@dataclass(frozen=True, slots=True)
class Rename(Change):
    folder: int
    name: str
    to_folder: int
    to_name: str


@dataclass(frozen=True, slots=True)
class Sync(Change):
    """fsync or fdatasync of a file, or of a directory: its names."""

    inode: int


@dataclass(frozen=True, slots=True)
class Say(Change):
    """A line on standard output: what was acknowledged."""

    text: str


Tree = dict[int, dict[str, int]]  # directory inode → name → inode


@dataclass(slots=True)
class Recording:
    """``files`` and ``tree`` are what was there, and durable, before the first change."""

    files: dict[int, bytes] = field(default_factory=dict)
    tree: Tree = field(default_factory=lambda: {ROOT_INODE: {}})
    changes: list[Change] = field(default_factory=list)

    def said(self, before: int) -> list[str]:
        return [c.text for c in self.changes if isinstance(c, Say) and c.begin < before]


def snapshot(root: Path) -> Recording:
    """The directory as it is, all of it durable; shared-memory files are not part of any disk state."""
    recording, inodes = Recording(), {root: ROOT_INODE}
    for path in sorted(root.rglob("*")):
        if not path.name.endswith("-shm"):
            inode = inodes[path] = len(inodes)
            recording.tree[inodes[path.parent]][path.name] = inode
            if path.is_dir():
                recording.tree[inode] = {}
            else:
                recording.files[inode] = path.read_bytes()
    return recording


def lay_out(tree: Tree, files: Mapping[int, bytes], root: Path) -> None:
    """Make the directory that ``tree`` and ``files`` describe at ``root``, which must not be there."""

    def folder(inode: int, path: Path) -> None:
        path.mkdir(mode=0o700)
        for name, child in tree[inode].items():
            if child in tree:
                folder(child, path / name)
            else:
                (path / name).touch(0o600)
                (path / name).write_bytes(files[child])

    folder(ROOT_INODE, root)


def after_all(recording: Recording) -> tuple[Tree, dict[int, bytes]]:
    """Names and contents once every change has reached the disk."""
    files = {inode: bytearray(data) for inode, data in recording.files.items()}
    tree = {inode: dict(names) for inode, names in recording.tree.items()}
    for change in recording.changes:
        if isinstance(change, Write):
            data = files[change.inode]
            data.extend(bytes(max(0, change.offset - len(data))))
            data[change.offset : change.offset + len(change.data)] = change.data
        elif isinstance(change, Resize):
            data = files[change.inode]
            data.extend(bytes(max(0, change.size_bytes - len(data))))
            del data[change.size_bytes :]
        else:
            rename(tree, change)
    return tree, {inode: bytes(data) for inode, data in files.items()}


def rename(tree: Tree, change: Change) -> None:
    """Apply a change of names; one whose source never reached the disk does nothing."""
    if isinstance(change, Link):
        tree[change.folder][change.name] = change.inode
    elif isinstance(change, Unlink):
        tree[change.folder].pop(change.name, None)
    elif isinstance(change, Rename) and change.name in tree[change.folder]:
        tree[change.to_folder][change.to_name] = tree[change.folder].pop(change.name)


def paths(tree: Tree, files: Mapping[int, bytes], inode: int = ROOT_INODE, prefix: str = "") -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, child in tree[inode].items():
        if child in tree:
            found[prefix + name + "/"] = b""
            found |= paths(tree, files, child, prefix + name + "/")
        else:
            found[prefix + name] = files[child]
    return found
