"""What the reference reads: weights by official name as f32, and how a view arranged them. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.checkpoint import Checkpoint
from exporter.view import View


class CheckpointWeights(Mapping[str, NDArray[Any]]):
    """The tensors of a checkpoint or view as f32 (tid2eid as i64), dequantised when looked up."""

    def __init__(self, checkpoint: Checkpoint | View) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> NDArray[Any]:
        if not self._checkpoint.has(name):
            raise KeyError(name)
        integer = self._checkpoint.info(name).dtype == "I64"
        return self._checkpoint.read(name) if integer else self._checkpoint.float32(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.names)

    def __len__(self) -> int:
        return len(self._checkpoint.names)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What weights by name do not tell: the official ids of ranked experts, and which inputs are rotated.

    ``official[layer][rank]`` is the expert's official id, for layers whose experts are not in ascending official order;
    ``rotations`` the Hadamard block of each rotated linear (name without ".weight").
    """

    official: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    rotations: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(view: View) -> Arrangement:
        """The arrangement of ``view``'s tensors."""
        official = {
            layer: order[:kept]
            for layer, (order, kept) in enumerate(zip(view.ranking.orders, view.experts_kept, strict=True))
            if list(order[:kept]) != sorted(order[:kept])
        }
        linears = {name.removesuffix(".weight") for overlay in view.overlays for name in overlay.tensors}
        return Arrangement(official, {name: block for name in linears if (block := view.rotation(name))})

    def order(self, layer: int) -> NDArray[np.int64] | None:
        """Ranks of ``layer`` by ascending official id [K]; None where ranks are in that order already."""
        if layer not in self.official:
            return None
        return np.argsort(np.array(self.official[layer], np.int64))
