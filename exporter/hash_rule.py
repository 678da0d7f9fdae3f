"""Cutting a layer that is routed by token id: its token table is rewritten to the most similar kept experts.

A dropped expert's place in a token's row goes to the kept expert most like it that the row does not name already.
Alike are experts whose router rows point the same way (cosine): in these layers the router still weighs what the
table chose, so such experts take over with about the dropped one's weight; and it needs no statistics. On the sample
model (its one hash layer cut from 16 to 8) the choice matters little: KL to the whole model .439, by what the experts'
inputs look like .443, by weights .450, at random .467, by co-occurrence .467. Keep hash layers whole, or train after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import UsageError
from exporter.overlay import OverlayWriter
from exporter.view import View

_ROWS = 4096  # token rows rewritten at once


def write_hash_overlay(view: View, out: Path) -> float:
    """Write the overlay "hash" of ``view``'s cut hash layers to ``out``; returns the share of entries moved.

    UsageError if no such layer is cut, or if ``view`` has overlays already.
    """
    cut = [layer for layer in range(view.config.num_hash_layers) if view.experts_kept[layer] < _experts(view)]
    if not cut:
        raise UsageError(f"{view.path}: no layer routed by token id is cut; nothing to rewrite")
    if view.overlays:
        raise UsageError("the token tables are rewritten before anything else: give no overlay")
    writer = OverlayWriter(out, "hash", view.recipe_sha256, {"rule": "router rows, cosine", "layers": cut})
    moved: dict[str, float] = {}
    for layer in cut:
        name = f"layers.{layer}.ffn.gate.tid2eid"
        table = np.array(view.ranking.rank_of(layer), np.int64)[view.base.read(name)]
        kept = view.experts_kept[layer]
        moved[f"layer {layer}"] = float((table >= kept).mean())
        if not writer.has(f"layer_{layer:03d}"):
            writer.add(f"layer_{layer:03d}", [(name, "I64", rewritten(table, replacements(view, layer), kept))])
    writer.finish(notes={"share_of_entries_moved": moved})
    return sum(moved.values()) / len(moved)


def replacements(view: View, layer: int) -> NDArray[np.int64]:
    """Per expert by rank [E, kept]: the kept ranks from the most to the least alike (lower rank first of equals)."""
    rows = view.base.float32(f"layers.{layer}.ffn.gate.weight").astype(np.float64)
    rows = rows[np.array(view.ranking.orders[layer])]
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    likeness = rows @ rows[: view.experts_kept[layer]].T
    return np.argsort(-likeness, axis=1, kind="stable")


def rewritten(table: NDArray[np.int64], preferred: NDArray[np.int64], kept: int) -> NDArray[np.int64]:
    """``table`` [V, k] of ranks with every rank ≥ ``kept`` replaced; a row never names one expert twice."""
    done = table.copy()
    for first in range(0, len(done), _ROWS):
        part = done[first : first + _ROWS]
        for slot in range(part.shape[1]):
            _replace(part, slot, preferred, kept)
    return done


def _replace(part: NDArray[np.int64], slot: int, preferred: NDArray[np.int64], kept: int) -> None:
    """Column ``slot`` of rows ``part``, in place: the first preferred rank that the row does not have."""
    rows = np.nonzero(part[:, slot] >= kept)[0]
    choices = preferred[part[rows, slot]]  # [rows, kept]
    taken: NDArray[Any] = np.zeros(choices.shape, bool)
    for other in range(part.shape[1]):
        taken |= choices == part[rows, other][:, None]
    part[rows, slot] = choices[np.arange(len(rows)), np.argmin(taken, axis=1)]


def _experts(view: View) -> int:
    return view.config.n_routed_experts
