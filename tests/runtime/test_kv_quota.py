"""Never more bytes than allowed: on the cache's own account, on the disk's, on the day's, and across restarts."""

from __future__ import annotations

import errno
import random

import pytest
from kv_support import Clock, FaultIo, assert_hit, disk_bytes, job, look_up, open_store, prompt, put, reason

from runtime.kv.job import Note, PutJob
from runtime.kv.policy import DAY_S, Policy
from runtime.kv.record import Role

START_S = 1_800_000_000 // DAY_S * DAY_S
SEGMENT = 512 * 1024
QUOTA = 4 * SEGMENT


class WatchIo(FaultIo):
    """Notes the most that the segments ever held; ``free`` is the disk's room when nothing of the cache is on it."""

    def __init__(self, directory, free=1 << 50):
        super().__init__()
        self.directory, self.free, self.peak_bytes, self.written_bytes = directory, free, 0, 0

    def pwrite(self, fd, data, offset):
        super().pwrite(fd, data, offset)
        self.written_bytes += 0 if len(data) % 4096 else len(data)  # a tenant's key is shorter
        self.peak_bytes = max(self.peak_bytes, disk_bytes(self.directory))

    def free_bytes(self, path):
        return self.free - disk_bytes(self.directory)


@pytest.fixture
def clock():
    return Clock(START_S)


def _open(tmp_path, clock, io=None, **bounds):
    bounds.setdefault("max_bytes", QUOTA)
    return open_store(tmp_path / "kv", clock=clock, io=io, segment_bytes=SEGMENT, policy=Policy(**bounds))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_never_above_the_quota_whatever_comes_and_whenever_it_restarts(tmp_path, clock, seed):
    """Eight tenants' traffic, groups of jobs, restarts with and without closing: no byte above, but for copies."""
    rng, io = random.Random(seed), WatchIo(tmp_path / "kv")
    store = _open(tmp_path, clock, io)
    for step in range(90):
        clock.now_s += rng.choice((1, 60, 1800))
        jobs = [job(rng.randrange(30), 256 * rng.randint(1, 5), f"tenant-{rng.randrange(8)}", rng.choice((*Role,)[1:4]))
                for _ in range(rng.randint(1, 3))]  # fmt: skip
        for each in jobs:
            look_up(store, [*each.ids, 1], each.tenant)
        assert all(result.stored for result in store.put_all(jobs))
        assert store.status().used_bytes == disk_bytes(tmp_path / "kv") <= QUOTA
        if step % 30 == 29:
            used_bytes = store.status().used_bytes
            store.close()
            store = _open(tmp_path, clock, io)
            assert store.status().used_bytes == used_bytes == disk_bytes(tmp_path / "kv")
    assert io.written_bytes > 4 * QUOTA
    assert io.peak_bytes > 0.9 * QUOTA
    assert io.peak_bytes <= QUOTA + SEGMENT / 4  # a fifth of a victim, its footer, and the footer of a full segment
    store.close()


def test_a_smaller_quota_holds_from_the_next_start_on(tmp_path, clock):
    store = _open(tmp_path, clock)
    for chat in range(12):
        clock.now_s += 60
        assert put(store, chat, 512).stored
    store.close()
    assert disk_bytes(tmp_path / "kv") > 2 * SEGMENT
    store = _open(tmp_path, clock, max_bytes=2 * SEGMENT)
    assert store.status().used_bytes == disk_bytes(tmp_path / "kv") <= 2 * SEGMENT
    assert_hit(store, 11, 512)
    assert reason(store, prompt(0, 513)) == "evicted"
    store.close()
    store = _open(tmp_path, clock, max_bytes=0)
    assert reason(store, prompt(11, 513)) == "policy"
    assert put(store, 50, 512).reason.startswith("policy")
    store.close()


def test_what_can_never_fit_is_refused_and_nothing_goes_for_it(tmp_path, clock):
    store = _open(tmp_path, clock, max_bytes=SEGMENT)
    assert put(store, 0, 512).stored
    refused = put(store, 1, 256 * 40)
    assert (refused.stored, refused.reason.partition(":")[0]) == (False, "quota")
    assert "kv.max_bytes" in refused.reason
    assert_hit(store, 0, 512)
    assert put(store, 2, 512).stored
    store.close()


def test_a_group_that_does_not_fit_is_tried_job_by_job(tmp_path, clock):
    store = _open(tmp_path, clock, max_bytes=SEGMENT)
    results = store.put_all([job(0, 512), job(1, 256 * 40), job(2, 512)])
    assert [result.stored for result in results] == [True, False, True]
    assert_hit(store, 0, 512)
    assert_hit(store, 2, 512)
    store.close()


