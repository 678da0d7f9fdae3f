"""The admin socket: read-only, for whoever may open a file of mode 0600. No key, no way to change anything.

``GET /admin/v1/status`` → appliance.wire.Status as JSON; ``GET /admin/v1/kv`` → appliance.wire.KvReport;
``GET /admin/v1/log?lines=N`` → the log's last lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

from starlette.responses import JSONResponse

from appliance.errors import BusyError, UsageError
from appliance.wire import KvReport
from runtime.server.http import App, Scope
from runtime.server.limits import Receive
from runtime.server.service import Service
from runtime.server.sse import Send

MAX_LOG_LINES = 2000
DEFAULT_LOG_LINES = 200
MAX_LOG_BYTES = 1 << 20  # looked at from the end
_SOCKET_PATH_BYTES = 107  # Linux sun_path without its zero


def build_admin_app(service: Service, log_path: Path, kv_report: Callable[[], KvReport] = KvReport) -> App:
    """The ASGI application behind ``run/admin.sock``; ``kv_report`` reads the index, in a thread of its own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/admin/v1/kv" and scope["method"] in ("GET", "HEAD"):
            status: int = 200
            body: object = (await asyncio.to_thread(kv_report)).to_dict()
        else:
            status, body = _answer(service, log_path, scope)
        response = JSONResponse(body, status)
        await send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": bytes(response.body), "more_body": False})

    return app


def _answer(service: Service, log_path: Path, scope: Scope) -> tuple[int, object]:
    if scope["method"] not in ("GET", "HEAD"):
        return 405, {"error": "the admin socket only answers GET"}
    if scope["path"] == "/admin/v1/status":
        return 200, service.status().to_dict()
    if scope["path"] == "/admin/v1/log":
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("lines", [str(DEFAULT_LOG_LINES)])[0]
        if not asked.isascii() or not asked.isdigit() or len(asked) > 9 or not 1 <= int(asked) <= MAX_LOG_LINES:
            return 400, {"error": f"lines must be 1 to {MAX_LOG_LINES}"}
        return 200, {"lines": tail_lines(log_path, int(asked))}
    return 404, {"error": "known paths: /admin/v1/status, /admin/v1/kv, /admin/v1/log"}


def tail_lines(path: Path, count: int) -> list[str]:
    """The last ``count`` lines of a text file, fewer where ``MAX_LOG_BYTES`` hold fewer; none when it is not there."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - MAX_LOG_BYTES)
            file.seek(start)
            data = file.read(MAX_LOG_BYTES)
    except FileNotFoundError:
        return []
    lines = data.decode(errors="replace").splitlines()
    return lines[1 if start else 0 :][-count:]


def bind_admin_socket(path: Path) -> socket.socket:
    """A listening unix socket of mode 0600, never open to others on the way there.

    Raises BusyError when a server answers there already, UsageError when the path is too long for a socket.
    """
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise UsageError(f"{path}: too long for a unix socket ({_SOCKET_PATH_BYTES} bytes); shorten SOLOCARD_HOME")
    if _answers(path):
        raise BusyError(f"{path}: another Solocard server is running with this SOLOCARD_HOME; stop it first")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(16)
    return listener


def _answers(path: Path) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:  # nothing there, or a socket whose server is gone
            return False
        return True
