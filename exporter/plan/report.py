"""A plan and a survey as a terminal shows them: bars first, numbers beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from appliance.errors import SpaceError
from appliance.model import ModelConfig
from exporter.plan.bound import bound
from exporter.plan.budget import Ask, Budget, fit
from exporter.plan.card import Card, built_in
from exporter.plan.kinds import KINDS, Survey
from exporter.plan.plan import CONTEXTS, Plan, context_name, verdict
from exporter.plan.weights import Weights

BAR_CHARS = 40
_NAMES = {**KINDS, "kv": "KV cache", "workspace": "workspace", "free": "left alone", "cold experts": "cold experts"}
_LAYERS = {"S": "sliding window", "C": "compressed, indexed", "H": "heavily compressed"}


def bar(share: float, *, blocks: str = "█░") -> str:
    """``share`` of BAR_CHARS, at least one block for anything above 0."""
    filled = min(BAR_CHARS, max(round(share * BAR_CHARS), 1 if share > 0 else 0))
    return blocks[0] * filled + blocks[1] * (BAR_CHARS - filled)


def gigabytes(size_bytes: int) -> str:
    """10⁹ bytes as GB, smaller sizes as MB or kB, three or more digits; a negative size keeps its sign."""
    size = abs(size_bytes)
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes} B"


def plan_lines(plan: Plan, config: ModelConfig) -> Iterator[str]:
    """The plan of one card."""
    memory = int(plan.card["device_memory_bytes"])
    what = f"{context_name(plan.context_tokens)} context, {plan.mode}, {plan.dense}, head {plan.head}"
    yield f"{plan.id}: {plan.card['name']}, {what}"
    yield ""
    widest = max(len(name) for name in _NAMES.values())
    rows = sorted(plan.device_bytes.items(), key=lambda row: -row[1])
    for key, size in [*rows, ("headroom", plan.headroom_bytes)]:
        note = f"  {_experts(plan, config)}" if key == "routed" else ""
        yield f"  {_NAMES.get(key, key):<{widest}} {bar(size / memory)} {gigabytes(size):>10}{note}"
    yield f"  {'device memory':<{widest}} {'':<{BAR_CHARS}} {gigabytes(memory):>10}"
    yield ""
    yield from (f"  on the host: {_NAMES.get(key, key)} {gigabytes(size)}" for key, size in plan.host_bytes.items())
    caches = (f"{context_name(int(tokens))} {gigabytes(size)}" for tokens, size in plan.kv_bytes.items())
    yield f"  KV cache: {', '.join(caches)}"
    yield f"  {_bound(plan)}"
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in plan.bundle_bytes.items())
    yield f"  bundle: {plan.bundle_total_bytes:,} bytes ({parts})"
    yield f"  verdict: {plan.verdict}"
    yield from (f"  note: {note}" for note in (*plan.card["notes"], *plan.assumptions))
    if plan.card["unverified"]:
        yield f"  unverified on hardware: {', '.join(plan.card['unverified'])}"


def _experts(plan: Plan, config: ModelConfig) -> str:
    resident, hashed, whole = plan.experts_resident, config.num_hash_layers, config.n_routed_experts
    text = f"{resident[-1]} of {whole} a layer"
    if hashed and resident[0] != resident[-1]:
        text += f", {resident[0]} in the {hashed} routed by token id"
    return text + (" resident, all kept" if plan.mode == "tiered" else "")


def _bound(plan: Plan) -> str:
    text = f"bandwidth bound: {plan.bound_tokens_per_s:.0f} tokens/s"
    if plan.mode == "tiered":
        text += f" with misses, {plan.bound['tokens_per_s_all_hits']:.0f} if none"
    read = plan.bound["expert_bytes"] + plan.bound["dense_bytes"] + plan.bound["kv_bytes"]
    return f"{text} (one sequence, {gigabytes(read)} read a token)"


def table_lines(weights: Weights, ask: Ask, extra: Card | None = None) -> Iterator[str]:
    """What fits every card: experts per layer by context, tokens per second, what that asks for."""
    whole = weights.config.n_routed_experts
    contexts = [tokens for tokens in CONTEXTS if tokens <= weights.config.max_position_embeddings]
    heads = " ".join(f"{'K@' + context_name(tokens):>9}" for tokens in contexts)
    yield f"  what fits, {weights.dense_format}: K of {whole} experts a layer (* layers routed by token id cut, too)"
    yield f"  {'card':<16} {heads}  {'tokens/s':>8}  at {context_name(ask.context_tokens)}"
    cards = {card.id: card for card in (*built_in(), *([extra] if extra else []))}
    for card in cards.values():
        mark = ">" if extra and card.id == extra.id else " "
        yield f" {mark}{_row(weights, card, replace(ask, mode='pruned', keep=None), contexts)}"


def _row(weights: Weights, card: Card, ask: Ask, contexts: list[int]) -> str:
    counts = [_count(_try(weights, card, replace(ask, context_tokens=tokens))) for tokens in contexts]
    now = _try(weights, card, ask)
    speed = f"{bound(weights, card, now, ask.context_tokens).tokens_per_s:.0f}" if now else "-"
    text = verdict(weights, now) if now else "does not fit pruned"
    tiered = _try(weights, card, replace(ask, mode="tiered"))
    if tiered and tiered.host["cold experts"]:
        cold = gigabytes(tiered.host["cold experts"])
        text += f"; tiered: {tiered.experts_resident[-1]} resident, {cold} on the host"
    return f"{card.id:<16} {' '.join(f'{count:>9}' for count in counts)}  {speed:>8}  {text}"


def _try(weights: Weights, card: Card, ask: Ask) -> Budget | None:
    try:
        return fit(weights, card, ask)
    except SpaceError:
        return None


def _count(budget: Budget | None) -> str:
    if budget is None:
        return "-"
    return f"{budget.experts_resident[-1]}{'*' if budget.hash_layers == 'cut' else ''}"


def survey_lines(found: Survey, config: ModelConfig) -> Iterator[str]:
    """What ``inspect`` prints."""
    yield f"{found.tensors:,} tensors, {found.size_bytes:,} bytes in {found.files} files of {found.file_bytes:,}"
    layers = ", ".join(f"{count} {_LAYERS[kind]} ({kind})" for kind, count in found.layers.items())
    yield f"{config.num_hidden_layers} layers: {layers}; the first {found.hash_layers} routed by token id"
    experts = f"{config.n_routed_experts} experts a layer, {config.num_experts_per_tok} a token"
    yield f"{experts}; draft stages: {found.draft}{'' if found.draft_complete else ' (not as the release has them)'}"
    for counted, names in ((found.by_kind, KINDS), (found.by_dtype, {})):
        yield ""
        yield from _counted(counted, names, found.size_bytes)


def _counted(counted: Mapping[str, tuple[int, int]], names: Mapping[str, str], total: int) -> Iterator[str]:
    for key, (tensors, size) in sorted(counted.items(), key=lambda row: -row[1][1]):
        yield f"  {names.get(key, key):<18} {bar(size / max(total, 1))} {tensors:>7,} tensors {size:>16,} bytes"
