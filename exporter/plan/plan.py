"""``plan.json``: what a card is to hold, every byte of it, and the bounds the result must stay within."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import CheckpointError, UsageError
from exporter.checkpoint import Checkpoint
from exporter.evaluate.gates import default_bounds
from exporter.plan.bound import Bound, bound
from exporter.plan.budget import Ask, Budget, fit, kv_bytes
from exporter.plan.card import Card
from exporter.plan.weights import Weights, weights_of
from exporter.stage import code_version, read_json, write_json

FORMAT = 1
CONTEXTS = (4096, 131072, 1048576)  # the contexts every plan shows
SMALL_FILES_BYTES = 64 << 20  # graphs, model.json, manifest, metadata: allowance beside the objects
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
# Experts kept of 256 (distillation plan: gates): 160 with short recovery, 116 with long recovery, below tiered mode.
_VERDICTS = ((256, "whole"), (160, "prune and heal"), (116, "prune, long recovery"), (0, "tiered mode advised"))


@dataclass(frozen=True, slots=True)
class Plan:
    """One profile. Sizes in bytes; ``experts_kept`` per layer, first those of a layer's ranking."""

    id: str
    card: Mapping[str, Any]
    context_tokens: int
    sequences: int
    mode: str  # "pruned": experts not kept are gone; "tiered": they stay on the host, lossless
    dense: str  # "D4" or "D8"
    head: str  # "fp8" or "bf16"
    experts_kept: tuple[int, ...]
    experts_resident: tuple[int, ...]
    hash_layers: str
    device_bytes: Mapping[str, int]
    headroom_bytes: int
    host_bytes: Mapping[str, int]
    kv_bytes: Mapping[str, int]  # by context in tokens
    bundle_bytes: Mapping[str, int]  # "base objects", "profile objects", "small files (allowance)"
    bound: Mapping[str, Any]
    gates: Mapping[str, float]
    verdict: str
    assumptions: tuple[str, ...]
    source_sha256: str
    code: Mapping[str, str]

    @property
    def bound_tokens_per_s(self) -> float:
        """See exporter/plan/bound.py."""
        return float(self.bound["tokens_per_s"])

    @property
    def bundle_total_bytes(self) -> int:
        """Disk the bundle needs."""
        return sum(self.bundle_bytes.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "id": self.id, "card": dict(self.card), "context_tokens": self.context_tokens,
            "sequences": self.sequences, "mode": self.mode, "dense": self.dense, "head": self.head,
            "experts_kept": list(self.experts_kept), "experts_resident": list(self.experts_resident),
            "hash_layers": self.hash_layers,
            "bytes": {
                "device": dict(self.device_bytes), "headroom": self.headroom_bytes, "host": dict(self.host_bytes),
                "kv": dict(self.kv_bytes), "bundle": dict(self.bundle_bytes),
            },
            "bound": dict(self.bound), "bound_tokens_per_s": self.bound_tokens_per_s, "gates": dict(self.gates),
            "verdict": self.verdict, "assumptions": list(self.assumptions), "source_sha256": self.source_sha256,
            "code": dict(self.code),
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        write_json(path, self.to_dict())

    @staticmethod
    def read(path: Path) -> Plan:
        """CheckpointError names file and field."""
        raw = read_json(path)
        if raw.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {raw.get('format')!r}, expected {FORMAT}; plan again")
        for field, kind in _FIELDS.items():
            if not isinstance(raw.get(field), kind) or isinstance(raw.get(field), bool):
                raise CheckpointError(f"{path}: {field}: found {str(raw.get(field))[:60]!r}, expected {kind.__name__}")
        if not _ID.fullmatch(raw["id"]) or raw["dense"] not in ("D4", "D8") or raw["head"] not in ("fp8", "bf16"):
            raise CheckpointError(f"{path}: id, dense or head is not of a plan's form; plan again")
        sizes = raw["bytes"]
        try:
            return Plan(
                **{field: raw[field] for field in _SAME}, experts_kept=_counts(raw["experts_kept"]),
                experts_resident=_counts(raw["experts_resident"]), device_bytes=dict(sizes["device"]),
                headroom_bytes=int(sizes["headroom"]), host_bytes=dict(sizes["host"]), kv_bytes=dict(sizes["kv"]),
                bundle_bytes=dict(sizes["bundle"]), assumptions=tuple(raw["assumptions"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error} is missing or of the wrong type; plan again") from None


_SAME = ("id", "card", "context_tokens", "sequences", "mode", "dense", "head", "hash_layers", "bound", "gates",
         "verdict", "source_sha256", "code")  # fmt: skip
_FIELDS: Mapping[str, type] = {
    "id": str, "card": dict, "context_tokens": int, "sequences": int, "mode": str, "dense": str, "head": str,
    "experts_kept": list, "experts_resident": list, "hash_layers": str, "bytes": dict, "bound": dict, "gates": dict,
    "verdict": str, "assumptions": list, "source_sha256": str, "code": dict,
}  # fmt: skip


def _counts(value: list[Any]) -> tuple[int, ...]:
    if not all(type(count) is int and count >= 0 for count in value):
        raise ValueError("experts_kept")
    return tuple(value)


def make_plan(
    checkpoint: Checkpoint, card: Card, ask: Ask, *, dense: str = "D4", head: str = "fp8", plan_id: str | None = None
) -> Plan:
    """The plan for one device of ``card``. SpaceError with the bytes needed where nothing fits."""
    weights = weights_of(checkpoint, dense, head)
    budget = fit(weights, card, ask)
    name = plan_id or f"{card.id}-{context_name(ask.context_tokens)}{'-tiered' if ask.mode == 'tiered' else ''}"
    if not _ID.fullmatch(name):
        raise UsageError(f"--id {name}: expected {_ID.pattern}")
    pruned = min(budget.experts_kept) < weights.config.n_routed_experts
    limit = bound(weights, card, budget, ask.context_tokens)
    tokenizer = checkpoint.path / "tokenizer.json"
    small = SMALL_FILES_BYTES + (tokenizer.stat().st_size if tokenizer.is_file() else 0)
    return Plan(
        id=name, card=card.to_dict(), context_tokens=ask.context_tokens, sequences=ask.sequences, mode=ask.mode,
        dense=dense, head=head, experts_kept=budget.experts_kept, experts_resident=budget.experts_resident,
        hash_layers=budget.hash_layers, device_bytes=budget.device, headroom_bytes=budget.headroom_bytes,
        host_bytes=budget.host, kv_bytes=_kv_by_context(weights, ask), bundle_bytes=_bundle(weights, budget, small),
        bound=_bound_dict(limit), gates=default_bounds(pruned=pruned), verdict=verdict(weights, budget),
        assumptions=_assumptions(card, ask, weights, budget), source_sha256=checkpoint.source_sha256,
        code=code_version(),
    )  # fmt: skip


def verdict(weights: Weights, budget: Budget) -> str:
    """What the share of experts on the device asks for."""
    learned, whole = budget.experts_resident[-1], weights.config.n_routed_experts
    if budget.experts_kept != budget.experts_resident:
        return "tiered, lossless"
    return next(text for least, text in _VERDICTS if learned * 256 >= least * whole)


def context_name(tokens: int) -> str:
    """131072 → "128k", 1048576 → "1m", 1000 → "1000"."""
    for unit, size in (("m", 1 << 20), ("k", 1 << 10)):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def _kv_by_context(weights: Weights, ask: Ask) -> dict[str, int]:
    longest = weights.config.max_position_embeddings
    contexts = sorted({*(tokens for tokens in CONTEXTS if tokens <= longest), ask.context_tokens})
    return {str(tokens): kv_bytes(weights.config, tokens, ask.sequences) for tokens in contexts}


def _bundle(weights: Weights, budget: Budget, small_bytes: int) -> dict[str, int]:
    """Objects as `build` writes them. The base holds every expert, whatever the profile keeps."""
    added = weights.added_objects + (weights.tables if budget.hash_layers == "cut" else 0)
    return {"base objects": weights.base_objects, "profile objects": added, "small files (allowance)": small_bytes}


def _bound_dict(limit: Bound) -> dict[str, Any]:
    return {field: getattr(limit, field) for field in limit.__slots__}


def _assumptions(card: Card, ask: Ask, weights: Weights, budget: Budget) -> tuple[str, ...]:
    lines = [
        f"{card.free_percent} % of the memory is left alone, {card.workspace_bytes:,} bytes are workspace",
        f"{ask.sequences} sequence(s) of {ask.context_tokens:,} tokens, caches in V4's trained formats (kv-v4)",
        "the embedding stays on the host, one row a token; draft stages (MTP, DSpark) are not loaded",
        "expert ids by token id are stored as I64; router rows are cut with the experts",
        "objects of the bundle: healed routers and norms, and whole layers where experts are trained, come on top",
    ]
    if card.devices > 1:
        lines.append(f"the card has {card.devices} devices with a memory each: one is planned, the others are unused")
    if weights.dense_format == "D4":
        lines.append("D4: attention (with the indexer's query) and shared experts in MXFP4, 4.25 bits a weight")
    if budget.hash_layers == "cut":
        lines.append("layers routed by token id are cut, too: their ids are rewritten, and recovery is mandatory")
    if ask.mode == "tiered":
        lines.append("tokens/s with misses: every expert as likely as another, each miss waits for the host link")
    return tuple(lines)
