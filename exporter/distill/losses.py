"""What a student is compared by: forward KL against the teacher's cached distribution.

The cache keeps, for each token, the k most likely next tokens with probabilities p_1 … p_k and the rest as one number,
p_tail = 1 − Σ p_i: k + 1 buckets. With the student's probabilities q of the same tokens and q_tail = 1 − Σ q_i,

    KL = Σ_i p_i · (log p_i − log q_i) + p_tail · (log p_tail − log q_tail)        [nats per token]

It is the KL divergence of the coarser distribution, so never more than the full one, and equal to it when all but k
tokens have no mass or the tail has the same shape. It falls only by moving towards the teacher, unlike perplexity.
Its gradient for the student's logit z_j is q_j − p_j inside the k, and q_j · (1 − p_tail / q_tail) in the tail.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TINY = 1e-30


class _BucketKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, logp: Tensor, tail: Tensor) -> Tensor:
        p, p_tail = bucket_probabilities(logp, tail)
        scores = logits.sub_(logits.amax(-1, keepdim=True))
        top = scores.gather(-1, ids)
        e = scores.exp_()
        top_e = e.gather(-1, ids)
        e.scatter_(-1, ids, 0.0)
        tail_e = e.sum(-1, keepdim=True).clamp_min_(_TINY)
        total = tail_e + top_e.sum(-1, keepdim=True)
        q_tail = tail_e / total
        loss = _entropic(p, p.log() - top + total.log()) + _entropic(p_tail, p_tail.log() - q_tail.log())
        e.mul_((1 - p_tail / q_tail) / total).scatter_(-1, ids, top_e / total - p)
        ctx.save_for_backward(e)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return back.mul_(grad.unsqueeze(-1)), None, None, None


def bucket_kl(logits: Tensor, ids: Tensor, logp: Tensor, tail: Tensor) -> Tensor:
    """KL per token f32 [N] of logits f32 [N, V] against ids i64 [N, k], logp f16 or f32 [N, k] and tail f32 [N].

    Overwrites ``logits`` and its saved gradient: the table of logits is the largest tensor of a step, so there is one.
    Runs backward once.
    """
    loss: Tensor = _BucketKl.apply(logits, ids, logp, tail)
    return loss


def bucket_probabilities(logp: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """p [N, k] and p_tail [N, 1], f32, summing to 1: half-precision logs are scaled to what the tail leaves."""
    rest = tail.float().clamp(0.0, 1.0).unsqueeze(-1)
    p = logp.float().exp()
    return p * ((1 - rest) / p.sum(-1, keepdim=True).clamp_min(_TINY)), rest


def full_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL per token [N] over the whole vocabulary, both f32 [N, V]: what is reported, where both are at hand."""
    teacher, student = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def _entropic(p: Tensor, log_ratio: Tensor) -> Tensor:
    """Σ p · log_ratio [N], with 0 · anything = 0."""
    return torch.where(p > 0, p * log_ratio, torch.zeros_like(p)).sum(-1)
