"""The feed-forward block: hash or learned router, FP4 experts, the FP8 shared expert beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.blocks.attention import fp8
from exporter.ops.body import Body
from exporter.ops.moe import gating_topk, gating_topk_hash, moe_fp4

if TYPE_CHECKING:
    from exporter.blocks.layer import LayerContext


def feed_forward(body: Body, ctx: LayerContext, index: int, x: str) -> str:
    """x f32 [T, D] after ffn_norm → y [T, D]: routed experts plus the shared one, both with the swiglu clamp."""
    cfg, name = ctx.config, f"layers.{index}.ffn"
    k, scale = cfg.num_experts_per_tok, cfg.routed_scaling_factor
    if index < cfg.num_hash_layers:
        router = gating_topk_hash(k, scale)
        last = (f"{name}.gate.tid2eid", ctx.input_ids)
    else:
        router = gating_topk(k, scale)
        last = (f"{name}.gate.bias", f"{name}.n_kept")
    ids, weights = body.call(router, x, f"{name}.gate.weight", *last, n=2)
    experts = moe_fp4(cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size, cfg.swiglu_limit)
    routed = body.call(experts, x, f"{name}.experts", ids, weights)
    return str(body.op("Add", routed, _shared(body, ctx, f"{name}.shared_experts", x)))


def _shared(body: Body, ctx: LayerContext, name: str, x: str) -> str:
    cfg = ctx.config
    inter = cfg.moe_intermediate_size * cfg.n_shared_experts
    gate = body.op("Min", fp8(body, x, f"{name}.w1", inter, cfg.hidden_size), body.f32(cfg.swiglu_limit))
    up = fp8(body, x, f"{name}.w3", inter, cfg.hidden_size)
    up = body.op("Clip", up, body.f32(-cfg.swiglu_limit), body.f32(cfg.swiglu_limit))
    act = body.op("Mul", body.op("Mul", gate, body.op("Sigmoid", gate)), up)
    return fp8(body, act, f"{name}.w2", cfg.hidden_size, inter)
