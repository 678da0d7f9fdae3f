"""Tensors that replace those of a checkpoint: what healing, distillation and quantization produce.

A folder: ``recipe.json``, one safetensors shard a layer (or part), ``overlay.json`` last. Names are official, experts
are named by rank; a tensor's dtype tells its format (I8 = packed FP4, E8M0 sibling per 32, for dense linears too).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from appliance.errors import CheckpointError
from exporter.safetensors_file import TensorInfo, read_header
from exporter.stage import StageFolder, digest, read_json

OVERLAY = "overlay.json"


@dataclass(frozen=True, slots=True)
class Overlay:
    """A finished overlay. ``base_sha256`` = ``View.recipe_sha256`` of what it was computed on (and is laid over)."""

    path: Path
    stage: str  # "heal", "router", "qad", "quantize", "hash"
    base_sha256: str
    rotated: Mapping[str, int]  # linear (without ".weight") → Hadamard block its inputs are rotated by
    tensors: Mapping[str, TensorInfo]
    sha256: str
    recipe: Mapping[str, Any]

    @staticmethod
    def open(path: Path) -> Overlay:
        """Read ``overlay.json`` and the shards' headers; CheckpointError names file and field."""
        raw = read_json(path / OVERLAY)
        if raw.get("format") != 1 or not isinstance(raw.get("files"), list):
            raise CheckpointError(f"{path / OVERLAY}: not an overlay of format 1; run the stage that makes it")
        tensors: dict[str, TensorInfo] = {}
        for entry in raw["files"]:
            shard = path / Path(str(entry["name"])).name
            if not shard.is_file() or shard.stat().st_size != entry["size_bytes"]:
                raise CheckpointError(f"{shard}: missing or not {entry['size_bytes']:,} bytes; run the stage again")
            tensors |= {info.name: info for info in read_header(shard)}
        rotated = {str(name): int(block) for name, block in raw.get("rotated", {}).items()}
        return Overlay(path, str(raw["stage"]), str(raw["base_sha256"]), rotated, tensors, digest(raw), raw["recipe"])


class OverlayWriter:
    """Writes an overlay shard by shard; the same recipe started again goes on after the last whole shard."""

    def __init__(self, out: Path, stage: str, base_sha256: str, recipe: Mapping[str, Any]) -> None:
        self._stage, self._base = stage, base_sha256
        self._folder = StageFolder(out, {"stage": stage, "base_sha256": base_sha256, **recipe})

    def has(self, shard: str) -> bool:
        """True if ``shard`` ("layer_003", "head" …) is there from an earlier run."""
        return self._folder.has(f"{shard}.safetensors")

    def add(self, shard: str, tensors: Iterable[tuple[str, str, NDArray[Any]]]) -> None:
        """Store (name, dtype, raw bits) as one shard, whole or not at all."""
        self._folder.write_tensors(f"{shard}.safetensors", tensors)

    def finish(self, *, rotated: Mapping[str, int] | None = None, notes: Mapping[str, Any] | None = None) -> Overlay:
        """Close the overlay. ``notes``: what a person wants to know later (losses per layer …)."""
        files = []
        for shard in sorted(self._folder.path.glob("*.safetensors")):
            with shard.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            files.append({"name": shard.name, "size_bytes": shard.stat().st_size, "sha256": sha256})
        self._folder.finish(OVERLAY, {
            "format": 1, "stage": self._stage, "base_sha256": self._base, "rotated": dict(rotated or {}),
            "files": files, "recipe": self._folder.recipe, "notes": dict(notes or {}),
        })
        return Overlay.open(self._folder.path)
