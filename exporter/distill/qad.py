"""``solocard-export distill qad`` and ``router``: end-to-end training against the teacher cache. No torch here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from appliance.errors import UsageError
from exporter.calibration import read_texts, texts_sha256
from exporter.distill.cache import TeacherCache
from exporter.view_arguments import add_view_arguments, open_view


def add_command(subparsers: Any) -> None:
    """Add ``qad CKPT … --teacher CACHE --texts FILE --out OVERLAY``; its ``func`` returns the exit code."""
    parser = subparsers.add_parser("qad", help="train against the teacher cache, in the formats that are written")
    _add_arguments(parser)
    parser.add_argument(
        "--dense", choices=("d4", "d8"), default="d4",
        help="attention and shared experts: MXFP4 (d4) or FP8 (d8) (default: d4)",
    )  # fmt: skip
    parser.add_argument(
        "--train", choices=("all", "experts", "dense", "router"), default="all", help="what is trained (default: all)"
    )
    parser.set_defaults(func=_run, stage="qad")


def add_router_command(subparsers: Any) -> None:
    """Add ``router``: the same loop with router rows and norms only; every format stays as it is."""
    parser = subparsers.add_parser("router", help="the same, router rows and norms only")
    _add_arguments(parser)
    parser.set_defaults(func=_run, stage="router", dense=None, train="router")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_view_arguments(parser)
    parser.add_argument("--teacher", type=Path, required=True, metavar="CACHE", help="output of distill teacher")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="the texts the teacher saw")
    parser.add_argument("--out", type=Path, required=True, metavar="OVERLAY", help="folder of the overlay")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="default: 150")
    parser.add_argument(
        "--lr", type=float, default=5e-4,
        help="of Muon, at most a tenth of pre-training's; AdamW takes half (default: 5e-4)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="texts a step, of all processes (default: 4)")
    parser.add_argument("--decay", choices=("cosine", "linear"), default="cosine", help="of the learning rate")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="order of the texts (default: 0)")
    parser.add_argument(
        "--tokens-at-once", type=int, default=4096, metavar="N", help="padded tokens in memory at once (default: 4096)"
    )
    parser.add_argument("--save-every", type=int, default=25, metavar="N", help="steps between states (default: 25)")
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), default="cpu", help="where to compute")


def _run(args: argparse.Namespace) -> int:
    for option in ("steps", "batch", "tokens_at_once", "save_every"):
        if getattr(args, option) < 1:
            raise UsageError(f"--{option.replace('_', '-')} {getattr(args, option)}: expected at least 1")
    if not 0 < args.lr < 1:
        raise UsageError(f"--lr {args.lr}: expected a number above 0 and below 1")
    view = open_view(args)
    cache, texts_digest = TeacherCache.open(args.teacher), texts_sha256(args.texts)
    cache.check(view.source_sha256, texts_digest)
    texts = read_texts(args.texts, view, max_tokens=sum(cache.lengths))
    from exporter.distill.qad_run import distill
    from exporter.distill.training import Options

    options = Options(args.steps, args.lr, args.batch, args.seed, args.train, args.decay, args.tokens_at_once)
    report = distill(
        view, [text.ids for text in texts], cache, args.out, args.stage, options, dense=args.dense,
        device=args.device, save_every=args.save_every,
    )  # fmt: skip
    if report is not None:
        print(f"wrote {args.out}: {report}")
    return 0
