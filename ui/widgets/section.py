"""A heading with a line to the right edge: ``── Notes ───────``."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from ui.format import cell_width, printable
from ui.terminal import Glyphs


class Section(Widget):
    """One line; ``show`` changes its words."""

    def __init__(self, title: str, glyphs: Glyphs, *, id: str | None = None) -> None:  # noqa: A002  textual's name
        super().__init__(id=id)
        self.title, self.glyphs = title, glyphs

    def show(self, title: str) -> None:
        self.title = printable(title)
        self.refresh()

    def render(self) -> Content:
        rule = self.glyphs.rule
        before, after = rule * 2 + " ", " " + rule * max(self.size.width - cell_width(self.title) - 4, 0)
        return Content.assemble((before, "dim"), (self.title, "bold"), (after, "dim"))
