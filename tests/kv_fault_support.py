"""What must be left of a told story (``kv_story_support``) after a fault, and the check of it.

A record may disappear only by a reclaim or a purge, so after a fault between ``done K`` and ``done K+1`` everything
that both lists name must be served, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from kv_story_support import (
    NOW_S,
    Found,
    Piece,
    Story,
    block_payload,
    call_of,
    checkpoint_payload,
    ids_of,
    job_of,
    look,
    open_faulty,
    tail_payload,
)

from runtime.kv.store import KvStore, PutResult


@contextlib.contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: what is asked here is not what a sync costs."""
    memory = Path("/dev/shm")  # noqa: S108 (a folder of its own name is made in it)
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="solocard-kv-", dir=place) as folder:
        yield Path(folder)


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What a child said before it died, read with the lists of an undisturbed telling of the same story."""

    done: int  # steps acknowledged
    must: frozenset[str]  # stored, and not to be reclaimed or purged by the step that was cut off
    may: frozenset[str]

    @staticmethod
    def read(lines: Sequence[str], story: Story, undisturbed: Sequence[frozenset[str]]) -> Acknowledged:
        lists = done_lists(lines)
        done, empty = len(lists), frozenset[str]()
        before = lists[-1] if lists else empty
        after = undisturbed[done] if done < len(undisturbed) else before
        return Acknowledged(done, before & after, before | after)


def done_lists(lines: Sequence[str]) -> list[frozenset[str]]:
    """The names after each acknowledged step; the last line may be cut off."""
    found = []
    for line in lines:
        if line.startswith("done ") and line.endswith("]"):
            found.append(frozenset(json.loads(line.split(" ", 2)[2])))
    return found


def ever(story: Story, lists: Sequence[frozenset[str]]) -> frozenset[str]:
    """Whatever was stored after the purge, and before it by others than the purged: an index made again may find it."""
    purge = next(i for i, step in enumerate(story.steps) if step.what == "purge")
    gone = story.steps[purge].tenant + "/"
    before = {name for names in lists[:purge] for name in names if not name.startswith(gone)}
    return frozenset(before).union(*lists[purge:])


def problems(directory: Path, story: Story, told: Acknowledged, *, rebuilt: bool = False) -> list[str]:
    """Open what a fault left, look everything up, put something new: what is wrong, in words; [] = nothing.

    ``rebuilt``: the index was damaged on purpose, so it may be set aside.
    """
    now_s = NOW_S + 3_600
    try:
        store = open_faulty(directory, story, now_s=now_s)
    except Exception as error:  # whatever it is, it must not come out of open
        return [f"open: {type(error).__name__}: {error}"]
    try:
        found = ["the index was set aside"] if not rebuilt and list(directory.glob("*.damaged*")) else []
        lost = [] if rebuilt else _lost_replays(store, told)  # only the index has them
        return [*found, *lost, *_problems(store, directory, story, told)]
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    finally:
        store.close()


def _lost_replays(store: KvStore, told: Acknowledged) -> Iterator[str]:
    for name in sorted(told.must):
        tenant, chat, kind, tokens = name.split("/")
        if kind == "replay":
            call, ids = call_of(int(chat), int(tokens)), list(ids_of(int(chat), int(tokens)))
            if store.replay_ids(tenant, [call]) != {call: ids[: int(tokens) // 8]}:
                yield f"lost: {name}"


def _problems(store: KvStore, directory: Path, story: Story, told: Acknowledged) -> Iterator[str]:
    yield from _accounting(store, directory)
    purging = told.done < len(story.steps) and story.steps[told.done].tenant
    for (tenant, chat), tokens in story.chats.items():
        for boundary in range(256, tokens + 1, 256):
            found = look(store, tenant, chat, boundary + 1)
            yield from wrong_bits(found, chat, f"{tenant}/{chat} at {boundary}")
            need = reach(told.must, tenant, chat, boundary)
            if (found.hit.tokens == boundary) != (found.hit.reason == ""):
                yield f"{tenant}/{chat} at {boundary}: {found.hit.tokens} tokens, reason {found.hit.reason!r}"
            if found.hit.tokens < need:
                yield f"lost: {tenant}/{chat} at {boundary}: {found.hit.tokens} of {need} ({found.hit.reason})"
            if found.hit.tokens > reach(told.may, tenant, chat, boundary):
                yield f"{tenant}/{chat} at {boundary}: {found.hit.tokens} tokens that nobody may have now"
            if found.hit.reason == "corrupt" and tenant != purging:
                yield f"corrupt: {tenant}/{chat} at {boundary}, and nothing was damaged"
    for name in sorted(told.must):
        tenant, chat, kind, tokens = name.split("/")
        if kind == "tail":
            found = look(store, tenant, int(chat), int(tokens) + 1, tails=True)
            yield from wrong_bits(found, int(chat), name)
            if found.hit.tokens < reach_tail(told.must, tenant, int(chat), int(tokens)):
                yield f"lost: {name} ({found.hit.tokens}, {found.hit.reason})"
    yield from next_put(store)
    yield from _accounting(store, directory)


def _accounting(store: KvStore, directory: Path) -> Iterator[str]:
    on_disk = sum(path.stat().st_size for path in directory.glob("*.kvs"))
    used = store.status().used_bytes
    if used != on_disk:
        yield f"accounting: {used} bytes used, the files have {on_disk}"


def wrong_bits(found: Found, chat: int, what: str) -> Iterator[str]:
    """Anything served that is not what was stored, and every hit that contradicts itself."""
    hit = found.hit
    if any(payload != block_payload(chat, i) for i, payload in found.seen.items()):
        yield f"bad block served: {what}"
    if not set(range(hit.blocks)) <= set(found.seen):
        yield f"{what}: {hit.blocks} blocks, the sink saw {sorted(found.seen)}"
    if hit.checkpoint is not None and hit.checkpoint != checkpoint_payload(chat, hit.tokens):
        yield f"bad checkpoint served: {what}"
    if hit.tail is not None and hit.tail != tail_payload(chat, hit.tokens):
        yield f"bad tail served: {what}"
    if hit.tail is None and (hit.checkpoint is None) != (hit.tokens == 0):
        yield f"{what}: {hit.tokens} tokens, checkpoint {hit.checkpoint is not None}"
    if hit.tail is None and hit.blocks != hit.tokens // 256:
        yield f"{what}: {hit.tokens} tokens with {hit.blocks} blocks"


def reach(stored: Set[str], tenant: str, chat: int, boundary: int) -> int:
    """The longest boundary ≤ ``boundary`` that these records serve."""
    blocks = 0
    while 256 * blocks + 256 <= boundary and f"{tenant}/{chat}/block/{blocks}" in stored:
        blocks += 1
    return max((256 * n for n in range(1, blocks + 1) if f"{tenant}/{chat}/unit/{256 * n}" in stored), default=0)


def reach_tail(stored: Set[str], tenant: str, chat: int, tokens: int) -> int:
    """The same with tails: the most of ``tokens`` tokens that these records serve."""
    best = reach(stored, tenant, chat, tokens)
    for name in stored:
        if name.startswith(f"{tenant}/{chat}/tail/"):
            end = int(name.split("/")[3])
            if end <= tokens and all(f"{tenant}/{chat}/block/{i}" in stored for i in range(end // 256)):
                best = max(best, end)
    return best


def next_put(store: KvStore) -> Iterator[str]:
    result: PutResult = store.put_all([job_of(Piece("default", 90, 512, (512,)))])[0]
    if not result.stored:
        yield f"the next put was refused: {result.reason}"
    found = look(store, "default", 90, 513)
    yield from wrong_bits(found, 90, "the next put")
    if found.hit.tokens != 512:
        yield f"the next put is not served: {found.hit.tokens} ({found.hit.reason})"
