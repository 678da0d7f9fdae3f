"""What the console's tests share: a fake admin server on a unix socket, a fake ``solocard``, text goldens."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import shutil
import socketserver
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from html import unescape
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from appliance.wire import KvMiss, KvReport, KvStatus, KvTenant, Status
from ui.app import ConsoleApp
from ui.backend import ConsoleBackend, SocketBackend
from ui.context import Context
from ui.terminal import Terminal

GOLDENS = Path(__file__).parent / "ui" / "goldens"
REWRITE = "SOLOCARD_REWRITE_GOLDENS"  # set to 1 to write the goldens anew, then read the diff
NEVER_S = 3600.0  # a poll interval no test waits for: tests look by hand
GOLDEN_HOME = "/srv/solocard/01"
CELL_PIXELS = 12.2  # width of one cell in textual's SVG

STATUS = Status(
    bundle_id="solocard-demo-3-0123456789ab",
    model="deepseek-v4-flash",
    version="1.2.0",
    encoding="dsv4-0731",
    numerics="kv-v4",
    backend="ort 1.31.1 CPU, function bodies, 2 threads",
    device="CPU",
    state="ready",
    uptime_s=7503.0,
    window_s=10.0,
    prefill_tokens_per_s=96.4,
    decode_tokens_per_s=17.2,
    running=1,
    queued=2,
    queue_depth=8,
    requests_total=1234,
    prompt_tokens_total=98765,
    completion_tokens_total=43210,
    context_tokens=4096,
    notes=("unverified on hardware",),
    kv=KvStatus(
        enabled=True,
        used_bytes=1_288_490_189,
        max_bytes=8_589_934_592,
        hit_tokens=61_440,
        miss_tokens=37_325,
        writing=True,
        miss_reasons={"no-unit": 41, "evicted": 3},
        blocks=1204,
        checkpoints=96,
        segments=5,
        written_today_bytes=314_572_800,
        daily_write_bytes=21_474_836_480,
    ),
)
REPORT = KvReport(
    status=STATUS.kv,
    live=True,
    roles={"prompt": 80, "answer": 10, "anchor": 6, "suspended": 0},
    tenants=(
        KvTenant("default", 1200, 95, 1_204_000_000, 1_700_000_000),
        KvTenant("team-b", 4, 1, 7_200_000, 1_700_000_000),
        KvTenant("shared"),
    ),
    logged_requests=312,
    logged_prompt_tokens=98_765,
    logged_hit_tokens=61_440,
    logged_reasons={"no-unit": 41, "evicted": 3},
    misses=(KvMiss(1_700_000_000.5, 600, 256, "no-unit"),),
)
BUNDLES = [
    {
        "bundle_id": "solocard-demo-3-0123456789ab",
        "name": "solocard-demo",
        "version": "1.2.0",
        "release_counter": 3,
        "size_bytes": 11_744_051,
        "current": True,
        "previous": False,
    },
    {
        "bundle_id": "solocard-demo-2-fedcba987654",
        "name": "solocard-demo",
        "version": "1.1.0",
        "release_counter": 2,
        "size_bytes": 11_743_990,
        "current": False,
        "previous": True,
    },
    {
        "bundle_id": "solocard-demo-1-00aa11bb22cc",
        "name": "solocard-demo",
        "version": "1.0.0",
        "release_counter": 1,
        "size_bytes": 9_961_472,
        "current": False,
        "previous": False,
    },
]


class AdminHandler(BaseHTTPRequestHandler):
    """Answers as the server's admin routes do."""

    server: FakeAdmin

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.raw is not None:
            self._answer(*self.server.raw)
        elif self.path == "/admin/v1/status":
            self._answer(200, json.dumps(self.server.status.to_dict()).encode())
        elif self.path == "/admin/v1/kv" and self.server.report is not None:
            self._answer(200, json.dumps(self.server.report.to_dict()).encode())
        elif self.path.startswith("/admin/v1/log?lines="):
            wanted = int(self.path.rpartition("=")[2])
            self._answer(200, json.dumps({"lines": self.server.lines[-wanted:]}).encode())
        else:
            self._answer(404, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        """Quiet."""


class FakeAdmin(socketserver.ThreadingUnixStreamServer):
    """``status``, ``report``, ``lines`` and ``raw`` (HTTP status, body) may be changed while it runs.

    Without a report it is a server of before, which knows no such path.
    """

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), AdminHandler)
        self.status, self.lines = STATUS, ["first line", "second line"]
        self.report: KvReport | None = REPORT
        self.raw: tuple[int, bytes] | None = None
        self.asked: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A console that hangs up in the middle of an answer is part of the tests."""


@contextmanager
def short_home() -> Iterator[Path]:
    """An appliance folder with a path short enough for a unix socket."""
    home = Path(tempfile.mkdtemp(prefix="sc-", dir="/tmp"))
    (home / "run").mkdir()
    try:
        yield home
    finally:
        shutil.rmtree(home)


@contextmanager
def admin_server(home: Path) -> Iterator[FakeAdmin]:
    """A fake server at ``home/run/admin.sock``."""
    path = home / "run/admin.sock"
    server = FakeAdmin(path)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        path.unlink()


class FakeSolocard:
    """A program called ``solocard`` that keeps its bundles in a file and notes how it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state, self.called = folder / "bundles.json", folder / "called.jsonl"
        self.set_report(dataclasses.replace(REPORT, live=False))
        self.program = folder / "solocard"
        self.program.write_text(f"#!{sys.executable} -ISE\n" + textwrap.dedent(_PROGRAM))
        self.program.chmod(0o755)
        self.set_bundles(BUNDLES)

    def set_bundles(self, bundles: list[dict[str, Any]]) -> None:
        self.state.write_text(json.dumps(bundles))

    def set_report(self, report: KvReport) -> None:
        """What ``kv stats`` prints from now on."""
        (self.folder / "report.json").write_text(json.dumps(report.to_dict()))

    def fail_with(self, message: str, exit_code: int) -> None:
        """Every call from now on says ``message`` on stderr and ends with ``exit_code``."""
        (self.folder / "fail.json").write_text(json.dumps([message, exit_code]))

    def hold(self) -> Path:
        """Commands that change something wait until the returned file is removed."""
        held = self.folder / "held"
        held.touch()
        return held

    @property
    def calls(self) -> list[list[str]]:
        """Arguments of every call that changed or tried to change something."""
        lines = self.called.read_text().splitlines() if self.called.exists() else []
        return [call for call in map(json.loads, lines) if call not in (["list"], ["kv", "stats"])]


