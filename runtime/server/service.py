"""What every route needs: the model's names, the parts that answer, and the state a person would ask about."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from appliance.errors import RequestError
from appliance.wire import FULL, KvStatus, Status
from runtime.chat.encoding import Dialect, encode_chat
from runtime.chat.transcript import Transcript
from runtime.request import Event, Request
from runtime.scheduler import Scheduler
from runtime.server.auth import KeyCheck
from runtime.server.limits import Limits, parse_json
from runtime.server.openai import ChatRequest, parse_chat
from runtime.tokenizer import Tokenizer

TENANT_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What is served, fixed while the process lives. ``arithmetic`` is the fingerprint's part of that name."""

    model: str
    bundle_id: str
    encoding: str
    numerics: str
    backend: str
    device: str
    context_tokens: int
    version: str = ""
    arithmetic: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    profile: str = FULL

    @property
    def names(self) -> tuple[str, ...]:
        """Model names a request may use."""
        return (self.model, self.bundle_id)


@dataclass(slots=True)
class Service:
    """The parts behind the routes. ``state`` is written by the event loop only."""

    info: ServerInfo
    tokenizer: Tokenizer
    dialect: Dialect
    scheduler: Scheduler
    verify: KeyCheck
    kv_status: Callable[[], KvStatus]
    limits: Limits = field(default_factory=Limits)
    max_tokens_default: int = 1024
    tenant: str = TENANT_DEFAULT
    state: Literal["starting", "ready", "draining"] = "starting"
    started_s: int = field(default_factory=lambda: int(time.time()))

    def prepare(self, body: bytes, request_id: str, emit: Callable[[Event], None]) -> tuple[ChatRequest, Request]:
        """Parse, check, encode and measure a chat request: everything that can be refused before it is queued.

        Takes CPU time in proportion to the body, so the event loop runs it in a thread. Raises RequestError.
        """
        chat = parse_chat(parse_json(body), self.dialect, self.info.names)
        segments = encode_chat(chat.messages, self.dialect, thinking=chat.thinking, effort=chat.effort)
        segments = list(segments)
        self._max_tokens(self.tokenizer.least_tokens(segments), chat.max_tokens)  # before minutes of tokenizing
        prompt_ids = self.tokenizer.encode(segments)
        sampling = chat.sampling(self._max_tokens(len(prompt_ids), chat.max_tokens))
        transcript = Transcript(self.tokenizer, thinking=chat.thinking, stop=chat.stop)
        return chat, Request(request_id, prompt_ids, sampling, transcript, emit, self.tenant)

    def _max_tokens(self, prompt_tokens: int, asked: int | None) -> int:
        """What may be generated. Raises RequestError ``context_length_exceeded``; only a default is clipped."""
        left = self.info.context_tokens - prompt_tokens
        if left < (asked or 1):
            raise RequestError(
                f"this model's context is {self.info.context_tokens} tokens; the messages are {prompt_tokens} or more "
                f"and the answer may take {asked or 1}: shorten the messages or lower max_tokens",
                code="context_length_exceeded", param="messages",
            )  # fmt: skip
        return asked if asked is not None else min(self.max_tokens_default, left)

    def status(self) -> Status:
        """One look at the server, for the console and ``solocard status``."""
        info, scheduler, metrics = self.info, self.scheduler, self.scheduler.metrics
        prefill, decode = metrics.rates()
        return Status(
            bundle_id=info.bundle_id, model=info.model, profile=info.profile, version=info.version,
            encoding=info.encoding, numerics=info.numerics, backend=info.backend, device=info.device, state=self.state,
            uptime_s=metrics.uptime_s, window_s=metrics.window_s, prefill_tokens_per_s=prefill,
            decode_tokens_per_s=decode, running=scheduler.running, queued=scheduler.queued,
            queue_depth=scheduler.queue_depth, requests_total=metrics.requests("/v1/chat/completions"),
            prompt_tokens_total=metrics.tokens("prompt"), completion_tokens_total=metrics.tokens("completion"),
            context_tokens=info.context_tokens, kv=self.kv_status(), notes=info.notes,
        )  # fmt: skip

    def health(self) -> dict[str, Any]:
        """The body of GET /health: state, what is served, and whether the KV cache still writes."""
        kv = self.kv_status()
        return {
            "status": self.state, "model": self.info.model, "bundle": self.info.bundle_id,
            "profile": self.info.profile, "backend": self.info.backend, "device": self.info.device,
            "arithmetic": dict(self.info.arithmetic),
            "kv": {"enabled": kv.enabled, "writing": kv.writing, "reason": kv.reason,
                   "used_bytes": kv.used_bytes, "max_bytes": kv.max_bytes},
            "notes": list(self.info.notes),
        }  # fmt: skip

    def exposition(self) -> str:
        """The body of GET /metrics."""
        kv, scheduler = self.kv_status(), self.scheduler
        return scheduler.metrics.exposition({
            "requests_running": scheduler.running, "requests_waiting": scheduler.queued,
            "kv_used_bytes": kv.used_bytes, "kv_max_bytes": kv.max_bytes, "kv_writing": float(kv.writing),
            "ready": float(self.state == "ready"),
        })  # fmt: skip
