"""The request log: how long the newest prompts were, what was read of them and why not more. No text, no token ids.

A table in the index, written with the commit that stores what a request left behind. A prompt is named by the first
bytes of its chain hashes, which are HMACs under its tenant's key: they say which requests began alike and nothing
about what they said, and nothing at all once the tenant is purged. ``solocard kv export-trace`` reads it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from appliance.model import BLOCK_TOKENS
from appliance.wire import KvMiss

KEPT_REQUESTS = 5000
KEPT_LINK_BYTES = 32 << 20  # of all requests together; the oldest go first
LINK_BYTES = 8  # of the 32 of a chain hash: two of 10⁶ blocks meet with probability 3·10⁻⁸
_TRIM_EVERY = 64

SCHEMA = """
CREATE TABLE IF NOT EXISTS request (
    number INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, tenant_id BLOB NOT NULL, prompt_tokens INTEGER NOT NULL,
    hit_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, reason TEXT NOT NULL, links BLOB NOT NULL
);
"""


class NoteLike(Protocol):
    """The store's ``Note``."""

    @property
    def at_s(self) -> float: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def hit_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def reason(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One request; ``links`` name its prompt's whole blocks in order. ``reason`` is empty for a prompt hit in full."""

    at_ms: int
    tenant_id: bytes
    prompt_tokens: int
    hit_tokens: int
    output_tokens: int
    reason: str
    links: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """All requests of the log together; ``reasons`` counts requests by the reason's first word."""

    requests: int
    prompt_tokens: int
    hit_tokens: int
    reasons: dict[str, int]


def insert(db: sqlite3.Connection, note: NoteLike, tenant_id: bytes, chain: Sequence[bytes]) -> None:
    """Add one request inside the caller's transaction and drop what is too old. May raise sqlite3.Error.

    ``chain`` holds the tenant's chain hashes from the first block on; those past the prompt's whole blocks are cut.
    """
    links = b"".join(link[:LINK_BYTES] for link in chain[: note.prompt_tokens // BLOCK_TOKENS])
    cursor = db.execute(
        "INSERT INTO request (at_ms, tenant_id, prompt_tokens, hit_tokens, output_tokens, reason, links) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (int(note.at_s * 1000), tenant_id, note.prompt_tokens, note.hit_tokens, note.output_tokens, note.reason, links),
    )
    number = cursor.lastrowid or 0
    db.execute("DELETE FROM request WHERE number <= ?", (number - KEPT_REQUESTS,))
    if number % _TRIM_EVERY == 0:
        _trim_links(db)


def entries(db: sqlite3.Connection, since_s: float = 0.0) -> Iterator[Entry]:
    """Every request since then (Unix time), oldest first."""
    query = (
        "SELECT at_ms, tenant_id, prompt_tokens, hit_tokens, output_tokens, reason, links FROM request "
        "WHERE at_ms >= ? ORDER BY number"
    )
    for at_ms, tenant_id, prompt_tokens, hit_tokens, output_tokens, reason, links in db.execute(
        query, (int(since_s * 1000),)
    ):
        cut = tuple(links[i : i + LINK_BYTES] for i in range(0, len(links), LINK_BYTES))
        yield Entry(at_ms, tenant_id, prompt_tokens, hit_tokens, output_tokens, reason, cut)


def summary(db: sqlite3.Connection) -> Summary:
    """Tokens asked and read, and the reasons of those that were not read whole."""
    query = "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(hit_tokens), 0) FROM request"
    requests, prompt_tokens, hit_tokens = db.execute(query).fetchone()
    reasons: dict[str, int] = {}
    for reason, times in db.execute("SELECT reason, COUNT(*) FROM request WHERE reason != '' GROUP BY reason"):
        reasons[short(reason)] = reasons.get(short(reason), 0) + times
    return Summary(requests, prompt_tokens, hit_tokens, reasons)


def newest_misses(db: sqlite3.Connection, limit: int = 50) -> list[KvMiss]:
    """The newest requests that were not hit in full, newest first."""
    query = (
        "SELECT at_ms, prompt_tokens, hit_tokens, reason FROM request WHERE reason != '' ORDER BY number DESC LIMIT ?"
    )
    return [KvMiss(at_ms / 1000, *values) for at_ms, *values in db.execute(query, (limit,))]


def short(reason: str) -> str:
    """``fingerprint: profile`` → ``fingerprint``."""
    return reason.partition(":")[0]


def mooncake(logged: Iterable[Entry]) -> Iterator[dict[str, Any]]:
    """Requests in the form of the Mooncake traces (FAST'25), blocks of 256 tokens instead of 512.

    ``timestamp`` in ms counts from the first request; ``hash_ids`` are numbered by first appearance, so nothing of
    the HMACs is left. The part of a prompt after its last whole block has a number of its own: nobody shares it.
    """
    numbers: dict[tuple[bytes, bytes], int] = {}
    fresh, start_ms = 0, None
    for entry in logged:
        start_ms = entry.at_ms if start_ms is None else start_ms
        ids = []
        for link in entry.links:
            if (entry.tenant_id, link) not in numbers:
                numbers[entry.tenant_id, link] = fresh
                fresh += 1
            ids.append(numbers[entry.tenant_id, link])
        if entry.prompt_tokens > len(entry.links) * BLOCK_TOKENS:
            ids.append(fresh)
            fresh += 1
        yield {
            "timestamp": max(entry.at_ms - start_ms, 0), "input_length": entry.prompt_tokens,
            "output_length": entry.output_tokens, "hash_ids": ids,
        }  # fmt: skip


def _trim_links(db: sqlite3.Connection) -> None:
    """Forget the oldest requests whose links do not fit."""
    db.execute(
        "DELETE FROM request WHERE number <= (SELECT COALESCE(MAX(number), 0) FROM (SELECT number, "
        "SUM(LENGTH(links)) OVER (ORDER BY number DESC) AS total FROM request) WHERE total > ?)",
        (KEPT_LINK_BYTES,),
    )
