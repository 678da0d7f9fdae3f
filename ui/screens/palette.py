"""``:``: find an action by name. Drawn with letters only, so it works on every terminal."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from ui.actions import ACTIONS, EVERYWHERE, Action
from ui.context import Context
from ui.format import fit
from ui.strings.base import Strings
from ui.widgets.section import Section

NAME_CELLS = 14


class PaletteScreen(ModalScreen[Action | None]):
    """Dismissed with the chosen action, None where it was closed."""

    BINDINGS = [("escape", "close", "close"), ("down", "move(1)", "down"), ("up", "move(-1)", "up")]  # noqa: RUF012

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context
        self.set_class(context.terminal.plain, "-plain")
        self.chosen = 0
        self.found = matching("", context.strings)

    def compose(self) -> ComposeResult:
        strings = self.context.strings
        with Vertical(classes="dialog"):
            yield Section(strings.palette_title, self.context.glyphs)
            with Horizontal(id="palette-line"):
                yield Static(": ", id="palette-mark", markup=False)
                yield Input(id="palette-input")
            yield Static("", id="palette-list", markup=False)

    def on_mount(self) -> None:
        self.set_focus(self.query_one(Input))
        self.draw()

    @on(Input.Changed)
    def search(self, event: Input.Changed) -> None:
        self.found, self.chosen = matching(event.value, self.context.strings), 0
        self.draw()

    @on(Input.Submitted)
    def choose(self) -> None:
        if self.found:
            self.dismiss(self.found[self.chosen])

    def action_move(self, step: int) -> None:
        if self.found:
            self.chosen = (self.chosen + step) % len(self.found)
            self.draw()

    def action_close(self) -> None:
        self.dismiss(None)

    def draw(self) -> None:
        strings = self.context.strings
        lines = [
            f"{'>' if n == self.chosen else ' '} {fit(a.label(strings), NAME_CELLS)}{a.explanation(strings)}"
            for n, a in enumerate(self.found)
        ]
        self.query_one("#palette-list", Static).update("\n".join(lines or [strings.palette_no_match]))


def matching(text: str, strings: Strings) -> list[Action]:
    """Actions whose label or explanation contains every word of ``text``; those that match in the label first."""
    words = text.casefold().split()
    found = [
        (all(w in a.label(strings).casefold() for w in words), a)
        for a in ACTIONS
        if a.name != "palette" and all(w in f"{a.label(strings)} {a.explanation(strings)}".casefold() for w in words)
    ]
    return [a for _, a in sorted(found, key=lambda pair: not pair[0])]


def mode_of(action: Action) -> str | None:
    """The screen an action belongs to; None where it works everywhere."""
    return None if action.scope == EVERYWHERE else action.scope
