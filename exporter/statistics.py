"""What ``observe`` found: one safetensors file a layer and ``observe.json``, read tensor by tensor. No torch.

Experts are numbered officially, rows of [domains, E] are the domains of ``observe.json`` (sorted).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError, UsageError
from exporter.checkpoint import stream_tensor
from exporter.safetensors_file import NUMPY_DTYPES, TensorInfo, read_header
from exporter.stage import digest, read_json

OBSERVE = "observe.json"
PEAK = "output_peak"
SUPER_PERCENTILE = 99.5  # of all experts of all layers
SUPER_SHARE = 0.1  # of the largest output of the model
SUPER_MEDIANS = 3.0  # of the experts of its own layer
ALIASES = {  # linears that read the same inputs: stored once
    "attn.wkv": "attn.wq_a", "attn.indexer.wq_b": "attn.wq_b", "ffn.shared_experts.w3": "ffn.shared_experts.w1",
}  # fmt: skip

Array = NDArray[np.generic]


def piece_name(layer: int) -> str:
    """File name of one layer's statistics."""
    return f"layer_{layer:03d}.safetensors"


@dataclass(frozen=True, slots=True)
class Statistics:
    """An observed calibration run. ``sha256`` names it; ``source_sha256`` the checkpoint it was made on."""

    path: Path
    sha256: str
    source_sha256: str
    texts_sha256: str
    domains: tuple[str, ...]
    experts: int
    super_experts: tuple[tuple[int, int], ...]  # (layer, official expert id)
    layers: tuple[Mapping[str, TensorInfo], ...]

    @staticmethod
    def open(path: Path) -> Statistics:
        """Read ``observe.json`` and the headers; CheckpointError names the file and what to do."""
        raw = read_json(path / OBSERVE)
        if raw.get("format") != 1 or not isinstance(raw.get("files"), list):
            raise CheckpointError(f"{path / OBSERVE}: no statistics of format 1; run observe again")
        try:
            return Statistics._parsed(path, raw)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path / OBSERVE}: field {error} is missing or wrong; run observe again") from None

    @staticmethod
    def _parsed(path: Path, raw: dict[str, Any]) -> Statistics:
        layers = []
        for layer, entry in enumerate(raw["files"]):
            file = path / piece_name(layer)
            if not file.is_file() or file.stat().st_size != entry["size_bytes"]:
                raise CheckpointError(f"{file}: missing or not {entry['size_bytes']:,} bytes; run observe again")
            layers.append({info.name: info for info in read_header(file)})
        return Statistics(
            path, digest(raw), str(raw["source_sha256"]), str(raw["recipe"]["texts_sha256"]), tuple(raw["domains"]),
            int(raw["experts"]), tuple((int(a), int(b)) for a, b in raw["super_experts"]), tuple(layers),
        )  # fmt: skip

    def tensor(self, layer: int, name: str) -> Array | None:
        """A tensor of ``layer`` as stored, None if it was not observed (no Hessian asked, no such linear).

        Linears with the same inputs share their moments: "x2.attn.wkv" gives "x2.attn.wq_a". "super_expert" is
        U8 [E], "reap_mean" F32 [E] the mean over all domains (0 where no token went).
        """
        if name == "super_expert":
            flags = np.zeros(self.experts, np.uint8)
            flags[[expert for at, expert in self.super_experts if at == layer]] = 1
            return flags
        if name == "reap_mean":
            return reap_mean(self, layer).astype(np.float32)
        kind, _, linear = name.partition(".")
        info = self.layers[layer].get(f"{kind}.{ALIASES[linear]}" if linear in ALIASES else name)
        return None if info is None else _read(info)

    def check_source(self, source_sha256: str, path: Path) -> None:
        """UsageError unless these statistics belong to the checkpoint ``path``."""
        if self.source_sha256 != source_sha256:
            raise UsageError(f"{self.path}: was observed on another checkpoint than {path}; observe this one")


def required(statistics: Statistics, layer: int, name: str) -> NDArray[np.float64]:
    """A tensor every observation has, as f64; CheckpointError if the file lacks it."""
    found = statistics.tensor(layer, name)
    if found is None:
        raise CheckpointError(f"{statistics.path / piece_name(layer)}: tensor {name} is missing; run observe again")
    return found.astype(np.float64)


def reap_mean(statistics: Statistics, layer: int, weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """REAP, arXiv 2510.13999: mean over the tokens routed to an expert of routing weight · ‖expert output‖₂, [E].

    ``weights`` [domains] multiply sums and counts of each domain: 2 counts its tokens twice.
    """
    factor = np.ones(len(statistics.domains)) if weights is None else weights
    total, count = factor @ required(statistics, layer, "reap_sum"), factor @ required(statistics, layer, "count")
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def super_experts(files: Sequence[Path]) -> list[list[int]]:
    """[layer, expert] of every expert whose largest output element is an outlier.

    Super experts, arXiv 2507.23279: the peak |w2(…)| lies above the 99.5th percentile of all experts of all layers
    and above a tenth of the largest. Its third condition, a layer where massive activations form, needs a look at the
    model; here the peak must be 3 times the median of its own layer instead.
    """
    peaks = np.stack([_read(next(i for i in read_header(file) if i.name == PEAK)).astype(np.float64) for file in files])
    least = max(float(np.percentile(peaks, SUPER_PERCENTILE)), SUPER_SHARE * float(peaks.max()))
    outlying = (peaks > least) & (peaks > SUPER_MEDIANS * np.median(peaks, axis=1, keepdims=True))
    return [[int(layer), int(expert)] for layer, expert in np.argwhere(outlying)]


def _read(info: TensorInfo) -> Array:
    data = b"".join(stream_tensor(info))
    return np.frombuffer(data, NUMPY_DTYPES[info.dtype]).reshape(info.shape)
