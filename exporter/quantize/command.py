"""``solocard-export quantize``: dense linears to MXFP4 and the head to FP8, as an overlay; experts are not touched."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from appliance.errors import UsageError
from exporter.quantize.dense import LINEARS, Method
from exporter.quantize.rotation import BLOCKS
from exporter.view_arguments import add_view_arguments, open_view


def add_command(subparsers: Any) -> None:
    """Add ``quantize CKPT … --out OVERLAY``; its ``func`` returns the exit code."""
    parser = subparsers.add_parser("quantize", help="attention and shared experts to FP4, the head to FP8")
    add_view_arguments(parser)
    parser.add_argument("--stats", type=Path, metavar="STATS", help="output of observe: weigh errors by the inputs")
    parser.add_argument("--dense", choices=("d4", "d8"), default="d4", help="d8 leaves linears FP8 (default: d4)")
    parser.add_argument("--head", choices=("fp8", "bf16"), default="fp8", help="bf16 leaves the head (default: fp8)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--gptq", action="store_true", help="round to make up for errors (stats with --hessian)")
    how.add_argument("--mr-gptq", action="store_true", help="the same on inputs rotated by a block Hadamard matrix")
    parser.add_argument("--block", type=int, choices=BLOCKS, help="Hadamard block of --mr-gptq (default: 64)")
    parser.add_argument("--act-order", action="store_true", help="largest inputs first (--gptq, --mr-gptq)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="GLOB",
        help="only linears so named, e.g. 'attn.w*' or 'layers.3.*' (repeated)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="OVERLAY", help="folder of the overlay")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    from exporter.quantize.run import Options, quantize, summary

    method = _method(args)
    view = open_view(args)
    options = Options(args.dense == "d4", args.head == "fp8", method, tuple(args.only), args.stats)
    overlay = quantize(view, options, args.out)
    print("\n".join(summary(overlay)))
    return 0


def _method(args: argparse.Namespace) -> Method:
    gptq = args.gptq or args.mr_gptq
    if args.block is not None and not args.mr_gptq:
        raise UsageError("--block is the Hadamard block of --mr-gptq; give both")
    if args.act_order and not gptq:
        raise UsageError("--act-order is an order of --gptq or --mr-gptq; give one of them")
    if gptq and args.stats is None:
        raise UsageError("--gptq and --mr-gptq need --stats STATS, made by `observe --hessian 4096`")
    if args.dense == "d8" and (gptq or args.only):
        raise UsageError("--dense d8 leaves every linear as it is; --gptq, --mr-gptq and --only are of --dense d4")
    if args.dense == "d8" and args.head == "bf16":
        raise UsageError("--dense d8 with --head bf16 leaves nothing to do")
    for pattern in args.only:
        if not _could_match(pattern):
            raise UsageError(f"--only {pattern}: matches no linear; they are {', '.join(LINEARS)} (of layers.N.)")
    kind = "mr-gptq" if args.mr_gptq else "gptq" if args.gptq else "rtn"
    return Method(kind, (args.block or 64) if args.mr_gptq else 0, act_order=args.act_order)


def _could_match(pattern: str) -> bool:
    from fnmatch import fnmatchcase

    layered = pattern.split(".")
    bare = ".".join(layered[2:]) if layered[0] == "layers" and len(layered) > 2 else pattern
    return any(fnmatchcase(part, bare) for part in LINEARS) or pattern.startswith(("*", "layers.*"))
