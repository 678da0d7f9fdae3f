"""The table of tenants in the KV cache: ``>`` marks the row."""

from __future__ import annotations

import time

from rich.text import Text
from textual import on
from textual.widgets import DataTable

from appliance.wire import KvTenant
from ui.context import Context
from ui.format import byte_size, count, duration, fit, printable
from ui.strings.base import Strings

CELLS = {"mark": 1, "blocks": 10, "units": 11, "size": 10, "used": 18}  # the name gets the rest
MIN_NAME_CELLS = 8
PADDING_CELLS = 2 * (len(CELLS) + 1)  # one left and one right of every column
JUST_NOW_S = 5


class TenantTable(DataTable[Text]):
    """``marked`` is the tenant under the cursor, None while there is none."""

    def __init__(self, context: Context, *, id: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id, cursor_type="row")
        self.context = context
        self.tenants: tuple[KvTenant, ...] = ()

    @property
    def marked(self) -> KvTenant | None:
        return self.tenants[self.cursor_row] if 0 <= self.cursor_row < len(self.tenants) else None

    def show(self, tenants: tuple[KvTenant, ...]) -> None:
        """Draw ``tenants``; the cursor stays on the tenant it was on."""
        kept = self.marked.name if self.marked else ""
        self.tenants = tenants
        self.clear(columns=True)
        self._add_columns()
        now_s = time.time()
        for tenant in tenants:
            self.add_row(*self._row_cells(tenant, now_s), key=tenant.name)
        names = [tenant.name for tenant in tenants]
        if kept in names:
            self.move_cursor(row=names.index(kept), animate=False)
        self._draw_marks()

    def on_resize(self) -> None:
        self.show(self.tenants)

    def _add_columns(self) -> None:
        strings = self.context.strings
        self.add_column(" ", key="mark", width=CELLS["mark"])
        self.add_column(strings.column_tenant, key="tenant", width=self._name_cells())
        for key, title in (("blocks", strings.column_blocks), ("units", strings.column_units),
                           ("size", strings.column_size)):  # fmt: skip
            self.add_column(title.rjust(CELLS[key]), key=key, width=CELLS[key])
        self.add_column(strings.column_used, key="used", width=CELLS["used"])

    def _row_cells(self, tenant: KvTenant, now_s: float) -> list[Text]:
        texts = [
            " ",
            fit(printable(tenant.name), self._name_cells(), self.context.glyphs.ellipsis),
            count(tenant.blocks).rjust(CELLS["blocks"]),
            count(tenant.checkpoints).rjust(CELLS["units"]),
            byte_size(tenant.size_bytes).rjust(CELLS["size"]),
            last_used(tenant.last_used_s, now_s, self.context.strings),
        ]
        return [Text(text) for text in texts]

    def _name_cells(self) -> int:
        return max(self.size.width - PADDING_CELLS - sum(CELLS.values()), MIN_NAME_CELLS)

    @on(DataTable.RowHighlighted)
    def _draw_marks(self) -> None:
        for number, tenant in enumerate(self.tenants):
            if tenant.name in self.rows:
                self.update_cell(tenant.name, "mark", Text(">" if number == self.cursor_row else " "))


def last_used(used_s: int, now_s: float, strings: Strings) -> str:
    """``2 h 05 min ago``."""
    if used_s <= 0:
        return strings.never
    passed_s = now_s - used_s
    return strings.just_now if passed_s < JUST_NOW_S else strings.ago.format(span=duration(passed_s))
