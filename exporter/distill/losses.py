"""What a student is compared by: forward KL against the teacher's cached distribution.

Of each token the cache holds the k most likely next tokens with probabilities p_i, and d tokens drawn from the rest,
whose mass p_tail = 1 − Σ p_i they share: a drawn token's is p̂_i ∝ max(p_i, τ) (cache.py). With the student's
probabilities q over the whole vocabulary

    KL ≈ Σ_{most likely} p_i · (log p_i − log q_i) + Σ_{drawn} p̂_i · (log p_i − log q_i)        [nats per token]

which is the full KL divergence on average over the draws (but for the scaling of Σ p̂ to p_tail, which takes most of
the noise away), and exactly that where the draw took all the rest. Of a single token it may be negative. Its gradient
for the student's logit z_j is q_j − p_j for the most likely, q_j − p̂_j for the drawn and q_j for all others: that of
the full divergence on average. The draw is the cache's, the same in every epoch: the average is over tokens. KL falls
only by moving towards the teacher, unlike perplexity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exporter.distill.cache import TOP

_TINY = 1e-30
_LEAST = -65_504.0  # of what half precision holds: a token of no mass has no −inf


class _CachedKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, logp: Tensor, weights: Tensor) -> Tensor:
        scores = logits.sub_(logits.amax(-1, keepdim=True))
        chosen = scores.gather(-1, ids)
        e = scores.exp_()
        total = e.sum(-1, keepdim=True)
        loss = (weights * (logp - chosen + total.log())).sum(-1)
        e.div_(total).scatter_add_(-1, ids, -weights)
        ctx.save_for_backward(e)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return back.mul_(grad.unsqueeze(-1)), None, None, None


def cached_kl(logits: Tensor, ids: Tensor, logp: Tensor, tail: Tensor, threshold: Tensor) -> Tensor:
    """KL per token f32 [N] of logits f32 [N, V] against a cache's rows: ids i64 and logp f16 or f32 [N, k + d], tail
    and threshold f32 [N]; k = min(TOP, V).

    Overwrites ``logits`` and its saved gradient: the table of logits is the largest tensor of a step, so there is one.
    Runs backward once.
    """
    told = logp.float().clamp_min(_LEAST)
    weights = token_weights(told, tail.float(), threshold.float())
    loss: Tensor = _CachedKl.apply(logits, ids, told, weights)
    return loss


def token_weights(logp: Tensor, tail: Tensor, threshold: Tensor) -> Tensor:
    """p_i and p̂_i [N, k + d], f32, summing to 1: half-precision logs are scaled to what they must sum to."""
    rest = tail.clamp(0.0, 1.0).unsqueeze(-1)
    p = logp.exp()
    best, drawn = p[:, :TOP], p[:, TOP:].maximum(threshold.unsqueeze(-1))
    if drawn.shape[-1] == 0:
        rest = torch.zeros_like(rest)
    best = best * ((1 - rest) / best.sum(-1, keepdim=True).clamp_min(_TINY))
    return torch.cat([best, drawn * (rest / drawn.sum(-1, keepdim=True).clamp_min(_TINY))], -1)


def full_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL per token [N] over the whole vocabulary, both f32 [N, V]: what is reported, where both are at hand."""
    teacher, student = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)
