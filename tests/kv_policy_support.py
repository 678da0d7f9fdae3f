"""A second, plain reckoning of what the KV cache gives up first: dictionaries and a formula, none of its code.

``Model`` hears of every use of a record and foretells which segments go next and which of their records are copied.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIVE, DAMAGED, SUPERSEDED = 0, 1, 4
HOUR = 3_600


def value(row: dict[str, Any], now_s: int, half_s: float, ttl_s: float, mine: bytes, tenants: set[bytes]) -> float:
    """Tokens saved, times 5, 9 or 13 where it was hit once, twice or more, halved with every half-life unused."""
    age = now_s - row["used_s"]
    if row["state"] not in (LIVE, SUPERSEDED) or row["tenant_id"] not in tenants or (ttl_s and age > ttl_s):
        return 0.0
    worth = 256.0 * {0: 1, 1: 5, 2: 9}.get(row["hits"], 13)
    if row["state"] == SUPERSEDED:
        worth /= 16
    if row["fingerprint_id"] != mine:
        worth = worth / 16 if age <= 24 * HOUR else 0.0
    while age >= half_s and worth > 0:
        worth, age = worth / 2, age - half_s
    return worth * (1 - max(age, 0) / half_s / 2)


def read_index(directory: Path) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """(records that lie in a segment, segments by number), as a look from outside finds them."""
    db = sqlite3.connect(f"file:{directory / 'index.sqlite3'}?mode=ro", uri=True)
    db.row_factory = sqlite3.Row
    rows = [dict(r) for r in db.execute("SELECT * FROM record WHERE segment >= 0 AND state IN (0, 1, 4)")]
    segments = {r["number"]: dict(r) for r in db.execute("SELECT * FROM segment")}
    db.close()
    return rows, segments


@dataclass
class Model:
    """``uses``: (chain, kind) → [unix s of the last use, hits]; what the index says of uses is not looked at."""

    half_s: dict[int, float]
    ttl_s: dict[int, float]
    mine: bytes
    tenants: set[bytes]
    uses: dict[tuple[bytes, int], list[int]] = field(default_factory=dict)

    def stored(self, rows: list[dict[str, Any]], now_s: int) -> None:
        """Records that were not there before are new now."""
        for row in rows:
            self.uses.setdefault((row["chain"], row["kind"]), [now_s, 0])

    def hit(self, keys: list[tuple[bytes, int]], now_s: int) -> None:
        for key in keys:
            self.uses[key] = [now_s, self.uses[key][1] + 1]

    def used(self, keys: list[tuple[bytes, int]], now_s: int) -> None:
        """Records that were given again and were there: not a hit, but a use."""
        for key in keys:
            self.uses[key][0] = now_s

    def order(self, directory: Path, now_s: int, pinned: set[bytes]) -> list[tuple[int, list[tuple[bytes, int]]]]:
        """(segment, records worth a copy beside the pinned ones), in the order in which segments go.

        Left out are the newest, and those of which more than a fifth is pinned.
        """
        rows, segments = read_index(directory)
        span = max(now_s - min(s["created_s"] for s in segments.values()), 0)
        worth: dict[tuple[bytes, int], float] = {}
        for row in rows:
            row["used_s"], row["hits"] = self.uses[row["chain"], row["kind"]]
            half = max(1.0, min(self.half_s[row["role"]], span / 10))
            worth[row["chain"], row["kind"]] = value(row, now_s, half, self.ttl_s[row["role"]], self.mine, self.tenants)
        mean = sum(worth.values()) / sum(s["end_bytes"] for s in segments.values())
        ranked = []
        for number, segment in segments.items():
            inside = [row for row in rows if row["segment"] == number]
            density = sum(worth[row["chain"], row["kind"]] for row in inside) / segment["end_bytes"]
            room = segment["end_bytes"] / 5 - sum(
                row["size_bytes"] for row in inside if row["chain"] in pinned and row["state"] != DAMAGED
            )
            if room >= 0 and number != max(segments):
                free = [row for row in inside if row["chain"] not in pinned]
                ranked.append((density, number, self._hot(free, worth, mean, room)))
        ranked.sort(key=lambda entry: entry[:2])
        return [(number, hot) for _, number, hot in ranked]

    def _hot(self, rows: list[dict[str, Any]], worth: dict[tuple[bytes, int], float], mean: float, room: float
             ) -> list[tuple[bytes, int]]:  # fmt: skip
        best = sorted(rows, key=lambda r: (-worth[r["chain"], r["kind"]] / r["size_bytes"], r["offset"]))
        chosen = []
        for row in best:
            if worth[row["chain"], row["kind"]] / row["size_bytes"] <= 4 * mean or row["size_bytes"] > room:
                break
            chosen.append((row["chain"], row["kind"]))
            room -= row["size_bytes"]
        return chosen
