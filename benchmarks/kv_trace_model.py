"""The KV cache's policy without its store, for traces of full size: arrays instead of files, minutes instead of hours.

Written apart from the store and checked against it: ``kv_trace.py --model`` prints what it prints without. On
Mooncake's synthetic trace at 32 GB: 87.37 % of the ideal and 1.453 times the distinct bytes here, 87.49 % and 1.450 on
the store.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from kv_trace_support import (
    BLOCK_BYTES,
    CHECKPOINT_BYTES,
    SEGMENT_BLOCKS,
    SEGMENT_BYTES,
    PointRule,
    Request,
    Score,
)

from runtime.kv.policy import HOUR_S
from runtime.kv.reclaim import COPY_SHARE, HOT
from runtime.kv.value import HIT_WEIGHT, HITS_COUNTED, SPAN_SHARE, SUPERSEDED_SHARE

_Key = tuple[str, int, bool]  # tenant, name of the prefix, is it a checkpoint
_ROOM_BYTES = SEGMENT_BLOCKS * BLOCK_BYTES  # of records in a segment


class ModelReplay:
    """Records are cells of arrays: last use (s), hits, share (below 1 = superseded), segment, size (0 = gone)."""

    def __init__(self, quota_bytes: int, points: PointRule, replay_tokens: int) -> None:
        self._quota_bytes = quota_bytes * _ROOM_BYTES // SEGMENT_BYTES
        self._points, self._replay_tokens = points, replay_tokens
        self._cells: dict[_Key, int] = {}
        self._keys: list[_Key] = []
        self._table = np.zeros((5, 1 << 16))  # used, hits, share, segment, size
        self._inside: dict[int, list[_Key]] = {0: []}
        self._ends, self._born, self._open, self._now_s = {0: 0}, {0: 0.0}, 0, 0.0
        self._used_bytes = self._peak_bytes = 0
        self._names: set[_Key] = set()
        self.score = Score()

    def run(self, requests: Iterable[Request]) -> Score:
        """Every request in turn."""
        for request in requests:
            self._now_s = request.at_s
            self._serve(request)
        score = self.score
        score.unique_blocks = len(self._names)
        score.over_bytes = (self._peak_bytes - self._quota_bytes) * SEGMENT_BYTES // _ROOM_BYTES
        return score

    def _serve(self, request: Request) -> None:
        count = (request.tokens - 1) // 256
        blocks = [(request.tenant, name, False) for name in request.units[:count]]
        reach = next((i for i, key in enumerate(blocks) if key not in self._cells), count)
        best = next((i for i in range(reach, 0, -1) if (*blocks[i - 1][:2], True) in self._cells), 0)
        hit, replay = best * 256, self._replay_tokens and reach * 256 - self._replay_tokens > best * 256
        if replay:
            hit = reach * 256 - self._replay_tokens
        self._touch(blocks[: reach if replay else best])
        if best and not replay:
            self._touch([(*blocks[best - 1][:2], True)])
        self._names.update(blocks)
        score = self.score
        score.requests, score.tokens = score.requests + 1, score.tokens + request.tokens
        score.hit_tokens, score.replays = score.hit_tokens + hit, score.replays + bool(replay)
        points = self._points(count * 256, hit, reach if replay else best, reach * 256, request) if count else []
        states = [(*blocks[at // 256 - 1][:2], True) for at in sorted(points)]
        self._store([key for key in [*blocks, *states] if key not in self._cells], set(blocks) | set(states))
        if count and (*blocks[-1][:2], True) in self._cells and 0 < best < count:
            cell = self._cells.get((*blocks[best - 1][:2], True))
            if cell is not None and self._table[1, cell] <= 1:
                self._table[2, cell] = SUPERSEDED_SHARE

    def _touch(self, keys: list[_Key]) -> None:
        cells = [self._cells[key] for key in keys]
        self._table[0, cells] = self._now_s
        self._table[1, cells] += 1

    def _store(self, keys: list[_Key], pinned: set[_Key]) -> None:
        sizes = [CHECKPOINT_BYTES if key[2] else BLOCK_BYTES for key in keys]
        while self._used_bytes + sum(sizes) > self._quota_bytes and len(self._inside) > 1:
            self._give_up(pinned)
        for key, size in zip(keys, sizes, strict=True):
            if key not in self._cells:
                self._append(key, size, (self._now_s, 0.0, 1.0))
                self.score.put_bytes += size

    def _append(self, key: _Key, size: int, use: tuple[float, float, float]) -> None:
        if self._ends[self._open] + size > _ROOM_BYTES:
            self._open += 1
            self._inside[self._open], self._ends[self._open], self._born[self._open] = [], 0, self._now_s
        cell = len(self._keys)
        if cell == self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        self._cells[key] = cell
        self._keys.append(key)
        self._table[:, cell] = (*use, self._open, size)
        self._inside[self._open].append(key)
        self._ends[self._open] += size
        self._used_bytes += size
        self._peak_bytes = max(self._peak_bytes, self._used_bytes)
        self.score.written_bytes += size

    def _give_up(self, pinned: set[_Key]) -> None:
        """The closed segment worth least per byte goes; up to a fifth of it that is hot or pinned is kept."""
        used, hits, share, segment, size = self._table[:, : len(self._keys)]
        span_s = self._now_s - min(self._born[number] for number in self._inside if number != self._open)
        half_s = min(6.0 * HOUR_S, max(span_s * SPAN_SHARE, 1.0))
        weight = share * (1 + HIT_WEIGHT * np.minimum(hits, HITS_COUNTED))
        worth = weight * np.exp2(-(self._now_s - used) / half_s) * 256 * (size > 0)
        sums = np.bincount(segment.astype(np.int64), worth, minlength=self._open + 1)
        victim = min((n for n in self._inside if n != self._open), key=lambda n: (sums[n] / max(self._ends[n], 1), n))
        hot, room = HOT * worth.sum() / max(self._used_bytes, 1), self._ends[victim] * COPY_SHARE
        kept: list[tuple[_Key, int, tuple[float, float, float]]] = []
        for key in sorted(self._inside[victim], key=lambda k: -worth[self._cells[k]] / size[self._cells[k]]):
            cell = self._cells[key]
            if (key in pinned or worth[cell] / size[cell] > hot) and size[cell] <= room:
                kept.append((key, int(size[cell]), (float(used[cell]), float(hits[cell]), float(share[cell]))))
                room -= size[cell]
        self._used_bytes -= self._ends.pop(victim)
        self._born.pop(victim)
        for key in self._inside.pop(victim):
            self._table[4, self._cells.pop(key)] = 0
        for key, size_bytes, use in kept:
            self._append(key, size_bytes, use)
