"""The request log in the index, and the trace made from it."""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass, replace

import pytest

from runtime.kv import requests

TENANT, OTHER = b"t" * 16, b"o" * 16


@dataclass(frozen=True)
class Note:
    at_s: float = 1_700_000_000.0
    prompt_tokens: int = 600
    hit_tokens: int = 256
    output_tokens: int = 7
    reason: str = "no-unit"


def chain(*names: str) -> list[bytes]:
    return [hashlib.sha256(name.encode()).digest() for name in names]


@pytest.fixture
def db() -> sqlite3.Connection:
    made = sqlite3.connect(":memory:", isolation_level=None)
    made.executescript(requests.SCHEMA)
    yield made
    made.close()


def test_a_request_comes_back_as_it_was_noted(db):
    requests.insert(db, Note(), TENANT, chain("a", "b", "answer"))
    (entry,) = requests.entries(db)
    assert (entry.at_ms, entry.tenant_id, entry.prompt_tokens) == (1_700_000_000_000, TENANT, 600)
    assert (entry.hit_tokens, entry.output_tokens, entry.reason) == (256, 7, "no-unit")
    assert entry.links == tuple(link[:8] for link in chain("a", "b"))  # 600 tokens are two whole blocks


def test_since_and_order(db):
    for at_s in (10.0, 20.0, 30.5):
        requests.insert(db, Note(at_s=at_s), TENANT, [])
    assert [entry.at_ms for entry in requests.entries(db, 20.0)] == [20_000, 30_500]


def test_only_the_newest_stay(db, monkeypatch):
    monkeypatch.setattr(requests, "KEPT_REQUESTS", 10)
    for number in range(25):
        requests.insert(db, Note(output_tokens=number), TENANT, [])
    assert [entry.output_tokens for entry in requests.entries(db)] == list(range(15, 25))


def test_long_prompts_push_out_the_oldest(db, monkeypatch):
    monkeypatch.setattr(requests, "KEPT_LINK_BYTES", 10 * 8 * 4)
    for number in range(requests._TRIM_EVERY):
        requests.insert(db, Note(prompt_tokens=4 * 256, output_tokens=number), TENANT, chain("a", "b", "c", "d"))
    kept = [entry.output_tokens for entry in requests.entries(db)]
    assert kept == list(range(requests._TRIM_EVERY - 10, requests._TRIM_EVERY))


def test_summary_and_misses_count_reasons_by_their_first_word(db):
    reasons = ["", "no-unit", "fingerprint: profile", "fingerprint: objects, graphs", "evicted"]
    for number, reason in enumerate(reasons):
        requests.insert(db, Note(at_s=float(number), prompt_tokens=1000, hit_tokens=10, reason=reason), TENANT, [])
    found = requests.summary(db)
    assert (found.requests, found.prompt_tokens, found.hit_tokens) == (5, 5000, 50)
    assert found.reasons == {"no-unit": 1, "fingerprint": 2, "evicted": 1}
    misses = requests.newest_misses(db, 3)
    assert [miss.reason for miss in misses] == ["evicted", "fingerprint: objects, graphs", "fingerprint: profile"]
    assert (misses[0].at_s, misses[0].tokens, misses[0].hit_tokens) == (4.0, 1000, 10)


def test_an_empty_log(db):
    assert requests.summary(db) == requests.Summary(0, 0, 0, {})
    assert requests.newest_misses(db) == []
    assert list(requests.mooncake(requests.entries(db))) == []


def test_the_trace_numbers_blocks_by_first_appearance_and_tails_by_themselves(db):
    note = Note(at_s=100.0, prompt_tokens=600)
    requests.insert(db, note, TENANT, chain("a", "b"))  # a, b, and a tail of 88 tokens
    requests.insert(db, replace(note, at_s=100.25, prompt_tokens=1024), TENANT, chain("a", "b", "c", "d"))  # no tail
    requests.insert(db, replace(note, at_s=101.0, prompt_tokens=100), OTHER, [])
    requests.insert(db, replace(note, at_s=102.0, prompt_tokens=300), OTHER, chain("a"))
    trace = list(requests.mooncake(requests.entries(db)))
    assert [row["hash_ids"] for row in trace] == [[0, 1, 2], [0, 1, 3, 4], [5], [6, 7]]
    assert [row["timestamp"] for row in trace] == [0, 250, 1000, 2000]
    assert [row["input_length"] for row in trace] == [600, 1024, 100, 300]
    assert all(len(row["hash_ids"]) == -(-row["input_length"] // 256) for row in trace)
    assert {row["output_length"] for row in trace} == {7}


def test_a_clock_set_back_gives_no_negative_time(db):
    requests.insert(db, Note(at_s=100.0), TENANT, [])
    requests.insert(db, Note(at_s=50.0), TENANT, [])
    assert [row["timestamp"] for row in requests.mooncake(requests.entries(db))] == [0, 0]


def test_nothing_of_a_hash_is_in_the_trace(db):
    links = chain("secret", "prompt")
    requests.insert(db, Note(), TENANT, links)
    text = repr(list(requests.mooncake(requests.entries(db))))
    assert all(link[:4].hex() not in text and repr(link[:8]) not in text for link in [*links, TENANT])
