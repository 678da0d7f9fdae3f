"""Manifold-constrained hyper-connections: S streams around each half of a layer (V4 spec: mHC pre and post)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from appliance.model import ModelConfig
from exporter.trainable.autograd import mean_square, sinkhorn


def coefficients(
    streams: Tensor, fn: nn.Parameter, base: nn.Parameter, scale: nn.Parameter, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """streams [N, S, D] → pre [S, N], post [S, N], comb [S (j), S (k), N] after the Sinkhorn rounds, columns last."""
    s, eps = config.hc_mult, config.hc_eps
    mixes = _mixes(streams.flatten(1), fn, config).t().contiguous()
    pre = torch.sigmoid(mixes[:s] * scale[0] + base[:s, None]) + eps
    post = 2 * torch.sigmoid(mixes[s : 2 * s] * scale[1] + base[s : 2 * s, None])
    comb = (mixes[2 * s :] * scale[2] + base[2 * s :, None]).view(s, s, -1).softmax(1) + eps
    return pre, post, sinkhorn(comb, config.hc_sinkhorn_iters, eps)


def head_coefficients(
    streams: Tensor, fn: nn.Parameter, base: nn.Parameter, scale: nn.Parameter, config: ModelConfig
) -> Tensor:
    """streams [N, S, D] → pre [S, N] of the final head: no Sinkhorn."""
    mixes = _mixes(streams.flatten(1), fn, config)
    return (torch.sigmoid(mixes * scale + base) + config.hc_eps).t()


def collected(pre: Tensor, streams: Tensor) -> Tensor:
    """Σ_j pre_j · h_j: pre [S, N], streams [N, S, D] → [N, D]."""
    return torch.bmm(pre.t().unsqueeze(1), streams).squeeze(1)


def returned(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """h'_k = post_k·y + Σ_j comb[j, k]·h_j: streams [N, S, D], y [N, D] → [N, S, D]."""
    return torch.baddbmm(post.t().unsqueeze(2) * y.unsqueeze(1), comb.permute(2, 1, 0), streams)


def _mixes(flat: Tensor, fn: nn.Parameter, config: ModelConfig) -> Tensor:
    return F.linear(flat, fn) * torch.rsqrt(mean_square(flat) + config.rms_norm_eps)
