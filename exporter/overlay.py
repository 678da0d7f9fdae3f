"""Tensors that replace those of a checkpoint: what healing, distillation and quantization produce.

A folder: ``recipe.json``, one safetensors shard a layer (or part), ``overlay.json`` last. Names are official, experts
are named by rank; a tensor's dtype tells its format (I8 = packed FP4, E8M0 sibling per 32, for dense linears too).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from appliance.errors import CheckpointError
from exporter.ops.linear import ROTATIONS
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
    shards: Mapping[Path, str]  # SHA-256 of each file, as listed; see check_bytes

    @staticmethod
    def open(path: Path) -> Overlay:
        """Read ``overlay.json`` and the shards' headers; CheckpointError names file and field."""
        raw = {"rotated": {}, **read_json(path / OVERLAY)}
        _check(raw, path / OVERLAY)
        tensors: dict[str, TensorInfo] = {}
        shards: dict[Path, str] = {}
        for entry in raw["files"]:
            shard = path / Path(entry["name"]).name
            if not shard.is_file() or shard.stat().st_size != entry["size_bytes"]:
                raise CheckpointError(f"{shard}: missing or not {entry['size_bytes']:,} bytes; run the stage again")
            tensors |= {info.name: info for info in read_header(shard)}
            shards[shard] = entry["sha256"]
        return Overlay(
            path, raw["stage"], raw["base_sha256"], raw["rotated"], tensors, digest(raw), raw["recipe"], shards
        )  # fmt: skip

    def check_bytes(self) -> None:
        """Hash every shard; CheckpointError names the one whose bytes are not those that were written."""
        for shard, sha256 in self.shards.items():
            with shard.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if found != sha256:
                raise CheckpointError(
                    f"{shard}: damaged (SHA-256 is {found[:12]}…, {OVERLAY} lists {sha256[:12]}…); run the stage again "
                    "into a new folder"
                )


def _check(raw: Mapping[str, Any], path: Path) -> None:
    """CheckpointError names the field of ``path`` that no stage writes so."""
    if raw.get("format") != 1:
        raise CheckpointError(f"{path}: format {raw.get('format')!r:.60}, expected 1; run the stage that makes it")
    for field, kind in {"stage": str, "base_sha256": str, "recipe": dict, "files": list, "rotated": dict}.items():
        if not isinstance(raw.get(field), kind):
            raise CheckpointError(
                f"{path}: {field}: found {raw.get(field)!r:.60}, expected a {kind.__name__}; run the stage again"
            )
    for entry in raw["files"]:
        fields = entry if isinstance(entry, dict) else {}
        kinds = [type(fields.get(field)) for field in ("name", "size_bytes", "sha256")]
        if kinds != [str, int, str]:
            raise CheckpointError(f"{path}: files: {entry!r:.80}: not name, size_bytes and sha256; run the stage again")
    for linear, block in raw["rotated"].items():
        if type(block) is not int or block not in ROTATIONS:
            raise CheckpointError(
                f"{path}: rotated: {linear} by {block!r:.20}, expected one of {ROTATIONS}; run the stage again"
            )


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
