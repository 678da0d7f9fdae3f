"""What of a request's state goes to the KV store, and when it is copied.

All copies are made on the engine's thread, once, as soon as they are complete: a block when it is full, a checkpoint at
its write point. They are handed to the writer while prefill and decode go on. Without ``reuse_mixed`` nothing beyond
c(n) is kept: rows that a tail or decode wrote might differ in bits from what a whole chunk writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from appliance.model import BLOCK_TOKENS
from runtime.kv.job import KvHit, Note, PutJob, PutResult, TailUnit, Unit
from runtime.kv.record import Role
from runtime.kv.writer import Ticket
from runtime.request import EngineLike, Logits, Request, SequenceLike
from runtime.schedule import far_apart, prompt_boundary, write_points

FLUSH_BYTES = 32 << 20  # blocks handed over without waiting for a write point
TICKET_WAIT_S = 30.0  # a disk that hangs longer than this keeps no answer from its client


class Keeper:
    """Follows one sequence. ``hit`` is what its prompt found; every method belongs to the engine's thread."""

    def __init__(
        self, request: Request, engine: EngineLike[Any], seq: SequenceLike, submit: Callable[[PutJob], Ticket],
        hit: KvHit, *, reuse_mixed: bool,
    ) -> None:  # fmt: skip
        self._request, self._engine, self._seq, self._submit = request, engine, seq, submit
        self._reuse_mixed, self._boundary = reuse_mixed, prompt_boundary(len(request.prompt_ids))
        self._points = write_points(
            self._boundary, hit.tokens, hit.blocks, common_tokens=hit.common_tokens,
            anchor_tokens=request.anchor_tokens, shared_tokens=request.shared_tokens,
        )  # fmt: skip
        self._next_block = max(hit.common_tokens, hit.tokens) // BLOCK_TOKENS  # those before are stored
        self._kept_tokens = hit.tokens  # the newest checkpoint that is stored or handed over
        self._newest: tuple[int, bytes] | None = None  # the newest that may be stored
        self._blocks: dict[int, bytes] = {}  # copied and not handed over
        self._tickets: list[Ticket] = []

    def after_call(self, ids: Sequence[int]) -> None:
        """Copy what the engine's last call completed; ``ids`` are all tokens of the sequence."""
        usable_tokens = self._seq.n_tokens if self._reuse_mixed else min(self._seq.n_tokens, self._boundary)
        while self._next_block < usable_tokens // BLOCK_TOKENS:
            self._blocks[self._next_block] = self._engine.export_block(self._seq, self._next_block)
            self._next_block += 1
        newest = self._seq.checkpoint
        if newest is not None and newest[0] <= usable_tokens:
            self._newest = newest
            if newest[0] in self._points and newest[0] > self._kept_tokens:
                role = Role.PROMPT if newest[0] == self._boundary else Role.ANCHOR
                self._hand_over(ids, [self._unit(role)])
        if sum(map(len, self._blocks.values())) >= FLUSH_BYTES:
            self._hand_over(ids, [])

    def finish(
        self, ids: Sequence[int], note: Note, *, tail_after: Logits | None, replays: Mapping[str, Sequence[int]]
    ) -> None:  # fmt: skip
        """Hand over the rest: whole blocks, the newest checkpoint, the note.

        ``tail_after``: the logits of the sequence's last token where its exact tail is wanted as well. Copies nothing
        else, so that it is safe after a call that failed.
        """
        units = []
        newest = self._newest
        if newest is not None and newest[0] > self._kept_tokens and far_apart(self._kept_tokens, newest[0]):
            units = [self._unit(Role.ANSWER if newest[0] > self._boundary else Role.PROMPT)]
        tail = None if tail_after is None else self._tail(ids, tail_after)
        durable = bool(units or tail or self._blocks or replays)
        ticket = self._submit(self._job(ids, units, tail=tail, note=note, replays=replays))
        if durable:
            self._tickets.append(ticket)

    def wait(self) -> list[PutResult | None]:
        """Until everything handed over is durable or refused; None stands for a disk that took too long."""
        end_s = time.monotonic() + TICKET_WAIT_S
        return [ticket.wait(max(0.0, end_s - time.monotonic())) for ticket in self._tickets]

    def _tail(self, ids: Sequence[int], logits: Logits) -> TailUnit | None:
        n_tokens = self._seq.n_tokens
        if not self._reuse_mixed or n_tokens % BLOCK_TOKENS == 0:  # there a checkpoint says the same
            return None
        return TailUnit(list(ids[:n_tokens]), self._engine.export_tail(self._seq, logits))

    def _unit(self, role: Role) -> Unit:
        assert self._newest is not None  # noqa: S101 - both callers looked
        self._kept_tokens = self._newest[0]
        return Unit(self._newest[0], role, self._newest[1])

    def _hand_over(self, ids: Sequence[int], units: list[Unit]) -> None:
        self._tickets.append(self._submit(self._job(ids, units)))

    def _job(
        self, ids: Sequence[int], units: list[Unit], *, tail: TailUnit | None = None, note: Note | None = None,
        replays: Mapping[str, Sequence[int]] | None = None,
    ) -> PutJob:  # fmt: skip
        blocks, self._blocks = self._blocks, {}
        return PutJob(
            self._request.tenant, list(ids), blocks, units, tail, self._request.shared_tokens, note, replays or {}
        )  # fmt: skip
