"""``solocard-export build CKPT OUT``: a checkpoint becomes an unsigned bundle.

Tensors stream into objects one at a time, the graph refers to them, the engine itself finds the golden tokens. All of
it happens in ``OUT.partial``; OUT appears complete, by one rename, or not at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from appliance.bundle_writer import BundleWriter
from appliance.errors import CheckpointError, SpaceError, UsageError
from appliance.manifest import Manifest
from appliance.model import BLOCK_TOKENS, ENCODINGS, NUMERICS, ModelConfig, ModelSpec, Profile, state_tensors
from exporter import inventory
from exporter.checkpoint import Checkpoint
from exporter.goldens import find_goldens
from exporter.graph import build_graph
from exporter.progress import Progress
from exporter.view import View
from exporter.writer import stored_bytes, write_weights

DSPARK_MARK = "markov_w1"  # a tensor only the 0731 refresh has


def add_command(commands: Any) -> None:
    """Add ``build`` to the exporter's commands."""
    parser = commands.add_parser("build", help="a checkpoint into an unsigned bundle")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder in the official V4-Flash format")
    parser.add_argument("out", type=Path, metavar="OUT", help="the bundle's folder, not there yet")
    parser.add_argument("--encoding", choices=ENCODINGS, help="prompt dialect; required unless DSpark tensors decide")
    parser.add_argument("--numerics", choices=NUMERICS, default="kv-v4", help="cache formats (default: kv-v4)")
    parser.add_argument("--name", default="deepseek-v4-flash", help="the model's name over HTTP")
    parser.add_argument("--release-version", default="0.1.0", metavar="V", help="for people, e.g. 1.2.0")
    parser.add_argument("--release-counter", type=int, default=1, metavar="N", help="rises with every release")
    parser.add_argument("--golden-prompts", type=Path, metavar="FILE", help="JSON lines of token ids to try first")
    parser.add_argument("--no-tokenizer", action="store_true", help="without one the bundle cannot be installed")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 with the bundle at OUT; every refusal names file and tensor or field."""
    started_s = time.monotonic()
    ckpt = Checkpoint.open(args.checkpoint)
    inventory.check(ckpt)
    check_numerics(ckpt.config, args.numerics)
    encoding = choose_encoding(ckpt, args.encoding)
    tokenizer = _tokenizer(ckpt, args.no_tokenizer)
    prompts = _golden_prompts(args.golden_prompts, ckpt.config)
    if args.out.exists():
        raise UsageError(f"{args.out} exists; name a new folder or remove it")
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    check_space(args.out, stored_bytes(View(ckpt)))
    try:
        manifest = _build(args, ckpt, encoding, tokenizer, prompts, partial)
        partial.rename(args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size, elapsed_s = manifest.total_bytes, time.monotonic() - started_s
    print(f"built {args.out}: {manifest.bundle_id}, {size:,} bytes, unsigned, {elapsed_s:.1f} s")
    return 0


def _build(
    args: argparse.Namespace, ckpt: Checkpoint, encoding: str, tokenizer: bytes | None, prompts: list[list[int]],
    partial: Path,
) -> Manifest:  # fmt: skip
    writer = BundleWriter(partial)
    view = View(ckpt)
    tensors = write_weights(view, writer, Progress("objects", stored_bytes(view)).add)
    graph = build_graph(view, args.numerics, tensors).SerializeToString(deterministic=True)
    writer.add_file("model.onnx", graph)
    if tokenizer is not None:
        writer.add_file("tokenizer.json", tokenizer)
    experts_kept = (ckpt.config.n_routed_experts,) * ckpt.config.num_hidden_layers
    profile = Profile("full", "any", experts_kept, (), hashlib.sha256(graph).hexdigest())
    states = state_tensors(ckpt.config, args.numerics)
    spec = ModelSpec(
        args.name, ckpt.config, states, encoding, args.numerics, (profile,), (), tokenizer=tokenizer is not None
    )
    release = (args.name, args.release_version, args.release_counter, _provenance(ckpt))
    writer.add_file("model.json", spec.to_json().encode())
    writer.finish(*release)  # a draft the engine can open; the golden tokens come from it
    print("golden tokens: asking the engine", file=sys.stderr)
    goldens = find_goldens(partial, ckpt.config, prompts)
    writer.replace_file("model.json", dataclasses.replace(spec, goldens=goldens).to_json().encode())
    return writer.finish(*release)


def check_numerics(config: ModelConfig, numerics: str) -> None:
    """kv-v4 stores the part without rotation in groups of 64, index keys in groups of 32."""
    nope = config.head_dim - config.qk_rope_head_dim
    if numerics == "kv-v4" and nope % 64:
        raise CheckpointError(
            f"config.json: head_dim − qk_rope_head_dim = {nope} is not a multiple of 64, which kv-v4 needs; "
            "only --numerics kv-f32 can hold this model, and it is for parity checks, not for serving"
        )
    for field, rows in (("sliding_window", config.sliding_window), *(("compress_ratios", r) for r in _ratios(config))):
        if BLOCK_TOKENS % rows:
            raise CheckpointError(f"config.json: {field} {rows} does not divide {BLOCK_TOKENS}, the KV block")


def _ratios(config: ModelConfig) -> list[int]:
    return sorted({ratio for ratio in config.compress_ratios if ratio})


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


def check_space(out: Path, needed_bytes: int) -> None:
    parent = out.resolve().parent
    if not parent.is_dir():
        raise UsageError(f"{parent} is not a folder; create it first")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes * 1.02 + (64 << 20):
        raise SpaceError(f"{out} needs {needed_bytes:,} bytes and {free:,} are free on its disk; free some or move it")


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
    prompts = []
    try:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            ids = json.loads(line)
            if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in ids):
                raise UsageError(f"{path}:{number}: not a list of token ids below {config.vocab_size}")
            prompts.append(ids)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON lines ({error})") from None
    return prompts


def _provenance(ckpt: Checkpoint) -> dict[str, Any]:
    """Where the weights came from: the config's digest and every source file's size; nothing that changes by rerun."""
    config = json.dumps(dict(ckpt.raw_config), sort_keys=True, separators=(",", ":"))
    files = [{"name": source.path.name, "size_bytes": source.size_bytes} for source in ckpt.sources]
    return {"config_sha256": hashlib.sha256(config.encode()).hexdigest(), "source_files": files}
