"""V4-Flash's formulas in fp32 torch, one function each (V4 spec: maths, block by block). n is tokens, D hidden size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

Cast = Callable[[torch.Tensor], torch.Tensor]  # identity, or the round to BF16 of the official code


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x · rsqrt(mean(x²) + eps) over the last axis, times ``weight`` if there is one."""
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return scaled if weight is None else scaled * weight


def head_norm(query: torch.Tensor, eps: float, cast: Cast) -> torch.Tensor:
    """query [n, H, d] · rsqrt(mean(q²) + eps) per head; ``cast`` after each step, as the official code runs it."""
    mean = cast(cast(query.square()).mean(-1, keepdim=True))
    return cast(query * cast(torch.rsqrt(cast(mean + eps))))


def rope_tables(frequency: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin f32 [n, rope/2] of the f32 product t·f; amplitude 1 (no YaRN mscale)."""
    angles = positions.to(torch.float32)[:, None] * frequency
    return torch.cos(angles), torch.sin(angles)


def rope(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], *, inverse: bool = False) -> torch.Tensor:
    """Rotate the last 2·(rope/2) dims of x [n, …, d] in interleaved pairs; ``inverse`` is the conjugate."""
    cos, sin = table
    dims = 2 * cos.shape[-1]
    middle = (1,) * (x.dim() - 2)
    cos, sin = (t.reshape(t.shape[0], *middle, t.shape[1]) for t in (cos, -sin if inverse else sin))
    even, odd = x[..., -dims::2], x[..., 1 - dims :: 2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-dims], turned), dim=-1)


def unrope(out: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Inverse RoPE of the attention output [n, heads, head_dim] at the query's position."""
    return rope(out, table, inverse=True)


def hc_mixes(streams: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    """streams [n, S, D] to the raw mHC coefficients [n, rows of fn]."""
    flat = streams.flatten(1)
    return (flat @ fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def hc_split(
    mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, streams: int, iterations: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mixes [n, S·(S+2)] to pre [n, S], post [n, S] and the Sinkhorn-normalised comb [n, S, S] (rows j, columns k)."""
    pre = torch.sigmoid(mixes[:, :streams] * scale[0] + base[:streams]) + eps
    post = 2 * torch.sigmoid(mixes[:, streams : 2 * streams] * scale[1] + base[streams : 2 * streams])
    comb = (mixes[:, 2 * streams :] * scale[2] + base[2 * streams :]).unflatten(-1, (streams, streams))
    return pre, post, sinkhorn(comb, iterations, eps)


def sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """Softmax over rows, then columns and rows in turn; ends on columns."""
    comb = torch.softmax(logits, dim=-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def hc_head(mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, eps: float) -> torch.Tensor:
    """Stream weights [n, S] of the final head: no Sinkhorn."""
    return torch.sigmoid(mixes * scale + base) + eps


def hc_collect(streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """Σ_j pre_j · h_j: streams [n, S, D] to x [n, D]."""
    return (streams * pre[..., None]).sum(1)


def hc_post(y: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """h'_k = post_k · y + Σ_j comb[j, k] · h_j: the transpose of comb."""
    return post[..., None] * y[:, None] + comb.transpose(-1, -2) @ streams


def attend(
    query: torch.Tensor, keys: torch.Tensor, allowed: torch.Tensor, sink: torch.Tensor,
    cast: Cast,
) -> torch.Tensor:  # fmt: skip
    """query [n, H, d], shared keys = values [K, d], allowed bool [n, K], sink [H] to [n, H, d].

    Softmax of q·k·d^-0.5 over the allowed keys, with exp(sink) added to the denominator. ``cast`` is applied to
    exp(score − max) before it meets the values (the official kernel multiplies in BF16, and sums in fp32 uncast).
    """
    scores = torch.einsum("nhd,kd->nhk", query, keys) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True) + torch.exp(sink[None, :, None] - largest)
    return torch.einsum("nhk,kd->nhd", cast(weights) / total, keys)


def index_scores(query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_h w_h · ReLU(q_h · k_s): query [n, H, d], keys [E, d], weights [n, H] to [n, E]."""
    return (torch.relu(torch.einsum("nhd,ed->nhe", query, keys)) * weights[..., None]).sum(1)


def top_k(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` highest scores [n, E], highest first; of equal scores the lower index. Values and ids [n, k]."""
    values, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[:, :count], ids[:, :count]


def pool(kv: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Per-channel softmax over the slots: kv and gate [blocks, slots, d] to entries [blocks, d]."""
    return (torch.softmax(gate, dim=1) * kv).sum(1)


def route_scores(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """sqrt(softplus(x · gateᵀ)) [n, experts]."""
    return functional.softplus(x @ gate.T).sqrt()


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """silu(min(gate, limit)) · clamp(up, ±limit); the clamps come before the SiLU."""
    return functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def shared_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """The shared expert clamps like the routed ones (the first release's code forgot to)."""
    return swiglu(gate, up, limit)
