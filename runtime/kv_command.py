"""``python -m runtime kv …``: the KV cache looked at, checked, purged and exported, beside a running server or not.

The working half of ``solocard kv``: prints Progress objects as JSON lines; errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appliance.config import Config, home
from appliance.errors import StoreError, UsageError
from appliance.wire import KvTenant, Progress
from runtime.kv import requests
from runtime.kv.approvals import APPROVALS, Approvals
from runtime.kv.contents import (
    KV_DIRECTORY,
    KV_MASTER_KEY,
    configured,
    open_index,
    open_tenants,
    read_held,
    read_report,
)
from runtime.kv.keys import derive_master, load_master_key
from runtime.kv.tenants import Tenants
from runtime.kv.verify import Verified, verify

PROGRESS_S = 0.5
MAX_SHARED_BYTES = 4 << 20
_UNIT_S = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def run(args: argparse.Namespace) -> int:
    """One command, to its last line."""
    data = _COMMANDS[args.kv_command](args, home())
    _print(Progress(args.kv_command, "", done=True, data=data))
    return 0


def _stats(args: argparse.Namespace, where: Path) -> dict[str, Any]:
    return read_report(where, configured(Config.load(where).kv), live=False).to_dict()


def _verify(args: argparse.Namespace, where: Path) -> dict[str, Any]:
    started_s = time.monotonic()
    tenants, result = open_tenants(where), Verified()
    problems = [info.damaged for info in (tenants.all() if tenants else []) if info.damaged]
    with open_index(where) as index:
        if index and tenants:
            keys = {info.tenant_id: found for info in tenants.all() if (found := tenants.find(info.name))}
            master = derive_master(load_master_key(where / KV_MASTER_KEY))
            total = sum(row.end_bytes for row in index.segments())
            result = verify(where / KV_DIRECTORY, index, keys, master, _meter("verify", "reading every record", total))
        elif index:
            raise StoreError(f"{where / KV_MASTER_KEY} is not there and nothing in {where / KV_DIRECTORY} opens "
                             "without it; restore it, or delete that folder")  # fmt: skip
    return dataclasses.asdict(result) | {"problems": problems, "elapsed_s": round(time.monotonic() - started_s, 3)}


def _purge(args: argparse.Namespace, where: Path) -> dict[str, Any]:
    """The key first, then the counting: what is purged is gone within the first milliseconds."""
    started_s = time.monotonic()
    tenants = open_tenants(where)
    infos = tenants.all() if tenants else []
    if tenants is None or not _destroy(tenants, args.tenant, where):
        known = ", ".join(info.name for info in infos if not info.damaged) or "none"
        raise UsageError(f"no tenant {args.tenant!r} has a key in {where / KV_DIRECTORY}; there are: {known}")
    elapsed_s = round(time.monotonic() - started_s, 4)
    held, uncounted = KvTenant(), ""
    try:
        with open_index(where) as index:
            if index:
                ids = [info.tenant_id for info in infos if info.name == args.tenant and not info.damaged]
                held = next((h for i, h in read_held(index.connection).tenants.items() if i in ids), held)
    except StoreError as error:  # the key is gone all the same, and whoever asked must hear that
        uncounted = str(error)
    return dataclasses.asdict(held) | {"name": args.tenant, "elapsed_s": elapsed_s, "uncounted": uncounted}


def _destroy(tenants: Tenants, name: str, where: Path) -> bool:
    try:
        return tenants.purge(name)
    except OSError as error:
        raise StoreError(f"{tenants.path(name)}: {error.strerror}; {name} is not purged") from None


def _export_trace(args: argparse.Namespace, where: Path) -> dict[str, Any]:
    """Written beside and renamed: a file of that name is whole or not there."""
    if args.out.exists():
        raise UsageError(f"{args.out} is there already; name a file that is not")
    if not args.out.parent.is_dir():
        raise UsageError(f"{args.out.parent} is no folder; make it, or name a file elsewhere")
    since_s = time.time() - seconds(args.since) if args.since else 0.0
    draft, count, blocks = args.out.with_name(args.out.name + ".partial"), 0, -1
    tenants = open_tenants(where)
    live = tenants.live_ids() if tenants else frozenset()
    with open_index(where) as index, draft.open("w", encoding="ascii") as file:
        logged = requests.entries(index.connection, since_s) if index else iter(())
        for row in requests.mooncake(entry for entry in logged if entry.tenant_id in live):
            file.write(json.dumps(row) + "\n")
            count, blocks = count + 1, max(blocks, *row["hash_ids"])
        file.flush()
        os.fsync(file.fileno())
    draft.rename(args.out)
    return {"out": str(args.out), "requests": count, "blocks": blocks + 1}


def _share(args: argparse.Namespace, where: Path) -> dict[str, Any]:
    text = _text(args.file)
    approvals = Approvals(where / KV_DIRECTORY / APPROVALS, load_master_key(where / KV_MASTER_KEY))
    ending = "; its final line break is part of it" if text.endswith("\n") else ""
    if args.remove:
        if not approvals.remove(text):
            raise UsageError(f"the text in {args.file} is not approved ({len(text):,} characters{ending})")
        lines = ["no longer shared; what is stored under it is not read any more and freed as room is needed"]
    else:
        approvals.approve(text)
        lines = [
            f"shared: this system prompt ({len(text):,} characters{ending}) is stored for all tenants the next time "
            "it is computed",
            "a request uses it when its first message is a system message of exactly this text; tools are not shared",
        ]
    return {"lines": lines, "characters": len(text), "removed": args.remove}


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SHARED_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    if not data or len(data) > MAX_SHARED_BYTES:
        raise UsageError(f"{path} has {'no text' if not data else f'more than {MAX_SHARED_BYTES:,} bytes'}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start:,}); requests are") from None


def seconds(age: str) -> int:
    """``7d`` → 604800. UsageError for anything else than a number and m, h, d or w."""
    number, unit = age[:-1], _UNIT_S.get(age[-1:])
    if unit is None or not number.isascii() or not number.isdigit() or len(number) > 6:
        raise UsageError(f"--since {age}: a number and a unit, like 90m, 12h, 7d or 2w")
    return int(number) * unit


def _meter(step: str, message: str, total_bytes: int) -> Callable[[int], None]:
    """Prints how far it is, at most twice a second."""
    start_s = told_s = time.monotonic()
    done_bytes = 0

    def tick(count_bytes: int) -> None:
        nonlocal done_bytes, told_s
        done_bytes += count_bytes
        now_s = time.monotonic()
        if now_s - told_s >= PROGRESS_S:
            told_s = now_s
            _print(Progress(step, message, min(done_bytes, total_bytes), total_bytes, round(now_s - start_s, 3)))

    return tick


def _print(progress: Progress) -> None:
    print(json.dumps(progress.to_dict()), flush=True)


_COMMANDS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "stats": _stats, "verify": _verify, "purge": _purge, "export-trace": _export_trace, "share": _share,
}  # fmt: skip
