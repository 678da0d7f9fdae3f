"""The newest requests that were not read whole: when, how long, how much was read, why. Shown where there is room."""

from __future__ import annotations

import time

from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget

from appliance.wire import KvMiss
from ui.context import Context
from ui.format import count, fit, printable

WHEN_CELLS, TOKENS_CELLS = 17, 32


class Misses(Widget):
    """One line a request, the newest first; as many as the style's max-height allows."""

    def __init__(self, context: Context, *, id: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id)
        self.context = context
        self.misses: tuple[KvMiss, ...] = ()

    def show(self, misses: tuple[KvMiss, ...]) -> None:
        self.misses = misses
        self.refresh(layout=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return max(len(self.misses), 1)

    def render(self) -> Content:
        strings, ellipsis = self.context.strings, self.context.glyphs.ellipsis
        lines = [
            Content.assemble(
                (fit(moment(miss.at_s), WHEN_CELLS), "dim"),
                fit(strings.miss_line.format(read=count(miss.hit_tokens), tokens=count(miss.tokens)), TOKENS_CELLS),
                fit(printable(miss.reason), max(self.size.width - WHEN_CELLS - TOKENS_CELLS, 1), ellipsis),
            )
            for miss in self.misses[: self.size.height]
        ]
        return Content("\n").join(lines or [Content(strings.reasons_none)])


def moment(at_s: float) -> str:
    """``11-14 22:13:20Z``: UTC, as in the server's log."""
    try:
        return time.strftime("%m-%d %H:%M:%SZ", time.gmtime(at_s))
    except (OverflowError, ValueError, OSError):
        return "?"
