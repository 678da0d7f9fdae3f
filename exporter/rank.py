"""``solocard-export rank``: the experts of each layer by saliency, most salient first. No torch.

Layers with a learned router are ordered by score, super experts before all others. Layers routed by token id keep
their official order, unless they are to be cut: then they are ranked, too, and an overlay rewrites their token table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import UsageError
from exporter import inventory
from exporter.checkpoint import Checkpoint
from exporter.hash_rule import write_hash_overlay
from exporter.ranking import Ranking
from exporter.statistics import Statistics, reap_mean, required
from exporter.view import View
from exporter.view_arguments import planned_experts

F64 = NDArray[np.float64]
OBSERVED = ("reap-mean", "reap-sum", "frequency")
SCORES = (*OBSERVED, "random", "first")
Score = Callable[[int], F64]


def rank(
    checkpoint: Checkpoint, score: str, statistics: Statistics | None = None, *,
    domain_weights: dict[str, float] | None = None, seed: int = 0, hash_layers: bool = False,
) -> Ranking:
    """Orders of all layers; equal scores keep the official order. ``hash_layers`` ranks those routed by token id, too.

    UsageError: a score that needs statistics without any, statistics of another checkpoint, an unknown domain.
    """
    config = checkpoint.config
    of_layer = _score(checkpoint, score, statistics, domain_weights or {}, seed)
    first = 0 if hash_layers else config.num_hash_layers
    identity = tuple(range(config.n_routed_experts))
    orders = [identity] * first
    for layer in range(first, config.num_hidden_layers):
        orders.append(_order(of_layer(layer), _super(statistics, layer) if score in OBSERVED else None))
    return Ranking(checkpoint.source_sha256, score, tuple(orders), statistics.sha256 if statistics else "")


def _order(scores: F64, super_experts: NDArray[np.generic] | None) -> tuple[int, ...]:
    """Expert ids by (super expert, score), best first, lower id first of equals."""
    first = np.zeros(len(scores)) if super_experts is None else super_experts.astype(np.float64)
    return tuple(int(e) for e in np.lexsort((np.arange(len(scores)), -scores, -first)))


def _super(statistics: Statistics | None, layer: int) -> NDArray[np.generic] | None:
    return None if statistics is None else statistics.tensor(layer, "super_expert")


def _score(
    checkpoint: Checkpoint, score: str, statistics: Statistics | None, domain_weights: dict[str, float], seed: int
) -> Score:
    """Layer → score of each expert [E], higher is kept longer."""
    experts = checkpoint.config.n_routed_experts
    if score == "first":
        return lambda layer: -np.arange(experts, dtype=np.float64)
    if score == "random":
        return lambda layer: np.random.Generator(np.random.PCG64([seed, layer])).permutation(experts).astype(np.float64)
    if statistics is None:
        raise UsageError(f"--score {score} needs STATS: the folder that `solocard-export observe` wrote")
    statistics.check_source(checkpoint.source_sha256, checkpoint.path)
    found, weights = statistics, _weights(statistics, domain_weights)
    if score == "reap-mean":
        return lambda layer: reap_mean(found, layer, weights)
    name = "reap_sum" if score == "reap-sum" else "count"
    return lambda layer: weights @ required(found, layer, name)


def _weights(statistics: Statistics, chosen: dict[str, float]) -> F64:
    """One weight per domain, 1 unless chosen."""
    unknown = sorted(set(chosen) - set(statistics.domains))
    if unknown:
        raise UsageError(f"--domain-weight {unknown[0]}: {statistics.path} has {', '.join(statistics.domains)}")
    weights = np.array([chosen.get(domain, 1.0) for domain in statistics.domains])
    if weights.sum() == 0:
        raise UsageError("--domain-weight: every domain has weight 0; leave at least one")
    return weights


def add_command(subparsers: Any) -> None:
    """Add ``rank CKPT [STATS] --score … --out FILE``; its ``func`` returns the exit code."""
    parser = subparsers.add_parser("rank", help="order the experts of each layer by saliency")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder in the official V4-Flash format")
    parser.add_argument("statistics", type=Path, nargs="?", metavar="STATS", help="what observe wrote")
    parser.add_argument("--score", choices=SCORES, default="reap-mean", help="default: reap-mean")
    parser.add_argument(
        "--domain-weight", action="append", default=[], metavar="NAME=W", help="count a domain W times (repeated)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --score random (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("ranking.json"), metavar="FILE", help="default: ranking.json")
    parser.add_argument(
        "--overlay-out", type=Path, metavar="DIR",
        help="rank the layers routed by token id, too, and rewrite their token tables for the cut below",
    )  # fmt: skip
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--plan", type=Path, metavar="FILE", help="with --overlay-out: plan.json, experts kept per layer")
    cut.add_argument("--keep", type=int, metavar="K", help="with --overlay-out: experts kept in every layer")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    if (args.overlay_out is None) != (args.plan is None and args.keep is None):
        raise UsageError("--overlay-out DIR needs --plan FILE or --keep K, and they need --overlay-out")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: expected at least 0")
    base = Checkpoint.open(args.checkpoint)
    inventory.check(base)
    statistics = Statistics.open(args.statistics) if args.statistics else None
    ranking = rank(
        base, args.score, statistics, domain_weights=_parsed_weights(args.domain_weight), seed=args.seed,
        hash_layers=args.overlay_out is not None,
    )
    if args.overlay_out is not None:
        config = base.config
        kept = planned_experts(args.plan, config) if args.plan else (args.keep,) * config.num_hidden_layers
        moved = write_hash_overlay(View(base, ranking=ranking, experts_kept=kept), args.overlay_out)
        print(f"wrote {args.overlay_out}: {moved:.1%} of the token table entries moved to a kept expert")
    ranking.write(args.out)
    print(f"wrote {args.out}: {len(ranking.orders)} layers of {base.config.n_routed_experts} experts by {args.score}")
    return 0


def _parsed_weights(options: list[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = -1.0
        if not name or not 0 <= weights[name] < 1e6:
            raise UsageError(f"--domain-weight {option}: expected NAME=W with W from 0 to 1,000,000")
    return weights
