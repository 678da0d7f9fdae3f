"""Plain sentences a person should know, wrapped into the room there is."""

from __future__ import annotations

import textwrap

from textual.content import Content
from textual.widget import Widget

from ui.format import printable
from ui.strings.base import Strings

INDENT = "  "


class Notes(Widget):
    """``- a sentence`` per note; says how many did not fit."""

    def __init__(self, strings: Strings, *, id: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id)
        self.strings = strings
        self.notes: tuple[str, ...] = ()

    def show(self, notes: tuple[str, ...]) -> None:
        self.notes = notes
        self.refresh()

    def render(self) -> Content:
        if not self.notes:
            return Content(self.strings.notes_none)
        return Content("\n".join(note_lines(self.notes, self.size.width, self.size.height, self.strings)))


def note_lines(notes: tuple[str, ...], width: int, height: int, strings: Strings) -> list[str]:
    """``notes`` in at most ``height`` lines of ``width`` cells; a note is shown whole or counted as left out."""
    blocks = [
        textwrap.wrap(printable(note), max(width, 10), initial_indent="- ", subsequent_indent=INDENT) or ["-"]
        for note in notes
    ]
    if sum(len(block) for block in blocks) <= height:
        return [line for block in blocks for line in block]
    lines: list[str] = []
    for shown, block in enumerate(blocks):
        if len(lines) + len(block) > height - 1:
            return [*lines, strings.notes_more.format(count=len(blocks) - shown)]
        lines += block
    return lines
