"""What the reference keeps between calls: window rows, entries, index keys and compressor partials per layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from appliance.errors import EngineError
from appliance.model import ModelConfig

RowKind = Literal["win", "ent", "ient"]


@dataclass
class Rows:
    """Committed rows: values f32 [n, d] as later queries read them, and the stored bytes u8 [n, row] if quantised."""

    values: torch.Tensor
    packed: torch.Tensor | None = None
    first: int = 0  # absolute index of row 0

    @staticmethod
    def empty(width: int) -> Rows:
        return Rows(torch.zeros(0, width))

    def append(self, values: torch.Tensor, packed: torch.Tensor | None) -> None:
        self.values = torch.cat((self.values, values))
        if packed is not None:
            self.packed = packed if self.packed is None else torch.cat((self.packed, packed))

    def keep_last(self, count: int) -> None:
        """Forget all but the last ``count`` rows."""
        drop = max(0, len(self.values) - count)
        self.values, self.first = self.values[drop:], self.first + drop
        self.packed = None if self.packed is None else self.packed[drop:]


@dataclass
class Partials:
    """One compressor: rows not yet pooled (kv, gate + ape), the carry of the overlap, the entries."""

    kv: torch.Tensor  # [fewer than r, overlap·d]
    gate: torch.Tensor
    carry_kv: torch.Tensor  # [r, d]: the "a" half of the last closed block; empty without overlap
    carry_gate: torch.Tensor
    entries: Rows

    @staticmethod
    def empty(ratio: int, width: int, overlap: int) -> Partials:
        carried = ratio if overlap == 2 else 0
        return Partials(
            torch.zeros(0, overlap * width), torch.zeros(0, overlap * width),
            torch.zeros(carried, width), torch.full((carried, width), float("-inf")), Rows.empty(width),
        )


@dataclass
class LayerState:
    """One layer's window and, by its kind, its compressor and its indexer's."""

    window: Rows
    compressor: Partials | None = None
    indexer: Partials | None = None


@dataclass
class State:
    """One sequence. ``keep_all`` keeps every window row for comparison instead of the last sliding_window."""

    layers: list[LayerState]
    mtp: LayerState
    tokens: int = 0
    mtp_tokens: int = 0
    keep_all: bool = False

    def rows(self, layer: int, kind: RowKind) -> NDArray[Any]:
        """Committed rows of a layer, oldest first: stored bytes u8 [n, row] with kv_sim, else f32 [n, width].

        ``win`` gives the last sliding_window tokens (all with ``keep_all``), ``ent`` and ``ient`` every entry.
        """
        state = self.layers[layer]
        holder = {"win": state.window, "ent": _entries(state.compressor), "ient": _entries(state.indexer)}[kind]
        if holder is None:
            raise EngineError(f"reference: layer {layer} has no {kind} rows")
        array: NDArray[Any] = (holder.values if holder.packed is None else holder.packed).numpy()
        return array


def _entries(partials: Partials | None) -> Rows | None:
    return None if partials is None else partials.entries


def new_layer(config: ModelConfig, ratio: int) -> LayerState:
    """An empty layer with compress ratio ``ratio``."""
    layer = LayerState(Rows.empty(config.head_dim))
    if ratio:
        layer.compressor = Partials.empty(ratio, config.head_dim, 2 if ratio == config.csa_ratio else 1)
    if ratio == config.csa_ratio:
        layer.indexer = Partials.empty(ratio, config.index_head_dim, 2)
    return layer


@dataclass
class Trace:
    """What a forward call saw, if asked: appended per call, so chunked calls add up.

    Streams are f32 [n, S, D]; ``routed`` and ``selected`` hold ids [n, k] per call (−1 = fewer visible than top-k).
    Margins are the smallest distances between the last chosen and the first left-out score (inf if none was left out).
    """

    block_inputs: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    block_outputs: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    routed: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    selected: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    router_margins: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # [n] per call
    topk_margins: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    streams: list[torch.Tensor] = field(default_factory=list)
    final_norm: list[torch.Tensor] = field(default_factory=list)

    @property
    def min_router_margin(self) -> float:
        return _least(self.router_margins)

    @property
    def min_topk_margin(self) -> float:
        return _least(self.topk_margins)


def _least(margins: dict[int, list[torch.Tensor]]) -> float:
    return min((float(m.min()) for calls in margins.values() for m in calls if len(m)), default=float("inf"))
