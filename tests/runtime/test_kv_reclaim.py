"""What goes first when room is needed, what is kept, and that nothing of it can be seen as wrong bytes."""

from __future__ import annotations

import errno
import random
import threading

import pytest
from kv_policy_support import Model, read_index, value
from kv_support import (
    Clock,
    FaultIo,
    assert_hit,
    disk_bytes,
    look_up,
    make_fingerprint,
    open_store,
    prompt,
    put,
    reason,
    tiny_layout,
)

from runtime.kv.index import Index, Row, State
from runtime.kv.policy import Policy
from runtime.kv.record import Kind, Role
from runtime.kv.value import Worth

START_S = 1_800_000_000
SEGMENT = 512 * 1024  # 17 records of the tiny layout, of which three may be copied
SMALL = 160 * 1024
SIX = 6 * SEGMENT


@pytest.fixture
def clock():
    return Clock(START_S)


def _open(tmp_path, clock, **options):
    options = {"max_bytes": SIX, "segment_bytes": SEGMENT, **options}
    return open_store(tmp_path / "kv", clock=clock, **options)


def _numbers(tmp_path):
    return sorted(int(path.stem) for path in (tmp_path / "kv").glob("*.kvs"))


def _model(policy):
    halves = {int(role): policy.half_life_s[role] for role in Role}
    ttls = {int(role): policy.ttl_s[role] for role in Role}
    return Model(halves, ttls, make_fingerprint(tiny_layout()).digest[:16], set())


def _traffic(clock, seed, steps=160):
    """(chat, tokens) with the clock moved on: ten short chats that come back all the time, others that grow or not."""
    rng, lengths = random.Random(seed), {}
    for _ in range(steps):
        clock.now_s += rng.choice((1, 20, 300))
        chat = rng.choice((rng.randrange(12), rng.randrange(12), rng.randrange(12, 100)))
        lengths[chat] = 256 if chat < 10 else min(lengths.get(chat, 0) + 256 * rng.randint(1, 3), 1024)
        yield chat, lengths[chat]


