"""``solocard-export distill heal``: routers of cut layers fitted to the whole layers. torch only when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from appliance.errors import UsageError
from exporter.calibration import read_texts, texts_sha256
from exporter.overlay import OVERLAY
from exporter.stage import read_json
from exporter.statistics import Statistics
from exporter.view_arguments import add_view_arguments, open_view


def add_command(subparsers: Any) -> None:
    """Add ``heal CKPT --ranking … --keep K --texts FILE --out OVERLAY``; its ``func`` returns the exit code."""
    parser = subparsers.add_parser("heal", help="fit the routers of cut layers, one layer in memory")
    add_view_arguments(parser)
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="JSON lines: domain and text or ids")
    parser.add_argument("--stats", type=Path, metavar="STATS", help="what observe wrote, for the provenance")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the overlay")
    parser.add_argument(
        "--inputs", choices=("student", "teacher"), default="student",
        help="whose streams the layers are fitted on (default: student: errors of earlier layers are seen)",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after N tokens of the file")
    parser.add_argument(
        "--fit-tokens", type=int, default=32768, metavar="N", help="most tokens one layer is fitted on (default: 32768)"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="streams between layers (default: OUT.work)")
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), default="cpu", help="where to compute")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    from exporter.distill.heal_run import HealOptions, heal

    for option, value in (("--fit-tokens", args.fit_tokens), ("--max-tokens", args.max_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: expected at least 1")
    view = open_view(args)
    statistics = Statistics.open(args.stats) if args.stats else None
    if statistics is not None:
        statistics.check_source(view.source_sha256, view.path)
    texts = read_texts(args.texts, view, max_tokens=args.max_tokens)
    options = HealOptions(
        texts_sha256(args.texts), statistics.sha256 if statistics else "", args.inputs, args.fit_tokens, args.device
    )
    work = args.work or args.out.with_name(args.out.name + ".work")
    heal(view, texts, args.out, work, options)
    notes = read_json(args.out / OVERLAY)["notes"]["layers"]
    for note in notes:
        before, after = note["relative_error_before"], note["relative_error_after"]
        left = "" if note["changed"] else " (left as it was)"
        print(f"layer {note['layer']}: error {before:.4f} → {after:.4f}{left}")
    changed = sum(note["changed"] for note in notes)
    print(f"wrote {args.out}: {changed} of {len(notes)} cut layers healed")
    return 0
