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
    def forward(ctx: Any, scores: Tensor, bias: Tensor, sink: Tensor) -> Tensor:
        scores.add_(bias.unsqueeze(2))[..., -1] = sink
        p = scores.softmax(-1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (p,) = ctx.saved_tensors
        back: Tensor = torch._softmax_backward_data(grad, p, -1, p.dtype)
        return back, None, back[..., -1].sum((0, 1))


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, comb: Tensor, iterations: int, eps: float) -> Tensor:
        steps = 2 * iterations - 1
        found = comb.new_empty(steps, *comb.shape)
        inverse = comb.new_empty(steps, comb.shape[0], comb.shape[2])
        for step in range(steps):
            axis = step % 2  # columns first and last, rows between
            sums = torch.sum(comb, axis, out=inverse[step]).add_(eps).reciprocal_()
            comb = torch.mul(comb, sums.unsqueeze(axis), out=found[step])
        ctx.save_for_backward(found, inverse)
        return comb.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        found, inverse = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        product, carried = torch.empty_like(grad), torch.empty_like(inverse[0])
        for step in reversed(range(len(found))):
            axis = step % 2
            torch.sum(torch.mul(grad, found[step], out=product), axis, out=carried)
            grad.sub_(carried.unsqueeze(axis)).mul_(inverse[step].unsqueeze(axis))
        return grad, None, None


def rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last axis."""
    y: Tensor = _Rms.apply(x, eps)
    return y


def mean_square(x: Tensor) -> Tensor:
    """mean(x²) over the last axis, kept: x [..., d] to [..., 1]."""
    y: Tensor = _MeanSquare.apply(x)
    return y


def sinkhorn(comb: Tensor, iterations: int, eps: float) -> Tensor:
    """comb [S (j), S (k), N] with columns (sum over j) made 1, then rows and columns in turn, columns last."""
    y: Tensor = _Sinkhorn.apply(comb, iterations, eps)
    return y


def sink_softmax(scores: Tensor, bias: Tensor, sink: Tensor) -> Tensor:
    """Softmax over keys of scores [B, T, H, K] plus bias [1 or B, T, K], whose last key is the sink [H].

    The last column of ``scores`` must come from a key of zeros; ``scores`` is overwritten.
    """
    y: Tensor = _SinkSoftmax.apply(scores, bias, sink)
    return y
