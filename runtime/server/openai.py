"""OpenAI's chat completions on the wire: request fields in, answer, chunk and error bodies out.

Unknown fields are ignored. A field we know and do not serve is refused when ignoring it would change what the answer
means; docs/http-api.md lists each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appliance.errors import RequestError
from runtime.chat.content import Message, parse_messages
from runtime.chat.encoding import Dialect
from runtime.request import Delta, Finished, Usage
from runtime.sampler import MAX_STOP_CHARS, MAX_STOP_STRINGS, MAX_TEMPERATURE, SamplingParams

SEED_RANGE = (-(1 << 63), (1 << 64) - 1)
MAX_COMPLETION_TOKENS = 1 << 31


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat completion as asked for; ``max_tokens`` None means the server's default, clipped to the context."""

    messages: Sequence[Message]
    thinking: bool
    effort: str
    temperature: float
    top_p: float
    seed: int | None
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    def sampling(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_p, self.seed, max_tokens, self.stop)


def parse_chat(raw: Mapping[str, Any], dialect: Dialect, models: Sequence[str]) -> ChatRequest:
    """Check every field. ``models`` are the names this server answers to. Raises RequestError naming the field."""
    model = raw.get("model")
    if model is not None and model not in models:
        raise RequestError(
            f"this server serves {models[0]} and no other model", status=404, code="model_not_found", param="model"
        )
    _refuse_unserved(raw)
    stream = _flag(raw, "stream")
    messages = [_as_system(message) for message in parse_messages(raw.get("messages"))]
    if messages[-1].role == "assistant":
        raise _wrong("messages", "must not end with an assistant message; completing one is not served yet")
    thinking, effort = _thinking(raw, dialect)
    return ChatRequest(
        messages, thinking, effort, _number(raw, "temperature", 0, MAX_TEMPERATURE, 1.0),
        _number(raw, "top_p", 0, 1, 1.0), _integer(raw, "seed", *SEED_RANGE), _max_tokens(raw), _stop(raw), stream,
        _include_usage(raw, stream),
    )  # fmt: skip


def _as_system(message: Message) -> Message:
    """OpenAI's developer role is its newer name for system; V4's own is a kind of user turn that no client means."""
    return dataclasses.replace(message, role="system") if message.role == "developer" else message


def _refuse_unserved(raw: Mapping[str, Any]) -> None:
    if raw.get("n") not in (None, 1) or raw.get("n") is True:
        raise _wrong("n", "must be 1: one answer per request is served")
    for field in ("tools", "functions"):
        if raw.get(field):
            raise RequestError("tool calls are not served yet; leave out tools", param=field, code="unsupported_value")
    for field in ("logprobs", "top_logprobs", "logit_bias"):
        if raw.get(field):
            raise RequestError(f"{field} is not served yet; leave it out", param=field, code="unsupported_value")
    wanted = raw.get("response_format")
    if wanted is not None and wanted != {"type": "text"}:
        raise RequestError(
            "response_format other than text is not served yet; ask for JSON in the prompt and check the answer",
            param="response_format", code="unsupported_value",
        )  # fmt: skip


def _thinking(raw: Mapping[str, Any], dialect: Dialect) -> tuple[bool, str]:
    """On unless ``thinking.type`` is disabled or ``reasoning_effort`` is none."""
    switch = raw.get("thinking")
    kind = "enabled" if switch is None else switch.get("type") if isinstance(switch, dict) else None
    if kind not in ("enabled", "disabled"):
        raise _wrong("thinking", 'must be {"type": "enabled"} or {"type": "disabled"}')
    effort = raw.get("reasoning_effort")
    if effort is not None and not isinstance(effort, str):
        raise _wrong("reasoning_effort", "must be a string")
    if effort == "none":
        return False, dialect.default_effort
    return kind == "enabled", dialect.check_effort(dialect.default_effort if effort is None else effort)


