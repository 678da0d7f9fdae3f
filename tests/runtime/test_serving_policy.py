"""config.yaml → the bounds of the KV cache."""

from pathlib import Path

import pytest

from appliance.config import Config
from runtime.kv.record import Role
from runtime.serving import kv_policy, segment_bytes

HOUR_S = 3600


def policy(text: str):
    return kv_policy(Config.from_bytes(text.encode(), Path("config.yaml")).kv)


def test_the_settings_arrive() -> None:
    made = policy(
        "kv: {max_bytes: 123456789, min_free_bytes: 5, daily_write_bytes: 6, ttl_hours: 10, answer_ttl_hours: 2}"
    )
    assert (made.max_bytes, made.min_free_bytes, made.daily_write_bytes) == (123456789, 5, 6)
    assert made.ttl_s == {
        Role.NONE: 10 * HOUR_S, Role.PROMPT: 10 * HOUR_S, Role.ANCHOR: 10 * HOUR_S, Role.SUSPENDED: 10 * HOUR_S,
        Role.ANSWER: 2 * HOUR_S,
    }  # fmt: skip


def test_switched_off_is_no_space() -> None:
    assert policy("kv: {enabled: false}").max_bytes == 0
    assert policy("").max_bytes == 8 << 30


@pytest.mark.parametrize(("role", "hours"), [(Role.ANSWER, 24), (Role.PROMPT, 72), (Role.NONE, 72)])
def test_defaults_of_time(role: Role, hours: int) -> None:
    made = policy("")
    assert not made.expired(role, 1000, 1000 + hours * HOUR_S)
    assert made.expired(role, 1000, 1001 + hours * HOUR_S)


def test_a_small_cache_has_eight_segments_at_least() -> None:
    assert segment_bytes(8 << 30) == 256 << 20
    assert segment_bytes(1 << 44) == 256 << 20
    assert segment_bytes(16 << 20) == 2 << 20
    assert segment_bytes((16 << 20) + 4095 * 8) % 4096 == 0
