"""The command-line arguments by which every stage names the model it works on, and the View they open."""

from __future__ import annotations

import argparse
from pathlib import Path

from appliance.errors import CheckpointError, UsageError
from appliance.model import ModelConfig
from exporter import inventory
from exporter.checkpoint import Checkpoint
from exporter.overlay import Overlay
from exporter.ranking import Ranking
from exporter.stage import read_json
from exporter.view import View


def add_view_arguments(parser: argparse.ArgumentParser) -> None:
    """CKPT, --ranking, --plan or --keep, --overlay (repeated, bottom first)."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder in the official V4-Flash format")
    parser.add_argument("--ranking", type=Path, metavar="FILE", help="ranking.json: the experts by saliency")
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--plan", type=Path, metavar="FILE", help="plan.json: experts kept per layer")
    cut.add_argument("--keep", type=int, metavar="K", help="experts kept in each layer with a learned router")
    parser.add_argument(
        "--overlay", type=Path, action="append", default=[], metavar="DIR",
        help="output of distill or quantize; several lie on top of each other in the order given",
    )  # fmt: skip


def open_view(args: argparse.Namespace) -> View:
    """The view these arguments name. CheckpointError or UsageError names the file or option."""
    base = Checkpoint.open(args.checkpoint)
    inventory.check(base)
    ranking = Ranking.read(args.ranking) if args.ranking else None
    kept = None
    if args.plan:
        kept = planned_experts(args.plan, base.config)
    elif args.keep is not None:
        kept = learned_cut(base.config, args.keep)
    return View(base, ranking=ranking, experts_kept=kept, overlays=[Overlay.open(path) for path in args.overlay])


def learned_cut(config: ModelConfig, keep: int) -> tuple[int, ...]:
    """``keep`` experts in each layer with a learned router; layers routed by token id stay whole."""
    learned = config.num_hidden_layers - config.num_hash_layers
    return (config.n_routed_experts,) * config.num_hash_layers + (keep,) * learned


def planned_experts(path: Path, config: ModelConfig) -> tuple[int, ...]:
    """``experts_kept`` of a plan.json, one count a layer."""
    kept = read_json(path).get("experts_kept")
    if not isinstance(kept, list) or not all(type(count) is int for count in kept):
        raise CheckpointError(f"{path}: experts_kept: expected a list of counts; make it with `solocard-export plan`")
    if len(kept) != config.num_hidden_layers:
        raise UsageError(f"{path}: experts_kept has {len(kept)} layers, the checkpoint {config.num_hidden_layers}")
    return tuple(kept)
