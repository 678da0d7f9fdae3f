"""F3: the server's newest log lines, with a filter. It reads only while it is on the screen."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Input, Static

from ui.actions import bindings
from ui.backend import AnswerError, ServerDownError
from ui.format import count, printable
from ui.messages import LogArrived, LogLost
from ui.screens.base import ConsoleScreen
from ui.widgets.logtail import MAX_LINES, LogTail
from ui.widgets.section import Section


class LogsScreen(ConsoleScreen):
    """Tail and filter."""

    mode: ClassVar[str] = "logs"
    CSS_PATH = "logs.tcss"
    BINDINGS = [*bindings("logs"), ("escape", "show_all", "show all")]  # noqa: RUF012  textual reads a plain list
    looking = False  # a look is under way; a slow server is not asked twice at once

    def compose_body(self) -> ComposeResult:
        strings = self.context.strings
        yield Section(strings.logs_title, self.context.glyphs)
        yield Static("", id="logs-calm", markup=False)
        yield LogTail(id="tail")
        with Horizontal(id="filter-line"):
            yield Static(strings.filter_prompt, id="filter-prompt", markup=False)
            yield Input(id="filter", select_on_focus=False)
        yield Static("", id="logs-position", markup=False)

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one("#filter-line").display = False
        self.timer = self.set_interval(self.context.poll_s, self.look, pause=True)

    def on_screen_resume(self) -> None:
        self.query_one(LogTail).focus()
        self.look()

    def look(self) -> None:
        """Read the log once, in a worker."""
        if not self.looking:
            self.looking = True
            self.run_worker(self.read_log(), group="log")

    async def read_log(self) -> None:
        """Worker: it only posts messages."""
        try:
            lines = await asyncio.to_thread(self.context.backend.log, MAX_LINES)
            self.post_message(LogArrived(lines))
        except ServerDownError as error:
            self.post_message(LogLost(str(error), down=True))
        except AnswerError as error:
            self.post_message(LogLost(str(error), down=False))

    @on(LogArrived)
    def take_lines(self, event: LogArrived) -> None:
        self.looking = False
        self.query_one(LogTail).show(event.lines)
        strings = self.context.strings
        empty = strings.logs_replay if self.context.replaying else strings.logs_empty
        self.show_calm("" if event.lines else empty)

    @on(LogLost)
    def take_loss(self, event: LogLost) -> None:
        self.looking = False
        down = self.context.strings.logs_down.format(socket=self.context.socket_path)
        self.show_calm(down if event.down else event.problem)

    def show_calm(self, sentence: str) -> None:
        """A sentence in place of the log; the log where it is empty. Lines read before stay above it."""
        calm = self.query_one("#logs-calm", Static)
        calm.update("\n".join(printable(line) for line in sentence.split("\n")))
        calm.display = bool(sentence)
        self.show_position()

    @on(LogTail.FollowChanged)
    def show_position(self) -> None:
        """The line below the log: how many lines, which filter, following or stopped."""
        strings, tail = self.context.strings, self.query_one(LogTail)
        total, shown = len(tail.latest), len(tail.matching)
        parts = []
        if tail.wanted and shown == 0:
            parts.append(strings.logs_no_match.format(filter=tail.wanted))
        elif tail.wanted:
            parts.append(strings.logs_filtered.format(shown=count(shown), total=count(total), filter=tail.wanted))
        if not tail.following:
            parts.append(strings.logs_paused)
        elif not tail.wanted and total:
            parts.append(strings.logs_following.format(total=count(total)))
        self.query_one("#logs-position", Static).update(printable("; ".join(parts)))

    # ---- keys

    def action_filter(self) -> None:
        self.query_one("#filter-line").display = True
        self.set_focus(self.query_one("#filter", Input))  # at once: the next key typed belongs to it

    def action_follow(self) -> None:
        tail = self.query_one(LogTail)
        tail.follow(not tail.following)

    def action_show_all(self) -> None:
        self.query_one("#filter", Input).value = ""
        self.query_one("#filter-line").display = False
        self.query_one(LogTail).focus()

    @on(Input.Changed, "#filter")
    def narrow(self, event: Input.Changed) -> None:
        self.query_one(LogTail).narrow(event.value)
        self.show_position()

    @on(Input.Submitted, "#filter")
    def keep_filter(self) -> None:
        """Enter keeps the filter and gives the keys back to the log."""
        self.query_one(LogTail).focus()
