"""The lightning indexer of C layers: which compressed entries a query may read (V4 spec: indexer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from appliance.model import ModelConfig
from exporter.trainable.compressor import Compressor
from exporter.trainable.linear import dense, hadamard
from exporter.trainable.rotary import rotate
from exporter.trainable.rounding import round_index_row

Turn = tuple[Tensor, Tensor]


class Indexer(nn.Module):
    """Scores compressed entries per query. It learns from a side loss only, as nothing flows back through top-k."""

    mix: Tensor

    def __init__(self, config: ModelConfig, ratio: int) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.wq_b = dense(self.heads * self.dim, config.q_lora_rank)
        self.weights_proj = dense(self.heads, config.hidden_size)
        self.compressor = Compressor(config, ratio, self.dim)
        self.register_buffer("mix", hadamard(self.dim), persistent=False)

    def forward(self, x: Tensor, latent: Tensor, turn: Turn, entry_turn: Turn, round_rows: bool) -> Tensor:
        """x [B, T, D] and latent [B, T, q_lora] (both detached) → scores [B, T, entries]."""
        query = rotate(self.wq_b(latent).unflatten(-1, (self.heads, self.dim)), turn) @ self.mix
        keys = rotate(self.compressor(x), entry_turn) @ self.mix
        if round_rows:
            query, keys = round_index_row(query), round_index_row(keys)
        weights = self.weights_proj(x) * (self.dim**-0.5 * self.heads**-0.5)
        per_head = (query.flatten(1, 2) @ keys.transpose(1, 2)).relu().unflatten(1, (x.shape[1], self.heads))
        return torch.linalg.vecdot(per_head, weights.unsqueeze(-1), dim=2)


def keep_best(scores: Tensor, count: int) -> Tensor:
    """scores [B, T, n], −inf where invisible → 0 for the best ``count`` of a row (lower index wins), else −inf."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    bias = torch.full_like(scores, float("-inf")).scatter(-1, best, 0.0)
    return torch.where(scores.isinf(), float("-inf"), bias)


def side_loss(scores: Tensor, p: Tensor) -> Tensor:
    """Cross entropy of the index scores [B, T, n] against attention mass p [B, T, H, n], where there is any."""
    target = p.sum(2)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-6)
    return -(target * scores.clamp_min(-1e4).log_softmax(-1)).sum(-1).mean()