def test_space_on_the_disk_is_left_to_others(tmp_path, clock):
    """As others fill the disk the cache gives way, no further than it helps; then it refuses, and serving goes on."""
    io = WatchIo(tmp_path / "kv", free=12 * SEGMENT)
    store = _open(tmp_path, clock, io, max_bytes=100 * SEGMENT, min_free_bytes=6 * SEGMENT)
    for chat in range(50):
        clock.now_s += 60
        assert put(store, chat, 512).stored
        assert io.free_bytes(tmp_path) >= 6 * SEGMENT
    assert 5 * SEGMENT < store.status().used_bytes <= 6 * SEGMENT
    io.free -= SEGMENT
    assert put(store, 60, 512).stored
    assert io.free_bytes(tmp_path) >= 6 * SEGMENT
    assert_hit(store, 60, 512)
    io.free_bytes = lambda path: 5 * SEGMENT  # others take the room as quickly as it is freed
    before = store.status().used_bytes
    refused = put(store, 61, 512)
    assert refused.reason == f"quota: less than kv.min_free_bytes = {6 * SEGMENT} would be left"
    assert store.status().used_bytes >= before - 2.5 * SEGMENT  # one and a bit were missing
    assert_hit(store, 60, 512)
    store.close()


def test_a_day_has_its_bytes(tmp_path, clock):
    store = _open(tmp_path, clock, max_bytes=100 * SEGMENT, daily_write_bytes=SEGMENT)
    stored = 0
    while put(store, stored, 512).stored:
        stored += 1
    refused = put(store, 50, 512)
    assert refused.reason == f"policy: kv.daily_write_bytes = {SEGMENT} is used up until 00:00 UTC"
    assert store.put(PutJob("default", prompt(50, 600), note=Note(START_S, 600, 0, 1, "no-unit"))).stored
    assert (store.status().writing, store.status().reason) == (False, refused.reason)  # the note changed nothing
    written = store.status().written_today_bytes
    assert SEGMENT * 3 / 4 < written <= SEGMENT
    for chat in range(stored):
        assert_hit(store, chat, 512)
    store.close()
    clock.now_s = START_S + DAY_S - 1.0
    store = _open(tmp_path, clock, max_bytes=100 * SEGMENT, daily_write_bytes=SEGMENT)
    assert store.status().written_today_bytes == written  # the ledger outlives the restart
    assert not put(store, 50, 512).stored
    clock.now_s = START_S + DAY_S
    assert put(store, 50, 512).stored
    assert store.status().writing
    assert store.status().written_today_bytes < written
    store.close()


def test_copies_count_as_written(tmp_path, clock):
    """With the day's bytes nearly used up nothing is copied; the ledger never passes the bound."""
    limit = 12 * SEGMENT
    io = WatchIo(tmp_path / "kv")
    store = _open(tmp_path, clock, io, daily_write_bytes=limit)
    rng, put_bytes = random.Random(1), 0
    for _ in range(220):
        clock.now_s += 30
        chat = rng.choice((rng.randrange(10), rng.randrange(100, 400)))
        tokens = 256 if chat < 10 else 768
        look_up(store, prompt(chat, tokens + 1))
        put_bytes += put(store, chat, tokens).written_bytes
        assert store.status().written_today_bytes <= limit
        assert store.status().written_today_bytes == io.written_bytes
    assert put_bytes < io.written_bytes  # copies and footers
    store.close()


@pytest.mark.parametrize("name", ["pwrite", "fdatasync", "commit"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_ends_writing_not_reading(tmp_path, clock, name, code):
    """While segments are being replaced the disk starts to refuse: puts say why, lookups go on, the account holds."""
    store = _open(tmp_path, clock)
    for chat in range(25):
        clock.now_s += 60
        assert put(store, chat, 512).stored
    io = store._ground.io
    real = getattr(type(io), name)

    def refuse(self, *args):
        raise OSError(code, "refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(io), name, refuse)
        for chat in range(25, 40):
            result = put(store, chat, 512)
            assert result.reason == f"{errno.errorcode[code]}: refused"
            assert_hit(store, 24, 512)
    assert getattr(type(io), name) is real
    status = store.status()
    assert (status.writing, status.reason) == (False, f"{errno.errorcode[code]}: refused")
    assert store.status().used_bytes <= QUOTA
    clock.now_s += 61
    assert put(store, 50, 512).stored is (code == errno.ENOSPC)  # room may come back; a broken disk needs a restart
    store.close()
    store = _open(tmp_path, clock)
    assert store.status().used_bytes == disk_bytes(tmp_path / "kv") <= QUOTA
    assert put(store, 51, 512).stored
    assert_hit(store, 51, 512)
    store.close()


def test_a_job_without_records_needs_no_room(tmp_path, clock):
    store = _open(tmp_path, clock, daily_write_bytes=1)
    assert not put(store, 0, 256).stored
    assert store.put(PutJob("default", prompt(0, 300))).stored
    store.close()
