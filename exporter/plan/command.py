"""``solocard-export plan`` and ``solocard-export inspect``: from a checkpoint's headers alone, in seconds."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from appliance.errors import SpaceError, UsageError
from exporter import inventory
from exporter.checkpoint import Checkpoint
from exporter.plan import card as cards
from exporter.plan.budget import HASH_RULES, MODES, Ask
from exporter.plan.kinds import survey
from exporter.plan.plan import Plan, make_plan
from exporter.plan.report import plan_lines, survey_lines, table_lines
from exporter.plan.weights import HEAD_FORMATS, weights_of

_CONTEXT = re.compile(r"([1-9][0-9]{0,9})([km]?)")


def add_commands(commands: Any) -> None:
    """Add ``inspect`` and ``plan``; each ``func`` returns the exit code."""
    parser = commands.add_parser("inspect", help="what a checkpoint holds: tensors, bytes, kinds, draft stages")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder in the official V4-Flash format")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(func=run_inspect)
    _add_plan(commands.add_parser("plan", help="what fits a card: experts per layer, formats, every byte"))


def _add_plan(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(cards.ids())
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder in the official V4-Flash format")
    parser.add_argument("--card", required=True, metavar="ID|FILE.yaml", help=f"{known}, or a file of that form")
    parser.add_argument("--context", type=parse_context, default=131072, metavar="N", help="tokens (default: 128k)")
    parser.add_argument("--mode", choices=MODES, default="pruned", help="cut experts, or hold cold ones on the host")
    parser.add_argument("--dense", choices=("d4", "d8"), default="d4", help="attention, shared experts (default: d4)")
    parser.add_argument("--head", choices=HEAD_FORMATS, default="fp8", help="format of the head (default: fp8)")
    parser.add_argument("--sequences", type=int, default=1, metavar="N", help="full contexts held at once (default: 1)")
    parser.add_argument("--keep", type=int, metavar="K", help="experts kept a layer (default: as many as fit)")
    parser.add_argument("--hash-layers", choices=HASH_RULES, default="auto", help="layers routed by token id")
    parser.add_argument("--id", metavar="NAME", help="the profile's id (default: CARD-CONTEXT[-tiered])")
    parser.add_argument("--disk", type=Path, metavar="FOLDER", help="refuse if this disk cannot take the bundle")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write plan.json")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(func=run_plan)


def run_inspect(args: argparse.Namespace) -> int:
    """Exit 0 with the survey; CheckpointError names what does not belong."""
    checkpoint = Checkpoint.open(args.checkpoint)
    found = survey(checkpoint)
    if args.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        _show(survey_lines(found, checkpoint.config))
    return 0


def run_plan(args: argparse.Namespace) -> int:
    """Exit 0 with the plan; SpaceError (exit 8) with the bytes needed, after the table of what would fit where."""
    card = cards.load(args.card)
    checkpoint = Checkpoint.open(args.checkpoint)
    inventory.check(checkpoint)
    ask = Ask(args.context, args.mode, args.sequences, args.hash_layers, args.keep)
    dense = args.dense.upper()
    table = table_lines(weights_of(checkpoint, dense, args.head), ask, card)
    try:
        plan = make_plan(checkpoint, card, ask, dense=dense, head=args.head, plan_id=args.id)
        if args.disk is not None:
            check_disk(args.disk, plan)
    except SpaceError:
        _show(table, sys.stderr)
        raise
    if args.out is not None:
        plan.write(args.out)
    if args.json:
        print(json.dumps(plan.to_dict(), indent=1, sort_keys=True))
        return 0
    _show([*plan_lines(plan, checkpoint.config), "", *table])
    if args.out is not None:
        print(f"wrote {args.out}")
    return 0


def check_disk(folder: Path, plan: Plan) -> None:
    """SpaceError if the disk of ``folder`` has less room than the bundle takes."""
    if not folder.is_dir():
        raise UsageError(f"--disk {folder}: not a folder")
    free = shutil.disk_usage(folder).free
    if free < plan.bundle_total_bytes:
        needed = f"the bundle needs {plan.bundle_total_bytes:,} bytes and {free:,} are free"
        raise SpaceError(f"{folder}: {needed}; free some or name another disk")


def parse_context(text: str) -> int:
    """``4k``, ``128k``, ``1m`` (powers of two) or a number of tokens."""
    match = _CONTEXT.fullmatch(text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of tokens, or 4k, 128k, 1m")
    return int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2]]


def _show(lines: Iterable[str], file: Any = None) -> None:
    """Print; a terminal without the block characters gets # and dots."""
    stream = file or sys.stdout
    for line in lines:
        try:
            line.encode(stream.encoding or "utf-8")
        except UnicodeEncodeError:
            line = line.replace("█", "#").replace("░", ".").encode("ascii", "replace").decode()
        print(line, file=stream)
