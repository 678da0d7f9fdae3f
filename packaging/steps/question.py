"""One question over HTTP, its answer streamed to the terminal: what any OpenAI client does, in the standard library."""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from environment import SetupError
from progress import say

ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """What came, and how fast."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    first_s: float
    total_s: float

    def summary(self) -> str:
        after_first = max(self.total_s - self.first_s, 1e-9)
        rate = f", {(self.answer_tokens - 1) / after_first:.1f} tokens/s" if self.answer_tokens > 1 else ""
        return (
            f"{self.prompt_tokens} prompt tokens ({self.cached_tokens} from the KV cache), "
            f"{self.answer_tokens} answer tokens, first after {self.first_s:.1f} s{rate}"
        )


def health(port: int) -> dict[str, Any] | None:
    """What /health says, or None while nothing answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        raw = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return raw if isinstance(raw, dict) else None


def key_works(port: int, key: str) -> bool:
    """Whether the server takes this API key."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        return connection.getresponse().status == 200
    finally:
        connection.close()


def body_of(question: str, max_tokens: int) -> dict[str, Any]:
    """The request: no thinking, the most likely token each time."""
    return {
        "messages": [{"role": "user", "content": question}], "thinking": {"type": "disabled"}, "temperature": 0,
        "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def ask(port: int, key: str, question: str, max_tokens: int) -> Answer:
    """Ask and print the answer as it comes. SetupError with what the server said when it says no."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    started_s = time.monotonic()
    first_s = 0.0
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body_of(question, max_tokens)), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise SetupError(f"the server answered {response.status}: {response.read(2000).decode('utf-8', 'replace')}")
        for event in events(response):
            if "error" in event:
                raise SetupError(f"the server ended the answer: {event['error'].get('message')}")
            usage = event.get("usage") or usage
            text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if text:
                first_s = first_s or time.monotonic() - started_s
                pieces.append(text)
                _show(text)
    finally:
        connection.close()
    say()
    if not usage:
        raise SetupError("the stream ended before the server said how many tokens it was")
    return Answer(
        "".join(pieces), usage["prompt_tokens"], usage["prompt_cache_hit_tokens"], usage["completion_tokens"],
        first_s, time.monotonic() - started_s,
    )  # fmt: skip


def events(lines: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects of an event stream, up to [DONE]; comments and empty lines are skipped."""
    for line in lines:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


def printable(text: str) -> str:
    """Random weights may answer with control characters; a terminal gets dots instead."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


def _show(text: str) -> None:
    encoding = sys.stdout.encoding or "ascii"
    sys.stdout.write(printable(text).encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
