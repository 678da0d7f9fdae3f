"""What nobody used for its kind's time is not served any more and goes; so does what nobody can read again."""

from __future__ import annotations

import pytest
from kv_support import (
    MASTER_KEY,
    Clock,
    assert_hit,
    assert_miss,
    disk_bytes,
    job,
    look_up,
    make_fingerprint,
    open_store,
    prompt,
    put,
    put_tail,
    reason,
    tiny_layout,
)

from runtime.kv.files import Io
from runtime.kv.policy import DAY_S, HOUR_S, Policy
from runtime.kv.record import Role
from runtime.kv.tenants import Tenants

START_S = 1_800_000_000
TTL = {Role.NONE: 100, Role.PROMPT: 60, Role.ANSWER: 30, Role.ANCHOR: 90, Role.SUSPENDED: 50}


@pytest.fixture
def clock():
    return Clock(START_S)


def _open(tmp_path, clock, **options):
    ttl_s = options.pop("ttl_s", TTL)
    return open_store(tmp_path / "kv", clock=clock, policy=Policy(max_bytes=1 << 30, ttl_s=ttl_s), **options)


def test_defaults():
    policy = Policy()
    assert [policy.ttl_s[role] for role in Role] == [3 * DAY_S, 3 * DAY_S, DAY_S, 3 * DAY_S, 3 * DAY_S]
    assert not policy.expired(Role.PROMPT, START_S, START_S + 72 * HOUR_S)
    assert policy.expired(Role.PROMPT, START_S, START_S + 72 * HOUR_S + 1)
    assert not Policy(ttl_s={}).expired(Role.PROMPT, 0, 1 << 40)
    assert not Policy(ttl_s={Role.PROMPT: 0}).expired(Role.PROMPT, 0, 1 << 40)


@pytest.mark.parametrize("role", [Role.PROMPT, Role.ANSWER, Role.ANCHOR])
def test_each_kind_has_its_time(tmp_path, clock, role):
    store = _open(tmp_path, clock)
    assert store.put(job(0, 512, role=role)).stored
    clock.now_s += TTL[role]
    assert look_up(store, prompt(0, 513))[0].tokens == 512
    clock.now_s += TTL[role] + 1
    assert_miss(store, 0, 513, "ttl")
    store.close()


def test_a_use_is_a_new_start(tmp_path, clock):
    store = _open(tmp_path, clock)
    assert put(store, 0, 512).stored
    for attempt in range(6):
        clock.now_s += 50
        assert_hit(store, 0, 512)
        if attempt == 3:
            store.close()
            store = _open(tmp_path, clock)
    clock.now_s += 61
    assert reason(store, prompt(0, 513)) == "ttl"
    assert put(store, 0, 512).stored
    store.close()


def test_an_old_tail_is_not_used(tmp_path, clock):
    store = _open(tmp_path, clock)
    assert put_tail(store, 0, 300).stored
    hit, _ = look_up(store, prompt(0, 400), tails=True)
    assert hit.tokens == 300
    clock.now_s += 51
    hit, _ = look_up(store, prompt(0, 400), tails=True)
    assert (hit.tokens, hit.tail) == (0, None)
    store.close()


def test_the_expired_go_by_themselves_and_the_reason_stays(tmp_path, clock):
    store = _open(tmp_path, clock)
    for chat in range(8):
        assert put(store, chat, 512).stored
    full = disk_bytes(tmp_path / "kv")
    clock.now_s += 101
    assert put(store, 20, 256).stored  # the first put after a minute sweeps
    assert disk_bytes(tmp_path / "kv") == store.status().used_bytes < full / 3
    assert reason(store, prompt(3, 513)) == "ttl"
    assert_hit(store, 20, 256)
    store.close()
    clock.now_s += 101
    store = _open(tmp_path, clock)
    assert put(store, 21, 256).stored  # and so does the first one after a start
    assert_hit(store, 21, 256)
    assert disk_bytes(tmp_path / "kv") == store.status().used_bytes < full / 3
    assert reason(store, prompt(3, 513)) == reason(store, prompt(20, 257)) == "ttl"
    store.close()


def test_a_purged_tenant_is_unreadable_at_once_and_gone_at_the_next_sweep(tmp_path, clock):
    store = _open(tmp_path, clock, ttl_s={})
    for chat in range(6):
        assert put(store, chat, 512, tenant="alice").stored
    assert put(store, 9, 512, tenant="bob").stored
    before = disk_bytes(tmp_path / "kv")
    assert Tenants(tmp_path / "kv", MASTER_KEY, Io()).purge("alice")  # by another process, as the command does it
    assert_miss(store, 0, 513, "no-unit", tenant="alice")
    clock.now_s += 61
    assert put(store, 10, 256, tenant="bob").stored
    assert disk_bytes(tmp_path / "kv") < before / 2
    assert_hit(store, 9, 512, tenant="bob")
    assert put(store, 0, 512, tenant="alice").stored  # a later tenant of that name starts from nothing
    assert_hit(store, 0, 512, tenant="alice")
    store.close()


def test_another_master_key_removes_nothing(tmp_path, clock):
    """Keys restored from the wrong backup: every tenant is unknown, and so nobody is taken for gone."""
    store = _open(tmp_path, clock, ttl_s={})
    assert put(store, 0, 512).stored
    store.close()
    store = _open(tmp_path, clock, ttl_s={}, master_key=bytes(32))
    assert reason(store, prompt(0, 513)) == "no-unit"
    clock.now_s += 61
    assert put(store, 1, 256, tenant="other").stored
    store.close()
    store = _open(tmp_path, clock, ttl_s={})
    assert_hit(store, 0, 512)
    store.close()


def test_another_fingerprint_is_kept_for_a_day(tmp_path, clock):
    """Going back to the old weights within a day finds the old cache; after that it is the first to go."""
    store = _open(tmp_path, clock, ttl_s={})
    assert put(store, 0, 512).stored
    store.close()
    clock.now_s += DAY_S - 10
    store = _open(tmp_path, clock, ttl_s={}, profile="small")
    assert make_fingerprint(tiny_layout(), profile="small").digest != make_fingerprint(tiny_layout()).digest
    assert reason(store, prompt(0, 513)) == "fingerprint: profile"
    store.close()
    store = _open(tmp_path, clock, ttl_s={})
    assert_hit(store, 0, 512)
    store.close()
    clock.now_s += DAY_S + 1
    store = _open(tmp_path, clock, ttl_s={}, profile="small")
    assert put(store, 1, 256).stored
    store.close()
    store = _open(tmp_path, clock, ttl_s={})
    assert reason(store, prompt(0, 513)) != ""
    store.close()


def test_what_is_in_use_outlives_the_loss_of_the_index(tmp_path, clock):
    store = _open(tmp_path, clock)
    put(store, 0, 512)
    for _ in range(3):
        clock.now_s += TTL[Role.PROMPT] - 1
        assert_hit(store, 0, 512)
    store.close()
    for path in (tmp_path / "kv").glob("index*"):
        path.unlink()
    store = _open(tmp_path, clock)
    assert_hit(store, 0, 512)
    clock.now_s += TTL[Role.PROMPT] + 1
    assert reason(store, prompt(0, 513)) == "ttl"
    store.close()
