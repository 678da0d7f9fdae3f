"""The feed-forward block: hash or learned router, FP4 experts, the shared expert (FP8 or FP4) beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.blocks.linear import linear
from exporter.ops.body import Body
from exporter.ops.moe import gating_topk, gating_topk_hash, moe_fp4
from exporter.view import View

if TYPE_CHECKING:
    from exporter.blocks.layer import LayerContext


def is_reordered(view: View, index: int) -> bool:
    """True if the kept experts of a layer are not in ascending official order: sums then need ``official``."""
    order = view.ranking.orders[index][: view.experts_kept[index]]
    return list(order) != sorted(order)


def feed_forward(body: Body, ctx: LayerContext, index: int, x: str) -> str:
    """x f32 [T, D] after ffn_norm → y [T, D]: routed experts plus the shared one, both with the swiglu clamp."""
    cfg, name = ctx.config, f"layers.{index}.ffn"
    k, scale, ranked = cfg.num_experts_per_tok, cfg.routed_scaling_factor, is_reordered(ctx.view, index)
    official = (f"{name}.official",) if ranked else ()
    if index < cfg.num_hash_layers:
        router = gating_topk_hash(k, scale, ranked=ranked)
        last = (f"{name}.gate.tid2eid", ctx.input_ids)
    else:
        router = gating_topk(k, scale, ranked=ranked)
        last = (f"{name}.gate.bias", f"{name}.n_kept")
    ids, weights = body.call(router, x, f"{name}.gate.weight", *last, *official, n=2)
    kept, inter = ctx.view.experts_kept[index], cfg.moe_intermediate_size
    experts = moe_fp4(kept, cfg.hidden_size, inter, cfg.swiglu_limit, ranked=ranked)
    routed = body.call(experts, x, f"{name}.experts", ids, weights, *official)
    return str(body.op("Add", routed, _shared(body, ctx, f"{name}.shared_experts", x)))


def _shared(body: Body, ctx: LayerContext, name: str, x: str) -> str:
    cfg, view = ctx.config, ctx.view
    inter = cfg.moe_intermediate_size * cfg.n_shared_experts
    gate = body.op("Min", linear(body, view, x, f"{name}.w1", inter, cfg.hidden_size), body.f32(cfg.swiglu_limit))
    up = linear(body, view, x, f"{name}.w3", inter, cfg.hidden_size)
    up = body.op("Clip", up, body.f32(-cfg.swiglu_limit), body.f32(cfg.swiglu_limit))
    act = body.op("Mul", body.op("Mul", gate, body.op("Sigmoid", gate)), up)
    return linear(body, view, act, f"{name}.w2", cfg.hidden_size, inter)
