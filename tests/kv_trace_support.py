"""Replays a trace of requests through the real store, scaled down, and says what an ideal cache would have hit.

One block record takes 4,096 bytes instead of the 901,120 of V4-Flash, a checkpoint 16,384 instead of 3,645,440; a
segment holds as many blocks as one of 256 MiB does and a quota as many segments. Payloads are the names of their
prefixes, so that every block read is checked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from kv_support import MASTER_KEY, make_fingerprint

from runtime.kv.files import Io
from runtime.kv.footer import footer_bytes
from runtime.kv.job import PutJob, Unit
from runtime.kv.layout import KvLayout
from runtime.kv.policy import Policy
from runtime.kv.record import Role
from runtime.kv.store import KvStore
from runtime.schedule import prompt_boundary, write_points

BLOCK_TOKENS = 256
BLOCK_BYTES, CHECKPOINT_BYTES = 4_096, 16_384  # on disk
REAL_BLOCK_BYTES, REAL_SEGMENT_BYTES = 901_120, 268_435_456
SEGMENT_BLOCKS = (REAL_SEGMENT_BYTES - footer_bytes(297)) // REAL_BLOCK_BYTES
SEGMENT_BYTES = SEGMENT_BLOCKS * BLOCK_BYTES + footer_bytes(SEGMENT_BLOCKS)
REPLAY_TOKENS = 5_632  # R of V4-Flash
_START_S = 1_800_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt: its length in tokens and the names of its 256-token units, the last one maybe partial."""

    at_s: float
    tokens: int
    output_tokens: int
    units: tuple[int, ...]
    tenant: str = "default"
    anchors: tuple[int, ...] = ()


def read_trace(path: Path, unit_tokens: int = 512) -> list[Request]:
    """A trace in Mooncake's JSON lines; ``unit_tokens`` is what one of its hash ids stands for.

    The partial last unit of a coarser trace is left out: its id says nothing about the 256 tokens in its first half.
    """
    requests = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        ids, tokens = entry["hash_ids"], entry["input_length"]
        if unit_tokens != BLOCK_TOKENS:
            whole, parts = tokens // unit_tokens, unit_tokens // BLOCK_TOKENS
            ids, tokens = [i * parts + j for i in ids[:whole] for j in range(parts)], whole * unit_tokens + 1
        requests.append(Request(entry["timestamp"] / 1000, tokens, entry["output_length"], tuple(ids),
                                entry.get("tenant", "default"), tuple(entry.get("anchors", ()))))  # fmt: skip
    return requests


def quota_bytes(real_bytes: float) -> int:
    """The scaled quota that holds as many segments as ``real_bytes`` do of 256 MiB."""
    return round(real_bytes / REAL_SEGMENT_BYTES * SEGMENT_BYTES)


def scaled_layout() -> KvLayout:
    """A layout whose records take 4,096 and 16,384 bytes; nothing is ever scattered into a model."""
    return KvLayout(
        block_tokens=BLOCK_TOKENS, states=(), block_parts=(), checkpoint_parts=(), block_bytes=BLOCK_BYTES - 256,
        checkpoint_bytes=CHECKPOINT_BYTES - 256, vocab_size=0, layout_id="trace",
    )  # fmt: skip


