"""The server process: sockets, signals, log and pid file around the routes.

SIGTERM and SIGINT drain and end with 0; SIGHUP drains and runs the same command again in the same process, so that the
bundle that is current by then is served; a second SIGTERM or SIGINT cuts requests off. While draining, new requests
get 503 and ``/health`` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
import logging.handlers
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import uvicorn

from appliance.config import Config, check_loopback
from appliance.errors import RequestError, UsageError
from appliance.wire import ADMIN_SOCKET, FULL, KvReport, KvStatus
from runtime.chat.encoding import CONTROL_LITERALS, EOS, dialect
from runtime.kv.contents import read_report
from runtime.request import EngineLike, KvLike
from runtime.scheduler import Scheduler
from runtime.server.admin import bind_admin_socket, build_admin_app
from runtime.server.auth import KeyCheck
from runtime.server.http import App, build_app
from runtime.server.limits import MAX_CONNECTIONS, MAX_HEADER_BYTES, Limits, TimedProtocol
from runtime.server.service import ServerInfo, Service
from runtime.tokenizer import Tokenizer

Outcome = Literal["stop", "restart"]
LOG_FILE, PID_FILE = "log/serve.log", "run/serve.pid"  # below SOLOCARD_HOME
LOG_BYTES, LOG_FILES = 10 << 20, 3
FLUSH_S = 3  # for answers to leave after the last request ended
_LOGGERS = ("solocard", "uvicorn.error")
_log = logging.getLogger("solocard.serve")


def build_service(
    config: Config, engine: EngineLike[Any], tokenizer: Tokenizer, kv: KvLike | None, *, verify: KeyCheck,
    bundle_id: str, backend_description: str, profile: str = FULL, device: str = "CPU",
    arithmetic: Mapping[str, Any] | None = None, notes: tuple[str, ...] = (), reuse_mixed: bool = False,
    is_approved: Callable[[str], bool] = lambda text: False, without_kv: KvStatus | None = None,
) -> Service:  # fmt: skip
    """The parts, checked against each other. Raises UsageError for an unknown dialect, EngineError for a tokenizer
    that lacks the dialect's control tokens. ``without_kv`` is what is said of the KV cache where ``kv`` is None."""
    spec = engine.spec
    check_tokenizer(tokenizer, spec.config.eos_token_id)
    info = ServerInfo(
        spec.name, bundle_id, spec.encoding, spec.numerics, backend_description, device, engine.context_tokens,
        _version(), dict(arithmetic or {}), notes, profile,
    )  # fmt: skip
    scheduler = Scheduler(
        engine, kv, queue_depth=config.server.queue_depth, reuse_mixed=reuse_mixed, exact_tails=config.kv.exact_tails
    )  # fmt: skip
    return Service(
        info, tokenizer, dialect(spec.encoding), scheduler, verify,
        kv.status if kv is not None else lambda: without_kv or KvStatus(),
        Limits(max_body_bytes=config.server.max_body_bytes), config.generation.max_tokens_default,
        kv.replay_ids if kv is not None else lambda tenant, names: {}, config.kv.replay_answers, is_approved,
    )  # fmt: skip


def check_tokenizer(tokenizer: Tokenizer, eos_token_id: int) -> None:
    """EngineError for a tokenizer without the dialects' control tokens, UsageError for another end token."""
    for literal in CONTROL_LITERALS:
        tokenizer.control_id(literal)
    if tokenizer.control_id(EOS) != eos_token_id:
        raise UsageError(f"tokenizer.json and model.json disagree about the id of {EOS}; build the bundle anew")


def run(
    config: Config, engine: EngineLike[Any], tokenizer: Tokenizer, kv: KvLike | None, *, home: Path, verify: KeyCheck,
    bundle_id: str, backend_description: str, close: Callable[[], None] = lambda: None, **described: Any,
) -> int:  # fmt: skip
    """Serve until a signal. Returns the exit code 0; does not return after SIGHUP. ``close`` releases engine and KV.

    ``described`` goes to :func:`build_service`. Raises UsageError for a host that is not loopback or a port in use,
    BusyError when a server of this SOLOCARD_HOME runs already.
    """
    service = build_service(
        config, engine, tokenizer, kv, verify=verify, bundle_id=bundle_id, backend_description=backend_description,
        **described,
    )  # fmt: skip
    with log_to(home / LOG_FILE):
        try:
            outcome = asyncio.run(serve(service, config, home))
        finally:
            close()
        if outcome == "restart":
            _log.info("restarting: %s", " ".join(sys.orig_argv))
            sys.stdout.flush()
            sys.stderr.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - no shell is the point
    return 0


class Ending:
    """How and when the server shall end; signals ask here, and tests, whose thread gets no signals."""

    def __init__(self) -> None:
        self.outcome: Outcome = "stop"
        self.asked, self.cut_off = asyncio.Event(), asyncio.Event()

    def ask(self, outcome: Outcome) -> None:
        """Begin to drain. Asked to stop again, cut off what still runs."""
        if self.asked.is_set() and outcome == "stop":
            self.cut_off.set()
        if outcome == "stop" or not self.asked.is_set():
            self.outcome = outcome
        self.asked.set()


