"""Statistics of made-up, correlated inputs for a checkpoint's dense linears, laid out as ``observe`` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporter.checkpoint import Checkpoint
from exporter.quantize.dense import LINEARS
from exporter.safetensors_file import write_file
from exporter.stage import write_json
from exporter.statistics import ALIASES, piece_name


def correlated(rng: np.random.Generator, width: int, tokens: int = 600) -> np.ndarray:
    """Inputs f32 [tokens, width] whose second moments decay fast, with a few large columns."""
    mix = rng.normal(size=(width, width)) * np.exp(-np.arange(width) / (width / 6))[:, None]
    x = rng.normal(size=(tokens, width)) @ mix + 0.3 * rng.normal(size=(tokens, width))
    x[:, rng.integers(0, width, max(1, width // 40))] *= 8
    return x.astype(np.float32)


def second_moments(x: np.ndarray) -> np.ndarray:
    """Mean x·xᵀ, f32 [K, K]."""
    return (x.T.astype(np.float64) @ x / len(x)).astype(np.float32)


def write_statistics(checkpoint: Path, out: Path, *, most_columns: int = 4096, hessians: bool = True) -> Path:
    """``observe.json`` and a file a layer for ``checkpoint``; Hessians in blocks of at most ``most_columns``."""
    out.mkdir()
    base, rng, files = Checkpoint.open(checkpoint), np.random.default_rng(23), []
    for layer in range(base.config.num_hidden_layers):
        tensors = []
        for part in LINEARS:
            name = f"layers.{layer}.{part}.weight"
            if part in ALIASES or not base.has(name):
                continue
            groups, width = base.config.o_groups if part == "attn.wo_a" else 1, base.info(name).shape[1]
            size = min(width, most_columns)
            moments = [second_moments(correlated(rng, width)) for _ in range(groups)]
            x2 = np.stack([np.diagonal(m) for m in moments])
            tensors.append((f"x2.{part}", "F32", x2 if groups > 1 else x2[0]))
            blocks = np.stack([m[at : at + size, at : at + size] for m in moments for at in range(0, width, size)])
            tensors += [(f"hessian.{part}", "F32", blocks)] if hessians else []
        write_file(out / piece_name(layer), tensors)
        files.append({"name": piece_name(layer), "size_bytes": (out / piece_name(layer)).stat().st_size})
    write_json(out / "observe.json", {
        "format": 1, "files": files, "source_sha256": base.source_sha256, "recipe": {"texts_sha256": "0" * 64},
        "domains": ["made up"], "experts": base.config.n_routed_experts, "super_experts": [],
    })  # fmt: skip
    return out
