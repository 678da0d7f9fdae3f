"""Calibration texts through a checkpoint, layer by layer, into a folder of statistics.

One file a layer, each appearing whole, and ``observe.json`` last. Killed anywhere, the same call ends with the same
bytes: the streams between layers lie in ``work`` until then.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.calibration import Text, domains
from exporter.layerwise import Walk
from exporter.observe.reference import ObservingReference
from exporter.stage import StageFolder, code_version
from exporter.statistics import OBSERVE, Statistics, piece_name, super_experts
from exporter.view import View


@dataclass(frozen=True, slots=True)
class ObserveOptions:
    """``hessian``: largest block of x·xᵀ, 0 for none. ``batch_tokens``: None for what memory allows."""

    texts_sha256: str
    hessian: int = 0
    act_sim: bool = False
    device: str = "cpu"
    batch_tokens: int | None = None


def observe(view: View, texts: Sequence[Text], out: Path, work: Path, options: ObserveOptions) -> Statistics:
    """Write ``out`` and return it opened; ``work`` is removed at the end. Errors as of Walk and StageFolder."""
    names = domains(list(texts))
    folder = StageFolder(out, _recipe(view, texts, options))
    if folder.has(OBSERVE):
        return Statistics.open(out)
    domain_of = torch.tensor([names.index(text.domain) for text in texts])
    reference = ObservingReference(
        view, domain_of, len(names), hessian=options.hessian, device=options.device, act_sim=options.act_sim
    )
    walk = Walk(reference, [text.ids for text in texts], work, batch_tokens=options.batch_tokens, label="observe")
    if not all(folder.has(piece_name(layer)) for layer in range(walk.spill.layer)):
        walk.spill.restart()  # the statistics of a layer that was walked are gone: begin again

    def store(layer: int) -> None:
        folder.write_tensors(piece_name(layer), reference.sums.tensors())
        reference.watch()

    walk.run(layer_done=store, keep_last=False)
    folder.finish(OBSERVE, _closing(folder, view, texts))
    walk.discard()
    return Statistics.open(out)


def _recipe(view: View, texts: Sequence[Text], options: ObserveOptions) -> dict[str, Any]:
    tokens = Counter[str]()
    for text in texts:
        tokens[text.domain] += len(text.ids)
    return {
        "stage": "observe", "model": view.recipe_sha256, "source_sha256": view.source_sha256,
        "texts_sha256": options.texts_sha256, "sequences": len(texts), "tokens": dict(sorted(tokens.items())),
        "hessian": options.hessian, "act_sim": options.act_sim, "device": options.device,
        "batch_tokens": options.batch_tokens,
    }  # fmt: skip


def _closing(folder: StageFolder, view: View, texts: Sequence[Text]) -> dict[str, Any]:
    layers = range(view.config.num_hidden_layers)
    files = []
    for layer in layers:
        path = folder.path / piece_name(layer)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        files.append({"name": path.name, "size_bytes": path.stat().st_size, "sha256": sha256})
    return {
        "format": 1, "source_sha256": view.source_sha256, "domains": list(domains(list(texts))), "files": files,
        "experts": view.config.n_routed_experts, "recipe": folder.recipe, "code": code_version(),
        "super_experts": super_experts([folder.path / piece_name(layer) for layer in layers]),
    }
