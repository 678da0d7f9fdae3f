"""The P1 check (float parity of the reference), shared by the parity tests and their negative controls. Needs torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hf_support
import numpy as np
import torch

from appliance.model import ModelConfig
from exporter.checkpoint import Checkpoint
from exporter.reference import CheckpointWeights, Reference, Trace

torch.set_num_threads(1)
P1_LIMIT = 2e-5  # max |Δlogit| of any row, V4 spec: parity levels
RAGGED = (5, 3, 16, 33, 2, 1, 7, 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """Weights and prompt with the logits another implementation computed, f32 [n, vocab]."""

    name: str
    config: ModelConfig
    weights: Mapping[str, Any]
    ids: list[int]
    logits: np.ndarray


def tiny_a(prompt: str) -> Case:
    """tests/golden/tiny-a: transformers' fp32 logits; ``prompt`` is s200, s37 or s16."""
    config, weights = hf_support.load_hf_checkpoint(hf_support.GOLDEN / "tiny-a")
    with np.load(hf_support.GOLDEN / "tiny-a/golden.npz") as golden:
        return Case(f"tiny-a {prompt}", config, weights, golden[f"{prompt}_ids"].tolist(), golden[f"{prompt}_logits"])


def tiny_q() -> Case:
    """tests/golden/tiny-q: the official code in fp32 on dequantised weights."""
    checkpoint = Checkpoint.open(hf_support.GOLDEN / "tiny-q")
    with np.load(hf_support.GOLDEN / "tiny-q/golden.npz") as golden:
        ids, logits = golden["ids"].tolist(), golden["float32_dequant_logits"]
    return Case("tiny-q", checkpoint.config, CheckpointWeights(checkpoint), ids, logits)


def transformers_case(name: str, folder: Path) -> Case:
    """A random config, written in the official layout, with transformers' logits of it."""
    random = hf_support.random_configs()[name]
    weights = CheckpointWeights(hf_support.write_official(folder, random.config, random.seed))
    logits = hf_support.hf_logits(hf_support.hf_model(weights, random.config), random.ids)
    return Case(f"transformers {name}", random.config, weights, random.ids, logits)


def chunks(ids: list[int], sizes: tuple[int, ...]) -> Iterator[list[int]]:
    """``ids`` in pieces of ``sizes``, repeated until they are used up."""
    start = turn = 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        yield ids[start : start + size]
        start, turn = start + size, turn + 1


def check_p1(case: Case, sizes: tuple[int, ...], trace: Trace | None = None) -> float:
    """Run the reference over ``case`` in pieces; asserts max |Δlogit| ≤ 2e-5 over all rows and returns it."""
    reference = Reference(case.weights, case.config)
    state = reference.new_state()
    rows = [reference.forward(piece, state, trace=trace) for piece in chunks(case.ids, sizes)]
    largest = float(np.abs(torch.cat(rows).numpy() - case.logits).max())
    assert largest <= P1_LIMIT, f"P1 {case.name} in pieces of {sizes}: max |Δlogit| {largest:.3g} > {P1_LIMIT}"
    return largest
