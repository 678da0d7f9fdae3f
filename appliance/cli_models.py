"""Commands about models: install, activate, rollback, remove, list, verify, status."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from appliance.bundle import VerifiedBundle
from appliance.cli_output import Output, size
from appliance.errors import SolocardError, StoreError
from appliance.floors import Floors
from appliance.install import Installer, Outcome
from appliance.meter import Meter
from appliance.roots import trusted_root
from appliance.server_link import ServerDownError, read_status, server_pid
from appliance.state import State
from appliance.store import Installed, Pool
from appliance.wire import FULL


def install(args: argparse.Namespace, out: Output) -> int:
    """``solocard install DIR``"""
    return _changed(out, "install", Installer(args.home, out.progress).install(args.directory))


def activate(args: argparse.Namespace, out: Output) -> int:
    """``solocard activate BUNDLE_ID``"""
    return _changed(out, "activate", Installer(args.home, out.progress).activate(args.bundle_id))


def rollback(args: argparse.Namespace, out: Output) -> int:
    """``solocard rollback``"""
    return _changed(out, "rollback", Installer(args.home, out.progress).rollback())


def remove(args: argparse.Namespace, out: Output) -> int:
    """``solocard remove BUNDLE_ID``"""
    freed = Installer(args.home, out.progress).remove(args.bundle_id)
    out.result("remove", [f"removed {args.bundle_id}: {freed:,} bytes freed"], {"freed_bytes": freed})
    return 0


def list_bundles(args: argparse.Namespace, out: Output) -> int:
    """``solocard list``"""
    state, problem = _state(args.home)
    rows = [_row(item, state) for item in Pool(args.home).installed()]
    lines = [
        f"{_mark(r):9} {r['bundle_id']}  version {r['version']}  {size(r['size_bytes'])}{_profiles(r)}" for r in rows
    ]
    if problem:
        lines.append(f"note: {problem}")
    if not rows:
        lines.append(f"no model is installed in {args.home}; run `solocard install DIRECTORY`")
    out.result("list", lines, {"bundles": rows, "problem": problem})
    return 0


def verify(args: argparse.Namespace, out: Output) -> int:
    """``solocard verify [BUNDLE_ID] [--full]``"""
    bundle_id = args.bundle_id or State.read(args.home).current
    if not bundle_id:
        raise StoreError(f"no model is installed in {args.home}; run `solocard install DIRECTORY`")
    total = sum(entry.size_bytes for entry in Pool(args.home).manifest(bundle_id).objects)
    meter = Meter(out.progress, "verify", "checking objects", total)
    bundle = VerifiedBundle.open_installed(args.home, bundle_id, full=args.full, tick=meter.tick)
    manifest, chain = bundle.manifest, bundle.chain
    depth = "every byte" if args.full else "every size and one record of each object; --full reads every byte"
    lines = [
        f"{bundle_id} is good: signed under root version {chain.root_version}, {len(manifest.files)} files, "
        f"{len(manifest.objects)} objects, {manifest.total_bytes:,} bytes ({depth})"
    ]
    data = {"bundle_id": bundle_id, "full": args.full, "size_bytes": manifest.total_bytes}
    out.result("verify", lines, data)
    return 0


def status(args: argparse.Namespace, out: Output) -> int:
    """``solocard status``"""
    state, problem = _state(args.home)
    data: dict[str, Any] = {"home": str(args.home), "current": state.current, "previous": state.previous,
                            "server": None, "problem": problem}  # fmt: skip
    lines = [
        f"home:      {args.home}",
        f"current:   {state.current or 'none'}",
        f"previous:  {state.previous or 'none'}",
        f"root:      {_root_line(args.home, data)}",
    ]
    try:
        server = read_status(args.home)
    except ServerDownError:
        pid = server_pid(args.home)
        lines.append("server:    down" + (f" (process {pid} of run/serve.pid does not answer)" if pid else ""))
    else:
        data["server"] = server.to_dict()
        lines += [
            f"server:    {server.state}, serves {server.bundle_id}{_served_profile(server.profile)} on {server.device} "
            f"({server.backend})",
            f"           {server.running} running, {server.queued} of {server.queue_depth} waiting, "
            f"{server.requests_total:,} requests since start, up {server.uptime_s:.0f} s",
        ]
        if state.current and server.bundle_id != state.current:
            lines.append("note:      it serves another model than the current one; restart it")
    if problem:
        lines.append(f"note:      {problem}")
    out.result("status", lines, data)
    return 0


def _changed(out: Output, step: str, outcome: Outcome) -> int:
    data = asdict(outcome)
    if not outcome.changed:
        lines = [f"{outcome.bundle_id} is current already; its bytes were checked, nothing was switched"]
    else:
        lines = [f"{outcome.bundle_id} is current" + (f" (before: {outcome.previous})" if outcome.previous else "")]
        if outcome.restart is not None:
            lines.append(outcome.restart.message)
    if outcome.unlisted:
        shown = ", ".join(outcome.unlisted[:5]) + (" …" if len(outcome.unlisted) > 5 else "")
        lines.append(f"note: {len(outcome.unlisted)} files that nothing signed lists were left alone: {shown}")
    out.result(step, lines, data)
    late = outcome.restart is not None and outcome.restart.outcome == "late"
    return 1 if late else 0


def _row(item: Installed, state: State) -> dict[str, Any]:
    marks = {name: item.bundle_id == getattr(state, name) for name in ("current", "previous", "trial")}
    return asdict(item) | marks


def _profiles(row: dict[str, Any]) -> str:
    """The profiles besides full, for those who have to choose one."""
    return f"  profiles {', '.join(row['profiles'])}" if len(row["profiles"]) > 1 else ""


def _served_profile(profile: str) -> str:
    return "" if profile in ("", FULL) else f", profile {profile},"


def _mark(row: dict[str, Any]) -> str:
    return next((name for name in ("current", "previous", "trial") if row[name]), "-")


def _state(home: Path) -> tuple[State, str]:
    """State and, when its file is damaged, the sentence saying so."""
    try:
        return State.read(home), ""
    except StoreError as error:
        return State(), str(error)


def _root_line(home: Path, data: dict[str, Any]) -> str:
    try:
        floors = Floors.read(home)
        if floors is None or floors.root_version == 0:
            return "none trusted; run `solocard trust add ROOT.json`"
        root = trusted_root(home, floors)
    except SolocardError as error:
        return str(error)
    data["root"] = {"version": root.version, "fingerprint": root.fingerprint}
    return f"version {root.version}, fingerprint {root.fingerprint}"
