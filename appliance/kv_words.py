"""The KV cache in words for a terminal: what a report says, what a reason means, and what to do about it."""

from __future__ import annotations

import time
from pathlib import Path

from appliance.cli_output import counted, size
from appliance.wire import KvReport, KvStatus, KvTenant

BAR_CELLS = 24
MEANING = {
    "too-short": "the prompt has no whole block of 256 tokens to read; nothing to do",
    "no-unit": "not stored, or not this far: a new prompt, or a new beginning; put dates and names last",
    "fingerprint": "stored by another model, profile or setting; it fills again by itself",
    "ttl": "not used for longer than kv.ttl_hours; raise that to keep prompts longer",
    "evicted": "dropped to stay within kv.max_bytes; raise that if the disk has room",
    "corrupt": "a stored record failed its check and is not used; run `solocard kv verify`",
    "policy": "the cache is off or may not write; see `writes` above and kv.enabled in config.yaml",
}
REMEDY = {  # what a reason to stop writing contains → what to do; the first that fits
    "not opened": "nothing is read either; mend that, then restart the server",
    "made again": "nothing is read either until it is, tried every minute; make room, or check the disk",
    "kv.daily_write_bytes": "wait until then, or raise kv.daily_write_bytes in config.yaml and restart the server",
    "kv.min_free_bytes": "free disk space; stored prompts are still read",
    "quota": "raise kv.max_bytes in config.yaml and restart the server",
    "slower than": "nothing: what was not written is computed again, and stored later",
    "policy": "set kv.enabled: true in config.yaml and restart the server",
    "ENOSPC": "free disk space; stored prompts are still read",
    "EDQUOT": "free disk space; stored prompts are still read",
    "EROFS": "the file system is read-only; check the disk, then restart the server",
    "EIO": "the disk fails; check it, then restart the server",
}


def remedy(reason: str) -> str:
    """What to do about it; that reading goes on where nothing is known."""
    return next((text for mark, text in REMEDY.items() if mark in reason), "stored prompts are still read")


def stats_lines(home: Path, report: KvReport) -> list[str]:
    """The report as a person reads it."""
    kv = report.status
    where = "as the running server counts" if report.live else "read from the files; no server is running"
    lines = [f"KV cache in {home / 'kv'}, {where}"]
    lines += [f"{label:9} {text}" for label, text in _facts(report, kv)]
    reasons = miss_reasons(report)
    if reasons:
        lines.append("misses    requests not read whole, by reason:")
        lines += [f"  {reason:12} {times:>7,}  {MEANING.get(reason, 'unknown to this version')}"
                  for reason, times in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))]  # fmt: skip
    lines.append("tenants" if report.tenants else "tenants   none has stored anything")
    lines += [_tenant_line(tenant) for tenant in report.tenants]
    return lines + [f"note: {problem}" for problem in report.problems]


def _facts(report: KvReport, kv: KvStatus) -> list[tuple[str, str]]:
    facts = [
        ("used", f"{bar(kv.used_bytes, kv.max_bytes)}  {size(kv.used_bytes)} of {size(kv.max_bytes)}{_room(report)}")
    ]
    if report.purged_bytes:
        facts.append(("", f"{size(report.purged_bytes)} of it are of purged tenants and freed as room is needed"))
    facts += [("holds", _holds(report)), ("writes", _writes(report)), ("today", _today(kv)), ("hits", _hits(report))]
    if report.live and (kv.replays or kv.reclaimed_bytes):
        since = f"{kv.replays:,} exact replays, {size(kv.reclaimed_bytes)} reclaimed"
        facts.append(("", f"since the server started: {since}"))
    return facts


def _room(report: KvReport) -> str:
    free = f"; {size(report.free_bytes)} free on the disk" if report.free_bytes else ""
    kept = report.status.min_free_bytes
    return free + (f", {size(kept)} of it left to others" if kept else "")


def _holds(report: KvReport) -> str:
    kv = report.status
    roles = ", ".join(f"{count:,} {role}" for role, count in report.roles.items() if count)
    checkpoints = counted(kv.checkpoints, "checkpoint") + (f" ({roles})" if roles else "")
    damaged = f", {counted(report.damaged, 'damaged record')} set aside" if report.damaged else ""
    files = counted(kv.segments, "segment file")
    return f"{counted(kv.blocks, 'block')} of 256 tokens, {checkpoints}, {files}{damaged}"


def _today(kv: KvStatus) -> str:
    limit = f" of {size(kv.daily_write_bytes)} (kv.daily_write_bytes)" if kv.daily_write_bytes else "; no daily limit"
    return f"{size(kv.written_today_bytes)} written{limit}"


def _writes(report: KvReport) -> str:
    kv = report.status
    if not kv.enabled:
        return f"no: the cache is off; {REMEDY['policy']}"
    if not report.live:
        return "no server is running"
    if kv.writing:
        return "yes"
    return f"no: {kv.reason}; {remedy(kv.reason)}"


def _hits(report: KvReport) -> str:
    hit, asked = report.logged_hit_tokens, report.logged_prompt_tokens
    if not asked:
        return "no request logged yet"
    return (f"{bar(hit, asked)}  {hit:,} of {asked:,} prompt tokens of the newest {report.logged_requests:,} requests "
            "were read, not computed")  # fmt: skip


def miss_reasons(report: KvReport) -> dict[str, int]:
    """Of the request log; of the running server where the log is empty."""
    return report.logged_reasons or report.status.miss_reasons


def bar(part: int, whole: int) -> str:
    """``[######..................]  25 %``; a sliver for anything above nothing."""
    share = min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0
    cells = max(round(share * BAR_CELLS), 1 if part > 0 else 0)
    percent = "<1" if 0 < share < 0.01 else str(int(share * 100))
    return f"[{'#' * cells}{'.' * (BAR_CELLS - cells)}] {percent:>3} %"


def _tenant_line(tenant: KvTenant) -> str:
    return (f"  {tenant.name:24} {tenant.blocks:>9,} blocks {tenant.checkpoints:>7,} checkpoints "
            f"{size(tenant.size_bytes):>10}  {ago(tenant.last_used_s)}")  # fmt: skip


def ago(at_s: float, now_s: float | None = None) -> str:
    """``used 3 min ago``."""
    if at_s <= 0:
        return "never used"
    passed_s = max((time.time() if now_s is None else now_s) - at_s, 0)
    for unit_s, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if passed_s >= 2 * unit_s or (unit_s == 60 and passed_s >= 60):
            return f"used {passed_s // unit_s:.0f} {name} ago"
    return "used just now"
