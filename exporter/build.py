"""``solocard-export build CKPT OUT``: a checkpoint, its ranking, and profiles with their overlays become one bundle.

Objects stream from checkpoint and overlays into ``OUT.partial``, journaled record by record; the graphs refer to them,
and the engine itself finds the golden tokens. ``OUT.partial`` outlives an error, Ctrl-C or a kill, and the same build
started again goes on with it. OUT appears complete, by one rename.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from appliance.errors import CheckpointError, UsageError
from appliance.model import BLOCK_TOKENS, ENCODINGS, NUMERICS, ModelConfig
from exporter import inventory
from exporter.build_profiles import BuildProfile, open_profiles
from exporter.checkpoint import Checkpoint
from exporter.goldens import LONG
from exporter.provenance import dropped
from exporter.ranking import Ranking
from exporter.release import Release, write_bundle

DSPARK_MARK = "markov_w1"  # a tensor only the 0731 refresh has
MAX_WORKERS = 64


def add_command(commands: Any) -> None:
    """Add ``build`` to the exporter's commands."""
    parser = commands.add_parser("build", help="checkpoint, ranking and profiles into an unsigned bundle")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder in the official V4-Flash format")
    parser.add_argument("out", type=Path, metavar="OUT", help="the bundle's folder, not there yet")
    parser.add_argument("--encoding", choices=ENCODINGS, help="prompt dialect; required unless DSpark tensors decide")
    parser.add_argument("--numerics", choices=NUMERICS, default="kv-v4", help="cache formats (default: kv-v4)")
    parser.add_argument("--ranking", type=Path, metavar="FILE", help="ranking.json: experts are stored in its order")
    parser.add_argument(
        "--profile", action="append", default=[], metavar="PLAN[,OVERLAY…]",
        help="plan.json and the overlay folders made for it, bottom first; once for each card class",
    )  # fmt: skip
    parser.add_argument(
        "--quality", type=Path, action="append", default=[], metavar="FILE",
        help="quality.json of a profile, by `evaluate`; a gate it failed and nobody waived ends the build",
    )  # fmt: skip
    parser.add_argument("--without-quality", metavar="REASON", help="build profiles that have no quality.json")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="objects written at a time (default: 2)")
    parser.add_argument("--name", default="deepseek-v4-flash", help="the model's name over HTTP")
    parser.add_argument("--release-version", default="0.1.0", metavar="V", help="for people, e.g. 1.2.0")
    parser.add_argument("--release-counter", type=int, default=1, metavar="N", help="rises with every release")
    parser.add_argument("--golden-prompts", type=Path, metavar="FILE", help="JSON lines of token ids to try first")
    parser.add_argument("--no-tokenizer", action="store_true", help="without one the bundle cannot be installed")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 with the bundle at OUT; every refusal names file and tensor or field."""
    started_s = time.monotonic()
    base = Checkpoint.open(args.checkpoint)
    inventory.check(base)
    check_numerics(base.config, args.numerics)
    if not 1 <= args.workers <= MAX_WORKERS:
        raise UsageError(f"--workers {args.workers}: expected 1 to {MAX_WORKERS}")
    ranking = Ranking.read(args.ranking) if args.ranking else None
    release = Release(
        args.name, args.release_version, args.release_counter, choose_encoding(base, args.encoding), args.numerics,
        open_profiles(base, ranking, args.profile, args.quality, args.without_quality),
        _tokenizer(base, args.no_tokenizer), _golden_prompts(args.golden_prompts, base.config),
    )  # fmt: skip
    left = dropped(release.base_view)
    if left["tensors"]:
        print(
            f"left out: {left['tensors']:,} tensors, {left['bytes']:,} bytes (mtp.*: MTP and DSpark blocks, which no "
            "graph reads)", file=sys.stderr,
        )  # fmt: skip
    manifest = write_bundle(release, args.out, workers=args.workers)
    for profile in release.profiles[1:]:
        print(f"profile {profile.id}: {profile.card}, {_described(profile)}")
    size, elapsed_s = manifest.total_bytes, time.monotonic() - started_s
    print(f"built {args.out}: {manifest.bundle_id}, {size:,} bytes, unsigned, {elapsed_s:.1f} s")
    return 0


def _described(profile: BuildProfile) -> str:
    kept, quality = profile.view.experts_kept, profile.quality
    experts = f"{min(kept)}" if min(kept) == max(kept) else f"{min(kept)} to {max(kept)}"
    if quality is None:
        return f"{experts} experts a layer, quality not measured: {profile.without_quality}"
    waived = f", waived: {', '.join(quality.waived_gates)}" if quality.waived_gates else ""
    looser = "".join(f", gate {name} by a looser bound: {text}" for name, text in profile.loosened().items())
    return f"{experts} experts a layer, quality gates passed{waived}{looser}"


def check_numerics(config: ModelConfig, numerics: str) -> None:
    """kv-v4 stores the part without rotation in groups of 64, index keys in groups of 32."""
    nope = config.head_dim - config.qk_rope_head_dim
    if numerics == "kv-v4" and nope % 64:
        raise CheckpointError(
            f"config.json: head_dim − qk_rope_head_dim = {nope} is not a multiple of 64, which kv-v4 needs; "
            "only --numerics kv-f32 can hold this model, and it is for parity checks, not for serving"
        )
    ratios = sorted({ratio for ratio in config.compress_ratios if ratio})
    for field, rows in (("sliding_window", config.sliding_window), *(("compress_ratios", r) for r in ratios)):
        if BLOCK_TOKENS % rows:
            raise CheckpointError(f"config.json: {field} {rows} does not divide {BLOCK_TOKENS}, the KV block")


def choose_encoding(ckpt: Checkpoint, asked: str | None) -> str:
    """The prompt dialect: DSpark tensors are the 0731 refresh's; otherwise the caller must say."""
    dspark = any(DSPARK_MARK in name for name in ckpt.names)
    if dspark and asked in (None, "dsv4-0731"):
        return "dsv4-0731"
    if dspark:
        raise UsageError(f"--encoding {asked}: {ckpt.path} holds DSpark tensors, it is the 0731 refresh: dsv4-0731")
    if asked is None:
        raise UsageError(f"--encoding is needed: {ckpt.path} does not tell; give one of {', '.join(ENCODINGS)}")
    return asked


def _tokenizer(ckpt: Checkpoint, none: bool) -> bytes | None:
    path = ckpt.path / "tokenizer.json"
    if none:
        return None
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy it, or build with --no-tokenizer (then it cannot be installed)")
    return path.read_bytes()


def _golden_prompts(path: Path | None, config: ModelConfig) -> list[list[int]]:
    if path is None:
        return []
    prompts, longest = [], config.max_position_embeddings - LONG
    try:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            ids = json.loads(line)
            known = isinstance(ids, list) and all(type(i) is int and 0 <= i < config.vocab_size for i in ids)
            if not known or not 1 <= len(ids) <= longest:
                raise UsageError(f"{path}:{number}: expected 1 to {longest:,} token ids below {config.vocab_size:,}")
            prompts.append(ids)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON lines ({error})") from None
    return prompts
