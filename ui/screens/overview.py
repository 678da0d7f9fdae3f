"""F1: how fast, how busy, how full, and what is served. Where the server does not answer, a calm sentence instead."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from appliance.wire import FULL, KvStatus, Status
from ui.actions import bindings
from ui.command import Command
from ui.format import byte_size, count, duration, percent, printable, share
from ui.screens.base import ConsoleScreen
from ui.strings.base import Strings
from ui.view import ServerView
from ui.widgets.meter import BarMeter, Facts, RateMeter
from ui.widgets.notes import Notes
from ui.widgets.section import Section


class OverviewScreen(ConsoleScreen):
    """Live numbers of one server."""

    mode: ClassVar[str] = "overview"
    CSS_PATH = "overview.tcss"
    BINDINGS = bindings("overview")

    def compose_body(self) -> ComposeResult:
        strings, glyphs = self.context.strings, self.context.glyphs
        with Vertical(id="live"):
            yield Facts(glyphs, id="identity")
            yield Section("", glyphs, id="rates-title")
            yield RateMeter(strings.prefill, strings, glyphs, id="prefill")
            yield RateMeter(strings.decode, strings, glyphs, id="decode")
            yield Facts(glyphs, id="load")
            yield Section("", glyphs, id="kv-title")
            yield BarMeter(strings.kv_disk, glyphs, id="kv-used")
            yield BarMeter(strings.kv_hits, glyphs, id="kv-hits")
            yield Static("", id="kv-missed", markup=False)
            yield Section(strings.notes_title, glyphs)
            yield Notes(strings, id="notes")
        with Vertical(id="calm"):
            yield Section("", glyphs, id="calm-title")
            yield Static("", id="calm-body", markup=False)

    def show_view(self, view: ServerView) -> None:
        self.query_one("#live").display = view.status is not None
        self.query_one("#calm").display = view.status is None
        if view.status is None:
            self._show_calm(view)
            return
        self.query_one("#prefill", RateMeter).show(view.prefill_history)
        self.query_one("#decode", RateMeter).show(view.decode_history)
        self._show_status(view.status)
        self._show_kv(view.status.kv)

    def _show_calm(self, view: ServerView) -> None:
        strings, context = self.context.strings, self.context
        title = getattr(strings, f"{view.link}_title")
        body = getattr(strings, f"{view.link}_body").format(
            socket=context.socket_path,
            start=Command(("serve",), context.home).line,
            problem=printable(view.problem),
        )
        self.query_one("#calm-title", Section).show(title)
        self.query_one("#calm-body", Static).update(body)

    def _show_status(self, status: Status) -> None:
        strings = self.context.strings
        self.query_one("#identity", Facts).show(*identity_rows(status, strings))
        window = strings.rates_title.format(seconds=duration(status.window_s))
        self.query_one("#rates-title", Section).show(window)
        self.query_one("#load", Facts).show(*load_rows(status, strings))
        self.query_one("#notes", Notes).show(status.notes)

    def _show_kv(self, kv: KvStatus) -> None:
        strings = self.context.strings
        self.query_one("#kv-title", Section).show(kv_title(kv, strings))
        self.query_one("#kv-used", BarMeter).show(
            share(kv.used_bytes, kv.max_bytes),
            strings.kv_disk_caption.format(
                percent=percent(share(kv.used_bytes, kv.max_bytes)),
                used=byte_size(kv.used_bytes),
                max=byte_size(kv.max_bytes),
            ),
        )
        looked = kv.hit_tokens + kv.miss_tokens
        caption = (
            strings.kv_none_yet
            if looked == 0
            else strings.kv_hits_caption.format(
                percent=percent(share(kv.hit_tokens, looked)),
                hit=count(kv.hit_tokens),
                looked=count(looked),
            )
        )
        self.query_one("#kv-hits", BarMeter).show(share(kv.hit_tokens, looked), caption)
        self.query_one("#kv-missed", Static).update(missed(kv, strings))


def identity_rows(status: Status, strings: Strings) -> list[tuple[str, str]]:
    """What is served, on what, since when."""
    context = strings.tokens.format(count=count(status.context_tokens))
    return [
        (strings.model, f"{status.model} {status.version}".strip()),
        (strings.bundle, served_bundle(status)),
        (strings.device, f"{status.device}: {status.backend}" if status.backend else status.device),
        (strings.encoding, strings.encoding_line.format(encoding=status.encoding, numerics=status.numerics)),
        (strings.context, context),
        (strings.uptime, duration(status.uptime_s)),
    ]


def served_bundle(status: Status) -> str:
    """The bundle, and its profile where that is not the whole model."""
    return status.bundle_id if status.profile in ("", FULL) else f"{status.bundle_id}, {status.profile}"


def load_rows(status: Status, strings: Strings) -> list[tuple[str, str]]:
    """Requests now and since the start."""
    requests = strings.requests_line.format(
        running=count(status.running),
        queued=count(status.queued),
        depth=count(status.queue_depth),
        total=count(status.requests_total),
    )
    tokens = strings.tokens_line.format(
        prompt=count(status.prompt_tokens_total), completion=count(status.completion_tokens_total)
    )
    return [(strings.requests, requests), ("", tokens)]


def kv_title(kv: KvStatus, strings: Strings) -> str:
    """``KV cache on disk: writing``, or why it is not."""
    if not kv.enabled:
        state = strings.kv_off
    elif kv.writing:
        state = strings.kv_writing
    else:
        state = strings.kv_stopped.format(reason=kv.reason)
    return f"{strings.kv_title}: {state}"


def missed(kv: KvStatus, strings: Strings) -> str:
    """Why tokens were missed, the commonest reason first; empty while nothing was."""
    reasons = sorted(kv.miss_reasons.items(), key=lambda item: (-item[1], item[0]))
    if not reasons:
        return ""
    listed = ", ".join(f"{printable(reason)} {count(times)}" for reason, times in reasons)
    return strings.kv_missed.format(reasons=listed)
