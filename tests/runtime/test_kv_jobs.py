"""Jobs: groups, tails, replays, notes, what supersedes what, when uses are written, and calls that are wrong."""

from __future__ import annotations

import dataclasses

import pytest
from kv_support import (
    QUOTA,
    FaultIo,
    assert_hit,
    assert_miss,
    block_payload,
    blocks_of,
    checkpoint_payload,
    disk_bytes,
    job,
    look_up,
    open_store,
    prompt,
    put,
    put_tail,
    tail_payload,
    tiny_layout,
)

from appliance.errors import EngineError
from runtime.kv.policy import Policy
from runtime.kv.record import Role, record_bytes
from runtime.kv.store import Note, PutJob, PutResult, TailUnit, Unit
from runtime.schedule import prompt_boundary


def test_a_group_is_one_sync_and_one_commit(tmp_path):
    io = FaultIo()
    store = open_store(tmp_path / "kv", io=io, segment_bytes=1 << 20)
    store.put(PutJob("default", []))  # the tenant's file is written once
    before = len(io.calls)
    assert store.put(PutJob("default", [])) == PutResult(True)
    assert len(io.calls) == before  # nothing to keep: the disk is left alone
    jobs = [job(0, 256), job(0, 512), job(1, 256), job(0, 512)]
    assert [result.records for result in store.put_all(jobs)] == [2, 2, 2, 0]
    calls = io.calls[before:]
    assert (calls.count("fdatasync"), calls.count("commit"), calls.count("pwrite")) == (1, 1, 6)
    for chat, tokens in ((0, 256), (0, 512), (1, 256)):
        assert_hit(store, chat, tokens)
    store.close()


def test_a_unit_without_its_blocks_is_refused(tmp_path):
    store = open_store(tmp_path / "kv")
    alone = PutJob("default", prompt(0, 512), {1: block_payload(0, 1)}, [Unit(512, Role.PROMPT, b"x" * 26240)])
    assert store.put(alone) == PutResult(False, "evicted")
    assert disk_bytes(tmp_path / "kv") == 0
    first = PutJob("default", prompt(0, 256), blocks_of(0, 256))  # blocks alone are a job too
    results = store.put_all([alone, first, job(1, 256)])
    assert [result.stored for result in results] == [False, True, True]
    second = job(0, 512)
    results = store.put_all([PutJob("default", prompt(2, 256), blocks_of(2, 256)),
                             PutJob("default", prompt(2, 512), {1: block_payload(2, 1)}, [
                                 Unit(512, Role.PROMPT, checkpoint_payload(2, 512))])])  # fmt: skip
    assert [result.stored for result in results] == [True, True]  # the group has the block
    assert_hit(store, 2, 512)
    assert store.put(second).records == 2
    store.close()


def test_a_refused_jobs_tail_does_not_count_as_planned(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 256)
    ids = prompt(0, 512)
    tail = TailUnit(ids[:300], tail_payload(0, 300))
    without_its_block = PutJob("default", ids, units=[Unit(512, Role.PROMPT, checkpoint_payload(0, 512))], tail=tail)
    results = store.put_all([without_its_block, PutJob("default", ids[:300], tail=tail)])
    assert [(result.stored, result.reason) for result in results] == [(False, "evicted"), (True, "")]
    assert look_up(store, ids, tails=True)[0].tail == tail.payload
    store.close()


