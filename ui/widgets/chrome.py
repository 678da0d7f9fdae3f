"""The first and the last line of every screen: where you are and how the server is; which keys work here."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from ui import actions
from ui.context import Context
from ui.format import cell_width
from ui.view import ServerView

STATE_STYLES = {
    "ready": "bold $text-success",
    "down": "bold $text-warning",
    "unreadable": "bold $text-error",
    "starting": "bold $text-warning",
    "draining": "bold $text-warning",
}


class TitleLine(Widget):
    """`` Solocard  [F1 Overview]  F2 Models   F3 Logs                 ready``; brackets mark the open screen."""

    def __init__(self, context: Context, mode: str) -> None:
        super().__init__()
        self.context, self.mode = context, mode
        self.view = ServerView()

    def show_view(self, view: ServerView) -> None:
        self.view = view
        self.refresh()

    def render(self) -> Content:
        strings = self.context.strings
        parts: list[Content | str | tuple[str, str]] = [(f" {strings.title} ", "bold")]
        for action in actions.in_scope(actions.EVERYWHERE):
            if action.name in actions.MODES:
                label = f"{action.shown} {action.label(strings)}"
                parts.append((f" [{label}]", "bold") if action.name == self.mode else f"  {label} ")
        left = Content.assemble(*parts)
        right = self._state()
        gap = max(self.size.width - left.cell_length - right.cell_length - 1, 1)
        return left + " " * gap + right + " "

    def _state(self) -> Content:
        strings, state = self.context.strings, self.view.state
        words = str(getattr(strings, f"state_{state}", state))
        mark = f"{strings.replay_mark}: " if self.context.replaying else ""
        return Content.assemble(mark, (words, STATE_STYLES.get(state, "")))


class KeyLine(Widget):
    """`` a Activate  b Roll back  ? Help  q Quit``: keys of ``scope`` first, then those of every screen."""

    def __init__(self, context: Context, scope: str) -> None:
        super().__init__()
        self.context, self.scope = context, scope

    def render(self) -> Content:
        parts: list[Content | str | tuple[str, str]] = []
        used = 0
        for key, label in actions.hints(self.scope, self.context.strings):
            used += cell_width(key) + cell_width(label) + 3
            if used > self.size.width:
                break
            parts += [(f" {key}", "bold $text-accent"), f" {label} "]
        return Content.assemble(*parts)
