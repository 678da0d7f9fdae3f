"""Hard limits of the HTTP side: what a connection may cost before anyone has said who they are, and after.

Not covered: a total rate per client address, and the time a client may take to read a non-streamed answer.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from appliance.errors import RequestError

MAX_HEADER_BYTES = 16 << 10
MAX_JSON_DEPTH = 64
MAX_JSON_CONTAINERS = 200_000
MAX_CONNECTIONS = 256
HEADER_TIMEOUT_S = 10.0
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)
Receive = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and seconds. ``body_timeout_s`` bounds the whole body, ``stall_s`` one write to a streaming client."""

    max_body_bytes: int = 16 << 20
    body_timeout_s: float = 30.0
    keep_alive_s: float = 10.0
    stall_s: float = 30.0


class TimedProtocol(H11Protocol):
    """Closes connections that send nothing, or only part of a header, for ``HEADER_TIMEOUT_S``."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        if self._header_timer is None and self._between_requests():
            self._arm()
        super().data_received(data)
        if not self._between_requests():
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _arm(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

    def _disarm(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


class ClientGoneError(Exception):
    """The client closed its connection or stopped reading; there is nobody to answer."""


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """The request's body. Raises RequestError 413 or 408, ClientGoneError when the connection closed."""
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                body += message.get("body", b"")
                if len(body) > limits.max_body_bytes:
                    raise RequestError(
                        f"the request is larger than {limits.max_body_bytes} bytes (server.max_body_bytes)",
                        status=413, code="request_too_large",
                    )  # fmt: skip
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise RequestError(
            f"the request's body did not arrive within {limits.body_timeout_s:g} s", status=408, code="request_timeout"
        ) from None


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object of bounded depth and without NaN or infinity. Raises RequestError 400, never quoting the body."""
    _check_structure(body)
    try:
        raw = json.loads(body.decode(), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        raise _invalid("the body is not valid JSON (RFC 8259, UTF-8, finite numbers)") from None
    if not isinstance(raw, dict):
        raise _invalid("the body must be a JSON object")
    return raw


def _check_structure(body: bytes) -> None:
    """Depth and number of containers, before anything is built from the body."""
    depth = containers = 0
    for match in _STRUCTURE.finditer(body):
        mark = body[match.start()]
        if mark in b"[{":
            depth, containers = depth + 1, containers + 1
            if depth > MAX_JSON_DEPTH:
                raise _invalid(f"the body is nested deeper than {MAX_JSON_DEPTH}")
            if containers > MAX_JSON_CONTAINERS:
                raise _invalid(f"the body has more than {MAX_JSON_CONTAINERS} objects and lists")
        elif mark in b"]}":
            depth -= 1
        elif match.end() == match.start() + 1:  # a quote that begins no string
            raise _invalid("the body is not valid JSON (a string does not end)")


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _invalid(message: str) -> RequestError:
    return RequestError(message, code="invalid_json")