def _max_tokens(raw: Mapping[str, Any]) -> int | None:
    newer = _integer(raw, "max_completion_tokens", 1, MAX_COMPLETION_TOKENS)
    return newer if newer is not None else _integer(raw, "max_tokens", 1, MAX_COMPLETION_TOKENS)


def _stop(raw: Mapping[str, Any]) -> tuple[str, ...]:
    stop = raw.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOP_STRINGS:
        raise _wrong("stop", f"must be a string or a list of at most {MAX_STOP_STRINGS} strings")
    if not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops):
        raise _wrong("stop", f"must hold strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _include_usage(raw: Mapping[str, Any], stream: bool) -> bool:
    options = raw.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise _wrong("stream_options", "is only allowed with stream: true")
    if not isinstance(options, dict):
        raise _wrong("stream_options", "must be an object")
    return _flag(options, "include_usage", "stream_options.include_usage")


def _flag(raw: Mapping[str, Any], key: str, field: str = "") -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise _wrong(field or key, "must be true or false")
    return bool(value)


def _number(raw: Mapping[str, Any], field: str, least: float, most: float, default: float) -> float:
    value = raw.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise _wrong(field, f"must be a number from {least:g} to {most:g}")
    return float(value)


def _integer(raw: Mapping[str, Any], field: str, least: int, most: int) -> int | None:
    value = raw.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _wrong(field, f"must be a whole number from {least} to {most}")
    return value


def _wrong(field: str, what: str) -> RequestError:
    return RequestError(f"{field} {what}", param=field, code="invalid_value")


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}}


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage with DeepSeek's two cache fields; hit + miss = prompt. Of ours: why not all that could hit did."""
    cached: dict[str, Any] = {"cached_tokens": usage.hit_tokens}
    if usage.miss_reason:
        cached["cache_miss_reason"] = usage.miss_reason
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_cache_hit_tokens": usage.hit_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.hit_tokens,
        "prompt_tokens_details": cached,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


@dataclass(frozen=True, slots=True)
class ChatWriter:
    """Bodies of one answer. ``created_s`` is Unix time; ``fingerprint`` names the bundle that answered."""

    id: str
    model: str
    fingerprint: str
    created_s: int
    thinking: bool
    include_usage: bool = False

    def completion(self, deltas: Sequence[Delta], finished: Finished) -> dict[str, Any]:
        """The whole answer, not streamed."""
        text = {kind: "".join(d.text for d in deltas if d.kind == kind) for kind in ("reasoning", "content")}
        message: dict[str, Any] = {"role": "assistant", "content": text["content"], "refusal": None}
        if self.thinking:
            message["reasoning_content"] = text["reasoning"]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.reason}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage_body(finished.usage)}

    def first(self) -> dict[str, Any]:
        """The chunk that opens a stream."""
        delta: dict[str, Any] = {"role": "assistant", "content": "" if not self.thinking else None}
        if self.thinking:
            delta["reasoning_content"] = ""
        return self._chunk(delta)

    def delta(self, delta: Delta) -> dict[str, Any]:
        return self._chunk({"reasoning_content" if delta.kind == "reasoning" else "content": delta.text})

    def last(self, finished: Finished) -> list[dict[str, Any]]:
        """The chunk with the reason, and with ``include_usage`` one more that has the usage and no choices."""
        chunks = [self._chunk({}, finished.reason)]
        if self.include_usage:
            usage = {"choices": [], "usage": usage_body(finished.usage)}
            chunks.append(self._head("chat.completion.chunk") | usage)
        return chunks

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self.include_usage else chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created_s, "model": self.model,
            "system_fingerprint": self.fingerprint,
        }  # fmt: skip


def model_body(name: str, bundle_id: str, context_tokens: int, created_s: int) -> dict[str, Any]:
    """One entry of GET /v1/models; ``bundle`` says which release answers to the name."""
    return {
        "id": name, "object": "model", "created": created_s, "owned_by": "solocard", "bundle": bundle_id,
        "context_length": context_tokens,
    }  # fmt: skip