def test_an_exact_tail_is_found_by_its_ids(tmp_path):
    for restart in (False, True):
        store = open_store(tmp_path / "kv")
        if not restart:
            for tokens in (1, 100, 300, 512):
                assert put_tail(store, 0, tokens).stored
            assert put(store, 0, 256).stored
        for more, tokens in ((1, 0), (2, 1), (100, 1), (101, 100), (256, 100), (257, 256), (300, 256), (301, 300),
                             (512, 300), (513, 512), (700, 512)):  # fmt: skip
            hit, blocks = look_up(store, prompt(0, more), tails=True)
            assert (hit.tokens, hit.blocks) == (tokens, tokens // 256), more
            assert hit.tail == (tail_payload(0, tokens) if tokens not in (0, 256) else None)
            assert blocks == [block_payload(0, i) for i in range(tokens // 256)]
            assert (hit.reason == "") == (tokens >= prompt_boundary(more) and more > 1)
        changed = prompt(0, 400)
        changed[299] += 1
        assert look_up(store, changed, tails=True)[0].tokens == 256
        assert look_up(store, prompt(0, 400))[0].tail is None  # only where mixed rows may be reused
        assert look_up(store, prompt(0, 400), "bob", tails=True)[0].tokens == 0
        store.close()


def test_a_miss_of_a_tail_says_why(tmp_path):
    store = open_store(tmp_path / "kv")
    for chat, tokens in ((0, 100), (1, 600)):
        assert put_tail(store, chat, tokens).stored
    store.close()
    store = open_store(tmp_path / "kv", threads="intra=1")
    for chat, tokens in ((0, 200), (1, 700)):
        assert look_up(store, prompt(chat, tokens), tails=True)[0].reason == "fingerprint: arithmetic.threads"
    assert look_up(store, prompt(0, 200))[0].reason == "too-short"  # nobody asked for tails
    store.close()
    store = open_store(tmp_path / "kv")
    places = store._ground.index.connection.execute("SELECT segment, offset FROM record WHERE kind = 3").fetchall()
    for segment, offset in places:
        with store._ground.segments.path(segment).open("r+b") as file:
            file.seek(offset + 5000)
            file.write(b"\0\1\2\3")
    for chat, tokens in ((0, 200), (1, 700)):
        hit, blocks = look_up(store, prompt(chat, tokens), tails=True)
        assert (hit.tokens, hit.tail, hit.reason, blocks) == (0, None, "corrupt", [])
    assert put(store, 1, 512).stored
    assert (look_up(store, prompt(1, 700), tails=True)[0].tokens, put_tail(store, 1, 600).records) == (512, 1)
    assert look_up(store, prompt(1, 700), tails=True)[0].tokens == 600
    store.close()


def test_an_exact_replay_where_the_checkpoints_are_gone(tmp_path):
    store = open_store(tmp_path / "kv")
    store.put(PutJob("default", prompt(0, 2048), blocks_of(0, 2048)))
    assert put(store, 0, 256).stored
    hit, blocks = look_up(store, prompt(0, 2049), replay_tokens=768)
    assert (hit.tokens, hit.blocks, hit.replay, hit.checkpoint) == (2048 - 768, 8, True, None)
    assert (hit.reason, hit.common_tokens, len(blocks)) == ("no-unit", 2048, 8)
    for tokens, replay, want in ((2049, 1792, (256, False)), (2049, 1536, (512, True)), (2049, 2048, (256, False)),
                                 (1025, 768, (256, False)), (1281, 768, (512, True))):  # fmt: skip
        hit, _ = look_up(store, prompt(0, tokens), replay_tokens=replay)
        assert (hit.tokens, hit.replay) == want, (tokens, replay)
    store.close()


def test_ids_of_calls_are_kept_and_read_by_their_tenant_only(tmp_path):
    store = open_store(tmp_path / "kv")
    store.put(PutJob("alice", [], replays={"call:1": [1, 2, 129279], "call:2": []}))
    for _ in range(2):
        assert store.replay_ids("alice", ["call:1", "call:2", "call:3"]) == {"call:1": [1, 2, 129279], "call:2": []}
        assert store.replay_ids("bob", ["call:1"]) == {}
        store.close()
        store = open_store(tmp_path / "kv")
    store.put(PutJob("bob", []))
    assert store.replay_ids("bob", ["call:1"]) == {}
    rows = store._ground.index.connection.execute("SELECT name, sealed FROM replay")
    names = b"".join(name + sealed for name, sealed in rows)
    assert b"call" not in names
    assert (129279).to_bytes(4, "little") not in names
    store.close()


def test_a_damaged_replay_is_left_out_alone(tmp_path):
    store = open_store(tmp_path / "kv")
    kept = {f"call:{i}": [i, i + 1] for i in range(3)}
    store.put(PutJob("alice", [], replays=kept))
    names = store._ground.index.connection.execute("SELECT name FROM replay").fetchall()
    for name in names:
        store.put(PutJob("alice", [], replays=kept))
        store._ground.index.connection.execute("UPDATE replay SET sealed = zeroblob(40) WHERE name = ?", name)
        found = store.replay_ids("alice", list(kept))
        assert len(found) == 2
        assert found.items() <= kept.items()
    store.close()


def test_a_note_is_kept_whatever_becomes_of_the_job(tmp_path):
    store = open_store(tmp_path / "kv", max_bytes=3 * record_bytes(tiny_layout().block_bytes))
    note = Note(1.5, 300, 0, 7, "no-unit")
    wanted = [True, False, False, True]
    for at, more in enumerate((job(0, 256), job(1, 1024), PutJob("default", prompt(5, 512), {}, [
            Unit(512, Role.PROMPT, checkpoint_payload(5, 512))]), PutJob("default", prompt(0, 300)))):  # fmt: skip
        assert store.put(dataclasses.replace(more, note=note)).stored == wanted[at]
    assert store._ground.index.connection.execute("SELECT COUNT(*) FROM request").fetchone() == (4,)
    store.close()


def test_later_ends_of_a_conversation_supersede_the_earlier_ones(tmp_path):
    store = open_store(tmp_path / "kv")
    for tokens, role in ((256, Role.ANCHOR), (512, Role.PROMPT), (768, Role.ANSWER), (1024, Role.PROMPT)):
        assert put(store, 0, tokens, role=role).stored
    states = dict(store._ground.index.connection.execute("SELECT end_token, state FROM record WHERE kind = 2"))
    assert states == {256: 0, 512: 4, 768: 4, 1024: 0}
    for tokens in (256, 512, 768, 1024):
        assert_hit(store, 0, tokens)  # still readable
    store.close()


def test_uses_are_written_with_the_next_commit(tmp_path):
    now = [1_000_000.0]
    store = open_store(tmp_path / "kv", clock=lambda: now[0])
    put(store, 0, 512)
    put(store, 0, 256)
    now[0] += 100
    assert_hit(store, 0, 512)
    assert_hit(store, 0, 512)
    query = "SELECT kind, end_token, used_s, hits FROM record ORDER BY kind, end_token"
    untouched = [(1, 256, 1_000_000, 0), (1, 512, 1_000_000, 0), (2, 256, 1_000_000, 0), (2, 512, 1_000_000, 0)]
    assert store._ground.index.connection.execute(query).fetchall() == untouched
    put(store, 9, 256)
    rows = store._ground.index.connection.execute(query).fetchall()
    assert [row for row in rows if row[3]] == [(1, 256, 1_000_100, 2), (1, 512, 1_000_100, 2), (2, 512, 1_000_100, 2)]
    assert_hit(store, 0, 256)
    store.close()
    store = open_store(tmp_path / "kv", clock=lambda: now[0])
    rows = store._ground.index.connection.execute(query).fetchall()
    assert [row[3] for row in rows if row[:2] == (1, 256)] in ([3, 0], [0, 3])  # written when the store was closed
    store.close()


def test_ttl_is_a_reason(tmp_path):
    now = [1_000_000.0]
    policy = Policy(max_bytes=QUOTA, ttl_s={Role.PROMPT: 3600, Role.ANSWER: 60, Role.SUSPENDED: 60})
    store = open_store(tmp_path / "kv", policy=policy, clock=lambda: now[0])
    put(store, 0, 256)
    put(store, 0, 512, role=Role.ANSWER)
    put_tail(store, 0, 600)
    now[0] += 61
    hit, _ = look_up(store, prompt(0, 700), tails=True)
    assert (hit.tokens, hit.reason) == (256, "ttl")
    now[0] += 3000
    assert look_up(store, prompt(0, 300))[0].tokens == 256  # used 3,000 s ago: its time counts from there
    now[0] += 3601
    assert_miss(store, 0, 300, "ttl")
    assert put(store, 0, 256).stored
    store.close()


def test_wrong_calls_store_nothing(tmp_path):
    store = open_store(tmp_path / "kv")
    unit, ids = Unit(256, Role.PROMPT, checkpoint_payload(0, 256)), prompt(0, 256)
    wrong = {
        "multiple of 256 tokens, not 257": PutJob("default", prompt(0, 257), blocks_of(0, 256), [
            dataclasses.replace(unit, tokens=257)]),
        "not 0": PutJob("default", ids, {}, [dataclasses.replace(unit, tokens=0)]),
        "255 token ids cannot name 1 blocks": PutJob("default", ids[:255], blocks_of(0, 256)),
        "KV block has 3 bytes": PutJob("default", ids, {0: b"abc"}, [unit]),
        "KV checkpoint has 3 bytes": PutJob("default", ids, blocks_of(0, 256), [
            dataclasses.replace(unit, payload=b"abc")]),
        "KV tail has 3 bytes": PutJob("default", ids, blocks_of(0, 256), tail=TailUnit(ids, b"abc")),
        "at least one token": PutJob("default", ids, tail=TailUnit([], b"")),
        "not those of the job": PutJob("default", ids, tail=TailUnit(prompt(1, 300), b"")),
        "ids below": PutJob("default", [-1] * 256, blocks_of(0, 256)),
        "shared_tokens": PutJob("default", ids, blocks_of(0, 256), shared_tokens=100),
        "index of 0 or more": PutJob("default", ids, {-1: block_payload(0, 0)}),
        "replay x": PutJob("default", ids, replays={"x": [-1]}),
    }  # fmt: skip
    for message, bad in wrong.items():
        first, result, last = store.put_all([PutJob("default", ids), bad, PutJob("default", ids)])
        assert (first.stored, result.stored, last.stored) == (True, False, True)
        assert result.reason.startswith("invalid: ")
        assert message in result.reason
    assert store.status().used_bytes == disk_bytes(tmp_path / "kv") == 0
    with pytest.raises(EngineError, match="ids below"):
        look_up(store, [-1] * 300)
    assert store.status().writing
    assert put(store, 0, 256).stored
    assert_hit(store, 0, 256)
    store.close()
