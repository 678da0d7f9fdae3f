"""The compressor of C and H layers: ``ratio`` tokens become one entry (V4 spec: compressor)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from appliance.model import ModelConfig
from exporter.trainable.autograd import rms
from exporter.trainable.linear import Weight, dense


class Compressor(nn.Module):
    """Pools ``ratio`` tokens into one entry of ``dim``; with overlap (C layers) an entry also sees the block before."""

    def __init__(self, config: ModelConfig, ratio: int, dim: int) -> None:
        super().__init__()
        self.ratio, self.dim, self.overlap = ratio, dim, ratio == config.csa_ratio
        width = dim * (2 if self.overlap else 1)
        self.ape = nn.Parameter(torch.zeros(ratio, width))
        self.wkv, self.wgate = dense(width, config.hidden_size), dense(width, config.hidden_size, 0.5)
        self.norm = Weight(dim, ones=True)
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] → entries [B, T // ratio, dim] after the norm, before the rope."""
        batch, blocks = x.shape[0], x.shape[1] // self.ratio
        x = x[:, : blocks * self.ratio]
        kv = self.wkv(x).view(batch, blocks, self.ratio, -1)
        gate = self.wgate(x).view(batch, blocks, self.ratio, -1) + self.ape
        if self.overlap:
            kv, gate = self._overlapped(kv, 0.0), self._overlapped(gate, float("-inf"))
        return rms((kv * gate.softmax(2)).sum(2), self.eps) * self.norm.weight

    def _overlapped(self, blocks: Tensor, empty: float) -> Tensor:
        """[B, n, r, 2·dim] → [B, n, 2·r, dim]: first half of the block before, then the own second half."""
        before = F.pad(blocks[:, :-1, :, : self.dim], (0, 0, 0, 0, 1, 0), value=empty)
        return torch.cat([before, blocks[..., self.dim :]], 2)
