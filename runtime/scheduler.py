"""First come, first served: one thread owns the engine and runs one request at a time (runtime.run), another writes
what they leave behind to the KV store (runtime.kv.writer). Cancellation is looked at between engine calls.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from appliance.errors import EngineError, RequestError, SolocardError
from runtime.kv.writer import Writer
from runtime.metrics import Metrics
from runtime.request import EngineLike, Failed, KvLike, Request
from runtime.run import Parts, Run

QUEUE_DEPTH_DEFAULT = 8
RETRY_AFTER_MAX_S = 60
WRITER_END_S = 60.0  # at a stop without a limit of its own
_log = logging.getLogger("solocard.serve")


class Scheduler:
    """Takes requests from any thread, answers through ``Request.emit`` on its own.

    ``reuse_mixed``: blocks with rows that a tail or decode wrote may be stored and reused, which the engine allows
    only where such rows are bit for bit what a whole chunk would have written. ``exact_tails``: then the end of every
    answer is stored too, not only while the server drains.
    """

    def __init__(
        self, engine: EngineLike[Any], kv: KvLike | None = None, *, queue_depth: int = QUEUE_DEPTH_DEFAULT,
        reuse_mixed: bool = False, exact_tails: bool = False, metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._clock = clock
        self.queue_depth, self.metrics = queue_depth, metrics or Metrics()
        self._writer = Writer(kv) if kv is not None else None
        self._parts = Parts(
            engine, kv, self._writer, self.metrics, clock, reuse_mixed, lambda: exact_tails or bool(self._refusal)
        )  # fmt: skip
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None
        self._refusal: str = ""  # why new requests are refused, empty while they are taken
        self._stopping = False
        self._mean_s = 1.0  # smoothed seconds a request takes, for Retry-After
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def running(self) -> int:
        return 0 if self._running is None else 1

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queue ``request``. Raises RequestError 429 when the queue is full, 503 when the server is stopping."""
        with self._changed:
            if self._refusal:
                raise RequestError(
                    self._refusal, status=503, code="server_stopping", kind="server_error", retry_after_s=10
                )
            if self.running + len(self._waiting) > self.queue_depth:
                raise RequestError(
                    f"the queue is full ({self.queue_depth} waiting); try again later", status=429,
                    code="queue_full", kind="rate_limit_error", retry_after_s=self._retry_after_s(),
                )
            request.queued_at_s = self._clock()
            self._waiting.append(request)
            self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """Forget a request whose client has gone: at once while it waits, at the next call while it runs."""
        request.cancelled.set()
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
                self.metrics.cancelled()
                self._changed.notify_all()

    def refuse(self, message: str) -> None:
        """Take no more requests; those taken go on, and leave an exact tail behind where that may be reused."""
        with self._changed:
            self._refusal = message

    def abort(self, error: SolocardError) -> None:
        """End every request with ``error``, the running one at its next call."""
        with self._changed:
            ending = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._changed.notify_all()
        for request in ending:
            if not request.cancelled.is_set():
                request.cancelled.set()
                request.emit(Failed(error))

    def stop(self, timeout_s: float | None = None) -> bool:
        """End the thread after the running request, then write what is queued; True when both ended in time."""
        with self._changed:
            self._refusal = self._refusal or "the server is stopping"
            self._stopping = True
            self._changed.notify_all()
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._thread.join(timeout_s)
        if self._writer is None:
            return not self._thread.is_alive()
        left_s = WRITER_END_S if end_s is None else max(0.1, end_s - time.monotonic())
        return self._writer.close(left_s) and not self._thread.is_alive()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs or waits; False when that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running is None and not self._waiting, timeout_s)

    def _retry_after_s(self) -> int:
        return max(1, min(RETRY_AFTER_MAX_S, math.ceil(self._mean_s)))

    def _loop(self) -> None:
        while (request := self._next()) is not None:
            started_s = self._clock()
            self.metrics.queued(started_s - request.queued_at_s)
            try:
                Run(request, self._parts).run()
            except SolocardError as error:
                _log.error("request %s failed: %s", request.id, error)
                request.emit(Failed(error))
            except Exception:
                # A defect must not take the server down with it: it is logged with its trace, the client gets a 500.
                _log.exception("request %s failed", request.id)
                request.emit(Failed(EngineError("the engine failed; see log/serve.log")))
            self._mean_s += 0.3 * (self._clock() - started_s - self._mean_s)
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def _next(self) -> Request | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            if self._stopping:
                return None
            self._running = self._waiting.popleft()
            return self._running
