"""Routes of the public HTTP endpoint, behind one gate that checks, counts and logs every request.

The log line has names, counts and times; nothing a client wrote and nothing the model answered is in it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response

from appliance.errors import RequestError, SolocardError
from runtime.request import Delta, Failed, Finished, Request, Usage
from runtime.server.auth import NOBODY, Caller, check_host, header_map, identify
from runtime.server.limits import MAX_HEADER_BYTES, ClientGoneError, Receive, read_body
from runtime.server.openai import ChatWriter, error_body, model_body
from runtime.server.service import Service
from runtime.server.sse import Answer, Send, client_gone, public_error, stream_answer

Scope = dict[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
CLIENT_GONE = 499  # only ever in the log and the counters
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_log = logging.getLogger("solocard.serve")


@dataclass(slots=True)
class Exchange:
    """One request and its answer as the log sees them."""

    id: str
    method: str
    path: str
    route: str = "other"
    caller: Caller = NOBODY
    status: int = 0
    usage: Usage | None = None
    reason: str = "-"
    started_s: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        usage = self.usage or Usage(0)
        counts = (
            f" prompt={usage.prompt_tokens} hit={usage.hit_tokens} miss={usage.prompt_tokens - usage.hit_tokens}"
            f" out={usage.completion_tokens} kv={usage.miss_reason.replace(' ', '') or 'hit'} finish={self.reason}"
            f" tenant={self.caller.tenant}"
        )
        return (
            f"{self.id} key={self.caller.name} {self.method} {self.route} {self.status}"
            f"{counts if self.usage else ''} total_s={time.monotonic() - self.started_s:.3f}"
        )


def build_app(service: Service) -> App:
    """The ASGI application of ``service``: only HTTP, no lifespan, no other protocol."""
    routes: dict[str, dict[str, Callable[[Exchange, Receive, Send], Awaitable[None]]]] = {
        "/v1/chat/completions": {"POST": _Chat(service)},
        "/v1/models": {"GET": _Models(service)},
        "/health": {"GET": _Health(service)},
        "/metrics": {"GET": _Metrics(service)},
    }

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(_request_id(scope), scope["method"], scope["path"])
        reply = _Reply(exchange, send)
        try:
            headers = header_map(scope["headers"])
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
                raise RequestError(
                    f"the headers are larger than {MAX_HEADER_BYTES} bytes", status=431, code="headers_too_large"
                )
            check_host(headers)
            exchange.caller = identify(exchange.path, headers, service.verify)
            handler = _route(routes, service, exchange)
            await handler(exchange, receive, reply.send)
        except ClientGoneError:
            exchange.status = CLIENT_GONE
        except SolocardError as error:
            await reply.fail(public_error(error))
        except Exception:
            _log.exception("%s failed", exchange.id)
            await reply.fail(public_error(SolocardError()))
        finally:
            service.scheduler.metrics.response(exchange.route, exchange.status)
            _log.info("%s", exchange.line())

    return app


class _Reply:
    """Sends, and remembers the status; adds the request id to every response."""

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self._exchange, self._send = exchange, send

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._exchange.status = message["status"]
            message = message | {"headers": [*message["headers"], (b"x-request-id", self._exchange.id.encode())]}
        await self._send(message)

    async def fail(self, error: RequestError) -> None:
        """An error body where nothing was sent yet; a stream has already written its own."""
        if self._exchange.status:
            self._exchange.reason = error.code or "error"
            return
        headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        await _respond(JSONResponse(error_body(error), error.status, headers), self.send)


def _request_id(scope: Scope) -> str:
    given = header_map(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"


def _route(
    routes: dict[str, dict[str, Callable[[Exchange, Receive, Send], Awaitable[None]]]], service: Service,
    exchange: Exchange,
) -> Callable[[Exchange, Receive, Send], Awaitable[None]]:  # fmt: skip
    methods = routes.get(exchange.path)
    if methods is None and exchange.path.startswith("/v1/models/"):
        methods = {"GET": _Model(service)}
        exchange.route = "/v1/models/{id}"
    elif methods is not None:
        exchange.route = exchange.path
    if methods is None:
        raise RequestError("there is no such path here; docs/http-api.md lists all", status=404, code="not_found")
    method = "GET" if exchange.method == "HEAD" else exchange.method
    if method not in methods:
        raise RequestError(f"this path takes {', '.join(methods)}", status=405, code="method_not_allowed")
    return methods[method]


async def _respond(response: Response, send: Send) -> None:
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": False})


@dataclass(frozen=True, slots=True)
class _Health:
    service: Service

    async def __call__(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        await _respond(JSONResponse(self.service.health(), 200 if self.service.state == "ready" else 503), send)


@dataclass(frozen=True, slots=True)
class _Metrics:
    service: Service

    async def __call__(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        await _respond(PlainTextResponse(self.service.exposition(), media_type="text/plain; version=0.0.4"), send)


@dataclass(frozen=True, slots=True)
class _Models:
    service: Service

    async def __call__(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        await _respond(JSONResponse({"object": "list", "data": [_model(self.service)]}), send)


@dataclass(frozen=True, slots=True)
class _Model:
    service: Service

    async def __call__(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        if exchange.path.removeprefix("/v1/models/") not in self.service.info.names:
            raise RequestError(f"this server serves {self.service.info.model}", status=404, code="model_not_found")
        await _respond(JSONResponse(_model(self.service)), send)


def _model(service: Service) -> dict[str, Any]:
    info = service.info
    return model_body(info.model, info.bundle_id, info.context_tokens, service.started_s)


@dataclass(frozen=True, slots=True)
class _Chat:
    """POST /v1/chat/completions: prepare in a thread, queue, then stream or collect while the client stays."""

    service: Service

    async def __call__(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        service, answer = self.service, Answer()
        body = await read_body(receive, service.limits)
        chat, request = await asyncio.to_thread(
            service.prepare, body, exchange.id, answer.emit, exchange.caller.tenant
        )  # fmt: skip
        writer = ChatWriter(
            f"chatcmpl-{secrets.token_hex(12)}", service.info.model, service.info.bundle_id, int(time.time()),
            chat.thinking, chat.include_usage,
        )  # fmt: skip
        service.scheduler.submit(request)
        exchange.usage = Usage(len(request.prompt_ids), miss_reason="unknown")
        try:
            if chat.stream:
                finished = await stream_answer(answer, writer, receive, send, service.limits)
            else:
                finished = await self._collect(request, answer, writer, receive, send)
        except BaseException:
            service.scheduler.cancel(request)  # the client is gone, the stream broke, or the server stops
            exchange.usage = request.usage or exchange.usage
            raise
        exchange.usage, exchange.reason = finished.usage, finished.reason

    async def _collect(
        self, request: Request, answer: Answer, writer: ChatWriter, receive: Receive, send: Send
    ) -> Finished:  # fmt: skip
        gone = asyncio.ensure_future(client_gone(receive))
        deltas: list[Delta] = []
        try:
            while True:
                for event in await answer.next(gone):
                    if isinstance(event, Delta):
                        deltas.append(event)
                    elif isinstance(event, Failed):
                        raise event.error
                    else:
                        await _respond(JSONResponse(writer.completion(deltas, event)), send)
                        return event
        finally:
            gone.cancel()
