"""``python -m runtime serve | trial | logits | kv``; ``solocard-serve`` is the first, ``solocard kv`` runs the last.

What a command needs is imported when it runs: a purge does not wait for onnxruntime.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from appliance.config import Config, home
from appliance.errors import SolocardError, StoreError
from appliance.wire import FULL


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; errors are one line on stderr and the class's exit code."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the tokenizer library must never look for a network
    parser = argparse.ArgumentParser(prog="python -m runtime", description="The engine: serve, trial, logits, kv.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve the current bundle over HTTP on this machine")
    serve.add_argument("--profile", metavar="ID", help="the bundle's profile to serve (default: engine.profile)")
    serve.set_defaults(func=_serve)
    trial = commands.add_parser("trial", help="check an installed bundle's golden tokens")
    trial.add_argument("bundle_id")
    trial.add_argument("--profile", metavar="ID", help="the bundle's profile to try (default: engine.profile)")
    trial.set_defaults(func=_trial)
    parity = commands.add_parser("logits", help="write the engine's logits for token ids (unsigned bundles allowed)")
    _logits_arguments(parity)
    _kv_arguments(commands.add_parser("kv", help="the working half of `solocard kv`; prints JSON lines"))
    args = parser.parse_args(argv)
    try:
        return int(args.func(args))
    except SolocardError as error:
        print(f"solocard: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full or read-only disk, a file where a folder belongs
        print(f"solocard: {error.filename or args.command}: {error.strerror or error}", file=sys.stderr)
        return StoreError.exit_code
    except KeyboardInterrupt:
        return 130


def serve_main(argv: Sequence[str] | None = None) -> int:
    """Entry point ``solocard-serve``."""
    return main(["serve", *(sys.argv[1:] if argv is None else argv)])


def _logits_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a built bundle's directory")
    parser.add_argument("--ids", type=Path, required=True, help=".npy of token ids, [n] or [p, n] padded with -1")
    parser.add_argument("--out", type=Path, required=True, help=".npy to write: f32 [n, vocab] or [p, n, vocab]")
    parser.add_argument("--chunks", help="tokens per call, e.g. 5,3,16,1 (default: 256 at a time, then the tail)")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="append N greedy tokens, decoded singly")
    parser.add_argument("--profile", default=FULL, metavar="ID", help="the bundle's profile to run (default: full)")
    parser.add_argument("--threads", type=int, default=1, help="onnxruntime intra-op threads (default: 1)")
    parser.set_defaults(func=_logits)


def _kv_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="kv_command", metavar="COMMAND", required=True)
    for name in ("stats", "verify"):
        commands.add_parser(name)
    commands.add_parser("purge").add_argument("tenant")
    trace = commands.add_parser("export-trace")
    trace.add_argument("out", type=Path)
    trace.add_argument("--since", default="")
    share = commands.add_parser("share")
    share.add_argument("file", type=Path)
    share.add_argument("--remove", action="store_true")
    parser.set_defaults(func=_kv)


def _kv(args: argparse.Namespace) -> int:
    from runtime import kv_command

    return kv_command.run(args)


def _logits(args: argparse.Namespace) -> int:
    from runtime import logits

    return logits.run(args)


def _trial(args: argparse.Namespace) -> int:
    from appliance.bundle import VerifiedBundle
    from runtime.load import load_engine
    from runtime.serving import servable_tokenizer
    from runtime.trial import run_trial

    bundle = VerifiedBundle.open_installed(home(), args.bundle_id)
    servable_tokenizer(bundle)
    config = Config.load(home())
    profile = args.profile or config.engine.profile
    longest = max((len(g.prompt_ids) + len(g.expected_ids) for g in bundle.spec.goldens), default=2)
    engine = load_engine(bundle, profile=profile, threads=config.engine.threads, context_tokens=max(longest, 2))
    print(f"{bundle.bundle_id}, profile {profile}: {run_trial(engine)} ({engine.backend.description})")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from runtime.serving import serve_current

    return int(serve_current(home(), profile=args.profile))


if __name__ == "__main__":
    sys.exit(main())
