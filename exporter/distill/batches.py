"""Which sequences a step trains on, and how they lie in memory: everything follows from the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Batches:
    """Every sequence once an epoch, in an order drawn from (seed, epoch); a step takes the next ``size`` of them."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self._count, self._size, self._seed = count, size, seed

    def of(self, step: int) -> list[int]:
        """Sequence numbers of ``step`` (from 0); the same on every machine and after every restart."""
        first = step * self._size
        return [self._at(first + offset) for offset in range(self._size)]

    def _at(self, index: int) -> int:
        epoch, place = divmod(index, self._count)
        return int(np.random.default_rng([self._seed, epoch]).permutation(self._count)[place])


def share(batch: Sequence[int], lengths: Sequence[int], rank: int, world: int) -> list[int]:
    """The sequences of process ``rank``: dealt out longest first, so that all have about as many tokens."""
    return sorted(batch, key=lambda number: (-lengths[number], number))[rank::world]


def pieces(members: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """``members`` (longest first) in groups of at most ``tokens`` padded tokens, or one sequence."""
    found: list[list[int]] = []
    for member in members:
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= tokens:
            found[-1].append(member)
        else:
            found.append([member])
    return found


def padded(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(ids [b, T] with zeros at the end, places of the real tokens in the flattened ids). Pads are causal: harmless."""
    longest = max(map(len, rows))
    ids, real = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), bool)
    for place, row in enumerate(rows):
        ids[place, : len(row)], real[place, : len(row)] = row, True
    return ids, np.flatnonzero(real)
