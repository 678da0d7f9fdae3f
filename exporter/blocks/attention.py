"""One attention layer of kind S, C or H: projections, cache rows, compressor, indexer, attention, output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.blocks.linear import grouped_linear, linear
from exporter.ops import codec
from exporter.ops.attention import sparse_attention
from exporter.ops.body import FLOAT, Body, OpFunction
from exporter.ops.compressor import compressor
from exporter.ops.indexer import lightning_indexer
from exporter.ops.linear import bf16_matmul
from exporter.ops.rope import rope

if TYPE_CHECKING:
    from exporter.blocks.layer import LayerContext


def _split_rows(body: Body, ctx: LayerContext, x: str, *dims: int) -> str:
    """x [b·m, …] → [b, m, dims…]."""
    return str(body.op("Reshape", x, body.op("Concat", ctx.b_m, body.ints(*dims), axis=0)))


def _row_codecs(ctx: LayerContext) -> tuple[OpFunction | None, OpFunction | None]:
    if ctx.numerics == "kv-f32":
        return None, None
    cfg = ctx.config
    nope = cfg.head_dim - cfg.qk_rope_head_dim
    return codec.kv_pack(nope, cfg.qk_rope_head_dim), codec.kv_unpack(nope, cfg.qk_rope_head_dim)


def _index_codecs(ctx: LayerContext) -> tuple[OpFunction | None, OpFunction | None]:
    if ctx.numerics == "kv-f32":
        return None, None
    dim = ctx.config.index_head_dim
    return codec.index_key_pack(dim), codec.index_key_unpack(dim)


def attention(body: Body, ctx: LayerContext, index: int, x: str) -> tuple[str, dict[str, str]]:
    """x f32 [T, D] after attn_norm → (y [T, D], fresh rows by state name)."""
    cfg, at, kind = ctx.config, f"layers.{index}.attn", ctx.config.layer_kind(index)
    d, rope_dim, eps = cfg.head_dim, cfg.qk_rope_head_dim, cfg.rms_norm_eps
    cos, sin = (ctx.rope[f"{f}_{'main' if kind == 'S' else 'comp'}"] for f in ("cos", "sin"))
    pack, unpack = _row_codecs(ctx)

    q_norm, kv_norm = (body.cast(f"{at}.{norm}.weight", FLOAT) for norm in ("q_norm", "kv_norm"))
    latent = body.rms_norm(linear(body, ctx.view, x, f"{at}.wq_a", cfg.q_lora_rank, cfg.hidden_size), q_norm, eps)
    q = linear(body, ctx.view, latent, f"{at}.wq_b", cfg.num_attention_heads * d, cfg.q_lora_rank)
    q = body.call(rope(d, rope_dim, norm_eps=eps), body.reshape(q, -1, cfg.num_attention_heads, d), cos, sin)
    kv = body.rms_norm(linear(body, ctx.view, x, f"{at}.wkv", d, cfg.hidden_size), kv_norm, eps)
    kv = body.reshape(body.call(rope(d, rope_dim), body.reshape(kv, -1, 1, d), cos, sin), -1, d)
    rows = _split_rows(body, ctx, kv if pack is None else body.call(pack, kv), ctx.row)
    fresh = {f"layers.{index}.win": rows}

    inputs = [_split_rows(body, ctx, q, cfg.num_attention_heads, d), f"layers.{index}.win", "slots", rows]
    if kind != "S":
        candidates = _compress(body, ctx, index, x, fresh)
        inputs += [f"layers.{index}.ent", "block_table", candidates]
        if kind == "C":
            inputs.append(_select(body, ctx, index, x, latent, fresh))
    ratio = cfg.compress_ratios[index]
    attend = sparse_attention(
        kind=kind, heads=cfg.num_attention_heads, dim=d, window=cfg.sliding_window, row=ctx.row,
        ratio=max(ratio, 1), rows=256 // max(ratio, 1), codec=unpack,
    )  # fmt: skip
    o = body.call(attend, *inputs, f"{at}.attn_sink", "pos")
    o = body.reshape(o, -1, cfg.num_attention_heads, d)
    o = body.call(rope(d, rope_dim, inverse=True), o, cos, sin)
    per_group = cfg.num_attention_heads * d // cfg.o_groups
    o = body.reshape(o, -1, cfg.o_groups, per_group)
    o = grouped_linear(body, ctx.view, o, f"{at}.wo_a", cfg.o_groups, cfg.o_lora_rank, per_group)
    return linear(body, ctx.view, o, f"{at}.wo_b", cfg.hidden_size, cfg.o_groups * cfg.o_lora_rank), fresh


def _compressed(
    body: Body, ctx: LayerContext, name: str, x: str, ring: str, *, ratio: int, overlap: bool, dim: int,
    pack: OpFunction | None, row: int,
) -> tuple[str, str]:  # fmt: skip
    """The compressor called ``name`` on x [T, D] → (candidates [b, c, row], ring rows [b, m, 2w])."""
    width = (2 if overlap else 1) * dim
    kv, gate = (
        _split_rows(body, ctx, bf16_matmul(body, x, f"{name}.{part}.weight"), width) for part in ("wkv", "wgate")
    )
    function = compressor(
        ratio=ratio, overlap=overlap, dim=dim, rope_dim=ctx.config.qk_rope_head_dim, eps=ctx.config.rms_norm_eps,
        pack=pack, row=row,
    )  # fmt: skip
    norm = body.cast(f"{name}.norm.weight", FLOAT)
    inputs = (kv, gate, f"{name}.ape", norm, ring, "slots", "pos", f"cos_c{ratio}", f"sin_c{ratio}")
    candidates, rows = body.call(function, *inputs, n=2)
    return candidates, rows


def _compress(body: Body, ctx: LayerContext, index: int, x: str, fresh: dict[str, str]) -> str:
    cfg, state = ctx.config, f"layers.{index}"
    candidates, rows = _compressed(
        body, ctx, f"{state}.attn.compressor", x, f"{state}.ring", ratio=cfg.compress_ratios[index],
        overlap=cfg.layer_kind(index) == "C", dim=cfg.head_dim, pack=_row_codecs(ctx)[0], row=ctx.row,
    )  # fmt: skip
    fresh[f"{state}.ring"], fresh[f"{state}.ent"] = rows, candidates
    return candidates


def _select(body: Body, ctx: LayerContext, index: int, x: str, latent: str, fresh: dict[str, str]) -> str:
    """The indexer of a CSA layer → sel i32 [b, m, K]."""
    cfg, state, name = ctx.config, f"layers.{index}", f"layers.{index}.attn.indexer"
    heads, dim, ratio = cfg.index_n_heads, cfg.index_head_dim, cfg.compress_ratios[index]
    pack, unpack = _index_codecs(ctx)
    q = linear(body, ctx.view, latent, f"{name}.wq_b", heads * dim, cfg.q_lora_rank)
    turn = rope(dim, cfg.qk_rope_head_dim)
    q = body.call(turn, body.reshape(q, -1, heads, dim), ctx.rope["cos_comp"], ctx.rope["sin_comp"])
    weights = bf16_matmul(body, x, f"{name}.weights_proj.weight")
    weights = body.op("Mul", weights, body.f32(dim**-0.5 * heads**-0.5))
    candidates, rows = _compressed(
        body, ctx, f"{name}.compressor", x, f"{state}.iring", ratio=ratio, overlap=True, dim=dim, pack=pack,
        row=ctx.index_row,
    )  # fmt: skip
    fresh[f"{state}.iring"], fresh[f"{state}.ient"] = rows, candidates
    function = lightning_indexer(
        heads=heads, dim=dim, topk=cfg.index_topk, ratio=ratio, rows=256 // ratio, row=ctx.index_row, pack=pack,
        codec=unpack,
    )  # fmt: skip
    q, weights = _split_rows(body, ctx, q, heads, dim), _split_rows(body, ctx, weights, heads)
    return str(body.call(function, q, weights, f"{state}.ient", "block_table", candidates, "pos"))
