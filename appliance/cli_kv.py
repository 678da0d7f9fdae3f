"""``solocard kv …``: what the KV cache on disk holds, and what can be done with it.

The work is done by ``python -m runtime kv …``, a child process; this module asks, and says what came of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from appliance.cli_output import Output, counted, size
from appliance.errors import StoreError, UsageError
from appliance.journal import Journal
from appliance.kv_child import run_kv
from appliance.kv_words import MEANING, ago, miss_reasons, stats_lines
from appliance.server_link import ServerDownError, read_kv, server_pid
from appliance.wire import KvReport, KvTenant

LEFT_ON_DISK = (
    "left on the disk until overwritten: the encrypted records, which nothing opens without that key. The key file was "
    "overwritten before it was deleted, but an SSD, a snapshot or a backup may keep an old copy, and that opens them "
    "together with keys/kv-master; erase a disk by its own secure erase before it leaves your hands"
)


def stats(args: argparse.Namespace, out: Output) -> int:
    """``solocard kv stats``: from the running server, else from the files."""
    report = read_report(args.home)
    data = report.to_dict() | {"meaning": {r: MEANING.get(r, "") for r in miss_reasons(report)}}
    out.result("kv", stats_lines(args.home, report), data)
    return 0


def verify(args: argparse.Namespace, out: Output) -> int:
    """``solocard kv verify``: every record is read and authenticated; exit code 6 where one is damaged."""
    data = run_kv(args.home, ["verify"], out.progress)
    records, damaged, purged = data["records"], data["damaged"], data["purged_records"]
    problems = data.get("problems", [])
    lines = [f"{records:,} records opened and authenticated, {size(data['read_bytes'])}, {data['elapsed_s']:.1f} s"]
    if purged and problems:
        lines.append(f"{purged:,} records cannot be opened: of purged tenants, or of the keys named above")
    elif purged:
        lines.append(f"{purged:,} records of purged tenants cannot be opened, as it should be; they are freed later")
    if not damaged and not problems:
        out.result("verify", [f"{lines[0]}: all good", *lines[1:]], data)
        return 0
    if not damaged:
        out.result("verify", [*problems, *lines], data, ok=False)
        return StoreError.exit_code
    said = [f"{len(damaged):,} of {records:,} records are damaged: prompts that need them are computed again, nothing "
            "wrong is ever served"]  # fmt: skip
    said += [f"  {d['file']} at byte {d['offset']:,}: {d['problem']}" for d in damaged[:10]]
    said += [f"  and {len(damaged) - 10:,} more (--json lists all)"] if len(damaged) > 10 else []
    said.append("what to do: nothing; a damaged record is set aside at its next use and written anew. If it happens "
                "again, check the disk (smartctl -a) and the memory")  # fmt: skip
    out.result("verify", [*said, *problems, *lines], data, ok=False)
    return StoreError.exit_code


def purge(args: argparse.Namespace, out: Output) -> int:
    """``solocard kv purge TENANT``: asks, then destroys the tenant's key."""
    if not args.yes:
        _ask(_tenant(read_report(args.home), args.tenant))
    data = run_kv(args.home, ["purge", args.tenant], out.progress)
    checkpoints = counted(data["checkpoints"], "checkpoint")
    holds = f"{counted(data['blocks'], 'block')} and {checkpoints} ({size(data['size_bytes'])})"
    if data.get("uncounted"):
        holds = f"what it stored was not counted ({data['uncounted']}) and"
    who = "the next server" if server_pid(args.home) is None else "the running server"
    lines = [
        f"{args.tenant}: key destroyed in {data['elapsed_s'] * 1000:.0f} ms; {holds} can no longer be read",
        f"their bytes still count as used: {who} frees them as it needs room",
        LEFT_ON_DISK,
        f"new prompts of {args.tenant} are stored under a new key",
        *_journaled(args.home, "kv-purge", tenant=args.tenant, blocks=data["blocks"], checkpoints=data["checkpoints"]),
    ]
    out.result("purge", lines, data)
    return 0


def export_trace(args: argparse.Namespace, out: Output) -> int:
    """``solocard kv export-trace OUT.jsonl``: the request log as a trace for benchmarks."""
    wanted = ["export-trace", str(args.out.absolute())]
    data = run_kv(args.home, wanted + (["--since", args.since] if args.since else []), out.progress)
    lines = [
        f"{args.out}: {counted(data['requests'], 'request')}, "
        f"{counted(data['blocks'], 'different block')} of 256 tokens",
        "each line: milliseconds since the first request, prompt and answer length in tokens, numbers of the prompt's "
        "blocks (equal numbers: equal beginnings). No text, no token, no hash, no name of a tenant",
    ]
    out.result("export-trace", lines, data)
    return 0


def share(args: argparse.Namespace, out: Output) -> int:
    """``solocard kv share FILE``: approve a system prompt whose cache all tenants may use."""
    wanted = ["share", str(args.file.absolute())] + (["--remove"] if args.remove else [])
    data = run_kv(args.home, wanted, out.progress)
    lines = [str(line) for line in data.get("lines", [])]
    lines += _journaled(
        args.home, "kv-share", file=str(args.file), characters=data.get("characters"), removed=args.remove
    )
    out.result("share", lines, data)
    return 0


def _journaled(home: Path, event: str, **details: object) -> list[str]:
    """One line in the journal; where that fails, a sentence: what was done stays done, a full disk or not."""
    try:
        Journal(home).append(event, **details)
    except StoreError as error:
        return [f"this is not in the journal: {str(error).partition(';')[0]}"]
    return []


def read_report(home: Path) -> KvReport:
    """From the server where one answers, else by a child that reads the files."""
    try:
        return read_kv(home)
    except ServerDownError:
        return KvReport.from_dict(run_kv(home, ["stats"]))


def _tenant(report: KvReport, name: str) -> KvTenant:
    """Raises UsageError listing the tenants there are."""
    for tenant in report.tenants:
        if tenant.name == name:
            return tenant
    known = ", ".join(tenant.name for tenant in report.tenants) or "none"
    raise UsageError(f"no tenant {name!r} has anything in the KV cache; there are: {known}")


def _ask(tenant: KvTenant) -> None:
    """UsageError unless a person at the terminal types yes."""
    question = [
        f"tenant {tenant.name}: {counted(tenant.blocks, 'block')}, {counted(tenant.checkpoints, 'checkpoint')}, "
        f"{size(tenant.size_bytes)}, {ago(tenant.last_used_s)}",
        "Its key is destroyed: what it stored can never be read again. Its next prompts are computed whole.",
    ]
    print("\n".join(question), file=sys.stderr)
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to confirm; run this again with --yes")
    print("Type yes to purge it: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        raise UsageError("not confirmed; nothing was changed")


def since(text: str) -> str:
    """An argparse type: ``90m``, ``12h``, ``7d`` or ``2w``, passed on as it is."""
    if len(text) < 2 or not text[:-1].isascii() or not text[:-1].isdigit() or text[-1] not in "mhdw":
        raise argparse.ArgumentTypeError(f"{text!r}: a number and a unit, like 90m, 12h, 7d or 2w")
    return text