class Tokens(Sequence[int]):
    """Token ids of a prompt: unit i is 256 times its name. Slices are made when asked for."""

    def __init__(self, units: Sequence[int], count: int) -> None:
        self._units, self._count = units, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> list[int]: ...
    def __getitem__(self, at: int | slice) -> int | list[int]:
        if isinstance(at, int):
            return self._units[at // BLOCK_TOKENS]
        start, stop, step = at.indices(self._count)
        if step == 1 and start % BLOCK_TOKENS == 0 and stop - start == BLOCK_TOKENS:
            return [self._units[start // BLOCK_TOKENS]] * BLOCK_TOKENS
        return [self._units[i // BLOCK_TOKENS] for i in range(start, stop, step)]


class MeterIo(Io):
    """Counts what is written to segments and what they hold on disk at every moment; syncs nothing."""

    def __init__(self) -> None:
        self.record_bytes = self.footer_bytes = self.disk_bytes = self.peak_bytes = 0

    def pwrite(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        before = os.fstat(fd).st_size
        super().pwrite(fd, data, offset)
        if len(data) % BLOCK_BYTES == 0:  # else a tenant's key
            if bytes(data[-BLOCK_BYTES:][:4]) == b"SKVT":
                self.footer_bytes += len(data)
            else:
                self.record_bytes += len(data)
            self.disk_bytes += os.fstat(fd).st_size - before
            self.peak_bytes = max(self.peak_bytes, self.disk_bytes)

    def truncate(self, path: Path, size_bytes: int) -> None:
        self.disk_bytes -= path.stat().st_size - size_bytes
        super().truncate(path, size_bytes)

    def unlink(self, path: Path) -> None:
        if path.suffix == ".kvs" and path.exists():
            self.disk_bytes -= path.stat().st_size
        super().unlink(path)

    def fdatasync(self, fd: int) -> None:
        """A measurement of what is written, not of how long it takes."""

    def sync_directory(self, path: Path) -> None:
        """See fdatasync."""

    def commit(self, connection: sqlite3.Connection) -> None:
        super().commit(connection)


PointRule = Callable[[int, int, int, int, Request], Iterable[int]]


def product_points(boundary: int, hit: int, blocks: int, common: int, request: Request) -> Iterable[int]:
    """Where the scheduler leaves checkpoints: prompt end, common prefix, declared anchors, on the way of a long one."""
    anchors = {a // BLOCK_TOKENS * BLOCK_TOKENS for a in request.anchors}
    points: set[int] = set()
    for anchor in anchors or {0}:
        points |= write_points(boundary, hit, blocks, common_tokens=common, anchor_tokens=anchor, shared_tokens=0)
    return points


def end_points(boundary: int, hit: int, blocks: int, common: int, request: Request) -> Iterable[int]:
    """A peer: at the end of the prompt only."""
    return {boundary}


def dense_points(boundary: int, hit: int, blocks: int, common: int, request: Request) -> Iterable[int]:
    """A peer: at the end and every 4,096 tokens."""
    return {boundary, *range(4_096, boundary, 4_096)}


@dataclass(slots=True)
class Score:
    """What a replay showed, in tokens and in bytes of the scaled store."""

    requests: int = 0
    tokens: int = 0
    hit_tokens: int = 0
    replays: int = 0
    unique_blocks: int = 0
    put_bytes: int = 0
    written_bytes: int = 0  # records, checkpoints, copies and footers (these at their real size)
    over_bytes: int = 0  # the most that the files held above the quota, negative when they never reached it
    refused: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def hit(self) -> float:
        return self.hit_tokens / max(self.tokens, 1)

    @property
    def written(self) -> float:
        return self.written_bytes / max(self.unique_blocks * BLOCK_BYTES, 1)

    @property
    def copied(self) -> float:
        """Copy-forward alone, as a share of the unique blocks' bytes."""
        return (self.written_bytes - self.put_bytes) / max(self.unique_blocks * BLOCK_BYTES, 1)

    @property
    def over_segments(self) -> float:
        return self.over_bytes / SEGMENT_BYTES


class Replay:
    """A store below ``directory`` that a trace runs through; ``policy.max_bytes`` counts scaled bytes."""

    def __init__(
        self, directory: Path, policy: Policy, points: PointRule = product_points, replay_tokens: int = REPLAY_TOKENS,
        restart_every: int = 0,
    ) -> None:  # fmt: skip
        self._directory, self._policy, self._points = directory, policy, points
        self._replay_tokens, self._restart_every = replay_tokens, restart_every
        self._now_s = float(_START_S)
        self.io = MeterIo()
        self.score = Score()
        self._names: set[tuple[str, int]] = set()
        self.store = self._open()

    def run(self, requests: Iterable[Request], tick: Callable[[Score], None] = lambda score: None) -> Score:
        """Every request in turn: looked up, checked, stored. Closes the store."""
        for request in requests:
            self._now_s = _START_S + request.at_s
            self._serve(request)
            if self._restart_every and self.score.requests % self._restart_every == 0:
                self.store.close()
                self.store = self._open()
            tick(self.score)
        self.store.close()
        score, io = self.score, self.io
        score.unique_blocks = len(self._names)
        score.written_bytes = io.record_bytes + io.footer_bytes * BLOCK_BYTES // REAL_BLOCK_BYTES
        score.over_bytes = io.peak_bytes - self._policy.max_bytes
        return score

    def _open(self) -> KvStore:
        layout = scaled_layout()
        return KvStore.open(
            self._directory, layout=layout, fingerprint=make_fingerprint(layout), master_key=MASTER_KEY,
            policy=self._policy, io=self.io, segment_bytes=SEGMENT_BYTES, clock=lambda: self._now_s,
        )  # fmt: skip

    def _serve(self, request: Request) -> None:
        ids, units, score = Tokens(request.units, request.tokens), request.units, self.score

        def check(index: int, payload: memoryview) -> None:
            assert struct.unpack_from("<Q", payload)[0] == units[index], "a block of another prefix"

        hit = self.store.lookup(request.tenant, ids, check, replay_tokens=self._replay_tokens)
        boundary = prompt_boundary(request.tokens)
        score.requests += 1
        score.tokens += request.tokens
        score.hit_tokens += hit.tokens
        score.replays += hit.replay
        score.reasons[hit.reason] = score.reasons.get(hit.reason, 0) + 1
        self._names.update((request.tenant, name) for name in units[: boundary // BLOCK_TOKENS])
        if boundary:
            points = self._points(boundary, hit.tokens, hit.blocks, hit.common_tokens, request)
            self._keep(request, ids, boundary, points, hit.common_tokens)

    def _keep(self, request: Request, ids: Tokens, boundary: int, points: Iterable[int], common: int) -> None:
        """Store what the scheduler would: the new blocks, and a checkpoint at each point, in one group."""
        blocks = {i: _payload(request.units[i], BLOCK_BYTES) for i in range(common // BLOCK_TOKENS,
                                                                          boundary // BLOCK_TOKENS)}  # fmt: skip
        units = [Unit(at, Role.PROMPT if at == boundary else Role.ANCHOR, _payload(at, CHECKPOINT_BYTES))
                 for at in sorted(points)]  # fmt: skip
        result = self.store.put(PutJob(request.tenant, ids, blocks, units))
        self.score.put_bytes += result.written_bytes
        self.score.refused += not result.stored


def _payload(name: int, record_bytes: int) -> bytes:
    return struct.pack("<Q", name).ljust(record_bytes - 256, b"\0")


def ideal_hit(requests: Iterable[Request], quota: float) -> float:
    """Share of tokens an LRU cache of blocks hits that may begin anywhere on a block; ``quota`` in blocks."""
    kept: OrderedDict[tuple[str, int], None] = OrderedDict()
    hits = tokens = 0
    for request in requests:
        names = [(request.tenant, name) for name in request.units[: prompt_boundary(request.tokens) // BLOCK_TOKENS]]
        reach = 0
        while reach < len(names) and names[reach] in kept:
            reach += 1
        hits += reach * BLOCK_TOKENS
        tokens += request.tokens
        for name in reversed(names):  # the beginning of a prompt is the newest: its end goes first
            kept[name] = None
            kept.move_to_end(name)
        while len(kept) > quota:
            kept.popitem(last=False)
    return hits / max(tokens, 1)
