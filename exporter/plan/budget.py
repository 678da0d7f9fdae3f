"""The memory of a card, every byte accounted: how many experts of each layer fit it, and what else lies there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from appliance.errors import SpaceError, UsageError
from appliance.model import BLOCK_TOKENS, ModelConfig, StateTensor, state_tensors
from exporter.plan.card import Card
from exporter.plan.weights import Weights

Mode = Literal["pruned", "tiered"]
MODES: tuple[Mode, ...] = ("pruned", "tiered")
HASH_RULES = ("auto", "full", "cut")
# Below this share of learned experts the layers routed by token id are cut as well (distillation plan: 80 of 256).
HASH_FLOOR = (80, 256)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a plan is made for."""

    context_tokens: int
    mode: Mode = "pruned"
    sequences: int = 1
    hash_rule: str = "auto"
    keep: int | None = None  # experts kept in layers with a learned router; None: as many as fit


@dataclass(frozen=True, slots=True)
class Budget:
    """Where the bytes of one device go. ``device`` with ``headroom_bytes`` adds up to the device's memory."""

    device: Mapping[str, int]  # "routed", "attention", …, "kv", "workspace", "free"
    headroom_bytes: int
    host: Mapping[str, int]  # "embed"; in tiered mode "cold experts"
    experts_kept: tuple[int, ...]  # in the model
    experts_resident: tuple[int, ...]  # on the device: the same, or the first of them (tiered)
    hash_layers: str  # "full", "cut", "none" where there are none


def kv_bytes(config: ModelConfig, context_tokens: int, sequences: int = 1) -> int:
    """Cache of ``sequences`` full contexts (kv-v4), with the reserved slot 0 and block 0 (design: paged state)."""
    states = state_tensors(config, "kv-v4")
    blocks = 1 + sequences * -(-context_tokens // BLOCK_TOKENS)
    return sum(_pool_bytes(state, blocks if state.paged else 1 + sequences) for state in states)


def _pool_bytes(state: StateTensor, count: int) -> int:
    return count * state.rows * state.row_bytes


def fit(weights: Weights, card: Card, ask: Ask) -> Budget:
    """The most experts that fit, or ``ask.keep`` of them. SpaceError with the bytes needed when they do not."""
    config = weights.config
    _check(config, ask)
    room = card.device_memory_bytes - sum(_fixed(weights, card, ask).values())
    counts = _tiered(weights, room) if ask.mode == "tiered" else _pruned(weights, room, ask)
    if counts is None:
        raise SpaceError(_refusal(weights, card, ask))
    return _budget(weights, card, ask, counts)


def _check(config: ModelConfig, ask: Ask) -> None:
    if not 1 <= ask.context_tokens <= config.max_position_embeddings:
        raise UsageError(f"--context {ask.context_tokens}: expected 1 to {config.max_position_embeddings} tokens")
    low, high = config.num_experts_per_tok, config.n_routed_experts
    if ask.keep is not None and not low <= ask.keep <= high:
        raise UsageError(f"--keep {ask.keep}: expected {low} (experts per token) to {high}")
    if ask.keep is not None and ask.mode == "tiered":
        raise UsageError("--keep and --mode tiered: a tiered model keeps every expert")
    if not 1 <= ask.sequences <= 4096:
        raise UsageError(f"--sequences {ask.sequences}: expected 1 to 4096")


def _fixed(weights: Weights, card: Card, ask: Ask) -> dict[str, int]:
    """What lies on the device whatever is cut."""
    kv = kv_bytes(weights.config, ask.context_tokens, ask.sequences)
    return {**weights.dense, "kv": kv, "workspace": card.workspace_bytes, "free": card.free_bytes}


def _pruned(weights: Weights, room: int, ask: Ask) -> tuple[int, ...] | None:
    """Experts kept per layer, or None. Layers routed by token id stay whole as long as the others keep enough."""
    config = weights.config
    experts, hashed = config.n_routed_experts, config.num_hash_layers
    learned = range(hashed, config.num_hidden_layers)
    if ask.keep is not None:
        options = [_kept(config, ask.keep, cut=cut) for cut in _cuts(ask)]
        return next((c for c in options if _slots(weights, c) <= room), None)
    whole = sum(weights.slot(layer) * experts for layer in range(hashed))
    most = (room - whole) // sum(weights.slot(layer) for layer in learned) if learned else experts
    floor, of = HASH_FLOOR
    enough = most >= config.num_experts_per_tok and (most * of >= floor * experts or ask.hash_rule == "full")
    if ask.hash_rule != "cut" and enough and room >= whole:
        return _kept(config, min(most, experts), cut=False)
    if ask.hash_rule == "full":
        return None
    every = room // sum(weights.slot(layer) for layer in range(config.num_hidden_layers))
    return _kept(config, min(every, experts), cut=True) if every >= config.num_experts_per_tok else None


def _cuts(ask: Ask) -> tuple[bool, ...]:
    return {"auto": (False, True), "full": (False,), "cut": (True,)}[ask.hash_rule]


def _kept(config: ModelConfig, keep: int, *, cut: bool) -> tuple[int, ...]:
    hashed = (keep if cut else config.n_routed_experts,) * config.num_hash_layers
    return hashed + (keep,) * (config.num_hidden_layers - config.num_hash_layers)


def _tiered(weights: Weights, room: int) -> tuple[int, ...] | None:
    """Experts resident per layer, the same in each; every router row is resident."""
    config, layers = weights.config, weights.config.num_hidden_layers
    rows = weights.gate_rows((config.n_routed_experts,) * layers)
    most = (room - rows) // (weights.record * layers)
    return None if most < 0 else (min(most, config.n_routed_experts),) * layers


def _slots(weights: Weights, counts: tuple[int, ...]) -> int:
    return sum(weights.slot(layer) * count for layer, count in enumerate(counts))


def _budget(weights: Weights, card: Card, ask: Ask, counts: tuple[int, ...]) -> Budget:
    config = weights.config
    full = (config.n_routed_experts,) * config.num_hidden_layers
    kept = full if ask.mode == "tiered" else counts
    device = {"routed": weights.record * sum(counts), **_fixed(weights, card, ask)}
    device["gates"] += weights.gate_rows(kept)
    host = {"embed": weights.embed}
    if ask.mode == "tiered":
        host["cold experts"] = weights.record * (sum(full) - sum(counts))
    headroom = card.device_memory_bytes - sum(device.values())
    hashed = kept[: config.num_hash_layers]
    rule = "none" if not hashed else "full" if min(hashed) == config.n_routed_experts else "cut"
    return Budget(device, headroom, host, kept, counts, rule)


def _refusal(weights: Weights, card: Card, ask: Ask) -> str:
    """One line: the least that would have to fit, and what there is."""
    config, fixed = weights.config, sum(_fixed(weights, card, ask).values())
    if ask.mode == "tiered":
        rows = weights.gate_rows((config.n_routed_experts,) * config.num_hidden_layers)
        needed, what = fixed + rows, "tiered with no expert resident"
    else:
        keep = config.num_experts_per_tok if ask.keep is None else ask.keep
        needed = fixed + _slots(weights, _kept(config, keep, cut=ask.hash_rule != "full"))
        what = f"pruned to {keep} experts a layer"
    return (
        f"{card.id}: {what}, {ask.sequences} x {ask.context_tokens:,} tokens, needs {needed:,} bytes ({fixed:,} "
        f"of them without experts) and a device has {card.device_memory_bytes:,}; take a larger card, a shorter "
        "context, fewer experts" + (", or --mode tiered" if ask.mode == "pruned" else "")
    )
