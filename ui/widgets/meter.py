"""One-line meters: a rate with its recent history, and a bar with its share. Every number is also in words."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from ui.format import bar, cell_width, fit, printable, rate, sparkline
from ui.strings.base import Strings
from ui.terminal import Glyphs

LABEL_CELLS = 10
VALUE_CELLS = 16
PEAK_CELLS = 14
BAR_CELLS = 20


class RateMeter(Widget):
    """``Prefill      105.3 tok/s  ▁▂▅█▆  peak 120.0``: the newest rate, its history, the history's peak."""

    def __init__(self, label: str, strings: Strings, glyphs: Glyphs, *, id: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id)
        self.label, self.strings, self.glyphs = label, strings, glyphs
        self.history: tuple[float, ...] = ()

    def show(self, history: tuple[float, ...]) -> None:
        """``history`` in tokens/s, oldest first."""
        self.history = history
        self.refresh()

    def render(self) -> Content:
        newest = self.history[-1] if self.history else 0.0
        value = f"{rate(newest)} {self.strings.rate_unit}".rjust(VALUE_CELLS)
        room = max(self.size.width - LABEL_CELLS - VALUE_CELLS - PEAK_CELLS - 4, 1)
        shown = self.history[-room:]
        peak = self.strings.peak.format(rate=rate(max(shown, default=0.0)).rjust(6))
        return Content.assemble(
            (fit(self.label, LABEL_CELLS), "dim"),
            (value, "bold"),
            "  ",
            (sparkline(shown, room, self.glyphs.spark), "$text-accent"),
            "  ",
            fit(peak, PEAK_CELLS),
        )


class BarMeter(Widget):
    """``Used  ████░░░░  15 %  1.2 GiB of 8.0 GiB``: a share of a whole, then a caption that says it in words."""

    def __init__(self, label: str, glyphs: Glyphs, *, id: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id)
        self.label, self.glyphs = label, glyphs
        self.fraction, self.caption = 0.0, ""

    def show(self, fraction: float, caption: str) -> None:
        """``fraction`` in 0…1."""
        self.fraction, self.caption = fraction, caption
        self.refresh()

    def render(self) -> Content:
        drawn = bar(self.fraction, BAR_CELLS, self.glyphs.bar_full, self.glyphs.bar_empty)
        return Content.assemble((fit(self.label, LABEL_CELLS), "dim"), (drawn, "$text-accent"), f"  {self.caption}")


class Facts(Widget):
    """Rows of ``label   value`` with the labels aligned; values from outside are made printable and cut to fit."""

    def __init__(self, glyphs: Glyphs, *, id: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id)
        self.glyphs = glyphs
        self.rows: tuple[tuple[str, str], ...] = ()

    def show(self, *rows: tuple[str, str]) -> None:
        self.rows = rows
        self.refresh(layout=True)

    def render(self) -> Content:
        label_cells = max((cell_width(label) + 2 for label, _ in self.rows), default=LABEL_CELLS)
        label_cells = max(label_cells, LABEL_CELLS)
        room = max(self.size.width - label_cells, 1)
        ellipsis = self.glyphs.ellipsis
        lines = [
            Content.assemble((fit(label, label_cells), "dim"), fit(printable(value), room, ellipsis))
            for label, value in self.rows
        ]
        return Content("\n").join(lines)
