"""The newest log lines, wrapped; follows the end until a person scrolls up, and can be narrowed by a filter."""

from __future__ import annotations

from rich.text import Text
from textual.events import MouseScrollUp, Resize
from textual.message import Message
from textual.widgets import RichLog

from ui.format import printable

MAX_LINES = 1000


class LogTail(RichLog):
    """``show`` takes the whole tail again each time; only what is new is drawn."""

    class FollowChanged(Message):
        """Following stopped or began again."""

    def __init__(self, *, id: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id, wrap=True, markup=False, highlight=False, min_width=1, max_lines=MAX_LINES)
        self.following = True
        self.latest: tuple[str, ...] = ()  # as the server sent them
        self.wanted = ""  # the filter
        self.drawn: tuple[str, ...] = ()

    @property
    def matching(self) -> tuple[str, ...]:
        """Lines that contain the filter, letter case aside."""
        wanted = self.wanted.casefold()
        return tuple(line for line in self.latest if wanted in line.casefold())

    def show(self, lines: tuple[str, ...]) -> None:
        self.latest = lines
        if self.following:
            self.draw_new()

    def narrow(self, wanted: str) -> None:
        """Show only lines that contain ``wanted``; all where it is empty."""
        self.wanted = wanted
        self.redraw()

    def follow(self, following: bool) -> None:
        if following != self.following:
            self.following = following
            self.post_message(self.FollowChanged())
        if following:
            self.redraw()

    def draw_new(self) -> None:
        """Append what came since the last drawing; where the two do not join, draw all again."""
        lines = self.matching
        joint = next((n for n in range(len(self.drawn)) if self.drawn[n:] == lines[: len(self.drawn) - n]), None)
        if joint is None:
            self.redraw()
            return
        for line in lines[len(self.drawn) - joint :]:
            self.write(Text(printable(line)), scroll_end=True)
        self.drawn = lines

    def redraw(self) -> None:
        self.clear()
        self.drawn = self.matching
        for line in self.drawn:
            self.write(Text(printable(line)), scroll_end=True)

    def on_resize(self, event: Resize) -> None:
        self.redraw()

    # ---- scrolling up stops following; reaching the end by hand does not start it again

    def action_scroll_up(self) -> None:
        self.follow(False)
        super().action_scroll_up()

    def action_page_up(self) -> None:
        self.follow(False)
        super().action_page_up()

    def action_scroll_home(self) -> None:
        self.follow(False)
        super().action_scroll_home()

    def action_scroll_end(self) -> None:
        self.follow(True)
        super().action_scroll_end()

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        self.follow(False)