async def serve(
    service: Service, config: Config, home: Path, *, ending: Ending | None = None,
    ready: Callable[[int], None] | None = None,
) -> Outcome:  # fmt: skip
    """Listen, serve, drain. ``ready`` is called with the port."""
    listener = bind_http_socket(config.server.host, config.server.port)
    port: int = listener.getsockname()[1]
    try:
        admin = bind_admin_socket(home / ADMIN_SOCKET)
    except BaseException:
        listener.close()
        raise
    ending = ending or Ending()
    report = functools.partial(kv_report, home, service)
    servers = [_Server(build_app(service), _HTTP), _Server(build_admin_app(service, home / LOG_FILE, report), {})]
    service.scheduler.start()
    tasks = [asyncio.create_task(s.serve([sock])) for s, sock in zip(servers, (listener, admin), strict=True)]
    with _signals(ending), _pid_file(home / PID_FILE, ending):
        while not all(s.started for s in servers) and not any(task.done() for task in tasks):
            await asyncio.sleep(0.005)
        service.state = "ready"
        url = f"http://{_url_host(config.server.host)}:{port}"
        _log.info("serving %s (%s) on %s, %s", service.info.model, service.info.bundle_id, url, service.info.backend)
        (ready or _announcer(service, url))(port)
        asked = asyncio.create_task(ending.asked.wait(), name="asked")
        await asyncio.wait([asked, *tasks], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        await _drain(service, config.server.drain_s, ending.cut_off)
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*tasks)
        (home / ADMIN_SOCKET).unlink(missing_ok=True)
    if not await asyncio.to_thread(service.scheduler.stop, FLUSH_S):
        _log.warning("the engine is still in a call; leaving it behind")
    return ending.outcome


def kv_report(home: Path, service: Service) -> KvReport:
    """What the KV cache holds: the store's own counts, and the rest from its files."""
    return read_report(home, service.kv_status(), live=True)


async def _drain(service: Service, drain_s: float, cut_off: asyncio.Event) -> None:
    """Let requests end for ``drain_s`` seconds (or until ``cut_off``), then end them with 503."""
    service.state = "draining"
    scheduler, before_s = service.scheduler, time.monotonic()
    scheduler.refuse("the server is stopping; try again in a moment")
    while time.monotonic() - before_s < drain_s and not cut_off.is_set():
        if await asyncio.to_thread(scheduler.wait_idle, 0.1):
            _log.info("drained in %.1f s", time.monotonic() - before_s)
            return
    _log.warning("cutting off %d running, %d waiting requests", scheduler.running, scheduler.queued)
    scheduler.abort(RequestError(
        "the server stopped before this answer was complete", status=503, code="server_stopping", kind="server_error",
        retry_after_s=10,
    ))  # fmt: skip
    await asyncio.to_thread(scheduler.wait_idle, FLUSH_S)


_HTTP: dict[str, Any] = {
    "http": TimedProtocol, "h11_max_incomplete_event_size": MAX_HEADER_BYTES, "limit_concurrency": MAX_CONNECTIONS,
    "timeout_keep_alive": 30,
}  # fmt: skip


class _Server(uvicorn.Server):
    """uvicorn without its own idea of signals, logging, proxies and other protocols."""

    def __init__(self, app: App, options: dict[str, Any]) -> None:
        super().__init__(uvicorn.Config(
            app, loop="asyncio", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_graceful_shutdown=FLUSH_S, **({"http": "h11"} | options),
        ))  # fmt: skip

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


def bind_http_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket; port 0 takes a free one. Raises UsageError: not loopback, or the port is in use."""
    check_loopback(host, "server.host")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {host} port {port} ({error.strerror}); set server.port") from None
    return listener


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Lines of ours and uvicorn's warnings go to ``path``, at most 3 old files of 10 MiB beside it, times in UTC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger, level in zip(loggers, (logging.INFO, logging.WARNING), strict=True):
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
        handler.close()


@contextlib.contextmanager
def _signals(ending: Ending) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP ask ``ending``; only the main thread can have them."""
    loop = asyncio.get_running_loop()
    wanted: dict[signal.Signals, Outcome] = {
        signal.SIGTERM: "stop", signal.SIGINT: "stop", signal.SIGHUP: "restart",
    }  # fmt: skip
    if threading.current_thread() is not threading.main_thread():
        wanted = {}
    for number, outcome in wanted.items():
        loop.add_signal_handler(number, ending.ask, outcome)
    try:
        yield
    finally:
        for number in wanted:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _pid_file(path: Path, ending: Ending) -> Iterator[None]:
    """``run/serve.pid`` while serving; it stays over a restart, which keeps the process id."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(f"{os.getpid()}\n")
    fresh.replace(path)
    try:
        yield
    finally:
        if ending.outcome == "stop":
            path.unlink(missing_ok=True)


def _announcer(service: Service, url: str) -> Callable[[int], None]:
    def announce(_: int) -> None:
        print(f"solocard: serving {service.info.model} ({service.info.bundle_id}) on {url}", flush=True)

    return announce


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _version() -> str:
    try:
        return importlib.metadata.version("solocard")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
