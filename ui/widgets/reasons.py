"""Why prompts were computed and not read: one line a reason, the commonest first, each with what it means."""

from __future__ import annotations

from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget

from ui.context import Context
from ui.format import count, fit, printable
from ui.strings.base import Strings

NAME_CELLS, COUNT_CELLS = 13, 8


class Reasons(Widget):
    """As many lines as there are reasons, and as the style's max-height allows."""

    def __init__(self, context: Context, *, id: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id)
        self.context = context
        self.reasons: dict[str, int] = {}

    def show(self, reasons: dict[str, int]) -> None:
        """``reasons``: name → how many requests."""
        self.reasons = reasons
        self.refresh(layout=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return max(len(self.reasons), 1)

    def render(self) -> Content:
        return Content("\n").join(reason_lines(self.reasons, self.size.width, self.size.height, self.context))


def reason_lines(reasons: dict[str, int], width: int, height: int, context: Context) -> list[Content]:
    """``reasons`` in at most ``height`` lines of ``width`` cells; those left out are counted in the last."""
    strings, ellipsis = context.strings, context.glyphs.ellipsis
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    if not ordered:
        return [Content(strings.reasons_none)]
    shown = ordered if len(ordered) <= height else ordered[: height - 1]
    lines = [
        Content.assemble(
            (fit(printable(reason), NAME_CELLS, ellipsis), "dim"),
            (count(times).rjust(COUNT_CELLS), "bold"),
            "  ",
            fit(meaning(reason, strings), max(width - NAME_CELLS - COUNT_CELLS - 2, 1), ellipsis),
        )
        for reason, times in shown
    ]
    left_out = sum(times for _, times in ordered[len(shown) :])
    return [*lines, Content(strings.reasons_more.format(count=count(left_out)))] if left_out else lines


def meaning(reason: str, strings: Strings) -> str:
    """One sentence; one for reasons of a newer server too."""
    return str(getattr(strings, f"reason_{reason.replace('-', '_')}", strings.reason_unknown))
