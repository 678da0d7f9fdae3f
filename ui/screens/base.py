"""The frame every main screen shares: title line, body, key line; and how it hears of the server."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.containers import Container
from textual.screen import Screen
from textual.timer import Timer

from ui.context import Context
from ui.view import ServerView
from ui.widgets.chrome import KeyLine, TitleLine


class ConsoleScreen(Screen[None]):
    """Subclasses give ``mode``, a body and what to do with a new view of the server."""

    mode: ClassVar[str] = ""
    timer: Timer | None = None  # a subclass's own, made paused: it runs while the screen is seen

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context
        self.set_class(context.terminal.plain, "-plain")

    def compose(self) -> ComposeResult:
        yield TitleLine(self.context, self.mode)
        with Container(id="body"):
            yield from self.compose_body()
        yield KeyLine(self.context, self.mode)

    def compose_body(self) -> ComposeResult:
        """The widgets between the title line and the key line."""
        yield from ()

    def on_mount(self) -> None:
        self.watch(self.app, "view", self._view_changed)

    def on_screen_resume(self) -> None:
        """Runs beside a subclass's handler of that name, as each class's is called."""
        if self.timer is not None:
            self.timer.resume()

    def on_screen_suspend(self) -> None:
        if self.timer is not None:
            self.timer.pause()

    def _view_changed(self, view: ServerView) -> None:
        self.query_one(TitleLine).show_view(view)
        self.show_view(view)

    def show_view(self, view: ServerView) -> None:
        """Draw what ``view`` says; called at mount and at every answer of the server."""
