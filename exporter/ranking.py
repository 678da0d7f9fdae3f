"""The order of a model's experts by saliency: one permutation a layer, most salient first.

A bundle holds the experts in this order, so that a card keeps the first K of a layer and nothing else changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import CheckpointError
from appliance.model import ModelConfig
from exporter.stage import digest, read_json, write_json


@dataclass(frozen=True, slots=True)
class Ranking:
    """``orders[layer][rank]`` = the official expert id. ``source_sha256`` names the checkpoint (its headers)."""

    source_sha256: str
    score: str  # how experts were compared: "reap-mean", "frequency", "random", "identity" …
    orders: tuple[tuple[int, ...], ...]
    stats_sha256: str = ""  # digest of the observation it came from

    @staticmethod
    def identity(config: ModelConfig, source_sha256: str) -> Ranking:
        """The official order."""
        order = tuple(range(config.n_routed_experts))
        return Ranking(source_sha256, "identity", (order,) * config.num_hidden_layers)

    @staticmethod
    def read(path: Path) -> Ranking:
        """From ``ranking.json``; CheckpointError names the file, the layer and what is wrong."""
        raw = read_json(path)
        if raw.get("format") != 1:
            raise CheckpointError(f"{path}: format {raw.get('format')!r}, expected 1; not a ranking, or too new")
        layers = raw.get("layers")
        if not isinstance(layers, list) or not all(isinstance(o, list) for o in layers):
            raise CheckpointError(f"{path}: layers: expected a list of lists of expert ids")
        for layer, order in enumerate(layers):
            if not all(type(expert) is int for expert in order) or sorted(order) != list(range(len(order))):
                raise CheckpointError(f"{path}: layers[{layer}] is no permutation of 0 … {len(order) - 1}")
        texts = {"stats_sha256": "", **raw}
        for field in ("source_sha256", "score", "stats_sha256"):
            if not isinstance(texts.get(field), str):
                raise CheckpointError(f"{path}: {field}: found {texts.get(field)!r:.60}, expected text; rank again")
        orders = tuple(tuple(order) for order in layers)
        return Ranking(texts["source_sha256"], texts["score"], orders, texts["stats_sha256"])

    def write(self, path: Path) -> None:
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": 1, "source_sha256": self.source_sha256, "score": self.score, "stats_sha256": self.stats_sha256,
            "layers": [list(order) for order in self.orders],
        }  # fmt: skip

    @property
    def sha256(self) -> str:
        """Digest of the ranking, as recipes and provenance name it."""
        return digest(self.to_dict())

    def rank_of(self, layer: int) -> tuple[int, ...]:
        """The inverse: rank by official expert id."""
        ranks = [0] * len(self.orders[layer])
        for rank, expert in enumerate(self.orders[layer]):
            ranks[expert] = rank
        return tuple(ranks)
