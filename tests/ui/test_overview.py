"""F1 at 80x24 and 120x40, with the server up, down, unreadable, and played from a recording."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ui_support import STATUS, FakeAdmin, admin_server, assert_golden, console, look, open_console, screen_lines, until

from appliance.wire import KvStatus, Status
from ui.backend import ReplayBackend
from ui.screens.overview import identity_rows
from ui.strings.en import EN
from ui.widgets.notes import note_lines

RISING = [
    dataclasses.replace(STATUS, prefill_tokens_per_s=float(rate), decode_tokens_per_s=rate / 6)
    for rate in (0, 0, 12, 30, 55, 81, 96, 120, 118, 90, 64, 96.4)
]


async def test_overview_with_live_numbers(home: Path) -> None:
    app = console(home, backend=ReplayBackend(RISING))
    async with open_console(app, (80, 24)) as pilot:
        await until(pilot, lambda: app.view.link == "up", "the first look")
        await look(pilot, len(RISING) - 1)
        assert_golden(app, "overview-80x24")
        assert "peak  120.0" in "\n".join(screen_lines(app))


async def test_overview_on_a_plain_terminal_is_ascii_only(home: Path) -> None:
    app = console(home, backend=ReplayBackend(RISING), plain=True, native_colors=True)
    async with open_console(app, (80, 24)) as pilot:
        await until(pilot, lambda: app.view.link == "up", "the first look")
        await look(pilot, len(RISING) - 1)
        assert_golden(app, "overview-80x24-ascii")
        assert "".join(screen_lines(app)).isascii()


async def test_overview_uses_a_wide_window(home: Path) -> None:
    app = console(home, backend=ReplayBackend(RISING))
    async with open_console(app, (120, 40)) as pilot:
        await until(pilot, lambda: app.view.link == "up", "the first look")
        await look(pilot, len(RISING) - 1)
        assert_golden(app, "overview-120x40")


async def test_numbers_come_over_the_socket(home: Path, admin: FakeAdmin) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await until(pilot, lambda: app.view.link == "up", "an answer")
        assert "solocard-demo-3-0123456789ab" in "\n".join(screen_lines(app))
        admin.status = dataclasses.replace(STATUS, queued=7, state="draining")
        await look(pilot)
        shown = screen_lines(app)
        assert shown[0].endswith("draining")
        assert any("7 of 8 queued" in line for line in shown)


async def test_a_server_that_is_down_is_a_calm_sentence(home: Path) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await until(pilot, lambda: app.view.link == "down", "the first look")
        assert_golden(app, "overview-down")


async def test_it_comes_back_by_itself_and_shows_the_gap(home: Path) -> None:
    app = console(home, poll_s=0.05)
    async with open_console(app, (80, 24)) as pilot:
        with admin_server(home):
            await until(pilot, lambda: app.view.link == "up", "the server")
        await until(pilot, lambda: app.view.link == "down", "the server gone")
        assert app.view.prefill_history[-1] == 0.0
        with admin_server(home):
            await until(pilot, lambda: screen_lines(app)[0].endswith("ready"), "the server again")


async def test_an_answer_that_cannot_be_read_is_told_apart_from_a_server_that_is_down(
    home: Path, admin: FakeAdmin
) -> None:
    admin.raw = (500, b"")
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await until(pilot, lambda: app.view.link == "unreadable", "the first look")
        assert_golden(app, "overview-unreadable")


async def test_what_stops_is_said(home: Path) -> None:
    stopped = KvStatus(enabled=True, used_bytes=100, max_bytes=100, writing=False, reason="no space left on the disk")
    notes = tuple(f"note {n}: " + "words " * 20 for n in range(4))
    statuses = [
        dataclasses.replace(STATUS, kv=stopped, notes=notes),
        dataclasses.replace(STATUS, kv=KvStatus()),
    ]
    app = console(home, backend=ReplayBackend(statuses))
    async with open_console(app, (80, 24)) as pilot:
        await until(pilot, lambda: app.view.link == "up", "the first look")
        shown = "\n".join(screen_lines(app))
        assert "not writing: no space left on the disk" in shown
        assert "and 2 more; enlarge the window" in shown
        await look(pilot)
        assert EN.kv_off in "\n".join(screen_lines(app))


async def test_nothing_a_server_says_can_steer_the_terminal(home: Path) -> None:
    nasty = "\x1b[31m[bold]x[/bold]\x9b2J[/nope]"
    status = Status(
        model=nasty,
        bundle_id=nasty,
        state=nasty,
        notes=(nasty,),
        device=nasty,
        kv=KvStatus(miss_reasons={nasty: 1}, enabled=True, writing=False, reason=nasty),
    )
    app = console(home, backend=ReplayBackend([status]))
    async with open_console(app, (80, 24)) as pilot:
        await until(pilot, lambda: app.view.link == "up", "the first look")
        shown = "\n".join(screen_lines(app))
        assert "?[31m[bold]x[/bold]?2J[/nope]" in shown
        assert "\x1b" not in app.export_screenshot()


def test_notes_are_whole_or_counted() -> None:
    notes = ("one", "two", "three")
    assert note_lines(notes, 40, 3, EN) == ["- one", "- two", "- three"]
    assert note_lines(notes, 40, 2, EN) == ["- one", EN.notes_more.format(count=2)]


def test_a_profile_other_than_the_whole_model_stands_beside_the_bundle() -> None:
    shown = [
        dict(identity_rows(Status(bundle_id="b-1", profile=profile), EN))[EN.bundle]
        for profile in ("", "full", "small")
    ]  # fmt: skip
    assert shown == ["b-1", "b-1", "b-1, small"]
