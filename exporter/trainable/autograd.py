"""Formulas with their gradients written out: fewer passes over memory than what autograd would record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Rms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(inverse), None


class _MeanSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (grad * (2 / x.shape[-1]))


class _SinkSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, sink: Tensor) -> Tensor:
        top = scores.amax(-1, keepdim=True)
        p = (scores - top).exp_()
        rest = (sink.view(-1, 1) - top).exp_()
        total = p.sum(-1, keepdim=True).add_(rest)
        p.div_(total)
        ctx.save_for_backward(p, rest.div_(total))
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        p, sink_share = ctx.saved_tensors
        carried = torch.linalg.vecdot(p, grad).unsqueeze(-1)
        return (grad - carried).mul_(p), -(sink_share * carried).sum((0, 1, 3))


def rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last axis."""
    y: Tensor = _Rms.apply(x, eps)
    return y


def mean_square(x: Tensor) -> Tensor:
    """mean(x²) over the last axis, kept: x [..., d] to [..., 1]."""
    y: Tensor = _MeanSquare.apply(x)
    return y


def sink_softmax(scores: Tensor, sink: Tensor) -> Tensor:
    """Softmax over keys of scores [B, T, H, K] with one more term exp(sink [H]) in the denominator."""
    y: Tensor = _SinkSoftmax.apply(scores, sink)
    return y