_PROGRAM = """
    import json, pathlib, sys, time
    here = pathlib.Path(__file__).parent
    home, arguments = sys.argv[1:3], [a for a in sys.argv[3:] if a != "--json"]
    with (here / "called.jsonl").open("a") as notes:
        notes.write(json.dumps(arguments) + "\\n")
    def say(step, message, **more):
        print(json.dumps({"step": step, "message": message, **more}), flush=True)
    if "--json" not in sys.argv or home[0] != "--home" or not pathlib.Path(home[1], "run").is_dir():
        sys.exit("solocard: called without --json or --home")
    if (here / "fail.json").exists():
        message, code = json.loads((here / "fail.json").read_text())
        say("error", message, done=True, ok=False, data={"exit_code": code})
        print("solocard: " + message, file=sys.stderr)
        sys.exit(code)
    if arguments[0] == "kv":
        report = json.loads((here / "report.json").read_text())
        if arguments[1] == "verify":
            say("verify", "reading every record", done_bytes=5872025, total_bytes=11744051)
            give_up = time.monotonic() + 20
            while (here / "held").exists() and time.monotonic() < give_up:
                time.sleep(0.01)
        if arguments[1] == "purge":
            report["tenants"] = [t for t in report["tenants"] if t["name"] != arguments[2]]
            (here / "report.json").write_text(json.dumps(report))
        message = {"stats": "KV cache", "verify": "1,300 records opened and authenticated: all good",
                   "purge": arguments[2] + ": key destroyed" if len(arguments) > 2 else ""}[arguments[1]]
        say("kv", message, done=True, ok=True, data=report)
        sys.exit(0)
    bundles = json.loads((here / "bundles.json").read_text())
    if arguments[0] != "list":
        wanted = arguments[1] if arguments[0] == "activate" else next(b["bundle_id"] for b in bundles if b["previous"])
        say("check", wanted, done_bytes=5872025, total_bytes=11744051)
        give_up = time.monotonic() + 20  # a test that failed must not wait for ever
        while (here / "held").exists() and time.monotonic() < give_up:
            time.sleep(0.01)
        say("trial", "16 golden tokens agree")
        for b in bundles:
            b["previous"], b["current"] = b["current"], b["bundle_id"] == wanted
        (here / "bundles.json").write_text(json.dumps(bundles))
        restart = {"outcome": "down", "message": "no server is running", "downtime_s": 0.0}
        say(arguments[0], wanted + " is current", done=True, ok=True, data={"restart": restart})
    else:
        say("list", f"{len(bundles)} bundles", done=True, ok=True, data={"bundles": bundles, "problem": ""})
"""


