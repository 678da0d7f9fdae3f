"""What healing sees of one layer: the full layer's routed output per token, and the kept experts' share in it."""

from __future__ import annotations

import torch

from exporter import reference_math as ops
from exporter.distill.router_fit import Quadratics, Router
from exporter.layer_reference import LayerReference, Stored
from exporter.view import View

SPARE_CANDIDATES = 4  # besides twice the experts a token is routed to


class StudentReference(LayerReference):
    """A cut view's layer that reads what both hold from ``teacher`` (same ranking, uncut): one copy in memory."""

    def __init__(self, view: View, teacher: LayerReference, *, device: str = "cpu") -> None:
        super().__init__(view, kv_sim=True, device=device)
        self._teacher = teacher

    def _store(self, name: str) -> Stored:
        return super()._store(name) if self.view.touched(name) else self._teacher._store(name)

    def router(self, layer: int) -> Router:
        """The learned router of ``layer``, rows in rank order."""
        gate = f"layers.{layer}.ffn.gate"
        return Router(self._w(f"{gate}.weight"), self._w(f"{gate}.bias"))

    def set_router(self, layer: int, router: Router) -> None:
        """Use ``router`` until the layer is released."""
        gate = f"layers.{layer}.ffn.gate"
        self._tensors[f"{gate}.weight"], self._tensors[f"{gate}.bias"] = router.gate, router.bias


class LayerTask:
    """One cut layer: ``teacher`` is whole, ``student`` keeps its first experts."""

    def __init__(self, teacher: LayerReference, student: StudentReference, layer: int) -> None:
        self.teacher, self.student, self.layer, self.config = teacher, student, layer, student.config
        self.kept = student.view.experts_kept[layer]
        self.candidates = min(self.kept, 2 * self.config.num_experts_per_tok + SPARE_CANDIDATES)
        self._name = f"layers.{layer}.ffn"

    def look(self, x: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, Quadratics, torch.Tensor]:
        """Normed x [n, D]: the full layer's output [n, D], the tokens' quadratics, the routed target r [n, D].

        r also makes up for a shared expert that an overlay changed.
        """
        with self.student.device, torch.no_grad():
            ids = self._candidate_ids(x)
            routed, outputs = self._experts(x, ids)
            full = routed + self._shared(self.teacher, x)
            target = full - self.shared(x) if self._shared_differs else routed
            gram = outputs @ outputs.transpose(1, 2)
            cross = torch.einsum("ncd,nd->nc", outputs, target)
            return full, Quadratics(x, ids, gram, cross, target.square().sum(-1), importance), target

    @property
    def _shared_differs(self) -> bool:
        name = f"{self._name}.shared_experts"
        return any(self.student.view.touched(f"{name}.{part}.weight") for part in ("w1", "w2", "w3"))

    def _candidate_ids(self, x: torch.Tensor) -> torch.Tensor:
        router = self.student.router(self.layer)
        scores = ops.route_scores(x, router.gate) + router.bias
        return torch.sort(ops.top_k(scores, self.candidates)[1], dim=-1).values

    def _experts(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each expert once: the full layer's routed sum [n, D], and the candidates' outputs [n, c, D]."""
        experts, weights = self._teacher_routing(x)
        routed, outputs = torch.zeros_like(x), torch.zeros(*ids.shape, x.shape[1])
        for expert in range(self.config.n_routed_experts):
            theirs, slot = torch.nonzero(experts == expert, as_tuple=True)
            ours, place = torch.nonzero(ids == expert, as_tuple=True)
            tokens, back = torch.cat((theirs, ours)).unique(return_inverse=True)
            if len(tokens):
                name = f"{self._name}.experts.{expert}"
                y = self.teacher._expert(name, x[tokens], torch.ones(len(tokens)), ops.swiglu)[back]
                routed[theirs] += weights[theirs, slot][:, None] * y[: len(theirs)]
                outputs[ours, place] = y[len(theirs) :]
        return routed, outputs

    def _teacher_routing(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids by rank i64 [n, k] and routing weights [n, k] of the full layer."""
        gate, k = f"{self._name}.gate", self.config.num_experts_per_tok
        scores = ops.route_scores(x, self.teacher._w(f"{gate}.weight"))
        experts = ops.top_k(scores + self.teacher._w(f"{gate}.bias"), k)[1]
        chosen = scores.gather(1, experts)
        return experts, chosen / chosen.sum(-1, keepdim=True) * self.config.routed_scaling_factor

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """The student's shared expert."""
        return self._shared(self.student, x)

    def _shared(self, reference: LayerReference, x: torch.Tensor) -> torch.Tensor:
        return reference._expert(f"{self._name}.shared_experts", x, torch.ones(len(x)), ops.shared_swiglu)
