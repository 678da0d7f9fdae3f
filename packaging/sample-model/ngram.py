"""The yardstick: an order-3 byte n-gram (each byte from the three before it), interpolated by Witten-Bell."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

ORDER = 3
SEPARATOR = b"\n\x00"


class ByteNgram:
    """Counts of orders 0 to 3; P_n = (c + T·P_(n-1)) / (C + T), C the context's count, T its distinct successors."""

    def __init__(self, texts: list[bytes]) -> None:
        stream = np.frombuffer(SEPARATOR.join([b"", *texts]), np.uint8).astype(np.uint32)
        self.tables = [self._count(stream, order) for order in range(ORDER + 1)]

    @staticmethod
    def _grams(stream: NDArray[np.uint32], order: int) -> NDArray[np.uint32]:
        """Context and successor of every position from ORDER on, as one number."""
        n = len(stream) - ORDER
        grams = np.zeros(n, np.uint32)
        for back in range(order, -1, -1):
            start = ORDER - back
            grams = (grams << np.uint32(8)) | stream[start : start + n]
        return grams

    def _count(self, stream: NDArray[np.uint32], order: int) -> tuple[NDArray[np.uint32], NDArray[np.int64], dict]:
        grams, counts = np.unique(self._grams(stream, order), return_counts=True)
        contexts, first, kinds = np.unique(grams >> np.uint32(8), return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        return grams, counts, {"contexts": contexts, "kinds": kinds, "totals": totals}

    @property
    def states(self) -> int:
        """Stored (context, successor) pairs of all orders."""
        return sum(len(grams) for grams, _, _ in self.tables)

    @property
    def contexts(self) -> int:
        """Distinct contexts of the highest order."""
        return len(self.tables[ORDER][2]["contexts"])

    def bits(self, texts: list[bytes]) -> tuple[float, int]:
        """(total bits, bytes) of the texts; each is preceded by a separator that is not counted."""
        total, size = 0.0, 0
        for text in texts:
            stream = np.frombuffer(b"\x00" * (ORDER - len(SEPARATOR)) + SEPARATOR + text, np.uint8).astype(np.uint32)
            total -= float(np.log2(self._probabilities(stream)).sum())
            size += len(text)
        return total, size

    def _probabilities(self, stream: NDArray[np.uint32]) -> NDArray[np.float64]:
        p = np.full(len(stream) - ORDER, 1 / 256)
        for order, (grams, counts, context) in enumerate(self.tables):
            wanted = self._grams(stream, order)
            c = self._looked_up(grams, counts, wanted)
            total = self._looked_up(context["contexts"], context["totals"], wanted >> np.uint32(8))
            kinds = self._looked_up(context["contexts"], context["kinds"], wanted >> np.uint32(8))
            known = total > 0
            p = np.where(known, (c + kinds * p) / np.where(known, total + kinds, 1), p)
        return p

    @staticmethod
    def _looked_up(
        keys: NDArray[np.uint32], values: NDArray[np.int64], wanted: NDArray[np.uint32]
    ) -> NDArray[np.int64]:
        at = np.searchsorted(keys, wanted).clip(0, len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0)


def bits_per_byte(total_bits: float, size_bytes: int) -> float:
    return total_bits / size_bytes if size_bytes else math.nan
