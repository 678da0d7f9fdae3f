"""The names one layer's weights and caches go by in the graph, and the block that holds attention and experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from appliance.model import ModelConfig, attention_row_width, index_row_width
from exporter.blocks.attention import attention
from exporter.blocks.moe import feed_forward
from exporter.ops import hyper
from exporter.ops.body import Body
from exporter.view import View


@dataclass(frozen=True)
class LayerContext:
    """What every block needs besides its own weights. Value names of graph inputs; T = b·m."""

    view: View
    numerics: str
    input_ids: str  # i64 [T]
    b_m: str  # i64 [2] = (b, m)
    rope: Mapping[str, str]  # cos_main, sin_main, cos_comp, sin_comp: f32 [T, rope/2]

    @property
    def config(self) -> ModelConfig:
        return self.view.config

    @property
    def row(self) -> int:
        return attention_row_width(self.config, self.numerics)

    @property
    def index_row(self) -> int:
        return index_row_width(self.config, self.numerics)


def layer(body: Body, ctx: LayerContext, index: int, h: str) -> tuple[str, dict[str, str]]:
    """h [T, n, D] → (h', fresh rows by state name): HcPre, attention, HcPost, HcPre, experts, HcPost."""
    cfg, name = ctx.config, f"layers.{index}"
    pre = hyper.hc_pre(cfg.hc_mult, cfg.hidden_size, cfg.hc_sinkhorn_iters, cfg.hc_eps, cfg.rms_norm_eps)
    post = hyper.hc_post(cfg.hc_mult, cfg.hidden_size)

    def around(part: str, inner: str, h: str) -> tuple[str, str, str]:
        hc = (f"{name}.hc_{part}_fn", f"{name}.hc_{part}_base", f"{name}.hc_{part}_scale")
        x, post_mix, comb = body.call(pre, h, *hc, n=3)
        return body.rms_norm(x, _norm(body, f"{name}.{inner}.weight"), cfg.rms_norm_eps), post_mix, comb

    x, post_mix, comb = around("attn", "attn_norm", h)
    y, fresh = attention(body, ctx, index, x)
    h = body.call(post, y, h, post_mix, comb)
    x, post_mix, comb = around("ffn", "ffn_norm", h)
    y = feed_forward(body, ctx, index, x)
    return body.call(post, y, h, post_mix, comb), fresh


def _norm(body: Body, weight: str) -> str:
    """Norm weights are BF16 in the file and used in fp32."""
    return body.cast(weight, 1)
