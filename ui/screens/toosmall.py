"""Below 80x24: one calm sentence in place of a broken screen. It goes by itself when the window is large enough."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.events import Resize
from textual.screen import ModalScreen
from textual.widgets import Static

from ui.context import Context
from ui.terminal import MIN_COLUMNS, MIN_ROWS


class TooSmallScreen(ModalScreen[None]):
    """Only q works here."""

    BINDINGS = [("q", "app.quit", "quit")]  # noqa: RUF012  textual reads a plain list

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    def compose(self) -> ComposeResult:
        yield Static(self.sentence(), id="too-small", markup=False)

    def on_resize(self, event: Resize) -> None:
        self.query_one("#too-small", Static).update(self.sentence())

    def sentence(self) -> str:
        strings, have = self.context.strings, self.app.size
        need = f"{MIN_COLUMNS}x{MIN_ROWS}"
        return f"{strings.too_small.format(need=need, have=f'{have.width}x{have.height}')}\n{strings.too_small_hint}"
