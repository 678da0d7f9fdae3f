"""``solocard-export observe``: what experts and linears do on calibration texts. torch is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from appliance.errors import UsageError
from exporter import inventory
from exporter.calibration import Text, domains, read_texts, texts_sha256
from exporter.checkpoint import Checkpoint
from exporter.view import View


def add_command(subparsers: Any) -> None:
    """Add ``observe CKPT --texts FILE --out STATS``; its ``func`` returns the exit code."""
    parser = subparsers.add_parser("observe", help="run calibration texts, keep statistics of experts and linears")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder in the official V4-Flash format")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="JSON lines: domain and text or ids")
    parser.add_argument("--out", type=Path, required=True, metavar="STATS", help="folder of the statistics")
    parser.add_argument("--domain", action="append", default=[], metavar="NAME", help="only these domains (repeated)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after N tokens of the file")
    parser.add_argument(
        "--hessian", type=int, default=0, metavar="N",
        help="also keep E[x·xᵀ] of the dense linears in blocks of at most N columns (for quantize --gptq)",
    )  # fmt: skip
    parser.add_argument("--act-sim", action="store_true", help="round activations as the official code does")
    parser.add_argument("--work", type=Path, metavar="DIR", help="streams between layers (default: STATS.work)")
    parser.add_argument("--batch-tokens", type=int, metavar="N", help="tokens that pass the experts together")
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), default="cpu", help="where to compute")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    from exporter.observe.run import ObserveOptions, observe

    _check(args)
    base = Checkpoint.open(args.checkpoint)
    inventory.check(base)
    view = View(base)
    texts = _chosen(read_texts(args.texts, view, max_tokens=args.max_tokens), args.domain, args.texts)
    options = ObserveOptions(texts_sha256(args.texts), args.hessian, args.act_sim, args.device, args.batch_tokens)
    work = args.work or args.out.with_name(args.out.name + ".work")
    found = observe(view, texts, args.out, work, options)
    tokens = sum(len(text.ids) for text in texts)
    print(f"wrote {args.out}: {tokens:,} tokens of {len(texts):,} texts, domains {', '.join(found.domains)}; "
          f"{len(found.layers)} layers, {len(found.super_experts)} super experts")  # fmt: skip
    return 0


def _check(args: argparse.Namespace) -> None:
    for option, value, least in (("--hessian", args.hessian, 0), ("--max-tokens", args.max_tokens, 1),
                                 ("--batch-tokens", args.batch_tokens, 1)):
        if value is not None and value < least:
            raise UsageError(f"{option} {value}: expected at least {least}")


def _chosen(texts: list[Text], wanted: list[str], path: Path) -> list[Text]:
    unknown = sorted(set(wanted) - set(domains(texts)))
    if unknown:
        raise UsageError(f"--domain {unknown[0]}: {path} has {', '.join(domains(texts))}")
    return [text for text in texts if not wanted or text.domain in wanted]