def console(
    home: Path,
    *,
    backend: ConsoleBackend | None = None,
    plain: bool = False,
    native_colors: bool = False,
    poll_s: float = NEVER_S,
) -> ConsoleApp:
    """The application as ``solocard-console`` makes it, looking at the server only when told."""
    socket_path = home / "run/admin.sock"
    chosen = backend or SocketBackend(socket_path, timeout_s=2.0)
    terminal = Terminal(plain=plain, native_colors=native_colors)
    return ConsoleApp(Context(home, socket_path, chosen, terminal, poll_s=poll_s))


def open_console(app: ConsoleApp, size: tuple[int, int]) -> AbstractAsyncContextManager[Any]:
    """Run ``app`` without a terminal, ``size`` = (columns, rows); passing notices are drawn as on a terminal."""
    return app.run_test(size=size, notifications=True)


async def until(pilot: Any, condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Let the application work until ``condition`` holds."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            await pilot.pause()
            return
        await pilot.pause(0.01)
    raise AssertionError(f"waited {timeout_s} s in vain for: {what}\n" + "\n".join(screen_lines(pilot.app)))


async def look(pilot: Any, times: int = 1) -> None:
    """Look at the server ``times`` times and let the screens draw what came."""
    for _ in range(times):
        await pilot.app.look()
        await pilot.pause()


def screen_lines(app: ConsoleApp) -> list[str]:
    """What the terminal shows, one string per row, read from textual's own SVG export."""
    columns, rows = app.size
    grid = [[" "] * columns for _ in range(rows)]
    for attributes, text in re.findall(r"<text ([^>]*)>(.*?)</text>", app.export_screenshot(), re.S):
        line = re.search(r'clip-path="url\(#[^"]*-line-(\d+)\)"', attributes)
        left = re.search(r'(?<![a-z])x="([\d.]+)"', attributes)
        if line is None or left is None:
            continue
        column = round(float(left[1]) / CELL_PIXELS)
        for offset, character in enumerate(unescape(text).replace("\xa0", " ")):
            if column + offset < columns:
                grid[int(line[1])][column + offset] = character
    return ["".join(row).rstrip() for row in grid]


def assert_golden(app: ConsoleApp, name: str) -> None:
    """Compare the screen with ``goldens/<name>.txt``; with SOLOCARD_REWRITE_GOLDENS=1 write that file instead.

    The home's random name is replaced by a fixed one of the same length.
    """
    shown = "\n".join(screen_lines(app)) + "\n"
    shown = shown.replace(str(app.context.home), GOLDEN_HOME)
    path = GOLDENS / f"{name}.txt"
    if os.environ.get(REWRITE) == "1":
        path.write_text(shown, encoding="utf-8")
    wanted = path.read_text(encoding="utf-8") if path.exists() else ""
    assert shown == wanted, f"{path.name} differs ({REWRITE}=1 rewrites it):\n--- wanted\n{wanted}--- shown\n{shown}"


async def settled(pilot: Any) -> None:
    """Nothing left to draw."""
    await pilot.pause()
    await asyncio.sleep(0)
    await pilot.pause()
