"""The thread that writes: what requests want kept is queued here and made durable beside decoding.

Everything queued when the thread looks becomes one group: one ``put_all``, so one sync and one commit. What is queued
is bounded in bytes: a request that outruns the disk waits a little, then goes on without keeping that part.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from runtime.kv.job import PutJob, PutResult

GROUP_BYTES = 64 << 20
MAX_PENDING_BYTES = 128 << 20
SUBMIT_WAIT_S = 5.0
BEHIND = "policy: the disk is slower than the prompts"
_CLOSED = "policy: the server is stopping"
_log = logging.getLogger("solocard.kv")


class PutAll(Protocol):
    """What the writer needs of a store."""

    def put_all(self, jobs: Sequence[PutJob]) -> list[PutResult]: ...


class Ticket:
    """The receipt of one job; any thread may wait for it."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._result: PutResult | None = None

    def settle(self, result: PutResult) -> None:
        self._result = result
        self._done.set()

    def wait(self, timeout_s: float | None = None) -> PutResult | None:
        """What became of the job, durable when ``stored``; None when that took longer than ``timeout_s``."""
        self._done.wait(timeout_s)
        return self._result


class Writer:
    """Owns its thread from construction to :meth:`close`; every other method may be called from any thread."""

    def __init__(
        self, store: PutAll, *, max_pending_bytes: int = MAX_PENDING_BYTES, submit_wait_s: float = SUBMIT_WAIT_S,
        name: str = "kv-writer",
    ) -> None:  # fmt: skip
        self._store, self._max_pending_bytes, self._submit_wait_s = store, max_pending_bytes, submit_wait_s
        self._queue: deque[tuple[PutJob, int, Ticket]] = deque()
        self._pending_bytes = 0  # queued and being written
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def pending_bytes(self) -> int:
        """Payload bytes handed in and not yet settled."""
        return self._pending_bytes

    def submit(self, job: PutJob) -> Ticket:
        """Queue ``job``; waits while ``max_pending_bytes`` are pending, at most ``submit_wait_s``, then refuses it.

        A job larger than the bound is taken when nothing else is pending. A refused job's ticket is settled at once.
        """
        size_bytes, ticket = payload_bytes(job), Ticket()
        with self._changed:
            fits = self._changed.wait_for(lambda: self._closing or self._fits(size_bytes), self._submit_wait_s)
            if self._closing or not fits:
                ticket.settle(PutResult(False, _CLOSED if self._closing else BEHIND))
                return ticket
            self._queue.append((job, size_bytes, ticket))
            self._pending_bytes += size_bytes
            self._changed.notify_all()
        return ticket

    def close(self, timeout_s: float) -> bool:
        """Write what is queued, then end the thread; False when that took longer. A second call is harmless."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _fits(self, size_bytes: int) -> bool:
        return not self._pending_bytes or self._pending_bytes + size_bytes <= self._max_pending_bytes

    def _loop(self) -> None:
        while group := self._next_group():
            started_s = time.monotonic()
            results = self._write([job for job, _, _ in group])
            with self._changed:
                self._pending_bytes -= sum(size_bytes for _, size_bytes, _ in group)
                self._changed.notify_all()
            for (_, _, ticket), result in zip(group, results, strict=True):
                ticket.settle(result)
            _tell(results, time.monotonic() - started_s)

    def _next_group(self) -> list[tuple[PutJob, int, Ticket]]:
        """Jobs in order, as many as fit ``GROUP_BYTES`` but at least one; empty when the thread shall end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            group: list[tuple[PutJob, int, Ticket]] = []
            total_bytes = 0
            while self._queue and (not group or total_bytes + self._queue[0][1] <= GROUP_BYTES):
                group.append(self._queue.popleft())
                total_bytes += group[-1][1]
            return group

    def _write(self, jobs: list[PutJob]) -> list[PutResult]:
        try:
            results = self._store.put_all(jobs)
        except Exception as error:
            # Keeping a prompt is never worth a server: the requests go on, the log has the trace.
            _log.exception("KV cache: %d jobs were not stored", len(jobs))
            return [PutResult(False, f"{type(error).__name__}: {error}")] * len(jobs)
        if len(results) != len(jobs):
            _log.error("KV cache: %d jobs, %d results", len(jobs), len(results))
            return [PutResult(False, "the store lost count of its jobs")] * len(jobs)
        return results


def payload_bytes(job: PutJob) -> int:
    """How much memory a job holds while it waits."""
    tail_bytes = len(job.tail.payload) if job.tail else 0
    return sum(map(len, job.blocks.values())) + sum(len(unit.payload) for unit in job.units) + tail_bytes


def _tell(results: list[PutResult], elapsed_s: float) -> None:
    failed = sorted({result.reason for result in results if not result.stored and result.reason})
    if failed:
        _log.warning("KV cache: not stored: %s", "; ".join(failed))
    written_bytes = sum(result.written_bytes for result in results)
    if written_bytes:
        records = sum(result.records for result in results)
        _log.debug("KV cache: %d records, %d bytes in %.3f s", records, written_bytes, elapsed_s)
