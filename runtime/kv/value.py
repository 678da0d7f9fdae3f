"""What stored records are worth: the tokens they save, less with every half-life they lie unused.

value = tokens · (1 + HIT_WEIGHT · min(hits, HITS_COUNTED)) · 2^(−age/half-life), where 2^−x is drawn straight between
whole x. A record that nobody can read again is worth nothing: damaged, expired, of a tenant whose key is destroyed, or
of another fingerprint and not used for a day (until then a server that goes back to its old weights finds its cache).
The constants are measured on generated and public traces (benchmarks/kv_trace.py): what was hit once is likely to be
hit again, and a half-life that is long beside the time a cache looks back on keeps the dead.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Set
from dataclasses import dataclass

from appliance.model import BLOCK_TOKENS
from runtime.kv.index import Row, State
from runtime.kv.policy import DAY_S, Policy
from runtime.kv.record import Role

HIT_WEIGHT = 4.0
HITS_COUNTED = 3
SPAN_SHARE = 0.1  # a half-life is at most this share of the time the cache looks back on
SUPERSEDED_SHARE = 0.0625
OTHER_FINGERPRINT_SHARE = 0.0625
OTHER_FINGERPRINT_S = DAY_S
_HALVINGS = 60

_SUMS = """
SELECT segment, tenant_id, SUM(value) FROM (
  SELECT segment, tenant_id,
    share * (1.0 + :weight * MIN(hits, :counted)) * :tokens
      * (1.0 - (x - CAST(x AS INTEGER)) / 2.0) / (1 << CAST(x AS INTEGER)) AS value
  FROM (
    SELECT segment, tenant_id, hits,
      MIN(MAX(:now - used_s, 0) / (CASE role WHEN 1 THEN :half1 WHEN 2 THEN :half2 WHEN 3 THEN :half3 WHEN 4 THEN :half4
        ELSE :half0 END), :halvings) AS x,
      CASE WHEN used_s < (CASE role WHEN 1 THEN :since1 WHEN 2 THEN :since2 WHEN 3 THEN :since3 WHEN 4 THEN :since4
        ELSE :since0 END) THEN 0.0
        WHEN state = 0 THEN 1.0 WHEN state = 4 THEN :superseded ELSE 0.0 END
        * CASE WHEN fingerprint_id = :fingerprint THEN 1.0 WHEN used_s < :since_other THEN 0.0 ELSE :other END AS share
    FROM record NOT INDEXED WHERE segment >= 0)
) GROUP BY segment, tenant_id
"""


@dataclass(frozen=True, slots=True)
class Worth:
    """How values are reckoned at one moment, ``now_s``, in a store whose oldest segment is ``span_s`` old."""

    policy: Policy
    fingerprint_id: bytes
    tenants: Set[bytes] | None  # those whose keys exist; None where that cannot be told
    now_s: int
    span_s: int

    def half_life_s(self, role: Role) -> float:
        """The policy's, but no more than a share of the span: a cache that turns over in minutes forgets in minutes."""
        return max(1.0, min(self.policy.half_life_s.get(role, float(DAY_S)), self.span_s * SPAN_SHARE))

    def of(self, row: Row) -> float:
        """The value of one record."""
        share = {State.LIVE: 1.0, State.SUPERSEDED: SUPERSEDED_SHARE}.get(row.state, 0.0)
        if not self._known(row.tenant_id) or self.policy.expired(row.role, row.used_s, self.now_s):
            return 0.0
        if row.fingerprint_id != self.fingerprint_id:
            share *= OTHER_FINGERPRINT_SHARE if row.used_s >= self.now_s - OTHER_FINGERPRINT_S else 0.0
        x = min(max(self.now_s - row.used_s, 0) / self.half_life_s(row.role), _HALVINGS)
        weight = 1 + HIT_WEIGHT * min(row.hits, HITS_COUNTED)
        return share * weight * BLOCK_TOKENS * (1 - (x - int(x)) / 2) / (1 << int(x))

    def _known(self, tenant_id: bytes) -> bool:
        return self.tenants is None or tenant_id in self.tenants

    def sums(self, connection: sqlite3.Connection) -> dict[int, float]:
        """Segment → the sum of its records' values, by one query; segments without records are not in it."""
        values: dict[str, object] = {
            "now": self.now_s, "weight": HIT_WEIGHT, "counted": HITS_COUNTED, "tokens": BLOCK_TOKENS,
            "halvings": _HALVINGS, "superseded": SUPERSEDED_SHARE, "fingerprint": self.fingerprint_id,
            "other": OTHER_FINGERPRINT_SHARE, "since_other": self.now_s - OTHER_FINGERPRINT_S,
        }  # fmt: skip
        for role in Role:
            ttl_s = self.policy.ttl_s.get(role, 0)
            values[f"half{role:d}"] = self.half_life_s(role)
            values[f"since{role:d}"] = self.now_s - ttl_s if ttl_s > 0 else 0
        found: dict[int, float] = {}
        for segment, tenant_id, value in connection.execute(_SUMS, values):
            found[segment] = found.get(segment, 0.0) + (value if self._known(tenant_id) else 0.0)
        return found
