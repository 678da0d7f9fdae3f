"""Fitting a cut layer's router to the full layer's output, from small per-token matrices.

With the outputs f_1 … f_c of a token's candidate experts, a router that weighs them w has the squared error
‖Σ w_j f_j − r‖² = wᵀGw − 2 bᵀw + ‖r‖², where G = F·Fᵀ, b = F·r and r is what the full layer's routed experts gave.
So training needs no expert: x [n, D], G [n, c, c], b [n, c] and ‖r‖² [n] say everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from appliance.model import ModelConfig
from exporter import reference_math as ops

STEPS = 400
CHECK_EVERY = 10
PATIENCE = 8  # checks without a better held-out error
BATCH_TOKENS = 2048
GATE_RATE = 0.02  # of the router's root mean square
BIAS_RATE = 0.005
SOFT = 0.05  # width of the soft choice that gradients see, in scores


@dataclass(frozen=True, slots=True)
class Router:
    """A learned router of K experts: gate f32 [K, D], bias f32 [K]."""

    gate: torch.Tensor
    bias: torch.Tensor

    def stored(self) -> Router:
        """As the file holds it: gate in BF16."""
        return Router(self.gate.detach().to(torch.bfloat16).to(torch.float32), self.bias.detach().clone())


@dataclass(frozen=True, slots=True)
class Quadratics:
    """n tokens: ``x`` [n, D] the router's input, ``ids`` i64 [n, c] candidates, G, b, ‖r‖² and importance [n]."""

    x: torch.Tensor
    ids: torch.Tensor
    gram: torch.Tensor
    cross: torch.Tensor
    square: torch.Tensor
    importance: torch.Tensor

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: torch.Tensor) -> Quadratics:
        return Quadratics(*(getattr(self, name)[rows] for name in self.__slots__))

    @staticmethod
    def joined(parts: list[Quadratics]) -> Quadratics:
        return Quadratics(*(torch.cat([getattr(part, name) for part in parts]) for name in Quadratics.__slots__))


def error(router: Router, data: Quadratics, config: ModelConfig, *, soft: float = 0.0) -> torch.Tensor:
    """Importance-weighted mean of the squared error of the routed output; differentiable in gate and bias.

    ``soft`` > 0: the choice itself gets a gradient, that of a sigmoid of this width around the last chosen score.
    """
    scores = ops.route_scores(data.x, router.gate).gather(1, data.ids)
    ranked = scores + router.bias[data.ids]
    k = config.num_experts_per_tok
    values, order = torch.sort(ranked, dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(scores).scatter(1, order[:, :k], 1.0)
    if soft and scores.shape[1] > k:
        edge = (values[:, k - 1 : k] + values[:, k : k + 1]).detach() / 2
        smooth = torch.sigmoid((ranked - edge) / soft)
        chosen = chosen + smooth - smooth.detach()
    weights = chosen * scores
    weights = weights / weights.sum(-1, keepdim=True) * config.routed_scaling_factor
    quadratic = (torch.einsum("ni,nij->nj", weights, data.gram) * weights).sum(-1)
    errors = quadratic - 2 * (weights * data.cross).sum(-1) + data.square
    return (errors * data.importance).sum() / data.importance.sum()


def fit(router: Router, train: Quadratics, held: Quadratics, config: ModelConfig, *, seed: int = 0) -> Router:
    """The router of the lowest error on ``held`` that Adam found on ``train``, as stored; ``router`` if none is lower.

    Deterministic for a seed. Stops when ``held`` has not improved for 80 steps, after 400 at the latest.
    """
    best, least = router, float(error(router, held, config))
    gate, bias = (t.detach().clone().requires_grad_() for t in (router.gate, router.bias))
    gate_rate = GATE_RATE * float(router.gate.square().mean().sqrt())
    optimizer = torch.optim.Adam([{"params": [gate], "lr": gate_rate}, {"params": [bias], "lr": BIAS_RATE}])
    scale = 1 / max(float((train.square * train.importance).sum() / train.importance.sum()), 1e-30)
    draw, since = torch.Generator().manual_seed(seed), 0
    for step in range(1, STEPS + 1):
        for group, rate in zip(optimizer.param_groups, (gate_rate, BIAS_RATE), strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        rows = torch.randint(len(train), (min(BATCH_TOKENS, len(train)),), generator=draw, device="cpu")
        optimizer.zero_grad()
        loss = error(Router(gate, bias), train.take(rows.to(train.x.device)), config, soft=SOFT) * scale
        loss.backward()
        optimizer.step()
        if step % CHECK_EVERY == 0:
            candidate = Router(gate, bias).stored()
            with torch.no_grad():
                found = float(error(candidate, held, config))
            best, least, since = (candidate, found, 0) if found < least else (best, least, since + 1)
            if since == PATIENCE:
                break
    return best