def _chain(store, chat, tokens):
    keys = store._ground.tenants.find("default")
    return keys.chain(store._ground.fingerprint.digest, prompt(chat, tokens), tokens // 256) if keys else []


@pytest.mark.parametrize("seed", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_decisions_are_those_of_the_plain_model(tmp_path, clock, seed):
    """100 chats come, grow and come back; every segment that goes, and every record kept of it, was foretold."""
    policy = Policy(max_bytes=SIX)
    store, model = _open(tmp_path, clock, policy=policy), _model(policy)
    gone, copied = 0, 0
    for chat, tokens in _traffic(clock, seed):
        now_s, mine = int(clock.now_s), set(_chain(store, chat, tokens))
        model.hit(_used(store, chat, tokens), now_s)
        before, _ = read_index(tmp_path / "kv")
        foretold = model.order(tmp_path / "kv", now_s, mine) if before else []
        assert put(store, chat, tokens).stored
        after, segments = read_index(tmp_path / "kv")
        lost = {row["segment"] for row in before} - set(segments)
        assert lost == {number for number, _ in foretold[: len(lost)]}
        there = {(row["chain"], row["kind"]) for row in after}
        for number, hot in foretold[: len(lost)]:
            inside = {(row["chain"], row["kind"]) for row in before if row["segment"] == number}
            assert {key for key in inside & there if key[0] not in mine} == set(hot)
            copied += len(hot)
        gone += len(lost)
        model.uses = {key: use for key, use in model.uses.items() if key in there}
        model.stored(after, now_s)
        model.used(_given(store, chat, tokens), now_s)
        model.tenants = {row["tenant_id"] for row in after}
        assert store.status().used_bytes == disk_bytes(tmp_path / "kv") <= SIX
    assert gone > 5
    assert copied > 0
    store.close()


def _given(store, chat, tokens):
    """What a put of a chat gives: its blocks and the checkpoint at its end."""
    chain = _chain(store, chat, tokens)
    return [(link, 1) for link in chain] + [(chain[-1], 2)]


def _used(store, chat, tokens):
    """Look a chat up; the (chain, kind) that the hit used."""
    hit, _ = look_up(store, prompt(chat, tokens + 1))
    chain = _chain(store, chat, hit.tokens)
    return [(link, 1) for link in chain] + ([(chain[-1], 2)] if chain else [])


def test_values_by_query_by_row_and_by_hand_agree(tmp_path):
    rng, policy = random.Random(5), Policy(max_bytes=1)
    mine, other, tenants = b"m" * 16, b"o" * 16, {b"a" * 16, b"b" * 16}
    (tmp_path / "kv").mkdir()
    index = Index.open(tmp_path / "kv", FaultIo())
    rows = []
    for i in range(400):
        kind = rng.choice((Kind.BLOCK, Kind.CHECKPOINT, Kind.TAIL))
        role = {Kind.BLOCK: Role.NONE, Kind.TAIL: Role.SUSPENDED}.get(kind, rng.choice((*Role,)[1:4]))
        used_s = START_S - rng.choice((0, 5, 60, 1000, 90_000, 200_000, 300_000))
        tenant = rng.choice([*sorted(tenants), b"c" * 16])
        rows.append(Row(i.to_bytes(32, "big"), kind, role, tenant, rng.choice((mine, other)), 256,
                        i % 7, 4096 * i, 4096, bytes(8), 1, START_S, used_s, rng.choice((0, 0, 1, 2, 9)),
                        rng.choice((State.LIVE, State.LIVE, State.DAMAGED, State.SUPERSEDED))))  # fmt: skip
    index.begin()
    index.add(rows, [])
    index.commit()
    for span_s in (0, 3_000, 1_000_000):
        worth = Worth(policy, mine, tenants, START_S, span_s)
        by_hand: dict[int, float] = {}
        for row in rows:
            half = max(1.0, min(policy.half_life_s[row.role], span_s / 10))
            plain = {"used_s": row.used_s, "state": int(row.state), "tenant_id": row.tenant_id, "hits": row.hits,
                     "fingerprint_id": row.fingerprint_id}  # fmt: skip
            expected = value(plain, START_S, half, policy.ttl_s[row.role], mine, tenants)
            assert worth.of(row) == pytest.approx(expected, rel=1e-6, abs=1e-9)
            by_hand[row.segment] = by_hand.get(row.segment, 0.0) + expected
        assert worth.sums(index.connection) == pytest.approx(by_hand, rel=1e-6, abs=1e-9)
    index.close()


def test_the_unused_go_and_the_used_stay(tmp_path, clock):
    store = _open(tmp_path, clock)
    for chat in range(50):
        clock.now_s += 60
        assert put(store, chat, 512).stored
        if chat >= 4 and chat % 3 == 0:
            assert_hit(store, 3, 512)
    assert reason(store, prompt(10, 600)) == "evicted"
    assert reason(store, prompt(99, 600)) == "no-unit"
    assert_hit(store, 49, 512)
    assert_hit(store, 3, 512)
    assert store.status().reclaimed_bytes > 0
    store.close()
    store = _open(tmp_path, clock)
    assert_hit(store, 3, 512)
    assert reason(store, prompt(10, 600)) == "evicted"  # the tombstone outlives the restart
    store.close()


def test_the_prompt_that_is_about_to_be_used_stays(tmp_path, clock):
    """The oldest chat of all is looked up and grows just when there is no room: its own blocks do not go for it."""
    store = _open(tmp_path, clock, max_bytes=3 * SEGMENT)
    assert put(store, 0, 512).stored
    for chat in range(1, 10):
        clock.now_s += 3600
        assert put(store, chat, 512).stored
    before = _numbers(tmp_path)
    with store.pin("default", prompt(0, 513)):
        for chat in range(10, 40):
            clock.now_s += 3600
            put(store, chat, 512)
    assert_hit(store, 0, 512)
    assert _numbers(tmp_path) != before
    for tokens in (768, 1024):
        assert put(store, 0, tokens).stored
        assert_hit(store, 0, tokens)
    store.close()


def test_no_more_than_a_fifth_is_copied(tmp_path, clock, monkeypatch):
    """Even where everything counts as hot."""
    monkeypatch.setattr("runtime.kv.reclaim.HOT", 0.0)
    store, copied = _open(tmp_path, clock), []
    real = type(store._ground).copy_forward
    monkeypatch.setattr(type(store._ground), "copy_forward", lambda ground, rows: copied.append(
        sum(row.size_bytes for row in rows)) or real(ground, rows))  # fmt: skip
    for chat in range(45):
        clock.now_s += 60
        assert put(store, chat, 512).stored
    assert len(copied) > 2
    assert SEGMENT / 8 < max(copied) <= SEGMENT / 5
    store.close()


def test_pinned_everywhere_is_a_refusal_not_a_loss(tmp_path, clock):
    store = _open(tmp_path, clock, max_bytes=2 * SMALL, segment_bytes=SMALL)
    chats = [0, 1]
    assert all(put(store, chat, 512).stored for chat in chats)
    rows, _ = read_index(tmp_path / "kv")
    store._pins.update(row["chain"] for row in rows)
    results = [put(store, 50 + i, 512) for i in range(3)]
    assert not results[-1].stored
    assert results[-1].reason == f"quota: kv.max_bytes = {2 * SMALL} is in use"
    for chat in chats:
        assert_hit(store, chat, 512)
    store._pins.clear()
    assert put(store, 60, 512).stored
    store.close()


@pytest.mark.parametrize(("code", "stops"), [(errno.ENOSPC, False), (errno.EIO, True)])
def test_copies_that_cannot_be_written(tmp_path, clock, code, stops):
    """A full disk: the victim goes without its copies. A failing one: nothing is given up and writing stops."""

    class CopyIo(FaultIo):
        copying = False

        def pwrite(self, fd, data, offset):
            if self.copying:
                raise OSError(code, "refused")
            super().pwrite(fd, data, offset)

    io, failed = CopyIo(), []
    store = _open(tmp_path, clock, io=io)
    real = type(store._ground).copy_forward

    def copy_forward(ground, rows):
        io.copying = bool(rows)
        failed.append(len(rows))
        try:
            return real(ground, rows)
        finally:
            io.copying = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store._ground), "copy_forward", copy_forward)
        for chat, tokens in _traffic(clock, 0):
            look_up(store, prompt(chat, tokens + 1))
            if not put(store, chat, tokens).stored:
                break
            last = chat, tokens
    assert any(failed)
    assert store.status().reason == ("EIO: refused" if stops else "")
    assert store.status().used_bytes == disk_bytes(tmp_path / "kv") <= SIX
    assert_hit(store, *last)
    store.close()


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_failure_at_any_call_of_a_reclaim_is_harmless(tmp_path, clock, step):
    """Whatever call fails: what is readable is right, the accounting is exact, and the next start goes on."""

    def fill(directory, io):
        store = open_store(directory, io=io, clock=clock, max_bytes=3 * SMALL, segment_bytes=SMALL)
        for chat in range(9):
            clock.now_s += 60
            put(store, chat, 512)
            look_up(store, prompt(0, 513))
        return store

    io = FaultIo()
    fill(tmp_path / "calls", io).close()
    total = len(io.calls)
    for at in range(total // 3, total, step):
        directory = tmp_path / f"at{at}"
        store = fill(directory, FaultIo(at, OSError(errno.EIO, "refused")))
        store.close()
        store = open_store(directory, clock=clock, max_bytes=3 * SMALL, segment_bytes=SMALL)
        assert store.status().used_bytes == disk_bytes(directory) <= 3 * SMALL
        found = [chat for chat in range(9) if look_up(store, prompt(chat, 513))[0].tokens]
        for chat in found:
            assert_hit(store, chat, 512)
        assert put(store, 20, 512).stored
        assert_hit(store, 20, 512)
        store.close()


def test_lookups_while_segments_go(tmp_path, clock):
    """Readers in other threads never see wrong bytes and never an error while every segment is replaced."""
    store = _open(tmp_path, clock, max_bytes=3 * SMALL, segment_bytes=SMALL)
    assert put(store, 0, 512).stored
    stop, seen, failures = threading.Event(), [], []

    def read():
        try:
            while not stop.is_set():
                hit, _ = look_up(store, prompt(0, 513))
                assert hit.tokens in (0, 512)
                seen.append(hit.tokens)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for chat in range(1, 40):
        clock.now_s += 60
        assert put(store, chat, 512).stored
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert 512 in seen
    store.close()
