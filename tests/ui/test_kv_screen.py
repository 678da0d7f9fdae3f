"""F4: what the cache holds, from the server or from the files; purge after the typed name; verify, and stop it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input
from ui_support import (
    REPORT,
    STATUS,
    FakeAdmin,
    FakeSolocard,
    assert_golden,
    console,
    look,
    open_console,
    screen_lines,
    settled,
    until,
)

from appliance.wire import MISS_REASONS, KvMiss, KvReport, KvStatus
from ui.app import ConsoleApp
from ui.backend import ReplayBackend
from ui.screens.cache import CacheScreen, hits, meters, title
from ui.strings.en import EN
from ui.widgets.commandpane import CommandPane
from ui.widgets.confirm import TEXT_CELLS
from ui.widgets.misses import moment
from ui.widgets.reasons import meaning
from ui.widgets.tenanttable import last_used

MISSES = tuple(KvMiss(1_700_000_000.0 - 77 * n, 600 * n, 256, "fingerprint: profile") for n in range(1, 9))
EVERY_REASON = {"no-unit": 41, "too-short": 30, "fingerprint": 9, "evicted": 3, "ttl": 2, "corrupt": 1, "policy": 1}


@pytest.fixture(autouse=True)
def one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ages on the screen do not depend on when the test runs."""
    monkeypatch.setattr("ui.widgets.tenanttable.time.time", lambda: 1_700_007_320.0)


async def open_cache(pilot: Any, app: ConsoleApp) -> None:
    await pilot.press("f4")
    await idle(pilot, app)


async def idle(pilot: Any, app: ConsoleApp) -> None:
    screen = app.cache_screen
    await until(pilot, lambda: screen.running is None and not screen.looking, "the cache screen at rest")
    await settled(pilot)


def text(app: ConsoleApp) -> str:
    return "\n".join(screen_lines(app))


