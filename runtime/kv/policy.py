"""The bounds of the KV cache: how much, how long, how many bytes a day."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.kv.record import Role

HOUR_S = 3_600
DAY_S = 24 * HOUR_S


def _ttl_s() -> dict[Role, int]:
    return {Role.NONE: 3 * DAY_S, Role.PROMPT: 3 * DAY_S, Role.ANSWER: DAY_S, Role.ANCHOR: 3 * DAY_S,
            Role.SUSPENDED: 3 * DAY_S}  # fmt: skip


def _half_life_s() -> dict[Role, float]:
    return {Role.NONE: 6.0 * HOUR_S, Role.PROMPT: 6.0 * HOUR_S, Role.ANSWER: 2.0 * HOUR_S, Role.ANCHOR: 12.0 * HOUR_S,
            Role.SUSPENDED: 12.0 * HOUR_S}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Policy:
    """``max_bytes`` bounds all segment files (0 = the cache is off); the other 0s mean no bound.

    ``ttl_s`` counts from the last use, blocks under Role.NONE; ``half_life_s`` is how long until an unused record is
    worth half as much.
    """

    max_bytes: int = 0
    min_free_bytes: int = 0  # kept free on the file system
    daily_write_bytes: int = 0  # copies made by reclaiming included; a day is one of UTC
    ttl_s: Mapping[Role, int] = field(default_factory=_ttl_s)
    half_life_s: Mapping[Role, float] = field(default_factory=_half_life_s)

    def expired(self, role: Role, used_s: int, now_s: float) -> bool:
        """Has a record that was last used at ``used_s`` outlived its kind's time?"""
        ttl_s = self.ttl_s.get(role, 0)
        return ttl_s > 0 and used_s + ttl_s < now_s
