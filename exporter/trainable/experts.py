"""The experts' half of a layer: router (learned or by token id), routed experts as stacks, the shared expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from appliance.model import ModelConfig
from exporter.trainable.linear import Weight, dense


class Gate(Weight):
    """Router rows ``weight`` [E, D] with ``bias`` [E] (learned; selection only) or ``tid2eid`` [V, k] (by token)."""

    bias: Tensor
    tid2eid: Tensor

    def __init__(self, config: ModelConfig, hashed: bool, experts: int) -> None:
        super().__init__(experts, config.hidden_size, std=config.hidden_size**-0.5)
        if hashed:
            table = torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
            self.register_buffer("tid2eid", table)
        else:
            self.register_buffer("bias", torch.zeros(experts))


class Experts(nn.Module):
    """Routed experts ``w1``, ``w3`` [E, I, D] and ``w2`` [E, D, I], the shared expert and the router."""

    def __init__(self, config: ModelConfig, layer: int, experts: int) -> None:
        super().__init__()
        inner, dims = config.moe_intermediate_size, config.hidden_size
        self.config, self.hashed = config, layer < config.num_hash_layers
        self.gate = Gate(config, self.hashed, experts)
        self.w1, self.w3 = (nn.Parameter(torch.randn(experts, inner, dims) * dims**-0.5) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(experts, dims, inner) * 0.3 * inner**-0.5)
        self.shared_experts = nn.ModuleDict(
            {"w1": dense(inner, dims), "w3": dense(inner, dims), "w2": dense(dims, inner, 0.3)}
        )
        self.load = torch.zeros(experts)  # tokens per expert of the last forward pass

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [N, D], ids [N] → [N, D]."""
        chosen, weights = self._routed(x, ids)
        order = chosen.flatten().argsort(stable=True)
        self.load = chosen.flatten().bincount(minlength=len(self.gate.weight))
        counts: list[int] = self.load.tolist()
        token = order // self.config.num_experts_per_tok
        parts = x.index_select(0, token).split(counts)
        gate = torch.cat([F.linear(p, w) for p, w in zip(parts, self.w1, strict=True)])
        up = torch.cat([F.linear(p, w) for p, w in zip(parts, self.w3, strict=True)])
        inner = self._act(gate, up) * weights.flatten().index_select(0, order).unsqueeze(1)
        y = torch.cat([F.linear(p, w) for p, w in zip(inner.split(counts), self.w2, strict=True)])
        shared = self.shared_experts
        total: Tensor = shared["w2"](self._act(shared["w1"](x), shared["w3"](x)))
        return total.index_add(0, token, y)

    def _routed(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and their weights, [N, k] each. The choice has no gradient, the weights have."""
        scores = F.softplus(self.gate(x)).sqrt()
        count = self.config.num_experts_per_tok
        chosen = self.gate.tid2eid[ids] if self.hashed else (scores + self.gate.bias).topk(count, -1).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * self.config.routed_scaling_factor

    def _act(self, gate: Tensor, up: Tensor) -> Tensor:
        limit = self.config.swiglu_limit
        return F.silu(gate.clamp_max(limit)) * up.clamp(-limit, limit)