async def test_the_running_server_tells(home: Path, admin: FakeAdmin, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        assert_golden(app, "cache-80x24")
        assert "/admin/v1/kv" in admin.asked
        assert not solocard.called.exists()


async def test_every_reason_has_room_in_a_tall_window(home: Path, admin: FakeAdmin, solocard: FakeSolocard) -> None:
    admin.report = dataclasses.replace(
        REPORT, misses=MISSES, logged_reasons=EVERY_REASON, damaged=1, purged_bytes=52_428_800, problems=("a note",)
    )
    app = console(home)
    async with open_console(app, (120, 40)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        assert_golden(app, "cache-120x40")
        await pilot.resize_terminal(80, 24)
        await settled(pilot)
        assert "7 more for other reasons: solocard kv stats" in text(app)
        assert "5 files, 1 damaged, 50.0 MiB purged" in text(app)


async def test_a_stopped_server_is_read_from_the_files_in_ascii(home: Path, solocard: FakeSolocard) -> None:
    app = console(home, plain=True, native_colors=True)
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        assert_golden(app, "cache-down-ascii")
        assert text(app).isascii()


async def test_a_server_of_before_is_read_from_the_files(home: Path, admin: FakeAdmin, solocard: FakeSolocard) -> None:
    admin.report = None
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        assert "team-b" in text(app)


async def test_numbers_follow_the_status_between_two_looks(
    home: Path, admin: FakeAdmin, solocard: FakeSolocard
) -> None:  # fmt: skip
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        full = dataclasses.replace(STATUS.kv, used_bytes=8_589_934_592, writing=False, reason="ENOSPC: disk full")
        admin.status = dataclasses.replace(STATUS, kv=full)
        await look(pilot)
        assert "100 %  8.0 GiB of 8.0 GiB" in text(app)
        assert "not writing: ENOSPC: disk full" in text(app)


async def test_the_server_goes_and_comes_back(home: Path, admin: FakeAdmin, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        path = home / "run/admin.sock"
        path.rename(home / "run/away")
        await look(pilot)
        await idle(pilot, app)
        assert EN.cache_down in text(app)
        (home / "run/away").rename(path)
        await look(pilot)
        await idle(pilot, app)
        assert f"{EN.kv_title}: {EN.kv_writing}" in text(app)


async def test_purge_needs_the_name(home: Path, admin: FakeAdmin, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        await pilot.press("down", "p")
        await settled(pilot)
        assert app.focused is not None
        assert app.focused.id == "cancel"
        assert_golden(app, "cache-purge")
        await pilot.press("tab", *"team-a", "enter", "tab", "enter")  # not its name: Enter hits Cancel
        await until(pilot, lambda: isinstance(app.screen, CacheScreen), "the dialog to close")
        assert solocard.calls == []
        await pilot.press("p", "tab", *"team-b", "enter", "enter")
        await until(pilot, lambda: isinstance(app.screen, CacheScreen), "the dialog to close")
        await idle(pilot, app)
        assert solocard.calls == [["kv", "purge", "team-b", "--yes"]]
        assert "kv purge team-b --yes --json" in text(app)
        assert "done: team-b: key destroyed" in text(app)


async def test_what_was_purged_is_gone_from_the_table(home: Path, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        await pilot.press("p")
        await settled(pilot)
        field = app.screen.query_one("#confirm-input", Input)
        field.focus()
        field.value = "default"
        await settled(pilot)
        await pilot.press("enter", "enter")
        await until(pilot, lambda: isinstance(app.screen, CacheScreen), "the dialog to close")
        await idle(pilot, app)
        await until(pilot, lambda: "1,200" not in text(app), "the table without the tenant")


async def test_verify_shows_how_far_it_is_and_can_be_stopped(
    home: Path, admin: FakeAdmin, solocard: FakeSolocard
) -> None:  # fmt: skip
    solocard.hold()
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        await pilot.press("v")
        await until(pilot, lambda: "verify reading every record  50 %" in text(app), "its progress")
        await pilot.press("p")
        await until(pilot, lambda: EN.busy in text(app), "that it is busy")
        assert isinstance(app.screen, CacheScreen)
        started_s = time.monotonic()
        await pilot.press("v")
        await idle(pilot, app)
        assert time.monotonic() - started_s < 10  # the program itself would wait for 20 s
        pane = app.screen.query_one(CommandPane)
        assert pane.ending == EN.command_stopped
        (solocard.folder / "held").unlink()
        await pilot.press("v")
        await idle(pilot, app)
        assert pane.ending == "done: 1,300 records opened and authenticated: all good"


async def test_leaving_cuts_a_verify_off(home: Path, admin: FakeAdmin, solocard: FakeSolocard) -> None:
    solocard.hold()
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        await pilot.press("v")
        await until(pilot, lambda: "50 %" in text(app), "its progress")
        await pilot.press("q")
        await until(pilot, lambda: not app.is_running, "the end")
    assert app.cache_screen.stop.is_set()


async def test_a_cache_that_cannot_be_read_is_told(home: Path, solocard: FakeSolocard) -> None:
    solocard.fail_with("keys/kv-master is readable by others; chmod 600 it", 6)
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        assert "The cache could not be read: keys/kv-master is readable by others" in " ".join(text(app).split())
        await pilot.press("p")
        await settled(pilot)
        assert EN.tenants_none in text(app)
        (solocard.folder / "fail.json").unlink()
        await pilot.press("r")
        await idle(pilot, app)
        assert "team-b" in text(app)


async def test_a_newer_report_than_this_console_knows(home: Path, solocard: FakeSolocard) -> None:
    (solocard.folder / "report.json").write_text('{"tenants": [{"name": 7}]}')
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        assert "tenants.name is 7, not str" in " ".join(text(app).split())


async def test_a_recording_shows_what_its_status_says(home: Path, solocard: FakeSolocard) -> None:
    app = console(home, backend=ReplayBackend([STATUS]))
    async with open_console(app, (80, 24)) as pilot:
        await look(pilot)
        await open_cache(pilot, app)
        assert "15 %  1.2 GiB of 8.0 GiB" in text(app)
        assert EN.cache_replay in text(app)
        assert not solocard.called.exists()


def test_every_reason_has_a_sentence_that_fits() -> None:
    sentences = [meaning(reason, EN) for reason in MISS_REASONS]
    assert len(set(sentences)) == len(MISS_REASONS)
    assert EN.reason_unknown not in sentences
    assert max(map(len, sentences)) <= 78 - 13 - 8 - 2
    assert meaning("new-in-2031", EN) == EN.reason_unknown


def test_the_warning_fits_the_dialog() -> None:
    assert max(map(len, EN.purge_warning.split("\n"))) <= TEXT_CELLS


def test_words_for_the_title_and_the_meters() -> None:
    assert title(KvReport(live=True), EN).endswith(EN.kv_off)
    assert title(KvReport(status=KvStatus(enabled=True)), EN).endswith(EN.cache_down)
    assert meters(KvReport(), EN)["#cache-today"] == (0.0, "0 B written, no limit")
    assert hits(KvReport(), EN) == (0.0, EN.cache_none_logged)
    counted = KvReport(status=KvStatus(hit_tokens=3, miss_tokens=1))
    assert hits(counted, EN) == (0.75, "75 %  3 of 4 tokens since start")


def test_the_moment_of_a_miss_is_that_of_the_log() -> None:
    assert moment(1_700_000_000.9) == "11-14 22:13:20Z"
    assert moment(1e300) == "?"


def test_when_a_tenant_was_last_there() -> None:
    assert last_used(0, 1e9, EN) == "never"
    assert last_used(10**9, 1e9 - 3, EN) == EN.just_now
    assert last_used(10**9, 1e9 + 7320, EN) == "2 h 02 min ago"
