"""What may lie on a disk after a power cut: states built from a recording of calls (``kv_recording_support``).

Kept is what a sync covered that had returned: of a file its bytes and size, of a directory its names. Of the rest any
part may be there: each 512-byte sector is as it was after any of the later writes to it, none included; the size is
any that the file had; names made, changed or removed since are there or not. A file may have grown without its bytes:
then they are zeros, or whatever the disk held before.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence

from kv_disk_support import (
    Change,
    Link,
    Recording,
    Rename,
    Resize,
    Say,
    Sync,
    Tree,
    Unlink,
    Write,
    rename,
)

SECTOR_BYTES = 512
FILE_FATES = ("all", "none", "first", "some", "torn", "grown", "junk")
NAME_FATES = ("all", "none", "first", "some")


def cut_points(recording: Recording, rng: random.Random, count: int) -> list[int]:
    """Lines of the trace before which the power goes: half of them anywhere, half where much is not synced yet."""
    anywhere = [c.begin + 1 for c in recording.changes]
    syncs = [c.end for c in recording.changes if isinstance(c, Sync)]
    says = [c.begin + 1 for c in recording.changes if isinstance(c, Say)]
    lists = [places for places in (anywhere, anywhere, syncs, says or syncs) if places] or [[0]]
    return [rng.choice(rng.choice(lists)) for _ in range(count)]


def after_cut(recording: Recording, at: int, rng: random.Random) -> tuple[Tree, dict[int, bytes]]:
    """One possible state of the disk when the power goes before line ``at``: names and contents."""
    happened = [c for c in recording.changes if c.begin < at]
    synced: dict[int, int] = {}  # inode → changes that had returned before this line are durable
    for change in happened:
        if isinstance(change, Sync) and change.end < at:
            synced[change.inode] = max(synced.get(change.inode, -1), change.begin)
    files = dict(recording.files)
    changes: dict[int, list[Write | Resize]] = {}
    for change in happened:
        if isinstance(change, Write | Resize):
            changes.setdefault(change.inode, []).append(change)
    one_fate = rng.choice([*FILE_FATES, None, None])  # the same for all files, or each its own
    for inode, some in changes.items():
        durable = [c for c in some if c.end < synced.get(inode, -1)]
        pending = [c for c in some if c.end >= synced.get(inode, -1)]
        content = _applied(files[inode], durable)
        files[inode] = _torn(content, pending, one_fate or rng.choice(FILE_FATES), rng)
    return _names(recording, happened, synced, rng), files


def _applied(content: bytes, changes: Sequence[Write | Resize]) -> bytes:
    data = bytearray(content)
    for change in changes:
        _apply(data, change)
    return bytes(data)


def _apply(data: bytearray, change: Write | Resize) -> None:
    if isinstance(change, Resize):
        data.extend(bytes(max(0, change.size_bytes - len(data))))
        del data[change.size_bytes :]
    else:
        data.extend(bytes(max(0, change.offset - len(data))))
        data[change.offset : change.offset + len(change.data)] = change.data


def _torn(content: bytes, pending: Sequence[Write | Resize], fate: str, rng: random.Random) -> bytes:
    """``content`` and a part of ``pending``, as ``fate`` says."""
    if not pending or fate == "none":
        return content
    if fate == "all":
        return _applied(content, pending)
    if fate == "first":
        return _applied(content, pending[: rng.randrange(len(pending) + 1)])
    versions = [content]
    for change in pending:
        versions.append(_applied(versions[-1], [change]))
    sizes = [len(version) for version in versions]
    touched = _touched(pending, sizes)
    kept = {i for i in range(len(pending)) if rng.random() < 0.5}
    result = bytearray(max(sizes))
    for sector in range(-(-len(result) // SECTOR_BYTES)):
        mine = touched.get(sector, [])
        if fate == "some":  # whole writes are there or not
            version = max((i + 1 for i in mine if i in kept), default=0)
        elif fate == "torn" or fate == "junk":  # every sector by itself
            version = rng.choice([0, *(i + 1 for i in mine)])
        else:
            version = 0
        begin, end = sector * SECTOR_BYTES, min((sector + 1) * SECTOR_BYTES, len(result))
        part = versions[version][begin:end]
        if fate == "junk" and not version and begin >= sizes[0]:
            part = rng.randbytes(end - begin)
        result[begin : begin + len(part)] = part
    size = max(sizes) if fate in ("grown", "junk") else rng.choice([*sizes, max(sizes)])
    return bytes(result[:size])


def _touched(pending: Sequence[Write | Resize], sizes: Sequence[int]) -> dict[int, list[int]]:
    """Sector → which of ``pending`` changed bytes of it."""
    touched: dict[int, list[int]] = {}
    for i, change in enumerate(pending):
        begin = change.offset if isinstance(change, Write) else change.size_bytes
        end = begin + len(change.data) if isinstance(change, Write) else max(begin, *sizes[: i + 1])
        for sector in range(begin // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
            touched.setdefault(sector, []).append(i)
    return touched


def _names(recording: Recording, happened: Sequence[Change], synced: dict[int, int], rng: random.Random) -> Tree:
    tree = {inode: dict(names) for inode, names in recording.tree.items()}
    changes = [c for c in happened if isinstance(c, Link | Unlink | Rename)]
    pending = [c for c in changes if not _durable(c, synced)]
    fate = rng.choice(NAME_FATES)
    kept = {"all": len(pending), "none": 0, "first": rng.randrange(len(pending) + 1)}.get(fate)
    for change in changes:
        place = bisect_left(pending, change.begin, key=lambda c: c.begin)
        waits = place < len(pending) and pending[place] is change
        if not waits or (rng.random() < 0.5 if kept is None else place < kept):
            rename(tree, change)
    return tree


def _durable(change: Link | Unlink | Rename, synced: dict[int, int]) -> bool:
    folders = {change.folder, change.to_folder} if isinstance(change, Rename) else {change.folder}
    return all(change.end < synced.get(folder, -1) for folder in folders)
