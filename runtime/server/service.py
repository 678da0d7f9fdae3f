"""What every route needs: the model's names, the parts that answer, and the state a person would ask about."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from appliance.errors import RequestError
from appliance.wire import FULL, TENANT_DEFAULT, KvStatus, Status
from runtime.chat.content import Message
from runtime.chat.encoding import Dialect, encode_chat, leading_segments
from runtime.chat.replay import Replays
from runtime.chat.transcript import Transcript
from runtime.request import Event, Request
from runtime.schedule import whole_blocks
from runtime.scheduler import Scheduler
from runtime.server.auth import KeyCheck
from runtime.server.limits import Limits, parse_json
from runtime.server.openai import ChatRequest, parse_chat
from runtime.tokenizer import Segment, Tokenizer

_log = logging.getLogger("solocard.serve")


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
    replay_ids: Callable[[str, Sequence[str]], Mapping[str, Sequence[int]]] = lambda tenant, names: {}
    replay_answers: bool = False  # by their text too, not only tool calls by their ids
    is_approved: Callable[[str], bool] = lambda text: False  # a system prompt that all tenants may share
    state: Literal["starting", "ready", "draining"] = "starting"
    started_s: int = field(default_factory=lambda: int(time.time()))

    def prepare(
        self, body: bytes, request_id: str, emit: Callable[[Event], None], tenant: str = TENANT_DEFAULT
    ) -> tuple[ChatRequest, Request]:
        """Parse, check, encode and measure a chat request: everything that can be refused before it is queued.

        Takes CPU time in proportion to the body, so the event loop runs it in a thread. Raises RequestError.
        """
        chat = parse_chat(parse_json(body), self.dialect, self.info.names)
        segments = self._encode(chat, tenant)
        self._max_tokens(self.tokenizer.least_tokens(segments), chat.max_tokens)  # before minutes of tokenizing
        leading = leading_segments(segments)
        prompt_ids = self.tokenizer.encode(segments[:leading])
        anchor_tokens = whole_blocks(len(prompt_ids))
        prompt_ids += self.tokenizer.encode(segments[leading:])
        sampling = chat.sampling(self._max_tokens(len(prompt_ids), chat.max_tokens))
        transcript = Transcript(self.tokenizer, thinking=chat.thinking, stop=chat.stop, replayed=self.replay_answers)
        shared_tokens = self._shared_tokens(chat, prompt_ids) if anchor_tokens else 0
        return chat, Request(
            request_id, prompt_ids, sampling, transcript, emit, tenant, anchor_tokens, shared_tokens
        )  # fmt: skip

    def _encode(self, chat: ChatRequest, tenant: str) -> list[Segment]:
        """The prompt, with answers of before as they were sampled where that is known."""
        replays = Replays(self.tokenizer, texts=self.replay_answers)
        segments = encode_chat(
            chat.messages, self.dialect, thinking=chat.thinking, effort=chat.effort, replay=replays.collect
        )  # fmt: skip
        try:
            if not replays.look_up(lambda names: self.replay_ids(tenant, names)):
                return segments
        except Exception:
            _log.exception("sampled answers cannot be read from the KV cache; going on with the tokenizer's way")
            return segments
        return encode_chat(
            chat.messages, self.dialect, thinking=chat.thinking, effort=chat.effort, replay=replays.ids
        )  # fmt: skip

    def _shared_tokens(self, chat: ChatRequest, prompt_ids: Sequence[int]) -> int:
        """How much of the prompt is nothing but an approved system prompt (and our template), in whole blocks.

        Compared in ids with a prompt that has only that text: what follows it, tools too, belongs to the tenant.
        """
        first = chat.messages[0]
        if first.role != "system" or not self.is_approved(first.text):
            return 0
        alone = encode_chat(
            [Message("system", first.text)], self.dialect, thinking=chat.thinking, effort=chat.effort
        )  # fmt: skip
        approved = self.tokenizer.encode(alone[: leading_segments(alone)])
        same = next((i for i, pair in enumerate(zip(approved, prompt_ids, strict=False)) if pair[0] != pair[1]),
                    min(len(approved), len(prompt_ids)))  # fmt: skip
        return whole_blocks(same)

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
