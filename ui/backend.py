"""Where the console reads from: the server's admin socket, or a recording. Reading only; nothing here changes anything.

Both backends block for at most ``TIMEOUT_S`` and are called from worker threads.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from appliance.errors import SolocardError, UsageError
from appliance.wire import KvMiss, KvReport, KvStatus, KvTenant, Status

TIMEOUT_S = 3.0
MAX_ANSWER_BYTES = 4 * 1024 * 1024
MAX_REPLAY_BYTES = 256 * 1024 * 1024
MAX_SOCKET_PATH_BYTES = 107  # sun_path of Linux less its final zero


class ServerDownError(SolocardError):
    """Nothing listens on the admin socket: the server is not running."""


class AnswerError(SolocardError):
    """Something listens, but this console may not read it or cannot understand what it says."""


class ConsoleBackend(Protocol):
    """What the console needs to read."""

    name: str  # "live" or "replay", shown in the title line

    def status(self) -> Status:
        """The server now. Raises ServerDownError or AnswerError."""

    def log(self, lines: int) -> tuple[str, ...]:
        """The newest ``lines`` lines of the server's log, oldest first. Raises as ``status``."""

    def kv(self) -> KvReport:
        """What the KV cache holds. Raises as ``status``."""


def read_status(raw: dict[str, Any]) -> Status:
    """A Status whose every field has the type of its default; raises TypeError or ValueError naming the field."""
    status = Status.from_dict(raw)
    _check_fields("", status, Status())
    _check_fields("kv.", status.kv, KvStatus())
    for note in status.notes:
        _check_value("notes", note, "")
    _check_counts("kv.miss_reasons", status.kv.miss_reasons)
    return status


def read_report(raw: dict[str, Any]) -> KvReport:
    """As ``read_status``, of a KvReport: what ``GET /admin/v1/kv`` answers and ``solocard kv stats --json`` prints."""
    report = KvReport.from_dict(raw)
    _check_fields("", report, KvReport())
    _check_fields("status.", report.status, KvStatus())
    for tenant in report.tenants:
        _check_fields("tenants.", tenant, KvTenant())
    for miss in report.misses:
        _check_fields("misses.", miss, KvMiss())
    for problem in report.problems:
        _check_value("problems", problem, "")
    for name in ("roles", "logged_reasons"):
        _check_counts(name, getattr(report, name))
    _check_counts("status.miss_reasons", report.status.miss_reasons)
    return report


def _check_counts(name: str, counts: dict[str, int]) -> None:
    for key, value in counts.items():
        _check_value(name, value, 0)
        _check_value(name, key, "")


def _check_fields(prefix: str, value: Any, template: Any) -> None:
    for field in dataclasses.fields(template):
        _check_value(prefix + field.name, getattr(value, field.name), getattr(template, field.name))


def _check_value(name: str, value: Any, template: Any) -> None:
    if isinstance(template, (int, float)) and not isinstance(template, bool):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, not a number")
    elif not isinstance(value, type(template)):
        raise ValueError(f"{name} is {value!r}, not {type(template).__name__}")


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix stream socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("solocard", timeout=timeout_s)
        self._path, self._timeout_s = path, timeout_s

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(str(self._path))


class SocketBackend:
    """Reads ``GET /admin/v1/…`` from the admin socket at ``path``."""

    name = "live"

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S) -> None:
        if len(bytes(path)) > MAX_SOCKET_PATH_BYTES:
            raise UsageError(
                f"{path}: longer than the {MAX_SOCKET_PATH_BYTES} bytes a unix socket can have; choose a shorter home"
            )
        self.path, self.timeout_s = path, timeout_s

    def status(self) -> Status:
        try:
            return read_status(self._get("/admin/v1/status"))
        except (TypeError, ValueError) as error:
            raise AnswerError(f"{self.path}: /admin/v1/status is not a status: {error}") from error

    def log(self, lines: int) -> tuple[str, ...]:
        answer = self._get(f"/admin/v1/log?lines={lines}")
        listed = answer.get("lines")
        if not isinstance(listed, list):
            raise AnswerError(f"{self.path}: /admin/v1/log has no list of lines")
        return tuple(str(line) for line in listed[-lines:])

    def kv(self) -> KvReport:
        try:
            return read_report(self._get("/admin/v1/kv"))
        except (TypeError, ValueError) as error:
            raise AnswerError(f"{self.path}: /admin/v1/kv is not a report: {error}") from error

    def _get(self, target: str) -> dict[str, Any]:
        connection = UnixConnection(self.path, self.timeout_s)
        try:
            connection.request("GET", target, headers={"Accept": "application/json"})
            response = connection.getresponse()
            body = response.read(MAX_ANSWER_BYTES + 1)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise ServerDownError(f"nothing answers at {self.path}") from error
        except PermissionError as error:
            raise AnswerError(f"{self.path} may be read only by the user that runs the server (mode 0600)") from error
        except TimeoutError as error:
            raise AnswerError(f"{self.path}: no answer within {self.timeout_s:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise AnswerError(f"{self.path}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        return self._parse(target, response.status, body)

    def _parse(self, target: str, status: int, body: bytes) -> dict[str, Any]:
        if status != http.client.OK:
            raise AnswerError(f"{self.path}: {target} answered HTTP {status}")
        if len(body) > MAX_ANSWER_BYTES:
            raise AnswerError(f"{self.path}: {target} answered more than {MAX_ANSWER_BYTES} bytes")
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise AnswerError(f"{self.path}: {target} did not answer JSON") from error
        if not isinstance(answer, dict):
            raise AnswerError(f"{self.path}: {target} did not answer a JSON object")
        return answer


class ReplayBackend:
    """Plays recorded Status lines, one each time it is asked; it stays on the last one."""

    name = "replay"

    def __init__(self, statuses: Sequence[Status]) -> None:
        self._statuses, self._next = tuple(statuses), 0

    def status(self) -> Status:
        status = self._statuses[self._next]
        self._next = min(self._next + 1, len(self._statuses) - 1)
        return status

    def log(self, lines: int) -> tuple[str, ...]:
        return ()

    def kv(self) -> KvReport:
        """What the status last played says of it; a recording holds no more."""
        status = self._statuses[max(self._next - 1, 0)].kv
        return KvReport(status=status, live=True)


def read_replay(path: Path) -> ReplayBackend:
    """Read a file of Status objects, one JSON object per line; raises UsageError naming the line."""
    try:
        if path.stat().st_size > MAX_REPLAY_BYTES:
            raise UsageError(f"{path}: larger than {MAX_REPLAY_BYTES} bytes; cut the recording")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a recording: {error}") from error
    statuses = [_replay_line(path, n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not statuses:
        raise UsageError(f"{path}: holds no status line; record one with GET /admin/v1/status")
    return ReplayBackend(statuses)


def _replay_line(path: Path, number: int, line: str) -> Status:
    try:
        raw = json.loads(line)
        if not isinstance(raw, dict):
            raise TypeError("not a JSON object")
        return read_status(raw)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: line {number} is not a status: {error}") from error
