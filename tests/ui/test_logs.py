"""F3: tail, filter, follow, and a server that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ui_support import (
    STATUS,
    FakeAdmin,
    admin_server,
    assert_golden,
    console,
    open_console,
    screen_lines,
    settled,
    until,
)

from ui.app import ConsoleApp
from ui.backend import ReplayBackend
from ui.strings.en import EN
from ui.widgets.logtail import LogTail

EVENTS = ["WARN queue full", *["INFO request done"] * 6]
LINES = [f"2026-11-22T03:00:{n:02d}Z {EVENTS[n % 7]} id={n}" for n in range(40)]


def text(app: ConsoleApp) -> str:
    return "\n".join(screen_lines(app))


async def open_logs(pilot: Any, app: ConsoleApp) -> LogTail:
    await pilot.press("f3")
    await until(pilot, lambda: not getattr(app.screen, "looking", True), "the first lines")
    await settled(pilot)
    return app.screen.query_one(LogTail)


async def read_again(pilot: Any, app: ConsoleApp) -> None:
    app.screen.look()  # type: ignore[attr-defined]
    await until(pilot, lambda: not getattr(app.screen, "looking", True), "the log")
    await settled(pilot)


async def test_the_newest_lines_are_shown(home: Path, admin: FakeAdmin) -> None:
    admin.lines = LINES
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_logs(pilot, app)
        assert_golden(app, "logs")


async def test_filter_narrows_and_escape_shows_all(home: Path, admin: FakeAdmin) -> None:
    admin.lines = LINES
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_logs(pilot, app)
        await pilot.press("slash", *"warn")
        await settled(pilot)
        assert_golden(app, "logs-filtered")
        await pilot.press("enter")
        admin.lines = [*LINES, "2026-11-22T03:01:00Z WARN late", "2026-11-22T03:01:01Z INFO fine"]
        await read_again(pilot, app)
        assert "WARN late" in text(app)
        assert "INFO fine" not in text(app)
        await pilot.press("slash", *"zzz")
        await settled(pilot)
        assert 'No line contains "warnzzz"' in text(app)
        await pilot.press("escape")
        await settled(pilot)
        assert "INFO fine" in text(app)


async def test_letters_typed_into_the_filter_are_not_keys(home: Path, admin: FakeAdmin) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_logs(pilot, app)
        await pilot.press("slash", "q", "f", "question_mark", "colon")
        await settled(pilot)
        assert app.is_running
        assert "filter: qf?:" in text(app)


async def test_only_new_lines_are_appended(home: Path, admin: FakeAdmin) -> None:
    admin.lines = LINES[:10]
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        tail = await open_logs(pilot, app)
        admin.lines = LINES[5:15]  # the server keeps a window of its own
        await read_again(pilot, app)
        shown = [line for line in screen_lines(app) if "id=" in line]
        assert [line.rpartition("=")[2] for line in shown] == [str(n) for n in range(15)]
        admin.lines = ["another server altogether"]
        await read_again(pilot, app)
        assert tail.drawn == ("another server altogether",)
        assert "id=" not in text(app)


async def test_scrolling_up_stops_and_f_follows_again(home: Path, admin: FakeAdmin) -> None:
    admin.lines = LINES
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        tail = await open_logs(pilot, app)
        await pilot.press("pageup")
        await settled(pilot)
        assert not tail.following
        assert EN.logs_paused in text(app)
        before = text(app)
        admin.lines = [*LINES, "newest of all"]
        await read_again(pilot, app)
        assert text(app) == before
        await pilot.press("f")
        await settled(pilot)
        assert "newest of all" in text(app)


async def test_a_server_that_is_down_is_a_calm_sentence(home: Path) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_logs(pilot, app)
        assert_golden(app, "logs-down")
        with admin_server(home):
            await read_again(pilot, app)
            assert "second line" in text(app)
            assert "nothing answers" not in text(app)


async def test_an_unreadable_log_says_why(home: Path, admin: FakeAdmin) -> None:
    admin.raw = (503, b"")
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_logs(pilot, app)
        assert "HTTP 503" in " ".join(text(app).split())


async def test_a_recording_has_no_log(home: Path) -> None:
    app = console(home, backend=ReplayBackend([STATUS]))
    async with open_console(app, (80, 24)) as pilot:
        await open_logs(pilot, app)
        assert EN.logs_replay in text(app)
        assert "replay: ready" in text(app)


async def test_log_lines_cannot_steer_the_terminal(home: Path, admin: FakeAdmin) -> None:
    admin.lines = ["\x1b[2J[red]hostile[/red]\r\x07"]
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_logs(pilot, app)
        assert "?[2J[red]hostile[/red]??" in text(app)


async def test_the_log_is_read_only_while_it_is_on_the_screen(home: Path, admin: FakeAdmin) -> None:
    app = console(home, poll_s=0.1)
    async with open_console(app, (80, 24)) as pilot:
        await open_logs(pilot, app)
        await until(pilot, lambda: sum("log" in path for path in admin.asked) > 2, "several reads of the log")
        await pilot.press("f1")
        await settled(pilot)
        await pilot.pause(0.2)
        seen = sum("log" in path for path in admin.asked)
        await pilot.pause(0.4)
        assert sum("log" in path for path in admin.asked) == seen
