"""What the screens that act have in common: one ``solocard`` command at a time, asked about, run and shown."""

from __future__ import annotations

import asyncio
import threading
from typing import ClassVar

from textual import on

from appliance.wire import Progress
from ui import command, plans
from ui.command import Command, CommandError
from ui.context import Context
from ui.format import printable
from ui.messages import CommandEnded, CommandProgressed
from ui.screens.base import ConsoleScreen
from ui.widgets.commandpane import CommandPane
from ui.widgets.confirm import TypedConfirm


class CommandScreen(ConsoleScreen):
    """``quiet``: the command that fills the screen, run without being shown; ``reading``: one that may be cut off.

    Subclasses have a CommandPane and say what comes after the quiet command and after another one.
    """

    quiet: ClassVar[tuple[str, ...]] = ()
    reading: ClassVar[tuple[str, ...]] = ()

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.running: Command | None = None
        self.stop = threading.Event()

    @property
    def changing(self) -> bool:
        """A command that changes the appliance is under way."""
        return self.running is not None and self.running.arguments not in (self.quiet, self.reading)

    def cut_off(self) -> None:
        """End a command that only reads; others are let go on to their end."""
        if self.running is not None and not self.changing:
            self.stop.set()

    def confirm(self, plan: plans.Plan) -> None:
        """Ask; start the plan's command only after what it expects was typed."""

        def decided(confirmed: bool | None) -> None:
            if confirmed:
                self.start(plan.arguments)
            else:
                self.say(self.context.strings.cancelled)

        if self.busy:
            self.say(self.context.strings.busy)
        else:
            self.app.push_screen(TypedConfirm(self.context, plan), decided)

    @property
    def busy(self) -> bool:
        """A command that a person started is under way."""
        return self.running is not None and self.running.arguments != self.quiet

    def shown(self, *arguments: str) -> str:
        return Command(arguments, self.context.home).shown

    def say(self, sentence: str) -> None:
        self.notify(printable(sentence), markup=False)

    def start(self, arguments: tuple[str, ...]) -> None:
        """Run ``solocard`` with ``arguments`` in a worker. A quiet command still running is not waited for."""
        running, self.stop = Command(arguments, self.context.home), threading.Event()
        self.running = running
        if arguments != self.quiet:
            self.query_one(CommandPane).show_start(running.shown)
        self.run_worker(self.run_command(running, self.stop), group="command")

    async def run_command(self, running: Command, stop: threading.Event) -> None:
        """Worker: it only posts messages, from the thread that waits for the child."""

        def progressed(progress: Progress) -> None:
            self.post_message(CommandProgressed(running, progress))

        try:
            outcome = await asyncio.to_thread(command.run, running, progressed, stop)
            self.post_message(CommandEnded(running, outcome))
        except CommandError as error:
            self.post_message(CommandEnded(running, None, error))

    @on(CommandProgressed)
    def take_progress(self, event: CommandProgressed) -> None:
        if event.command.arguments != self.quiet and not event.progress.done:
            self.query_one(CommandPane).show_step(event.progress)

    @on(CommandEnded)
    def take_end(self, event: CommandEnded) -> None:
        if event.command is self.running:
            self.running = None
        if event.command.arguments == self.quiet:
            self.take_quiet(event)
        else:
            self.query_one(CommandPane).show_end(self.ending(event))
            self.after_command()

    def ending(self, event: CommandEnded) -> str:
        strings, outcome = self.context.strings, event.outcome
        if self.stop.is_set():
            return strings.command_stopped
        if outcome is None:
            return strings.command_broken.format(message=event.error)
        if outcome.ok:
            return strings.command_ok.format(message=outcome.message)
        return strings.command_failed.format(code=outcome.exit_code, message=outcome.message)

    def take_quiet(self, event: CommandEnded) -> None:
        """The quiet command has ended."""

    def after_command(self) -> None:
        """Another command has ended: show what it left."""
