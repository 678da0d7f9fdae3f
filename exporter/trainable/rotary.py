"""Rotary positions: interleaved pairs of the last dims of a row are turned by an angle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from appliance.model import ModelConfig
from exporter import rope


def frequencies(config: ModelConfig, compressed: bool) -> Tensor:
    """f32 [rope/2] angles per token, the trained ones bit for bit."""
    return torch.from_numpy(rope.frequencies(config, compressed=compressed))


def turns(positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin f32 [n, rope/2] of the f32 product position · frequency."""
    angle = positions.to(torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def rotate(x: Tensor, turn: tuple[Tensor, Tensor], *, inverse: bool = False) -> Tensor:
    """x [B, T, …, d] with its last rope dims turned by ``turn`` ([T, rope/2] each); ``inverse`` turns back."""
    cos, sin = (part.view(part.shape[0], *([1] * (x.dim() - 3)), -1) for part in turn)
    y: Tensor = _Rotate.apply(x, cos, -sin if inverse else sin)
    return y


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Complex products where the device has them (a third of the time), real ones elsewhere."""
    return turned_complex(x, cos, sin) if x.device.type in ("cpu", "cuda") else turned_real(x, cos, sin)


def turned_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with its last pairs multiplied by cos + i·sin."""
    y = x.clone(memory_format=torch.contiguous_format)
    pairs = y[..., -2 * cos.shape[-1] :].unflatten(-1, (-1, 2))
    torch.view_as_complex(pairs).mul_(torch.complex(cos, sin))
    return y


def turned_real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in real arithmetic."""
    dims = 2 * cos.shape[-1]
    y = x.clone(memory_format=torch.contiguous_format)
    even, odd = x[..., -dims::2], x[..., 1 - dims :: 2]
    y[..., -dims::2] = torch.addcmul(even * cos, odd, sin, value=-1)
    y[..., 1 - dims :: 2] = torch.addcmul(odd * cos, even, sin)
    return y
