"""Shared-KV attention over the window, and over compressed entries on C and H layers (V4 spec: attention)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from appliance.model import ModelConfig
from exporter.trainable import rotary
from exporter.trainable.autograd import rms, sink_softmax
from exporter.trainable.compressor import Compressor
from exporter.trainable.indexer import Indexer, keep_best, side_loss
from exporter.trainable.linear import Weight, dense
from exporter.trainable.rounding import round_row

Turn = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """One layer's attention; its ``ratio`` says which kind: 0 window only, 4 with an indexer, larger without."""

    freqs: Tensor

    def __init__(self, config: ModelConfig, ratio: int) -> None:
        super().__init__()
        self.config, self.ratio = config, ratio
        dims, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
        latent = config.o_groups * config.o_lora_rank
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        self.wq_a, self.wq_b = dense(config.q_lora_rank, dims), dense(heads * width, config.q_lora_rank)
        self.q_norm, self.kv_norm = Weight(config.q_lora_rank, ones=True), Weight(width, ones=True)
        self.wkv = dense(width, dims)
        self.wo_a, self.wo_b = dense(latent, heads * width // config.o_groups), dense(dims, latent, 0.3)
        if ratio:
            self.compressor = Compressor(config, ratio, width)
        if ratio == config.csa_ratio:
            self.indexer = Indexer(config, ratio)
        self.register_buffer("freqs", rotary.frequencies(config, ratio > 0), persistent=False)

    def forward(self, x: Tensor, round_rows: bool, select: bool, teach: bool) -> tuple[Tensor, Tensor]:
        """x [B, T, D] → (output [B, T, D], the indexer's side loss, a scalar)."""
        config, tokens = self.config, x.shape[1]
        turn = rotary.turns(torch.arange(tokens, device=x.device), self.freqs)
        latent = rms(self.wq_a(x), config.rms_norm_eps) * self.q_norm.weight
        query = self.wq_b(latent).unflatten(-1, (config.num_attention_heads, config.head_dim))
        query = rotary.rotate(rms(query, config.rms_norm_eps), turn)
        keys = rotary.rotate(rms(self.wkv(x), config.rms_norm_eps) * self.kv_norm.weight, turn)
        keys = self._stored(keys, round_rows)
        bias, scores = self._window_bias(tokens, x.device), None
        if self.ratio and tokens >= self.ratio:
            starts = slice(0, tokens // self.ratio * self.ratio, self.ratio)
            entry_turn = (turn[0][starts], turn[1][starts])
            entries = rotary.rotate(self.compressor(x), entry_turn)
            keys = torch.cat([keys, self._stored(entries, round_rows)], 1)
            extra, scores = self._entry_bias(x, latent, turn, entry_turn, round_rows, select, teach)
            bias = torch.cat([bias.expand(extra.shape[0], -1, -1), extra], 2)
        keys, bias = F.pad(keys, (0, 0, 0, 1)), F.pad(bias, (0, 1))  # the sink: a key of zeros, a score of its own
        p = self._probabilities(query, keys, bias)
        out = (p.flatten(1, 2) @ keys).unflatten(1, (tokens, config.num_attention_heads))
        out = rotary.rotate(out, turn, inverse=True).reshape(*x.shape[:2], config.o_groups, -1)
        side = x.new_zeros(()) if scores is None or not teach else side_loss(scores, p.detach()[..., tokens:-1])
        return self.wo_b(self._grouped(out).flatten(2)), side

    def _stored(self, row: Tensor, round_rows: bool) -> Tensor:
        return round_row(row, self.config.qk_rope_head_dim) if round_rows else row

    def _window_bias(self, tokens: int, device: torch.device) -> Tensor:
        """[1, T, T]: 0 for a token of the window, −inf elsewhere."""
        at = torch.arange(tokens, device=device)
        seen = (at[None] <= at[:, None]) & (at[None] > at[:, None] - self.config.sliding_window)
        return torch.zeros(tokens, tokens, device=device).masked_fill_(~seen, float("-inf"))[None]

    def _entry_bias(
        self, x: Tensor, latent: Tensor, turn: Turn, entry_turn: Turn, round_rows: bool, select: bool, teach: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[1 or B, T, n]: 0 for an entry the query may read, else −inf; and the index scores, if they were needed."""
        tokens, entries = x.shape[1], entry_turn[0].shape[0]
        at = torch.arange(tokens, device=x.device)
        seen = torch.arange(entries, device=x.device)[None] < (at[:, None] + 1) // self.ratio
        bias = torch.zeros(tokens, entries, device=x.device).masked_fill_(~seen, float("-inf"))[None]
        selecting = select and entries > self.config.index_topk
        if self.ratio != self.config.csa_ratio or not (selecting or teach):
            return bias, None
        with torch.set_grad_enabled(teach and torch.is_grad_enabled()):
            scores = self.indexer(x.detach(), latent.detach(), turn, entry_turn, round_rows) + bias
        return (keep_best(scores.detach(), self.config.index_topk) if selecting else bias), scores

    def _probabilities(self, query: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        """query [B, T, H, d], keys [B, K, d], bias [1 or B, T, K] → [B, T, H, K]; the last key is the sink."""
        batch, tokens, heads, width = query.shape
        scores = ((query * width**-0.5).flatten(1, 2) @ keys.transpose(1, 2)).view(batch, tokens, heads, -1)
        return sink_softmax(scores, bias, self.attn_sink)

    def _grouped(self, out: Tensor) -> Tensor:
        """out [B, T, G, K] → [B, T, G, R]: group g meets rows g·R … of wo_a."""
        out, groups = self.wo_a.turned(out), self.config.o_groups
        weights = self.wo_a.weight.view(groups, self.config.o_lora_rank, -1)
        return torch.stack([F.linear(out[:, :, group], weights[group]) for group in range(groups)], 2)
