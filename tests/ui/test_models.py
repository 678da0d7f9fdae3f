"""F2: the list by ``solocard list``, typed confirmation, the command shown; the server may be down all the while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from textual.widgets import Input
from ui_support import (
    BUNDLES,
    FakeAdmin,
    FakeSolocard,
    assert_golden,
    console,
    open_console,
    screen_lines,
    settled,
    until,
)

from ui.app import ConsoleApp
from ui.screens.models import ModelsScreen
from ui.strings.en import EN
from ui.widgets.confirm import TypedConfirm

SECOND, FIRST = BUNDLES[1]["bundle_id"], BUNDLES[2]["bundle_id"]


async def open_models(pilot: Any, app: ConsoleApp) -> None:
    await pilot.press("f2")
    await idle(pilot, app)


async def idle(pilot: Any, app: ConsoleApp) -> None:
    await until(pilot, lambda: app.models_screen.running is None, "the command's end")
    await settled(pilot)


async def type_id(pilot: Any, app: ConsoleApp, bundle_id: object) -> None:
    """As if it was typed, but at once; two tests below press the keys."""
    field = app.screen.query_one("#confirm-input", Input)
    field.focus()
    field.value = str(bundle_id)
    await settled(pilot)


def text(app: ConsoleApp) -> str:
    return "\n".join(screen_lines(app))


async def test_list_and_marker_with_the_server_down(home: Path, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        await pilot.press("down")
        await settled(pilot)
        assert_golden(app, "models-server-down")


async def test_ascii_models_screen(home: Path, solocard: FakeSolocard) -> None:
    app = console(home, plain=True, native_colors=True)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        await pilot.press("b")
        await settled(pilot)
        assert_golden(app, "rollback-ascii")
        assert text(app).isascii()


async def test_activate_with_the_right_id(home: Path, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        await pilot.press("down", "down", "a")
        await settled(pilot)
        assert app.focused is not None
        assert app.focused.id == "cancel"
        await pilot.press("tab", *str(FIRST))
        await settled(pilot)
        assert_golden(app, "activate-typed-right")
        await pilot.press("enter", "enter")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen), "the dialog to close")
        await idle(pilot, app)
        assert solocard.calls == [["activate", FIRST]]
        assert_golden(app, "activate-done")


async def test_activate_with_a_wrong_id_runs_nothing(home: Path, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        await pilot.press("down", "a", "tab", *"solocard-demo-3")
        await settled(pilot)
        assert_golden(app, "activate-typed-wrong")
        await pilot.press("enter", "tab", "enter")  # the verb cannot be reached: Enter hits Cancel
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen), "the dialog to close")
        await idle(pilot, app)
        assert solocard.calls == []
        await until(pilot, lambda: EN.cancelled in text(app), "the outcome")


async def test_enter_at_once_cancels(home: Path, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        await pilot.press("b", "enter")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen), "the dialog to close")
        await idle(pilot, app)
        assert solocard.calls == []


async def test_the_verb_refuses_when_the_id_was_changed_after_it_matched(home: Path, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        await pilot.press("b")
        await type_id(pilot, app, SECOND)
        await pilot.press("enter")
        assert app.focused is not None
        assert app.focused.id == "go"
        await pilot.press("shift+tab", "shift+tab", "x")
        await settled(pilot)
        assert isinstance(app.screen, TypedConfirm)
        assert app.screen.query_one("#go").disabled
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen), "the dialog to close")
        assert solocard.calls == []


async def test_roll_back(home: Path, solocard: FakeSolocard, admin: FakeAdmin) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        await pilot.press("b")
        await type_id(pilot, app, SECOND)
        await pilot.press("enter", "enter")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen), "the dialog to close")
        await idle(pilot, app)
        assert solocard.calls == [["rollback"]]
        assert f"{SECOND} is current; no server is running" in text(app)
        assert "The server still answers with solocard-demo-3-0123456789ab." in text(app)


async def test_the_console_waits_for_a_running_command(home: Path, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        held = solocard.hold()
        await pilot.press("b")
        await type_id(pilot, app, SECOND)
        await pilot.press("enter", "enter")
        await until(pilot, lambda: "50 %" in text(app), "the first progress line")
        await pilot.press("q")
        await until(pilot, lambda: EN.busy in text(app), "the reason it stays")
        assert app.is_running
        await pilot.press("b")
        await settled(pilot)
        assert isinstance(app.screen, ModelsScreen)
        held.unlink()
        await idle(pilot, app)
        assert solocard.calls == [["rollback"]]


async def test_a_refused_command_shows_its_sentence_and_code(home: Path, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        await pilot.press("b")
        await type_id(pilot, app, SECOND)
        await pilot.press("enter")
        solocard.fail_with("the trial of the bundle failed; the old one stays in service", 9)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen), "the dialog to close")
        await idle(pilot, app)
        assert "failed, exit code 9: the trial of the bundle failed" in text(app)


async def test_a_list_that_fails_is_told_and_can_be_tried_again(home: Path, solocard: FakeSolocard) -> None:
    solocard.fail_with("models/state.json is damaged; run solocard doctor", 6)
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        assert "models/state.json is damaged" in text(app)
        await pilot.press("a", "b")
        await settled(pilot)
        assert isinstance(app.screen, ModelsScreen)
        (solocard.folder / "fail.json").unlink()
        await pilot.press("r")
        await idle(pilot, app)
        assert str(SECOND) in text(app)


async def test_no_solocard_at_all(home: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.setattr("ui.command.sys.executable", str(home / "python"))
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        assert "solocard is neither on PATH nor at" in text(app)


async def test_an_empty_appliance_says_what_to_do(home: Path, solocard: FakeSolocard) -> None:
    solocard.set_bundles([])
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        assert "solocard install DIRECTORY" in text(app)
        await pilot.press("a")
        await until(pilot, lambda: EN.nothing_selected in text(app), "the reason")
        await pilot.press("b")
        await until(pilot, lambda: EN.nothing_previous in text(app), "the reason")


async def test_what_is_in_service_is_not_activated_again(home: Path, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        await pilot.press("a")
        await until(pilot, lambda: "is in service already" in text(app), "the reason")
        assert isinstance(app.screen, ModelsScreen)


async def test_the_marker_stays_on_its_bundle_when_the_list_is_read_again(home: Path, solocard: FakeSolocard) -> None:
    app = console(home)
    async with open_console(app, (80, 24)) as pilot:
        await open_models(pilot, app)
        await pilot.press("down")
        newer = {**BUNDLES[0], "bundle_id": "solocard-demo-4-ffffffffffff", "release_counter": 4, "current": False}
        solocard.set_bundles([newer, *BUNDLES])
        await pilot.press("r")
        await idle(pilot, app)
        assert [line for line in screen_lines(app) if line.startswith("  >  " + str(SECOND))]
