"""A matrix or vector under its official name, and the block Hadamard rotation a linear's input may need."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Weight(nn.Module):
    """One parameter under the official name ``X.weight``. ``rotation``: Hadamard block of its inputs, 0 for none."""

    mix: Tensor

    def __init__(self, *shape: int, std: float = 0.0, ones: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape) if ones else torch.randn(*shape) * std)
        self.rotation = 0

    def rotate_inputs(self, block: int) -> None:
        """From now on the weight is stored rotated: y = (x·H)·Wᵀ with H of ``block`` × ``block`` on the diagonal."""
        self.rotation = block
        self.register_buffer("mix", hadamard(block).to(self.weight.device), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        """x [..., K] as the stored weight expects it."""
        return (x.unflatten(-1, (-1, self.rotation)) @ self.mix).flatten(-2) if self.rotation else x

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""
        return F.linear(self.turned(x), self.weight)


def dense(rows: int, columns: int, gain: float = 1.0) -> Weight:
    """A linear [rows, columns] with random values of standard deviation gain · columns^-0.5."""
    return Weight(rows, columns, std=gain * columns**-0.5)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix [size, size] times size^-0.5; ``size`` is a power of two."""
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h * size**-0.5
