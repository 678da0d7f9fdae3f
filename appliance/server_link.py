"""The running server as the installer sees it: a pid file, a signal, and one GET on the admin socket."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from appliance.errors import SolocardError
from appliance.layout import Layout
from appliance.wire import ADMIN_SOCKET, KvReport, Status

MAX_ANSWER_BYTES = 4 << 20
POLL_S = 0.1
Answer = TypeVar("Answer")


class ServerDownError(SolocardError):
    """Nothing answers on the admin socket."""


@dataclass(frozen=True, slots=True)
class Restart:
    """How a running server took a new model. ``outcome``: down (none ran), ready, or late."""

    outcome: str
    message: str
    downtime_s: float = 0.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def read_status(home: Path, timeout_s: float = 2.0) -> Status:
    """``GET /admin/v1/status``; ServerDownError when nothing answers, or not with a status."""
    return _get(home, "/admin/v1/status", Status.from_dict, timeout_s)


def read_kv(home: Path, timeout_s: float = 10.0) -> KvReport:
    """``GET /admin/v1/kv``; ServerDownError when nothing answers, or not with a report (a server older than this)."""
    return _get(home, "/admin/v1/kv", KvReport.from_dict, timeout_s)


def _get(home: Path, target: str, parse: Callable[[dict[str, Any]], Answer], timeout_s: float) -> Answer:
    connection = _UnixConnection(home / ADMIN_SOCKET, timeout_s)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        body = response.read(MAX_ANSWER_BYTES)
        if response.status != 200:
            raise ServerDownError(f"{home / ADMIN_SOCKET} answered {response.status}")
        return parse(json.loads(body))
    except (OSError, http.client.HTTPException, ValueError, TypeError, AttributeError) as error:
        raise ServerDownError(f"no server answers on {home / ADMIN_SOCKET} ({error})") from None
    finally:
        connection.close()


def server_pid(home: Path) -> int | None:
    """Process id from ``run/serve.pid`` when that process exists and is ours to signal; else None."""
    try:
        pid = int(Layout(home).serve_pid.read_text().strip())
        if pid <= 1:
            return None
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return pid


def restart_server(home: Path, bundle_id: str, timeout_s: int) -> Restart:
    """SIGHUP a running server and wait until it serves ``bundle_id``; says plainly when none runs or it is late."""
    pid = server_pid(home)
    if pid is None:
        return Restart("down", "no server is running; `solocard serve` starts it with this model")
    try:
        read_status(home)
    except ServerDownError:
        return Restart("down", f"process {pid} (run/serve.pid) does not answer; start the server to serve this model")
    os.kill(pid, signal.SIGHUP)
    last_ready, deadline = time.monotonic(), time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            status = read_status(home)
        except ServerDownError:
            if server_pid(home) is None:
                message = "the server ended instead of coming back; see its log, then start it again"
                return Restart("late", message, time.monotonic() - last_ready)
            status = Status()
        if status.state == "ready" and status.bundle_id == bundle_id:
            downtime_s = time.monotonic() - last_ready
            return Restart("ready", f"the server serves it after {downtime_s:.1f} s without service", downtime_s)
        if status.state == "ready":
            last_ready = time.monotonic()
        time.sleep(POLL_S)
    message = f"the server does not serve it after {timeout_s} s; see `solocard status` and its log"
    return Restart("late", message, time.monotonic() - last_ready)
