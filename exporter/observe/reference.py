"""A layer reference that watches: inputs of every linear, and what each routed expert adds to the stream."""

from __future__ import annotations

from collections.abc import Callable

import torch

from exporter.layer_reference import LayerReference
from exporter.observe.sums import LayerSums, Moments
from exporter.reference_state import Trace
from exporter.view import View

_SAME_INPUT = ("attn.wkv", "attn.indexer.wq_b", "ffn.shared_experts.w3")  # of wq_a, wq_b, w1: counted once


class ObservingReference(LayerReference):
    """Adds to ``sums`` (one layer's, replaced by :meth:`watch`). ``domain_of`` i64 [sequences] numbers domains."""

    def __init__(
        self, view: View, domain_of: torch.Tensor, domains: int, *, hessian: int = 0, device: str = "cpu",
        act_sim: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(view, act_sim=act_sim, kv_sim=True, device=device)
        self._domain_of, self._domains, self._hessian = domain_of, domains, hessian
        self._batch_domains = torch.zeros(0, dtype=torch.int64)
        self._routing = Trace()
        self.watch()

    def watch(self) -> None:
        """Start the sums of the next layer."""
        self.sums = LayerSums(self.config, self._domains, self._hessian)

    def begin_batch(self, sequence_of: torch.Tensor) -> None:
        self._batch_domains = self._domain_of[sequence_of]

    def _moe(self, name: str, layer: int, x: torch.Tensor, ids: torch.Tensor, trace: Trace | None) -> torch.Tensor:
        self._routing = trace or Trace()
        out = super()._moe(name, layer, x, ids, self._routing)
        self.sums.routed(self._routing.routed[layer][-1])
        return out

    def _expert(
        self, name: str, x: torch.Tensor, weight: torch.Tensor,
        activation: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
    ) -> torch.Tensor:
        out = super()._expert(name, x, weight, activation)
        _, layer, _, kind, *rest = name.split(".")
        if kind == "experts":
            expert = int(rest[0])
            tokens = torch.nonzero(self._routing.routed[int(layer)][-1] == expert)[:, 0].cpu()
            self.sums.expert(expert, self._batch_domains[tokens], weight, out)
        return out

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self._seen(name, x)
        return super()._linear(name, x)

    def _grouped_linear(self, name: str, groups: torch.Tensor) -> torch.Tensor:
        self._seen(name, groups)
        return super()._grouped_linear(name, groups)

    def _seen(self, name: str, x: torch.Tensor) -> None:
        """Inputs of ``layers.L.<linear>``: before rounding and before any rotation."""
        linear = name.split(".", 2)[2]
        if linear.startswith("ffn.experts."):
            _, _, expert, part = linear.split(".")
            moments = {"w1": self.sums.experts_in, "w2": self.sums.experts_mid}.get(part)
            if moments is not None:
                moments.setdefault(int(expert), Moments()).add(x, 0)
        elif linear not in _SAME_INPUT:
            self.sums.linear(linear, x)
