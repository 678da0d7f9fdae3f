"""Server-sent events: answers as they come, comments while nothing comes, and an end when the client goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from appliance.errors import RequestError, SolocardError
from runtime.request import Delta, Event, Failed, Finished
from runtime.server.limits import ClientGoneError, Limits, Receive
from runtime.server.openai import ChatWriter, error_body

Send = Callable[[dict[str, Any]], Awaitable[None]]
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Answer:
    """The events of one request, from the scheduler's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def emit(self, event: Event) -> None:
        """Called on any thread while the loop runs."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self, gone: asyncio.Task[None], timeout_s: float | None = None) -> list[Event]:
        """The events there are, waiting for the first; empty after ``timeout_s``. Raises ClientGoneError."""
        getting = asyncio.ensure_future(self._events.get())
        try:
            await asyncio.wait({getting, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not getting.done():
                getting.cancel()
        if gone.done():
            raise ClientGoneError
        if not getting.done() or getting.cancelled():
            return []
        events = [getting.result()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return events


async def client_gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        continue


def public_error(error: SolocardError) -> RequestError:
    """What a client may read of ``error``: our own words for the request, a plain sentence for anything inside."""
    if isinstance(error, RequestError):
        return error
    return RequestError(
        "the server could not answer this request; its log says why", status=500, code="internal_error",
        kind="server_error",
    )  # fmt: skip


async def stream_answer(answer: Answer, writer: ChatWriter, receive: Receive, send: Send, limits: Limits) -> Finished:
    """Write the whole stream. Raises ClientGoneError, or the request's error after it has been written."""
    gone = asyncio.ensure_future(client_gone(receive))
    try:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await _write(send, _data(writer.first()), limits)
        while True:
            events = await answer.next(gone, limits.keep_alive_s)
            body = b"".join(_event(writer, event) for event in events) or KEEP_ALIVE
            end = events[-1] if events and not isinstance(events[-1], Delta) else None
            await _write(send, body, limits, more=end is None)
            if isinstance(end, Finished):
                return end
            if isinstance(end, Failed):
                raise public_error(end.error)
    finally:
        gone.cancel()


async def _write(send: Send, body: bytes, limits: Limits, *, more: bool = True) -> None:
    try:
        async with asyncio.timeout(limits.stall_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})
    except TimeoutError:
        raise ClientGoneError from None


def _event(writer: ChatWriter, event: Event) -> bytes:
    if isinstance(event, Delta):
        return _data(writer.delta(event))
    if isinstance(event, Failed):
        return _data(error_body(public_error(event.error)))
    return b"".join(_data(chunk) for chunk in writer.last(event)) + DONE


def _data(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
