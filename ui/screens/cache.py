"""F4: what the KV cache holds, how often it helps and why not more often; purge a tenant, verify every record.

The running server tells; where there is none, ``solocard kv stats`` reads the files.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.events import Resize
from textual.widgets import DataTable, Static

from appliance.errors import SolocardError
from appliance.wire import KvReport, KvStatus
from ui import plans
from ui.actions import bindings
from ui.backend import AnswerError, ServerDownError, read_report
from ui.command import CommandError
from ui.context import Context
from ui.format import byte_size, count, percent, printable, share
from ui.messages import CommandEnded, KvArrived, KvLost
from ui.screens.commanding import CommandScreen
from ui.strings.base import Strings
from ui.view import ServerView
from ui.widgets.commandpane import CommandPane
from ui.widgets.meter import BarMeter, Facts
from ui.widgets.misses import Misses
from ui.widgets.reasons import Reasons
from ui.widgets.section import Section
from ui.widgets.tenanttable import TenantTable

TALL_ROWS = 38  # then everything fits, with five lines for tenants at least
LOOKS_APART = 10  # looks at the status for one at the cache, which is added up anew: half a second for 100,000 blocks


class CacheScreen(CommandScreen):
    """``report`` is the last one that came; the server's status refreshes its numbers in between."""

    mode: ClassVar[str] = "cache"
    CSS_PATH = "cache.tcss"
    BINDINGS = bindings("cache")
    quiet: ClassVar[tuple[str, ...]] = ("kv", "stats")
    reading: ClassVar[tuple[str, ...]] = ("kv", "verify")
    looking = False  # a look is under way; a slow server is not asked twice at once

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.report: KvReport | None = None
        self.problem = context.strings.cache_loading
        self.link = "asking"  # as in ServerView

    def compose_body(self) -> ComposeResult:
        strings, glyphs = self.context.strings, self.context.glyphs
        yield Section(strings.kv_title, glyphs, id="cache-title")
        yield BarMeter(strings.kv_disk, glyphs, id="cache-used")
        yield BarMeter(strings.kv_hits, glyphs, id="cache-hits")
        yield BarMeter(strings.cache_today, glyphs, id="cache-today")
        yield Facts(glyphs, id="cache-facts")
        yield Section(strings.reasons_title, glyphs, id="reasons-title")
        yield Reasons(self.context, id="reasons")
        yield Section(strings.misses_title, glyphs, id="misses-title")
        yield Misses(self.context, id="misses")
        yield Section(strings.tenants_title, glyphs)
        yield Static("", id="cache-note", markup=False)
        yield TenantTable(self.context, id="tenants")
        yield Section(strings.command_title, glyphs)
        yield CommandPane(self.context, id="cache-command")

    def on_mount(self) -> None:
        super().on_mount()
        self.timer = self.set_interval(self.context.poll_s * LOOKS_APART, self.look, pause=True)

    def on_resize(self, event: Resize) -> None:
        self.set_class(event.size.height >= TALL_ROWS, "-tall")

    def on_screen_resume(self) -> None:
        self.query_one(TenantTable).focus()
        self.action_renew()

    # ---- looking

    def look(self) -> None:
        """Every few seconds, while the server answers: a stopped one's files are read when a person asks."""
        if self.link == "up":
            self.action_renew()

    async def read_cache(self) -> None:
        """Worker: it only posts messages."""
        try:
            self.post_message(KvArrived(await asyncio.to_thread(self.context.backend.kv)))
        except ServerDownError as error:
            self.post_message(KvLost(str(error), down=True))
        except AnswerError as error:
            self.post_message(KvLost(str(error), down=False))

    @on(KvArrived)
    def take_report(self, event: KvArrived) -> None:
        self.looking = False
        self.report, self.problem = event.report, ""
        self.draw()

    @on(KvLost)
    def take_loss(self, event: KvLost) -> None:
        """Down, or older than this console: the files tell."""
        self.looking = False
        self.read_files()

    def read_files(self) -> None:
        if self.running is None:
            self.start(self.quiet)

    def take_quiet(self, event: CommandEnded) -> None:
        try:
            self.report, self.problem = reported(event), ""
        except SolocardError as error:
            self.problem = self.context.strings.cache_failed.format(message=error)
        self.draw()

    def show_view(self, view: ServerView) -> None:
        came_or_went, self.link = self.link != view.link, view.link
        if self.report is not None and view.status is not None:
            self.report = replace(self.report, status=view.status.kv, live=True)
        self.draw()
        if came_or_went and self.is_current:
            self.action_renew()

    # ---- acting

    def action_renew(self) -> None:
        if not self.looking:
            self.looking = True
            self.run_worker(self.read_cache(), group="kv")

    def action_purge(self) -> None:
        strings, tenant = self.context.strings, self.query_one(TenantTable).marked
        if tenant is None:
            self.say(strings.tenants_none)
        else:
            self.confirm(plans.purge(tenant, strings, self.shown))

    def action_verify(self) -> None:
        """Start, or stop the one under way."""
        if self.running is not None and self.running.arguments == self.reading:
            self.stop.set()
        elif self.busy:
            self.say(self.context.strings.busy)
        else:
            self.start(self.reading)

    def after_command(self) -> None:
        self.action_renew()

    # ---- showing

    def draw(self) -> None:
        strings, report = self.context.strings, self.report or KvReport()
        known = self.report is not None
        self.query_one("#cache-title", Section).show(title(report, strings) if known else strings.kv_title)
        for name, (fraction, caption) in meters(report, strings).items():
            self.query_one(name, BarMeter).show(fraction, caption if known else "")
        self.query_one(Facts).show((strings.cache_holds, holds(report, strings) if known else ""))
        self.query_one("#reasons-title", Section).show(reasons_title(report, strings))
        self.query_one(Reasons).show(report.logged_reasons or report.status.miss_reasons)
        self.query_one(Misses).show(report.misses)
        table = self.query_one(TenantTable)
        if table.tenants != report.tenants:
            table.show(report.tenants)
        self.draw_note()

    @on(DataTable.RowHighlighted)
    def draw_note(self) -> None:
        """Above the table: what is wrong, or why it is empty."""
        strings, note = self.context.strings, self.query_one("#cache-note", Static)
        report = self.report or KvReport()
        empty = strings.cache_replay if self.context.replaying else strings.tenants_none
        sentence = self.problem or "; ".join(report.problems) or ("" if report.tenants else empty)
        note.update(printable(sentence))
        note.display = bool(sentence)


