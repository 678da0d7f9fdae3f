"""F2: installed bundles; put one in service or go back. Works with the server down: it only runs ``solocard``."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.widgets import DataTable, Static

from appliance.errors import SolocardError
from ui import plans
from ui.actions import bindings
from ui.bundles import BundleList, read_bundles
from ui.command import CommandError
from ui.context import Context
from ui.format import printable
from ui.messages import CommandEnded
from ui.screens.commanding import CommandScreen
from ui.view import ServerView
from ui.widgets.bundletable import BundleTable
from ui.widgets.commandpane import CommandPane
from ui.widgets.section import Section


class ModelsScreen(CommandScreen):
    """The list is read again after every command."""

    mode: ClassVar[str] = "models"
    CSS_PATH = "models.tcss"
    BINDINGS = bindings("models")
    quiet: ClassVar[tuple[str, ...]] = ("list",)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.problem = context.strings.models_loading
        self.serving = ""  # bundle id the server says it serves

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
            self.start(self.quiet)

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

    after_command = action_reload

    # ---- showing

    def take_quiet(self, event: CommandEnded) -> None:
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
