"""What the store is given and what it answers: jobs, results, hits. Plain values, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runtime.kv.record import Role


@dataclass(frozen=True, slots=True)
class Unit:
    """A state checkpoint after ``tokens`` tokens, a multiple of 256."""

    tokens: int
    role: Role
    payload: bytes


@dataclass(frozen=True, slots=True)
class TailUnit:
    """The exact state after all of ``ids``, any n ≥ 1; blocks below 256·⌊n/256⌋ are in the job or stored."""

    ids: Sequence[int]
    payload: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """One line of the request log; ``reason`` is that of the lookup, empty when everything usable was there."""

    at_s: float
    prompt_tokens: int
    hit_tokens: int
    output_tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class PutJob:
    """What one request leaves behind: all of it is stored or nothing.

    ``blocks``: index → payload; those already stored are skipped. ``shared_tokens``, a multiple of 256: blocks and
    units up to there go to the tenant SHARED. ``replays``: name → the exact token ids that were sampled.
    """

    tenant: str
    ids: Sequence[int]  # at least up to the last unit and block given
    blocks: Mapping[int, bytes] = field(default_factory=dict)
    units: Sequence[Unit] = ()
    tail: TailUnit | None = None
    shared_tokens: int = 0
    note: Note | None = None
    replays: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PutResult:
    """``stored``: everything of the job is durable. Else ``reason``, and nothing of the job is visible.

    Reasons begin with ``policy``, ``quota``, ``evicted`` (a block below a unit is neither stored nor given),
    ``invalid`` (the call was wrong), ``closed``, an errno's name or ``index``.
    """

    stored: bool
    reason: str = ""
    records: int = 0
    written_bytes: int = 0


class Sink(Protocol):
    """Takes authenticated blocks, from 0 up, in order; the view is good during the call only."""

    def __call__(self, index: int, payload: memoryview, /) -> None: ...


@dataclass(frozen=True, slots=True)
class KvHit:
    """Where a prompt can start. The sink may have seen more blocks than ``blocks``: those do not count.

    ``tokens`` need no computing: a multiple of 256, the length of a tail, or where an exact replay begins (``replay``:
    blocks are there up to 256·blocks, but no checkpoint). ``reason`` is empty when the longest usable boundary was
    reached, else too-short, no-unit, fingerprint: FIELDS, ttl, evicted, corrupt or policy. ``common_tokens``: 256 ·
    the number of this prompt's blocks that are stored from its start on.
    """

    tokens: int
    blocks: int
    checkpoint: bytes | None
    tail: bytes | None
    replay: bool
    reason: str
    common_tokens: int
