"""First come, first served: one thread owns the engine and the KV store and runs one request at a time.

Schedule of a prompt of n tokens (design, KV on disk): look up, restore to the boundary B ≤ c(n) = 256·⌊(n−1)/256⌋,
then one prefill call per whole chunk [B, B+256) … up to c(n), one for the tail of 1 … 256 tokens, then decode. A hit
and a cold run therefore make the same calls from B on. Cancellation is looked at between calls.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from appliance.errors import EngineError, RequestError, SolocardError
from appliance.model import BLOCK_TOKENS
from runtime.metrics import Metrics
from runtime.request import EngineLike, Failed, Finished, FinishReason, KvLike, Logits, Request, SequenceLike, Usage
from runtime.sampler import Sampler
from runtime.schedule import prompt_boundary, prompt_calls

QUEUE_DEPTH_DEFAULT = 8
RETRY_AFTER_MAX_S = 60
_log = logging.getLogger("solocard.serve")


class Scheduler:
    """Takes requests from any thread, answers through ``Request.emit`` on its own.

    ``reuse_mixed``: blocks with rows that a tail or decode wrote may be stored and reused, which the engine allows
    only where such rows are bit for bit what a whole chunk would have written.
    """

    def __init__(
        self, engine: EngineLike[Any], kv: KvLike | None = None, *, queue_depth: int = QUEUE_DEPTH_DEFAULT,
        reuse_mixed: bool = False, metrics: Metrics | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._kv, self._reuse_mixed, self._clock = engine, kv, reuse_mixed, clock
        self.queue_depth, self.metrics = queue_depth, metrics or Metrics()
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
        """Take no more requests; those taken go on."""
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
        """End the thread after the running request; True when it ended in time."""
        with self._changed:
            self._refusal = self._refusal or "the server is stopping"
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

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
                self._serve(request)
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

    def _serve(self, request: Request) -> None:
        seq = self._engine.open()
        try:
            _Run(request, seq, self._engine, self._kv, self.metrics, self._clock).run(self._reuse_mixed)
        finally:
            self._engine.close(seq)


class _Cancelled(Exception):  # noqa: N818 (control flow of one request, never shown)
    pass


class _Run:
    """One request on its sequence, from lookup to the last event."""

    def __init__(
        self, request: Request, seq: SequenceLike, engine: EngineLike[Any], kv: KvLike | None, metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.request, self.seq, self.engine, self.kv = request, seq, engine, kv
        self.metrics, self.clock = metrics, clock
        self.prompt = list(request.prompt_ids)
        self.boundary = prompt_boundary(len(self.prompt))
        self.tokens: list[int] = []  # sampled so far; the last one is not in the sequence yet
        self.hit_tokens, self.miss_reason = 0, ""
        self.checkpoint: bytes | None = None  # at the boundary

    def run(self, reuse_mixed: bool) -> None:
        try:
            self.look_up()
            logits = self.prefill()
            reason = self.decode(logits)
        except _Cancelled:
            self.metrics.cancelled()
            self.store(reuse_mixed)
            return
        for delta in self.request.transcript.flush():
            self.request.emit(delta)
        self.store(reuse_mixed)  # before the last event: an answer that ended is an answer whose prompt is on disk
        self.request.emit(Finished(reason, self.usage()))

    def usage(self) -> Usage:
        return Usage(
            len(self.prompt), self.hit_tokens, len(self.tokens), self.request.transcript.reasoning_tokens,
            self.miss_reason,
        )

    def look_up(self) -> None:
        """Restore the longest stored prefix that ends at or before c(n)."""
        if self.kv is not None:
            hit = self.kv.lookup(self.request.tenant, self.prompt)
            self.miss_reason = hit.reason
            if hit.tokens and hit.checkpoint is not None:
                if hit.tokens > self.boundary or hit.tokens % BLOCK_TOKENS:
                    raise EngineError(f"KV store answered {hit.tokens} tokens, c(n) is {self.boundary}")
                self.engine.restore(self.seq, hit.blocks, hit.checkpoint)
                self.hit_tokens = hit.tokens
        else:
            self.miss_reason = "off"
        self.metrics.prompt(len(self.prompt), self.hit_tokens)

    def prefill(self) -> Logits:
        """Whole chunks up to c(n), then the tail; returns the last token's logits."""
        logits: Logits | None = None
        for chunk in prompt_calls(self.prompt, self.seq.n_tokens):
            self.check_cancelled()
            logits = self.engine.prefill(self.seq, chunk)
            self.metrics.prefilled(len(chunk))
            if self.seq.n_tokens == self.boundary:
                self.checkpoint = self.checkpoint_at(self.boundary)
        if logits is None:
            raise EngineError("the engine gave no logits for the prompt's last token")
        return logits

    def decode(self, logits: Logits) -> FinishReason:
        """Sample until the end token, a stop string, max_tokens or a full context."""
        request, sampler, eos = self.request, Sampler(self.request.sampling), self.engine.spec.config.eos_token_id
        step_at_s = self.clock()
        while True:
            self.check_cancelled()
            token = sampler.choose(logits)
            self.tokens.append(token)
            now_s = self.clock()
            if len(self.tokens) == 1:
                self.metrics.first_token(now_s - request.queued_at_s)
            else:
                self.metrics.next_token(now_s - step_at_s)
            step_at_s = now_s
            if token == eos:
                return "stop"
            for delta in request.transcript.push(token):
                request.emit(delta)
            if request.transcript.stopped:
                return "stop"
            if len(self.tokens) >= request.sampling.max_tokens or self.seq.n_tokens >= self.engine.context_tokens:
                return "length"
            logits = self.engine.decode(self.seq, token)

    def store(self, reuse_mixed: bool) -> None:
        """Keep the prompt up to c(n), and with ``reuse_mixed`` the answer up to its last full block."""
        if self.kv is None:
            return
        if self.checkpoint is not None:
            self.put(self.prompt[: self.boundary], self.checkpoint)
        at = self.seq.checkpoint[0] if self.seq.checkpoint else 0
        if reuse_mixed and at > max(self.boundary, self.hit_tokens):
            ids = (self.prompt + self.tokens)[:at]
            self.put(ids, self.checkpoint_at(at))

    def put(self, ids: Sequence[int], checkpoint: bytes) -> None:
        if self.kv is None:
            return
        try:
            self.kv.put(self.request.tenant, ids, lambda index: self.engine.export_block(self.seq, index), checkpoint)
        except SolocardError as error:
            _log.warning("request %s: its prompt was not stored: %s", self.request.id, error)

    def checkpoint_at(self, position: int) -> bytes:
        newest = self.seq.checkpoint
        if newest is None or newest[0] != position:
            found = "none" if newest is None else str(newest[0])
            raise EngineError(f"the engine's newest checkpoint is at {found}, expected {position}")
        return newest[1]

    def check_cancelled(self) -> None:
        if self.request.cancelled.is_set():
            raise _Cancelled
