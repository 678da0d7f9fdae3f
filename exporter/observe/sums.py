"""What one layer adds up while calibration tokens pass, and the tensors it is stored as."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from appliance.model import ModelConfig

Tensor = tuple[str, str, NDArray[np.generic]]


@dataclass
class Moments:
    """Σ x² of a linear's inputs and, if asked, Σ x·xᵀ in diagonal blocks; grouped inputs [n, G, K] per group."""

    count: int = 0
    squares: NDArray[np.float64] | None = None  # [K] or [G, K]
    products: NDArray[np.float32] | None = None  # [blocks, n, n] or [G·blocks, n, n]

    def add(self, x: torch.Tensor, block: int) -> None:
        """x [n, K] or [n, G, K]; ``block`` columns per product block, 0 for none."""
        self.count += len(x)
        squares = x.square().sum(0).cpu().numpy().astype(np.float64)
        self.squares = squares if self.squares is None else self.squares + squares
        if block:
            columns = x.reshape(len(x), -1, block)
            products = torch.einsum("nbi,nbj->bij", columns, columns).cpu().numpy()
            if self.products is None:
                self.products = products
            else:
                self.products += products


@dataclass
class LayerSums:
    """All sums of one layer. Rows are domains (D), columns official expert ids (E)."""

    config: ModelConfig
    domains: int
    hessian: int  # largest Hessian block, 0 for none
    linears: dict[str, Moments] = field(default_factory=dict)
    experts_in: dict[int, Moments] = field(default_factory=dict)  # inputs of w1 and w3
    experts_mid: dict[int, Moments] = field(default_factory=dict)  # inputs of w2

    def __post_init__(self) -> None:
        shape = (self.domains, self.config.n_routed_experts)
        self.reap, self.gate, self.norm = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.count = np.zeros(shape, np.int64)
        self.together = np.zeros((shape[1], shape[1]), np.int64)
        self.peak = np.zeros(shape[1], np.float32)

    def linear(self, name: str, x: torch.Tensor) -> None:
        """Inputs x [n, K] (wo_a: [n, G, K]) of a dense linear."""
        block = hessian_block(x.shape[-1], self.hessian) if self.hessian else 0
        self.linears.setdefault(name, Moments()).add(x, block)

    def expert(self, expert: int, domains: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Weighted outputs [n, D] of one expert, its routing weights [n] and its tokens' domains i64 [n]."""
        saliency = torch.linalg.vector_norm(out, dim=-1)
        plain = saliency / weight
        for sums, values in ((self.reap, saliency), (self.gate, weight), (self.norm, plain)):
            added = np.zeros(self.domains)
            np.add.at(added, domains.numpy(), values.cpu().numpy().astype(np.float64))
            sums[:, expert] += added
        self.count[:, expert] += np.bincount(domains.numpy(), minlength=self.domains)
        peak = float((out.abs().amax(-1) / weight).max())
        self.peak[expert] = max(float(self.peak[expert]), peak)

    def routed(self, experts: torch.Tensor) -> None:
        """Ids i64 [n, k] of the experts each token went to."""
        chosen = torch.zeros(len(experts), self.config.n_routed_experts, device=experts.device)
        chosen.scatter_(1, experts, 1.0)
        self.together += (chosen.T @ chosen).cpu().numpy().astype(np.int64)

    def tensors(self) -> list[Tensor]:
        """(name, dtype, array) as they are stored."""
        found: list[Tensor] = [
            ("reap_sum", "F32", self.reap.astype(np.float32)), ("gate_sum", "F32", self.gate.astype(np.float32)),
            ("norm_sum", "F32", self.norm.astype(np.float32)), ("count", "I64", self.count),
            ("cooccurrence", "I64", self.together), ("output_peak", "F32", self.peak),
        ]  # fmt: skip
        for name in sorted(self.linears):
            moments = self.linears[name]
            found.append((f"x2.{name}", "F32", _mean(moments)))
            if moments.products is not None:
                found.append((f"hessian.{name}", "F32", moments.products / np.float32(moments.count)))
        dims, inner = self.config.hidden_size, self.config.moe_intermediate_size
        found.append(("x2.ffn.experts.w13", "F32", self._per_expert(self.experts_in, dims)))
        found.append(("x2.ffn.experts.w2", "F32", self._per_expert(self.experts_mid, inner)))
        return found

    def _per_expert(self, moments: dict[int, Moments], width: int) -> NDArray[np.float32]:
        """[E, width]; zeros for an expert no token went to."""
        rows = np.zeros((self.config.n_routed_experts, width), np.float32)
        for expert, found in moments.items():
            rows[expert] = _mean(found)
        return rows


def hessian_block(width: int, most: int) -> int:
    """The widest block of at most ``most`` columns that divides ``width``."""
    return next(size for size in range(min(width, most), 0, -1) if width % size == 0)


def _mean(moments: Moments) -> NDArray[np.float32]:
    if moments.squares is None:
        return np.zeros(0, np.float32)
    mean: NDArray[np.float32] = (moments.squares / moments.count).astype(np.float32)
    return mean
