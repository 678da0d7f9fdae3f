"""One layer: mHC around attention, then around the experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from appliance.model import ModelConfig
from exporter.trainable import hyper
from exporter.trainable.attention import Attention
from exporter.trainable.autograd import rms
from exporter.trainable.experts import Experts
from exporter.trainable.linear import Weight


class Block(nn.Module):
    """pre → norm → attention → post, then the same around the experts, on S streams."""

    def __init__(self, config: ModelConfig, layer: int, experts: int) -> None:
        super().__init__()
        self.config, streams, dims = config, config.hc_mult, config.hidden_size
        width = streams * (2 + streams)
        for half in ("attn", "ffn"):
            base = torch.cat([torch.randn(2 * streams) * 0.5 - 0.5, torch.eye(streams).flatten() * 4])
            self.register_parameter(f"hc_{half}_fn", nn.Parameter(torch.randn(width, streams * dims) * 0.01))
            self.register_parameter(f"hc_{half}_base", nn.Parameter(base))
            self.register_parameter(f"hc_{half}_scale", nn.Parameter(torch.ones(3)))
        self.attn_norm, self.ffn_norm = Weight(dims, ones=True), Weight(dims, ones=True)
        self.attn = Attention(config, config.compress_ratios[layer])
        self.ffn = Experts(config, layer, experts)

    def forward(
        self, streams: Tensor, ids: Tensor, round_rows: bool, select: bool, teach: bool
    ) -> tuple[Tensor, Tensor]:
        """streams [N, S, D], ids [B, T] → (streams, the indexer's side loss)."""
        x, post, comb = self._before("attn", streams, self.attn_norm)
        y, side = self.attn(x.view(*ids.shape, -1), round_rows, select, teach)
        streams = hyper.returned(streams, y.flatten(0, 1), post, comb)
        x, post, comb = self._before("ffn", streams, self.ffn_norm)
        return hyper.returned(streams, self.ffn(x, ids.flatten()), post, comb), side

    def _before(self, half: str, streams: Tensor, norm: Weight) -> tuple[Tensor, Tensor, Tensor]:
        """The half's input [N, D], normed, and what brings its output back to the streams."""
        fn, base, scale = (self.get_parameter(f"hc_{half}_{part}") for part in ("fn", "base", "scale"))
        pre, post, comb = hyper.coefficients(streams, fn, base, scale, self.config)
        return rms(hyper.collected(pre, streams), self.config.rms_norm_eps) * norm.weight, post, comb