def title(report: KvReport, strings: Strings) -> str:
    """``KV cache on disk: writing``, why it is not, or that there is no server."""
    kv = report.status
    if not kv.enabled:
        state = strings.kv_off
    elif not report.live:
        state = strings.cache_down
    else:
        state = strings.kv_writing if kv.writing else strings.kv_stopped.format(reason=kv.reason)
    return f"{strings.kv_title}: {state}"


def meters(report: KvReport, strings: Strings) -> dict[str, tuple[float, str]]:
    """Widget → fraction and caption."""
    kv = report.status
    used = share(kv.used_bytes, kv.max_bytes)
    caption = strings.kv_disk_caption.format(
        percent=percent(used), used=byte_size(kv.used_bytes), max=byte_size(kv.max_bytes)
    )
    return {
        "#cache-used": (used, caption), "#cache-hits": hits(report, strings), "#cache-today": today(kv, strings),
    }  # fmt: skip


def reasons_title(report: KvReport, strings: Strings) -> str:
    missed = sum(report.logged_reasons.values())
    if not missed:
        return strings.reasons_title
    return strings.reasons_title_of.format(missed=count(missed), requests=count(report.logged_requests))


def hits(report: KvReport, strings: Strings) -> tuple[float, str]:
    """Of the request log, which outlives restarts; of the running server where the log is empty."""
    if report.logged_prompt_tokens:
        fraction = share(report.logged_hit_tokens, report.logged_prompt_tokens)
        return fraction, strings.cache_logged.format(
            percent=percent(fraction), hit=count(report.logged_hit_tokens), asked=count(report.logged_prompt_tokens)
        )  # fmt: skip
    hit, asked = report.status.hit_tokens, report.status.hit_tokens + report.status.miss_tokens
    if not asked:
        return 0.0, strings.cache_none_logged
    fraction = share(hit, asked)
    return fraction, strings.kv_hits_caption.format(percent=percent(fraction), hit=count(hit), looked=count(asked))


def today(kv: KvStatus, strings: Strings) -> tuple[float, str]:
    """Written since midnight (UTC), of the day's budget where there is one."""
    written, limit = byte_size(kv.written_today_bytes), byte_size(kv.daily_write_bytes)
    if not kv.daily_write_bytes:
        return 0.0, strings.cache_written.format(written=written)
    fraction = share(kv.written_today_bytes, kv.daily_write_bytes)
    return fraction, strings.cache_written_of.format(percent=percent(fraction), written=written, limit=limit)


def holds(report: KvReport, strings: Strings) -> str:
    """``1,204 blocks, 96 checkpoints, 5 files``, and what is worth knowing."""
    kv = report.status
    line = strings.cache_holds_line.format(
        blocks=count(kv.blocks), checkpoints=count(kv.checkpoints), segments=count(kv.segments)
    )
    if report.damaged:
        line += strings.cache_damaged.format(count=count(report.damaged))
    if report.purged_bytes:
        line += strings.cache_purged.format(size=byte_size(report.purged_bytes))
    return line


def reported(event: CommandEnded) -> KvReport:
    """What a finished ``solocard kv stats --json`` printed. Raises SolocardError with what went wrong."""
    if event.outcome is None:
        raise event.error or CommandError("solocard kv stats did not run")
    if not event.outcome.ok or event.outcome.last is None:
        raise CommandError(event.outcome.message)
    try:
        return read_report(event.outcome.last.data)
    except (TypeError, ValueError) as error:
        raise CommandError(f"solocard kv stats --json: {error}; console and appliance differ in version") from None
