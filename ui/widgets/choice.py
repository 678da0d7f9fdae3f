"""A push button drawn in text: ``[ Cancel ]``, and ``[>Cancel<]`` where the focus is, so that no colour is needed."""

from __future__ import annotations

from textual.content import Content
from textual.events import Click
from textual.message import Message
from textual.widget import Widget

from ui.format import cell_width


class Choice(Widget, can_focus=True):
    """Posts ``Chosen`` on Enter, space or a click; a disabled one cannot be focused."""

    BINDINGS = [("enter,space", "choose", "choose")]  # noqa: RUF012  textual reads a plain list

    class Chosen(Message):
        """The person chose ``choice``."""

        def __init__(self, choice: Choice) -> None:
            super().__init__()
            self.choice = choice

    def __init__(self, label: str, *, id: str, disabled: bool = False) -> None:  # noqa: A002  textual's name
        super().__init__(id=id, disabled=disabled)
        self.label = label
        self.styles.width = cell_width(label) + 4

    def render(self) -> Content:
        if self.disabled:
            return Content.assemble((f"( {self.label} )", "dim"))
        return Content(f"[>{self.label}<]" if self.has_focus else f"[ {self.label} ]")

    def action_choose(self) -> None:
        self.post_message(self.Chosen(self))

    def on_click(self, event: Click) -> None:
        event.stop()
        self.action_choose()
