"""Views that the student tests write: overlays made by hand, MXFP4 linears, an FP8 head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporter import codec
from exporter.overlay import Overlay, OverlayWriter
from exporter.view import View

Tensor = tuple[str, str, np.ndarray[Any, Any]]  # name, dtype, bits
LINEARS = (
    "attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b", "ffn.shared_experts.w1",
    "ffn.shared_experts.w2", "ffn.shared_experts.w3",
)  # fmt: skip


def overlaid(view: View, folder: Path, tensors: Iterable[Tensor], rotated: Mapping[str, int] | None = None) -> View:
    """``view`` with an overlay of ``tensors``."""
    writer = OverlayWriter(folder, "quantize", view.recipe_sha256, {"made": "by a test"})
    writer.add("part", tensors)
    writer.finish(rotated=rotated)
    return view.over(Overlay.open(folder))


def linear_names(view: View) -> list[str]:
    """Every dense linear of the layers, without ".weight"."""
    names = [f"layers.{layer}.{part}" for layer in range(view.config.num_hidden_layers) for part in LINEARS]
    return [name for name in names if view.has(f"{name}.weight")]


def random_fp4_linears(view: View, spread: int = 10) -> Iterator[Tensor]:
    """Random MXFP4 for every dense linear, group scales within ``spread`` powers of two."""
    rng = np.random.Generator(np.random.PCG64(6))
    for name in linear_names(view):
        rows, columns = view.info(f"{name}.weight").shape
        yield f"{name}.weight", "I8", rng.integers(0, 256, (rows, columns // 2), np.uint8)
        yield f"{name}.scale", "F8_E8M0", rng.integers(118, 119 + spread, (rows, columns // 32)).astype(np.uint8)


def rounded_fp4_linears(view: View) -> Iterator[Tensor]:
    """The view's own dense linears rounded to MXFP4, plainly."""
    for name in linear_names(view):
        packed, scales = codec.fp4_quantize(view.float32(f"{name}.weight"))
        yield f"{name}.weight", "I8", packed
        yield f"{name}.scale", "F8_E8M0", scales


def fp8_head(view: View) -> list[Tensor]:
    codes, scales = codec.fp8_block_quantize(view.float32("head.weight"))
    return [("head.weight", "F8_E4M3", codes), ("head.scale", "F8_E8M0", scales)]
