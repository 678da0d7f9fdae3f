"""The command that ran last, as it was run, with its newest steps and how it ended."""

from __future__ import annotations

import textwrap
from collections import deque

from textual.content import Content
from textual.widget import Widget

from appliance.wire import Progress
from ui.context import Context
from ui.format import byte_size, duration, fit, percent, printable, share

KEPT_STEPS = 50


def step_line(progress: Progress) -> str:
    """``copy objects  34 %  1.0 MiB of 3.0 MiB  2 s``; the bytes only where the step counts them."""
    parts = [" ".join(t for t in (progress.step, progress.message) if t)]
    if progress.total_bytes > 0:
        done = percent(share(progress.done_bytes, progress.total_bytes))
        parts.append(f"{done}  {byte_size(progress.done_bytes)} of {byte_size(progress.total_bytes)}")
    if progress.elapsed_s >= 1:
        parts.append(duration(progress.elapsed_s))
    return printable("  ".join(parts))


class CommandPane(Widget):
    """``show_start``, then ``show_step`` for each progress line, then ``show_end``."""

    def __init__(self, context: Context, *, id: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id)
        self.context = context
        self.command, self.ending = "", ""
        self.steps: deque[Progress] = deque(maxlen=KEPT_STEPS)

    def show_start(self, command: str) -> None:
        self.command, self.ending = command, self.context.strings.command_running
        self.steps.clear()
        self.refresh()

    def show_step(self, progress: Progress) -> None:
        """A line for the same step replaces the one before it."""
        if self.steps and self.steps[-1].step == progress.step and progress.step:
            self.steps.pop()
        self.steps.append(progress)
        self.refresh()

    def show_end(self, ending: str) -> None:
        self.ending = ending
        self.refresh()

    def render(self) -> Content:
        width, ellipsis = max(self.size.width, 1), self.context.glyphs.ellipsis
        if not self.command:
            return Content(self.context.strings.command_none)
        command, ending = wrapped(f"$ {self.command}", width), wrapped(self.ending, width)
        room = max(self.size.height - len(command) - len(ending), 0)
        steps = [fit(step_line(progress), width, ellipsis) for progress in self.steps][-room:] if room else []
        return Content("\n".join([*command, *steps, *ending]))


def wrapped(text: str, width: int) -> list[str]:
    """``text`` in lines of ``width`` cells, the further ones indented; ids and paths are not cut at hyphens."""
    return textwrap.wrap(printable(text), width, subsequent_indent="  ", break_on_hyphens=False)
