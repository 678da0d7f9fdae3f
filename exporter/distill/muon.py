"""Optimizers: Muon for matrices, one by one or stacked, AdamW for everything else; state as named tensors.

Muon: momentum, then the nearest orthogonal matrix by five Newton–Schulz steps (K. Jordan's coefficients), scaled by
0.2 · sqrt(largest side) so that an update's root mean square is 0.2 · lr for a matrix of any shape ("Muon is scalable
for LLM training", arXiv 2502.16982). Stacks [E, n, m] are one batch of matrices, which torch.optim.Muon refuses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5
MOMENTUM, WEIGHT_DECAY = 0.95, 0.0
BETAS, EPSILON = (0.9, 0.97), 1e-10
ADAM_SHARE = 0.5  # of Muon's lr


def orthogonalized(x: Tensor) -> Tensor:
    """x [..., n, m] with its singular values brought near 1 (between about 0.7 and 1.2), batched."""
    a, b, c = NEWTON_SCHULZ
    flip = x.shape[-2] > x.shape[-1]
    y = x.mT if flip else x
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if flip else y


class Muon:
    """Momentum of matrices [n, m] and stacks [E, n, m], by name."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def step(self, name: str, p: Tensor, grad: Tensor, lr: float) -> None:
        """One update of ``p`` in place: Nesterov momentum, orthogonalized, RMS 0.2 · lr. Call without grad."""
        momentum = self.momentum[name].lerp_(grad, 1 - MOMENTUM)
        update = orthogonalized(grad.lerp(momentum, MOMENTUM))
        p.mul_(1 - lr * WEIGHT_DECAY).sub_(update, alpha=lr * 0.2 * math.sqrt(max(update.shape[-2:])))


class Adam:
    """AdamW without decay for vectors, embeddings, routers and mHC, by name; every step updates every one."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.square = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def step(self, name: str, p: Tensor, grad: Tensor, lr: float, count: int) -> None:
        """Update number ``count`` (from 1) of ``p`` in place. Call without grad."""
        mean = self.mean[name].lerp_(grad, 1 - BETAS[0])
        square = self.square[name].lerp_(grad.square(), 1 - BETAS[1])
        scale = math.sqrt(1 - BETAS[1] ** count)
        p.addcdiv_(mean, square.sqrt().div_(scale).add_(EPSILON), value=-lr / (1 - BETAS[0] ** count))
