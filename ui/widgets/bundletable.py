"""The table of installed bundles: ``>`` marks the row, words say which one is in service."""

from __future__ import annotations

from rich.text import Text
from textual import on
from textual.widgets import DataTable

from ui.bundles import BundleList, BundleRow
from ui.context import Context
from ui.format import byte_size, fit, printable
from ui.strings.base import Strings

CELLS = {"mark": 1, "version": 10, "release": 4, "size": 9, "state": 10}  # the bundle id gets the rest
MIN_ID_CELLS = 12
PADDING_CELLS = 2 * (len(CELLS) + 1)  # one left and one right of every column


class BundleTable(DataTable[Text]):
    """``marked`` is the bundle under the cursor, None while the list is empty."""

    def __init__(self, context: Context, *, id: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id, cursor_type="row")
        self.context = context
        self.bundles = BundleList()

    @property
    def marked(self) -> BundleRow | None:
        rows = self.bundles.rows
        return rows[self.cursor_row] if 0 <= self.cursor_row < len(rows) else None

    def show(self, bundles: BundleList) -> None:
        """Draw ``bundles``; the cursor stays on the bundle it was on."""
        kept = self.marked.bundle_id if self.marked else ""
        self.bundles = bundles
        self.clear(columns=True)
        self._add_columns()
        for row in bundles.rows:
            self.add_row(*self._row_cells(row), key=row.bundle_id)
        rows = [row.bundle_id for row in bundles.rows]
        if kept in rows:
            self.move_cursor(row=rows.index(kept), animate=False)
        self._draw_marks()

    def on_resize(self) -> None:
        self.show(self.bundles)

    def _add_columns(self) -> None:
        strings = self.context.strings
        self.add_column(" ", key="mark", width=CELLS["mark"])
        self.add_column(strings.column_bundle, key="bundle", width=self._id_cells())
        self.add_column(strings.column_version, key="version", width=CELLS["version"])
        self.add_column(strings.column_release.rjust(CELLS["release"]), key="release", width=CELLS["release"])
        self.add_column(strings.column_size.rjust(CELLS["size"]), key="size", width=CELLS["size"])
        self.add_column(strings.column_state, key="state", width=CELLS["state"])

    def _row_cells(self, row: BundleRow) -> list[Text]:
        strings, ellipsis = self.context.strings, self.context.glyphs.ellipsis
        texts = [
            " ",
            fit(printable(row.bundle_id), self._id_cells(), ellipsis),
            fit(printable(row.version), CELLS["version"], ellipsis),
            str(row.release_counter).rjust(CELLS["release"]),
            byte_size(row.size_bytes).rjust(CELLS["size"]),
            state_word(row, strings),
        ]
        return [Text(text, style="bold" if row.current else "") for text in texts]

    def _id_cells(self) -> int:
        return max(self.size.width - PADDING_CELLS - sum(CELLS.values()), MIN_ID_CELLS)

    @on(DataTable.RowHighlighted)
    def _draw_marks(self) -> None:
        for number, row in enumerate(self.bundles.rows):
            if row.bundle_id in self.rows:
                self.update_cell(row.bundle_id, "mark", Text(">" if number == self.cursor_row else " "))


def state_word(row: BundleRow, strings: Strings) -> str:
    """``in service``, ``on trial``, ``previous`` or nothing."""
    if row.current:
        return strings.in_service
    if row.trial:
        return strings.on_trial
    return strings.previous if row.previous else ""
