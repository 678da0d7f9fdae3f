"""A model as the stages see it: the official checkpoint in rank order, cut to the experts kept, overlays on top.

It reads like a :class:`Checkpoint` (``names``, ``has``, ``info``, ``read``, ``stream``, ``float32``), official names,
experts named by rank. With no ranking, no cut and no overlay it is the checkpoint itself, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError, UsageError
from appliance.model import ModelConfig
from exporter.checkpoint import Checkpoint, dequantize, stream_tensor
from exporter.overlay import Overlay
from exporter.ranking import Ranking
from exporter.safetensors_file import NUMPY_DTYPES, TensorInfo
from exporter.stage import digest

_EXPERT = re.compile(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(.+)")
_GATE = re.compile(r"layers\.(\d+)\.ffn\.gate\.(weight|bias|tid2eid)")


class View:
    """See the module. Every method that reads raises CheckpointError naming file and tensor."""

    def __init__(
        self, base: Checkpoint, *, ranking: Ranking | None = None, experts_kept: Sequence[int] | None = None,
        overlays: Sequence[Overlay] = (),
    ) -> None:  # fmt: skip
        """UsageError if ranking, cut or overlays were not made for this checkpoint, or for another cut or order."""
        config = base.config
        full = (config.n_routed_experts,) * config.num_hidden_layers
        self.base, self.config, self.path = base, config, base.path
        self.raw_config: Mapping[str, Any] = base.raw_config
        self.source_sha256 = base.source_sha256
        self.ranking = ranking or Ranking.identity(config, self.source_sha256)
        self.experts_kept = tuple(experts_kept) if experts_kept is not None else full
        _check_ranking(self.ranking, config, self.source_sha256, base.path)
        _check_kept(self.experts_kept, config)
        self._overlays: tuple[Overlay, ...] = ()
        for overlay in overlays:
            if overlay.base_sha256 != self.recipe_sha256:
                raise UsageError(
                    f"{overlay.path}: was computed on another model (checkpoint, ranking, experts kept or overlays "
                    "before it differ); give the same ones, in the same order"
                )
            self._overlays += (overlay,)

    @property
    def overlays(self) -> tuple[Overlay, ...]:
        return self._overlays

    @property
    def recipe_sha256(self) -> str:
        """Digest of {checkpoint headers, ranking, experts kept, overlays}: equal digests read equal bytes."""
        return digest({
            "source": self.source_sha256, "orders": self.ranking.orders, "experts_kept": self.experts_kept,
            "overlays": [overlay.sha256 for overlay in self._overlays],
        })

    def over(self, overlay: Overlay) -> View:
        """This view with one more overlay on top."""
        return View(
            self.base, ranking=self.ranking, experts_kept=self.experts_kept, overlays=(*self._overlays, overlay)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor name: the base's order without the experts cut, then what only overlays have."""
        kept = [name for name in self.base.names if self._is_kept(name)]
        added = dict.fromkeys(n for o in self._overlays for n in o.tensors if n not in self.base.tensors)
        return (*kept, *added)

    def rotation(self, linear: str) -> int:
        """Hadamard block that the inputs of ``linear`` (no ".weight") are rotated by, 0 for none."""
        for overlay in reversed(self._overlays):
            if f"{linear}.weight" in overlay.tensors:
                return overlay.rotated.get(linear, 0)
        return 0

    def touched(self, name: str) -> bool:
        """True if an overlay holds ``name``: its bytes are not the checkpoint's."""
        return self._overlay_info(name) is not None

    def has(self, name: str) -> bool:
        return self.touched(name) or (self._is_kept(name) and self.base.has(self._official(name)))

    def info(self, name: str) -> TensorInfo:
        """dtype, shape, size; file and offset are where the bytes lie, before rows are cut or ids remapped."""
        found = self._overlay_info(name)
        if found is not None:
            return found
        if not self._is_kept(name):
            raise CheckpointError(f"{self.base.listing}: {name} is not among the experts kept")
        info = replace(self.base.info(self._official(name)), name=name)
        gate = _GATE.fullmatch(name)
        if gate is None or gate[2] == "tid2eid":
            return info
        kept = self.experts_kept[int(gate[1])]
        return replace(info, shape=(kept, *info.shape[1:]), size_bytes=info.size_bytes // info.shape[0] * kept)

    def read(self, name: str) -> NDArray[Any]:
        """Raw bits, as :meth:`Checkpoint.read`."""
        info = self.info(name)
        gate = _GATE.fullmatch(name)
        if gate is not None and not self.touched(name):
            return self._gate(int(gate[1]), gate[2], name)
        array: NDArray[Any] = np.empty(info.shape, NUMPY_DTYPES[info.dtype])
        view, done = array.reshape(-1).view(np.uint8), 0
        for piece in stream_tensor(info):
            view[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        return array

    def stream(self, name: str, chunk_bytes: int = 4 << 20) -> Iterator[bytes]:
        """The bytes of ``name`` in pieces of at most ``chunk_bytes``."""
        if _GATE.fullmatch(name) is not None and not self.touched(name):
            data = self.read(name).tobytes()
            yield from (data[at : at + chunk_bytes] for at in range(0, len(data), chunk_bytes))
        else:
            yield from stream_tensor(self.info(name), chunk_bytes)

    def float32(self, name: str) -> NDArray[np.float32]:
        """``name`` as f32, exactly; a rotated linear is given as stored (rotated)."""
        info = self.info(name)
        scale = f"{name.removesuffix('.weight')}.scale"
        codes = info.dtype in ("F8_E4M3", "I8")
        return dequantize(info, self.read(name), (self.info(scale), self.read(scale)) if codes else None)

    def _overlay_info(self, name: str) -> TensorInfo | None:
        for overlay in reversed(self._overlays):
            if name in overlay.tensors:
                return overlay.tensors[name]
        return None

    def _is_kept(self, name: str) -> bool:
        expert = _EXPERT.fullmatch(name)
        return expert is None or int(expert[2]) < self.experts_kept[int(expert[1])]

    def _official(self, name: str) -> str:
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            return name
        layer, rank = int(expert[1]), int(expert[2])
        return f"layers.{layer}.ffn.experts.{self.ranking.orders[layer][rank]}.{expert[3]}"

    def _gate(self, layer: int, part: str, name: str) -> NDArray[Any]:
        """Router rows in rank order, cut; token → expert ids as ranks."""
        raw, kept = self.base.read(name), self.experts_kept[layer]
        if part != "tid2eid":
            rows: NDArray[Any] = np.ascontiguousarray(raw[np.array(self.ranking.orders[layer][:kept])])
            return rows
        ranks: NDArray[Any] = np.array(self.ranking.rank_of(layer), np.int64)[raw]
        if int(ranks.max(initial=0)) >= kept:
            raise CheckpointError(
                f"{name}: some tokens are routed to experts beyond the {kept} kept; keep hash layers whole, or lay an "
                "overlay with a rewritten tid2eid over it (rank --hash-layers)"
            )
        return ranks


def _check_ranking(ranking: Ranking, config: ModelConfig, source_sha256: str, path: Path) -> None:
    if ranking.source_sha256 != source_sha256:
        raise UsageError(f"the ranking was made for another checkpoint than {path}; rank this one")
    shape = {len(order) for order in ranking.orders}
    if len(ranking.orders) != config.num_hidden_layers or shape != {config.n_routed_experts}:
        raise UsageError(
            f"the ranking has {len(ranking.orders)} layers of {sorted(shape)} experts, {path} "
            f"{config.num_hidden_layers} of {config.n_routed_experts}"
        )


def _check_kept(kept: Sequence[int], config: ModelConfig) -> None:
    if len(kept) != config.num_hidden_layers:
        raise UsageError(f"experts kept: {len(kept)} layers, the model has {config.num_hidden_layers}")
    for layer, count in enumerate(kept):
        if not config.num_experts_per_tok <= count <= config.n_routed_experts:
            raise UsageError(
                f"experts kept: layer {layer} keeps {count}, expected {config.num_experts_per_tok} "
                f"(num_experts_per_tok) to {config.n_routed_experts}"
            )
