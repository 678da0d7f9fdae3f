"""Help, palette, size and every key of the table."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from ui_support import STATUS, FakeSolocard, assert_golden, console, open_console, screen_lines, settled, until

from appliance.wire import KvReport
from ui.actions import ACTIONS, EVERYWHERE, MODES, hints
from ui.app import ConsoleApp
from ui.backend import ReplayBackend
from ui.format import cell_width
from ui.screens.models import ModelsScreen
from ui.screens.overview import OverviewScreen
from ui.screens.palette import PaletteScreen, matching
from ui.screens.toosmall import TooSmallScreen
from ui.strings.base import Strings
from ui.strings.en import EN
from ui.widgets.confirm import TypedConfirm


class CountingBackend(ReplayBackend):
    """Counts the looks at the cache: one may begin and end within a key press and leave the screen as it was."""

    looks = 0

    def kv(self) -> KvReport:
        self.looks += 1
        return super().kv()


@pytest.fixture
def app(home: Path, solocard: FakeSolocard) -> ConsoleApp:
    return console(home, backend=CountingBackend([STATUS]))


async def test_help_lists_every_key(app: ConsoleApp) -> None:
    async with open_console(app, (80, 24)) as pilot:
        await pilot.press("question_mark")
        await settled(pilot)
        assert_golden(app, "help")
        shown = "\n".join(screen_lines(app))
        assert all(action.explanation(EN) in shown for action in ACTIONS)
        await pilot.press("question_mark")
        await settled(pilot)
        assert isinstance(app.screen, OverviewScreen)


async def test_palette_finds_and_runs(app: ConsoleApp) -> None:
    async with open_console(app, (80, 24)) as pilot:
        await pilot.press("ctrl+p")
        await settled(pilot)
        assert_golden(app, "palette")
        await pilot.press(*"mod", "enter")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen), "the models screen")


async def test_palette_runs_an_action_of_another_screen(app: ConsoleApp) -> None:
    async with open_console(app, (80, 24)) as pilot:
        await pilot.press("f2")
        await until(pilot, lambda: app.models_screen.running is None, "the list")
        await pilot.press("f1", "colon", *"roll", "enter")
        await until(pilot, lambda: isinstance(app.screen, TypedConfirm), "the confirmation")
        assert app.current_mode == "models"


async def test_palette_moves_by_arrows_and_closes(app: ConsoleApp) -> None:
    async with open_console(app, (80, 24)) as pilot:
        await pilot.press("colon", "down", "down", "up")
        await settled(pilot)
        assert any(line.lstrip(" │").startswith("> Models") for line in screen_lines(app))
        await pilot.press(*"zzz", "enter")
        await settled(pilot)
        assert EN.palette_no_match in "\n".join(screen_lines(app))
        assert isinstance(app.screen, PaletteScreen)
        await pilot.press("escape")
        await settled(pilot)
        assert isinstance(app.screen, OverviewScreen)


def test_palette_puts_names_before_explanations() -> None:
    assert [action.name for action in matching("log", EN)] == ["logs"]
    assert matching("roll", EN)[0].name == "rollback"
    assert matching("no such thing", EN) == []


@pytest.mark.parametrize(("columns", "rows"), [(79, 24), (80, 23), (40, 10)])
async def test_too_small_says_what_it_needs(home: Path, columns: int, rows: int) -> None:
    app = console(home)
    async with open_console(app, (columns, rows)) as pilot:
        await settled(pilot)
        shown = " ".join(" ".join(screen_lines(app)).split())
        assert f"terminal too small: need 80x24, have {columns}x{rows}" in shown
        await pilot.press("q")
    assert not app.is_running


async def test_a_window_made_small_and_large_again(app: ConsoleApp) -> None:
    async with open_console(app, (80, 24)) as pilot:
        await until(pilot, lambda: app.view.link == "up", "the first look")
        before = screen_lines(app)
        await pilot.resize_terminal(60, 20)
        await settled(pilot)
        assert_golden(app, "too-small")
        await pilot.press("f2")  # keys of screens do nothing here
        await settled(pilot)
        assert isinstance(app.screen, TooSmallScreen)
        await pilot.resize_terminal(80, 24)
        await settled(pilot)
        assert screen_lines(app) == before


@pytest.mark.parametrize(("scope", "key"), [(a.scope, key) for a in ACTIONS for key in a.keys.split(",")])
async def test_every_key_of_the_table_does_something_and_nothing_breaks(
    app: ConsoleApp, solocard: FakeSolocard, scope: str, key: str
) -> None:
    def seen() -> object:
        # A reload may begin and end within one key press and leave the screen as it was: its command counts.
        commands = len(solocard.called.read_text()) if solocard.called.exists() else 0
        assert isinstance(app.context.backend, CountingBackend)
        looks = app.context.backend.looks
        return (app.is_running, app.screen, app.models_screen.running, looks, screen_lines(app), commands)

    async with open_console(app, (80, 24)) as pilot:
        await pilot.press({"models": "f2", "logs": "f3", "cache": "f4"}.get(scope, "f2" if key == "f1" else "f1"))
        idle = (app.models_screen, app.cache_screen)
        await until(pilot, lambda: all(screen.running is None for screen in idle), "an idle console")
        await until(pilot, lambda: not app.cache_screen.looking, "the look at the cache")
        before = seen()
        await pilot.press(key)
        await until(pilot, lambda: not app.is_running or seen() != before, f"something to come of {key}")


def test_the_table_is_whole() -> None:
    names = {field.name for field in fields(Strings)}
    assert all({action.name, f"{action.name}_help"} <= names for action in ACTIONS)
    assert {action.scope for action in ACTIONS} <= {EVERYWHERE, *MODES}
    for scope in (EVERYWHERE, *MODES):
        keys = [key for a in ACTIONS if a.scope in {EVERYWHERE, scope} for key in a.keys.split(",")]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize("mode", MODES)
def test_key_lines_fit_80_columns(mode: str) -> None:
    assert sum(cell_width(key) + cell_width(label) + 3 for key, label in hints(mode, EN)) <= 80


def test_every_sentence_is_ascii_and_not_empty() -> None:
    assert all(getattr(EN, field.name).isascii() and getattr(EN, field.name) for field in fields(Strings))


async def test_native_colors_use_no_rgb(home: Path) -> None:
    app = console(home, plain=True, native_colors=True)
    async with open_console(app, (80, 24)):
        assert app.theme == "ansi-dark"
        assert app.native_ansi_color
