"""One request on its sequence: look up, prefill, decode, keep; every engine call on the scheduler's thread.

Schedule of a prompt of n tokens (design, KV on disk): restore to the boundary B ≤ c(n) = 256·⌊(n−1)/256⌋, then one
prefill call per whole chunk [B, B+256) … up to c(n), one for the tail of 1 … 256 tokens, then decode. A hit and a cold
run therefore make the same calls from B on. The last event comes when what the request leaves behind is durable.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appliance.errors import EngineError
from appliance.model import BLOCK_TOKENS
from runtime.keep import Keeper
from runtime.kv.job import KvHit, Note
from runtime.kv.writer import Writer
from runtime.metrics import Metrics
from runtime.request import EngineLike, Finished, FinishReason, KvLike, Logits, Request, SequenceLike, Usage
from runtime.sampler import Sampler
from runtime.schedule import prompt_boundary, prompt_calls

_log = logging.getLogger("solocard.serve")
_MISS = functools.partial(KvHit, 0, 0, None, None, False)


@dataclass(frozen=True, slots=True)
class Parts:
    """What every request of a server runs on; ``suspending`` says whether an exact tail is kept at the end."""

    engine: EngineLike[Any]
    kv: KvLike | None
    writer: Writer | None
    metrics: Metrics
    clock: Callable[[], float]
    reuse_mixed: bool
    suspending: Callable[[], bool]


class _Cancelled(Exception):  # noqa: N818 (control flow of one request, never shown)
    pass


class Run:
    """One request, from lookup to the last event; :meth:`run` is called once."""

    def __init__(self, request: Request, parts: Parts) -> None:
        self._request, self._parts = request, parts
        self._engine, self._metrics, self._clock = parts.engine, parts.metrics, parts.clock
        self._ids = list(request.prompt_ids)  # of the prompt, then sampled; the last one may not be in the sequence yet
        self._prompt_tokens = len(self._ids)
        self._hit = _MISS("policy", 0)
        self._logits: Logits | None = None  # after the sequence's last token
        self._seq: SequenceLike
        self._keeper: Keeper | None = None

    def run(self) -> None:
        """Emits deltas and Finished. Raises what the engine raises; nothing is emitted for a cancelled request."""
        with self._pinned(), self._open():
            try:
                self._look_up()
                self._prefill()
                reason = self._decode()
            except _Cancelled:
                self._metrics.cancelled()
                self._finish(suspend=self._parts.suspending(), replays=self._replays())
                return
            except BaseException:
                self._finish(suspend=False)
                raise
            for delta in self._request.transcript.flush():
                self._request.emit(delta)
            self._finish(suspend=self._parts.suspending(), replays=self._replays())
        self._request.emit(Finished(reason, self._usage()))

    @property
    def _sampled(self) -> Sequence[int]:
        return self._ids[self._prompt_tokens :]

    def _usage(self) -> Usage:
        return Usage(
            self._prompt_tokens, self._hit.tokens, len(self._sampled), self._request.transcript.reasoning_tokens,
            self._hit.reason,
        )  # fmt: skip

    # -- the sequence

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        self._seq = self._engine.open()
        try:
            yield
        finally:
            self._engine.close(self._seq)

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[None]:
        """Nothing of this prompt's chain is reclaimed before the request's own blocks stand behind it."""
        kv, request = self._parts.kv, self._request
        with contextlib.ExitStack() as stack:
            if kv is not None:
                try:
                    stack.enter_context(kv.pin(request.tenant, self._ids, request.shared_tokens))
                except Exception:
                    _log.exception("request %s: its prompt is not pinned in the KV cache", request.id)
            yield

    def _look_up(self) -> None:
        """Resume from the longest stored part of the prompt; a cache that fails is a cache that has nothing."""
        kv, request = self._parts.kv, self._request
        if kv is not None:
            try:
                self._hit = kv.lookup(
                    request.tenant, self._ids, functools.partial(self._engine.import_block, self._seq),
                    replay_tokens=self._engine.replay_tokens, tails=self._parts.reuse_mixed,
                    shared_tokens=request.shared_tokens,
                )  # fmt: skip
                self._resume()
            except Exception:
                _log.exception("request %s: its prompt cannot be restored", request.id)
                self._engine.close(self._seq)
                self._seq, self._hit = self._engine.open(), _MISS("corrupt", 0)
        self._metrics.prompt(self._prompt_tokens, self._hit.tokens)
        self._metrics.looked_up(self._hit.reason)
        request.usage = self._usage()
        if self._parts.writer is not None:
            self._keeper = Keeper(
                request, self._engine, self._seq, self._parts.writer.submit, self._hit,
                reuse_mixed=self._parts.reuse_mixed,
            )  # fmt: skip

    def _resume(self) -> None:
        hit, boundary = self._hit, prompt_boundary(self._prompt_tokens)
        usable = hit.tokens < self._prompt_tokens if hit.tail is not None else hit.tokens <= boundary
        if not usable or (hit.tail is None and hit.tokens % BLOCK_TOKENS):
            raise EngineError(f"the KV store answered {hit.tokens} tokens of {self._prompt_tokens}, c(n) is {boundary}")
        self._engine.resume(self._seq, hit.tokens, checkpoint=hit.checkpoint, tail=hit.tail, blocks=hit.blocks)

    # -- computing

    def _prefill(self) -> None:
        """Whole chunks up to c(n), then the tail; leaves the last token's logits."""
        for chunk in prompt_calls(self._ids, self._seq.n_tokens):
            self._check_cancelled()
            self._logits = self._engine.prefill(self._seq, chunk)
            self._metrics.prefilled(len(chunk))
            self._keep()

    def _decode(self) -> FinishReason:
        """Sample until the end token, a stop string, max_tokens or a full context."""
        request, sampler, eos = self._request, Sampler(self._request.sampling), self._engine.spec.config.eos_token_id
        step_at_s = self._clock()
        while True:
            self._check_cancelled()
            if self._logits is None:
                raise EngineError("the engine gave no logits for the sequence's last token")
            token = sampler.choose(self._logits)
            self._ids.append(token)
            step_at_s = self._note_step(step_at_s)
            request.usage = self._usage()  # for the log, when the client goes away
            if token == eos:
                return "stop"
            for delta in request.transcript.push(token):
                request.emit(delta)
            if request.transcript.stopped:
                return "stop"
            if len(self._sampled) >= request.sampling.max_tokens or self._seq.n_tokens >= self._engine.context_tokens:
                return "length"
            self._logits = self._engine.decode(self._seq, token)
            self._keep()

    def _note_step(self, before_s: float) -> float:
        now_s = self._clock()
        if len(self._ids) == self._prompt_tokens + 1:
            self._metrics.first_token(now_s - self._request.queued_at_s)
        else:
            self._metrics.next_token(now_s - before_s)
        return now_s

    def _check_cancelled(self) -> None:
        if self._request.cancelled.is_set():
            raise _Cancelled

    # -- keeping

    def _keep(self) -> None:
        if self._keeper is not None:
            self._keeper.after_call(self._ids)

    def _replays(self) -> Mapping[str, Sequence[int]]:
        """Of the answer so far; none where answers are not reused, there a history takes the tokenizer's own way."""
        return self._request.transcript.replays(self._sampled) if self._parts.reuse_mixed else {}

    def _finish(self, *, suspend: bool, replays: Mapping[str, Sequence[int]] | None = None) -> None:
        """What ended is on disk: also for a client that gave up, because it will ask again at once."""
        self._request.usage = self._usage()
        if self._keeper is None:
            return
        note = Note(time.time(), self._prompt_tokens, self._hit.tokens, len(self._sampled), self._hit.reason)
        self._keeper.finish(
            self._ids, note, tail_after=self._logits if suspend else None, replays=replays or {}
        )  # fmt: skip
        if None in self._keeper.wait():
            _log.warning("request %s: the disk takes too long; its prompt may be lost", self._request.id)
