"""The most tokens per second that a card's memory and its link to the host allow: bytes read a token over bandwidth.

One sequence, no draft stages. It is a bound, not a forecast: kernels, launches and compute come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.model import ModelConfig, state_tensors
from exporter.plan.budget import Budget
from exporter.plan.card import Card
from exporter.plan.weights import Weights


@dataclass(frozen=True, slots=True)
class Bound:
    """Bytes of one decoded token. Misses: routed experts not on the device, if every expert is as likely as another."""

    expert_bytes: int
    dense_bytes: int
    kv_bytes: int
    miss_bytes: int
    tokens_per_s: float  # with these misses, which wait for the router and so for each other
    tokens_per_s_all_hits: float


def bound(weights: Weights, card: Card, budget: Budget, context_tokens: int) -> Bound:
    """For the last token of ``context_tokens``. Tables read by row (embedding, expert ids) are not counted."""
    config = weights.config
    experts = weights.record * config.num_experts_per_tok * config.num_hidden_layers
    dense = sum(weights.dense.values()) - weights.tables + weights.gate_rows(budget.experts_kept)
    kv = kv_read_bytes(config, context_tokens)
    cold = [1 - resident / kept for resident, kept in zip(budget.experts_resident, budget.experts_kept, strict=True)]
    misses = round(weights.record * config.num_experts_per_tok * sum(cold))
    resident_s = (experts + dense + kv) / card.bandwidth_bytes_per_s
    missed_s = (experts - misses + dense + kv) / card.bandwidth_bytes_per_s + misses / card.host_link_bytes_per_s
    return Bound(experts, dense, kv, misses, 1 / missed_s, 1 / resident_s)


def kv_read_bytes(config: ModelConfig, context_tokens: int) -> int:
    """Cache rows one query reads: window, every index key, the entries it selects (CSA) or all of them (HCA)."""
    total = 0
    for state in state_tensors(config, "kv-v4"):
        if state.kind == "win":
            total += min(state.rows, context_tokens) * state.row_bytes
        elif state.paged:
            rows = context_tokens // state.ratio
            chosen = state.kind == "ent" and config.layer_kind(state.layer) == "C"
            total += (min(rows, config.index_topk) if chosen else rows) * state.row_bytes
    return total
