"""Typed confirmation: what changes, the exact command, the way back, and the id to type. The focus starts on Cancel."""

from __future__ import annotations

import textwrap

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from ui.context import Context
from ui.format import printable
from ui.plans import Plan
from ui.widgets.choice import Choice
from ui.widgets.section import Section

TEXT_CELLS = 74  # inside the dialog's border and padding
LABEL_CELLS = 12


def hanging(label: str, text: str) -> list[str]:
    """``text`` wrapped beside ``label``, its further lines indented as far as the first."""
    return textwrap.wrap(
        text,
        TEXT_CELLS,
        initial_indent=label.ljust(LABEL_CELLS),
        subsequent_indent=" " * LABEL_CELLS,
        break_on_hyphens=False,
    )


class TypedConfirm(ModalScreen[bool]):
    """Dismissed with True only after ``plan.expected`` was typed and the verb chosen."""

    BINDINGS = [  # noqa: RUF012  textual reads a plain list
        ("escape", "cancel", "cancel"),
        ("down,right", "app.focus_next", ""),
        ("up,left", "app.focus_previous", ""),
    ]

    def __init__(self, context: Context, plan: Plan) -> None:
        super().__init__()
        self.context, self.plan = context, plan
        self.set_class(context.terminal.plain, "-plain")

    def compose(self) -> ComposeResult:
        plan, strings = self.plan, self.context.strings
        with Vertical(classes="dialog"):
            yield Section(plan.title, self.context.glyphs)
            yield Static(self._body(), id="confirm-body", markup=False)
            yield Static(plan.question, markup=False)
            with Horizontal(id="confirm-line"):
                yield Static("> ", markup=False, id="confirm-mark")
                yield Input(id="confirm-input", select_on_focus=False)
            yield Static("", id="confirm-verdict", markup=False)
            with Horizontal(id="confirm-choices"):
                yield Choice(strings.cancel, id="cancel")
                yield Choice(plan.verb, id="go", disabled=True)

    def _body(self) -> str:
        lines = [line for label, text in self.plan.rows for line in hanging(label, printable(text))]
        return "\n".join(["", *lines, "", *self.plan.warnings, ""])

    def on_mount(self) -> None:
        self.set_focus(self.query_one("#cancel"))

    @on(Input.Changed, "#confirm-input")
    def judge(self, event: Input.Changed) -> None:
        strings, typed = self.context.strings, event.value.strip()
        matches = typed == self.plan.expected
        self.query_one("#go", Choice).disabled = not matches
        self.query_one("#go", Choice).refresh()
        verdict = strings.typed_right if matches else strings.typed_wrong.format(expected=self.plan.expected)
        self.query_one("#confirm-verdict", Static).update(verdict if typed else "")

    @on(Input.Submitted, "#confirm-input")
    def submit(self) -> None:
        """Enter in the field only moves on: to the verb once the id matches, else it stays."""
        go = self.query_one("#go", Choice)
        if not go.disabled:
            self.set_focus(go)

    @on(Choice.Chosen)
    def choose(self, event: Choice.Chosen) -> None:
        matches = self.query_one("#confirm-input", Input).value.strip() == self.plan.expected
        self.dismiss(event.choice.id == "go" and matches)

    def action_cancel(self) -> None:
        self.dismiss(False)
