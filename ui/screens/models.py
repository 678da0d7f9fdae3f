"""F2: installed bundles; put one in service or go back. Works with the server down: it only runs ``solocard``."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.widgets import DataTable, Static

from appliance.errors import SolocardError
from appliance.wire import Progress
from ui import command, plans
from ui.actions import bindings
from ui.bundles import BundleList, read_bundles
from ui.command import Command, CommandError
from ui.context import Context
from ui.format import printable
from ui.messages import CommandEnded, CommandProgressed
from ui.screens.base import ConsoleScreen
from ui.view import ServerView
from ui.widgets.bundletable import BundleTable
from ui.widgets.commandpane import CommandPane
from ui.widgets.confirm import TypedConfirm
from ui.widgets.section import Section

LIST = ("list",)


class ModelsScreen(ConsoleScreen):
    """``running`` is the command under way; there is one at a time."""

    mode: ClassVar[str] = "models"
    CSS_PATH = "models.tcss"
    BINDINGS = bindings("models")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.running: Command | None = None
        self.problem = context.strings.models_loading
        self.serving = ""  # bundle id the server says it serves

    @property
    def changing(self) -> bool:
        """A command that changes the appliance is under way."""
        return self.running is not None and self.running.arguments != LIST

    def compose_body(self) -> ComposeResult:
        strings, glyphs = self.context.strings, self.context.glyphs
        yield Section(strings.models_title, glyphs)
        yield BundleTable(self.context, id="bundles")
        yield Static("", id="bundles-note", markup=False)
        yield Section(strings.command_title, glyphs)
        yield CommandPane(self.context, id="command")

    def on_screen_resume(self) -> None:
        self.query_one(BundleTable).focus()
        self.action_reload()

    def show_view(self, view: ServerView) -> None:
        self.serving = view.status.bundle_id if view.status else ""
        self.draw_note()

    # ---- acting

    def action_reload(self) -> None:
        if self.running is None:
            self.start(LIST)

    def action_activate(self) -> None:
        strings, table = self.context.strings, self.query_one(BundleTable)
        row = table.marked
        if row is None:
            self.say(strings.nothing_selected)
        elif row.current:
            self.say(strings.already_in_service.format(bundle=row.bundle_id))
        else:
            self.confirm(plans.activation(row, table.bundles.current, strings, self.shown))

    def action_rollback(self) -> None:
        strings, bundles = self.context.strings, self.query_one(BundleTable).bundles
        if bundles.previous is None:
            self.say(strings.nothing_previous)
        else:
            self.confirm(plans.rollback(bundles.previous, bundles.current, strings, self.shown))

    def confirm(self, plan: plans.Plan) -> None:
        """Ask; start the plan's command only after its id was typed."""

        def decided(confirmed: bool | None) -> None:
            if confirmed:
                self.start(plan.arguments)
            else:
                self.say(self.context.strings.cancelled)

        if self.changing:
            self.say(self.context.strings.busy)
        else:
            self.app.push_screen(TypedConfirm(self.context, plan), decided)

    def shown(self, *arguments: str) -> str:
        return Command(arguments, self.context.home).shown

    def say(self, sentence: str) -> None:
        self.notify(printable(sentence), markup=False)

    def start(self, arguments: tuple[str, ...]) -> None:
        """Run ``solocard`` with ``arguments`` in a worker. A list that is still running is not waited for."""
        running = Command(arguments, self.context.home)
        self.running = running
        if self.changing:
            self.query_one(CommandPane).show_start(running.shown)
        self.run_worker(self.run_command(running), group="command")

    async def run_command(self, running: Command) -> None:
        """Worker: it only posts messages, from the thread that waits for the child."""

        def progressed(progress: Progress) -> None:
            self.post_message(CommandProgressed(running, progress))

        try:
            outcome = await asyncio.to_thread(command.run, running, progressed)
            self.post_message(CommandEnded(running, outcome))
        except CommandError as error:
            self.post_message(CommandEnded(running, None, error))

    @on(CommandProgressed)
    def take_progress(self, event: CommandProgressed) -> None:
        if event.command.arguments != LIST and not event.progress.done:
            self.query_one(CommandPane).show_step(event.progress)

    @on(CommandEnded)
    def take_end(self, event: CommandEnded) -> None:
        if event.command is self.running:
            self.running = None
        if event.command.arguments == LIST:
            self.take_list(event)
        else:
            self.query_one(CommandPane).show_end(self.ending(event))
            self.action_reload()

    def ending(self, event: CommandEnded) -> str:
        strings, outcome = self.context.strings, event.outcome
        if outcome is None:
            return strings.command_broken.format(message=event.error)
        if outcome.ok:
            return strings.command_ok.format(message=outcome.message)
        return strings.command_failed.format(code=outcome.exit_code, message=outcome.message)

    # ---- showing

    def take_list(self, event: CommandEnded) -> None:
        bundles = BundleList()
        try:
            bundles = listed(event)
            self.problem = bundles.problem
        except SolocardError as error:
            self.problem = self.context.strings.models_failed.format(message=error)
        self.query_one(BundleTable).show(bundles)
        self.draw_note()

    @on(DataTable.RowHighlighted)
    def draw_note(self) -> None:
        """Below the table: what is wrong, else what the server serves instead, else the marked bundle in full."""
        strings, table = self.context.strings, self.query_one(BundleTable)
        current, marked = table.bundles.current, table.marked
        if self.problem:
            note = self.problem
        elif not table.bundles.rows:
            note = strings.models_empty
        elif self.serving and current is not None and self.serving != current.bundle_id:
            note = strings.serving_differs.format(bundle=self.serving)
        else:
            note = plans.described(marked, strings) if marked else ""
        self.query_one("#bundles-note", Static).update(printable(note))


def listed(event: CommandEnded) -> BundleList:
    """The bundles a finished ``solocard list --json`` printed. Raises SolocardError with what went wrong."""
    if event.outcome is None:
        raise event.error or CommandError("solocard list did not run")
    if not event.outcome.ok or event.outcome.last is None:
        raise CommandError(event.outcome.message)
    return read_bundles(event.outcome.last.data)
