"""The objects of a bundle before any is written: which bytes of which file make each record of each object.

A plain tensor is one object in records of 16 MiB; the experts of a layer are one object, an expert a record, padded to
4096. Offsets follow from the plan alone, so the bytes do not depend on who writes them, or in which order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from appliance.bundle_writer import CHUNK_BYTES
from exporter.graph import graph_tensors
from exporter.ops.moe import record_bytes, record_parts
from exporter.safetensors_file import TensorInfo
from exporter.view import View

_MADE = ".ffn.gate."  # tensors a view permutes, cuts or remaps: their bytes are not those of a file


@dataclass(frozen=True, slots=True)
class FileRange:
    """``size_bytes`` of a tensor from byte ``start`` of it on."""

    info: TensorInfo
    start: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes [offset, offset + size_bytes) of an object: the pieces in order, then zeros.

    ``source``: the checkpoint's tensor, or ``layers.L.ffn.experts.E`` for an expert's six, in the record's order; a
    tensor of an overlay has the overlay's stage before it. ``source_sha256`` is set where the pieces are not its bytes.
    """

    index: int
    offset: int
    size_bytes: int
    pieces: tuple[FileRange | memoryview, ...]
    source: str
    source_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class ObjectPlan:
    """One object to be written. ``key`` is unique in the bundle, ``tensor`` is the graph's name for it."""

    key: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    record_bytes: int
    view: View
    layer: int | None = None  # of an experts object

    @property
    def count(self) -> int:
        """Number of records."""
        return -(-self.size_bytes // self.record_bytes)

    @property
    def is_base(self) -> bool:
        """True if every profile shares it."""
        return self.key == self.tensor

    def records(self, start: int = 0) -> Iterator[Record]:
        """The records from number ``start`` on; CheckpointError names file and tensor."""
        if self.layer is not None:
            yield from (self._expert(self.layer, index) for index in range(start, self.count))
            return
        source_sha256 = self.made_from()
        data = memoryview(self.view.read(self.tensor).tobytes()) if source_sha256 else None
        info, source = self.view.info(self.tensor), _source(self.view, self.tensor)
        for index in range(start, self.count):
            at = index * self.record_bytes
            size = min(self.record_bytes, self.size_bytes - at)
            piece = data[at : at + size] if data is not None else FileRange(info, at, size)
            yield Record(index, at, size, (piece,), source, source_sha256)

    def made_from(self) -> str | None:
        """SHA-256 of the checkpoint's bytes where the view makes other ones out of them, else None."""
        if self.layer is not None or _MADE not in self.tensor or self.view.touched(self.tensor):
            return None
        return hashlib.sha256(self.view.base.read(self.tensor).tobytes()).hexdigest()

    def _expert(self, layer: int, rank: int) -> Record:
        view, name = self.view, f"layers.{layer}.ffn.experts.{rank}"
        parts = record_parts(view.config.hidden_size, view.config.moe_intermediate_size)
        infos = [view.info(f"{name}.{part}") for part, _ in parts]
        touched = any(view.touched(f"{name}.{part}") for part, _ in parts)
        source = f"{_stages(view)}:{name}" if touched else official_expert(view, layer, rank)
        pieces = tuple(FileRange(info, 0, info.size_bytes) for info in infos)
        return Record(rank, rank * self.record_bytes, self.record_bytes, pieces, source)


def base_plans(view: View) -> tuple[ObjectPlan, ...]:
    """The objects of the whole model, which every profile shares."""
    layers = range(view.config.num_hidden_layers)
    plain = [plain_plan(view, name, name) for name in graph_tensors(view)]
    return (*plain, *(experts_plan(view, layer, experts_name(layer)) for layer in layers))


def profile_plans(view: View, profile: str) -> tuple[ObjectPlan, ...]:
    """The objects that only ``profile`` has: tensors its overlays touch, and whole layers of experts if one is."""
    names = [name for name in graph_tensors(view) if view.touched(name)]
    plans = [plain_plan(view, name, f"{name}@{profile}") for name in names]
    for layer, kept in enumerate(view.experts_kept):
        ranks = (f"layers.{layer}.ffn.experts.{rank}." for rank in range(kept))
        parts = [part for part, _ in record_parts(view.config.hidden_size, view.config.moe_intermediate_size)]
        if view.overlays and any(view.touched(name + part) for name in ranks for part in parts):
            plans.append(experts_plan(view, layer, f"{experts_name(layer)}@{profile}"))
    return tuple(plans)


def plain_plan(view: View, name: str, key: str) -> ObjectPlan:
    """One tensor as it is stored."""
    info = view.info(name)
    return ObjectPlan(key, name, info.dtype, info.shape, info.size_bytes, CHUNK_BYTES, view)


def experts_plan(view: View, layer: int, key: str) -> ObjectPlan:
    """The experts kept of one layer, [K, R]."""
    size, kept = record_bytes(view.config.hidden_size, view.config.moe_intermediate_size), view.experts_kept[layer]
    return ObjectPlan(key, experts_name(layer), "U8", (kept, size), kept * size, size, view, layer)


def experts_name(layer: int) -> str:
    """The initializer of a layer's experts."""
    return f"layers.{layer}.ffn.experts"


def official_expert(view: View, layer: int, rank: int) -> str:
    """``layers.L.ffn.experts.E`` with the checkpoint's own number of the expert ranked ``rank``."""
    return f"{experts_name(layer)}.{view.ranking.orders[layer][rank]}"


def _source(view: View, name: str) -> str:
    return f"{_stages(view)}:{name}" if view.touched(name) else name


def _stages(view: View) -> str:
    return "+".join(overlay.stage for overlay in view.overlays)
