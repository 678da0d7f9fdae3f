"""``?``: every key, from the table of actions."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from ui import actions
from ui.context import Context
from ui.format import fit
from ui.strings.base import Strings
from ui.widgets.section import Section

KEY_CELLS = 10
NAME_CELLS = 12


class HelpScreen(ModalScreen[None]):
    """Closes on Esc, ``?`` or q."""

    BINDINGS = [("escape,question_mark,q", "dismiss", "close")]  # noqa: RUF012  textual reads a plain list

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context
        self.set_class(context.terminal.plain, "-plain")

    def compose(self) -> ComposeResult:
        strings = self.context.strings
        with Vertical(classes="dialog"):
            yield Section(strings.help_title, self.context.glyphs)
            yield Static("\n".join(help_lines(strings)), markup=False)


def help_lines(strings: Strings) -> list[str]:
    """One line per key, by scope."""
    lines = [strings.help_everywhere]
    lines += [_line(a, strings) for a in actions.in_scope(actions.EVERYWHERE)]
    lines.append("  " + fit(strings.moving, KEY_CELLS + NAME_CELLS) + strings.moving_help)
    for mode in actions.MODES:
        own = [_line(a, strings) for a in actions.in_scope(mode)]
        if own:
            lines += [str(getattr(strings, mode)), *own]
    return lines


def _line(action: actions.Action, strings: Strings) -> str:
    name = fit(action.label(strings), NAME_CELLS)
    return f"  {fit(action.shown, KEY_CELLS)}{name}{action.explanation(strings)}"
