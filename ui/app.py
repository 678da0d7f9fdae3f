"""The console's application: four screens, one view of the server, one loop that looks at it."""

from __future__ import annotations

import asyncio

from textual.app import App
from textual.events import Resize
from textual.geometry import Size
from textual.reactive import reactive
from textual.theme import Theme

from ui.actions import EVERYWHERE, MODES, Action, bindings
from ui.backend import AnswerError, ServerDownError
from ui.context import Context
from ui.messages import StatusArrived, StatusLost
from ui.screens.cache import CacheScreen
from ui.screens.help import HelpScreen
from ui.screens.logs import LogsScreen
from ui.screens.models import ModelsScreen
from ui.screens.overview import OverviewScreen
from ui.screens.palette import PaletteScreen, mode_of
from ui.screens.toosmall import TooSmallScreen
from ui.terminal import too_small
from ui.view import ServerView

CALM = Theme(
    name="solocard", dark=True, primary="#4d8fd6", accent="#7fb4ea", success="#7cc48a", warning="#e0b050",
    error="#e07a70", foreground="#d8dde4", background="#11151b", surface="#181d25", panel="#222a35",
)  # fmt: skip


class ConsoleApp(App[None]):
    """``view`` is replaced at every look at the server; the screens watch it."""

    TITLE = "Solocard"
    CSS_PATH = "screens/console.tcss"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS = bindings(EVERYWHERE)
    AUTO_FOCUS = None

    view: reactive[ServerView] = reactive(ServerView(), init=False)

    def __init__(self, context: Context) -> None:
        super().__init__(ansi_color=True if context.terminal.native_colors else None)
        self.context = context
        self.models_screen = ModelsScreen(context)
        self.cache_screen = CacheScreen(context)
        self.add_mode("overview", lambda: OverviewScreen(context))
        self.add_mode("models", lambda: self.models_screen)
        self.add_mode("logs", lambda: LogsScreen(context))
        self.add_mode("cache", lambda: self.cache_screen)

    async def on_mount(self) -> None:
        self.register_theme(CALM)
        self.theme = "ansi-dark" if self.context.terminal.native_colors else CALM.name
        self.animation_level = "none"
        await self.switch_mode("overview")
        self.fit_window(self.size)
        self.run_worker(self.look_again_and_again(), group="looks")

    # ---- looking

    async def look_again_and_again(self) -> None:
        """Worker: a look at the server every ``poll_s`` seconds."""
        while True:
            await self.look()
            await asyncio.sleep(self.context.poll_s)

    async def look(self) -> None:
        """Ask the backend once, off the event loop, and post what came of it."""
        try:
            self.post_message(StatusArrived(await asyncio.to_thread(self.context.backend.status)))
        except ServerDownError as error:
            self.post_message(StatusLost(str(error), down=True))
        except AnswerError as error:
            self.post_message(StatusLost(str(error), down=False))

    def on_status_arrived(self, event: StatusArrived) -> None:
        self.view = self.view.answered(event.status)

    def on_status_lost(self, event: StatusLost) -> None:
        self.view = self.view.lost(event.problem, down=event.down)

    # ---- size

    def on_resize(self, event: Resize) -> None:
        if self.current_mode in MODES:  # before the first screen stands, on_mount looks itself
            self.fit_window(event.size)

    def fit_window(self, size: Size) -> None:
        """Cover the screen with one sentence below 80x24; uncover it above."""
        shown = isinstance(self.screen, TooSmallScreen)
        small = too_small(size.width, size.height)
        if small and not shown:
            self.push_screen(TooSmallScreen(self.context))
        elif shown and not small:
            self.pop_screen()

    # ---- keys

    def action_overview(self) -> None:
        self.switch_mode("overview")

    def action_models(self) -> None:
        self.switch_mode("models")

    def action_logs(self) -> None:
        self.switch_mode("logs")

    def action_cache(self) -> None:
        self.switch_mode("cache")

    def action_help(self) -> None:
        self.push_screen(HelpScreen(self.context))

    def action_palette(self) -> None:
        self.push_screen(PaletteScreen(self.context), self.run_chosen)

    async def action_quit(self) -> None:
        """Leave, unless a command that changes the appliance is under way; one that only reads is cut off."""
        acting = (self.models_screen, self.cache_screen)
        if any(screen.changing for screen in acting):
            self.notify(self.context.strings.busy, markup=False)
            return
        for screen in acting:
            screen.cut_off()
        self.exit()

    def run_chosen(self, action: Action | None) -> None:
        """Run what the palette returned, on the screen it belongs to."""
        if action is None:
            return
        mode = mode_of(action)
        if mode in MODES:
            self.switch_mode(mode)
        self.call_after_refresh(self.run_action, action.name, self.screen if mode else self)
