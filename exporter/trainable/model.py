"""The whole trainable model: token ids to hidden rows and logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from appliance.model import ModelConfig
from exporter.trainable import hyper
from exporter.trainable.autograd import rms
from exporter.trainable.block import Block
from exporter.trainable.linear import Weight


class TrainableModel(nn.Module):
    """Parameters have official names, but the experts of a layer are stacks: ``layers.L.ffn.w1`` [E, I, D].

    ``experts_kept``: experts per layer (default: all), as a View has them. A new module has random weights.
    """

    def __init__(self, config: ModelConfig, experts_kept: Sequence[int] | None = None) -> None:
        super().__init__()
        self.cfg = self.config = config
        kept = experts_kept or (config.n_routed_experts,) * config.num_hidden_layers
        streams, dims = config.hc_mult, config.hidden_size
        self.embed = Weight(config.vocab_size, dims, std=0.2)
        self.layers = nn.ModuleList(Block(config, layer, kept[layer]) for layer in range(config.num_hidden_layers))
        self.hc_head_fn = nn.Parameter(torch.randn(streams, streams * dims) * 0.01)
        self.hc_head_base, self.hc_head_scale = nn.Parameter(torch.randn(streams) * 0.3), nn.Parameter(torch.ones(1))
        self.norm, self.head = Weight(dims, ones=True), Weight(config.vocab_size, dims, std=0.3 * dims**-0.5)

    def forward(
        self, ids: Tensor, round_rows: bool = True, select: bool = True, teach: bool = False
    ) -> tuple[Tensor, Tensor]:
        """ids [B, T] from position 0 → (hidden rows before the head [B·T, D], the indexers' side loss).

        ``round_rows``: cache rows and index path in kv-v4; ``select``: the indexer's top-k on; ``teach``: side loss.
        """
        streams = F.embedding(ids.flatten(), self.embed.weight).unsqueeze(1).expand(-1, self.config.hc_mult, -1)
        side = streams.new_zeros(())
        for block in self.layers:
            streams, extra = block(streams, ids, round_rows, select, teach)
            side = side + extra
        pre = hyper.head_coefficients(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.config)
        return rms(hyper.collected(pre, streams), self.config.rms_norm_eps) * self.norm.weight, side

    def logits(self, ids: Tensor, round_rows: bool = True, select: bool = True) -> Tensor:
        """ids [B, T] → f32 [B, T, V]."""
        x, _ = self(ids, round_rows, select)
        y: Tensor = self.head(x)
        return y.view(*ids.shape, -1)
