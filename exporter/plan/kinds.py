"""What the tensors of a checkpoint are for: each belongs to one kind, and the kinds add up to the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter import inventory
from exporter.checkpoint import Checkpoint
from exporter.safetensors_file import TensorInfo

KINDS: Mapping[str, str] = {
    "routed": "routed experts", "attention": "attention", "shared": "shared experts", "compressors": "compressors",
    "indexers": "indexers", "mhc": "hyper-connections", "gates": "routers", "norms": "norms", "head": "head",
    "embed": "embedding", "draft": "draft stages",
}  # fmt: skip


def kind_of(name: str) -> str:
    """The kind of an official tensor name: a key of KINDS. Sinks and the norms of q and kv belong to attention."""
    top, part = name.partition(".")[0], name.split(".", 2)[-1]
    if top in ("mtp", "embed", "head"):
        return {"mtp": "draft"}.get(top, top)
    if top == "layers" and part.startswith(("attn.", "ffn.")):
        group = part.split(".")[1]
        return {
            "compressor": "compressors", "indexer": "indexers", "experts": "routed", "shared_experts": "shared",
            "gate": "gates",
        }.get(group, "attention")  # fmt: skip
    return "mhc" if "hc_" in name else "norms"


@dataclass(frozen=True, slots=True)
class Survey:
    """Counts and bytes of a checkpoint's tensors, and its layers by kind of attention."""

    tensors: int
    size_bytes: int
    file_bytes: int
    files: int
    by_kind: Mapping[str, tuple[int, int]]  # kind → (tensors, bytes), kinds of KINDS that are there
    by_dtype: Mapping[str, tuple[int, int]]
    layers: Mapping[str, int]  # "S", "C", "H" → layers
    hash_layers: int
    draft: str  # "none", "1 MTP block", "DSpark, 3 stages"
    draft_complete: bool  # the draft's tensors are all there, with their shapes

    def to_dict(self) -> dict[str, Any]:
        """As ``inspect --json`` prints it."""
        pairs = {"by_kind": self.by_kind, "by_dtype": self.by_dtype}
        counted = {
            field: {key: {"tensors": n, "bytes": size} for key, (n, size) in value.items()}
            for field, value in pairs.items()
        }
        return {
            "tensors": self.tensors, "bytes": self.size_bytes, "file_bytes": self.file_bytes, "files": self.files,
            **counted, "layers": dict(self.layers), "hash_layers": self.hash_layers,
            "draft": self.draft, "draft_complete": self.draft_complete,
        }  # fmt: skip


def survey(checkpoint: Checkpoint) -> Survey:
    """From the headers alone. CheckpointError if the backbone is not what config.json says."""
    inventory.check(checkpoint)
    infos, config = list(checkpoint.tensors.values()), checkpoint.config
    kinds: Counter[str] = Counter(config.layer_kind(layer) for layer in range(config.num_hidden_layers))
    draft, complete = _draft(checkpoint)
    by_kind = _counted(infos, lambda info: kind_of(info.name))
    return Survey(
        len(infos), sum(info.size_bytes for info in infos), sum(s.size_bytes for s in checkpoint.sources),
        len(checkpoint.sources), {kind: by_kind[kind] for kind in KINDS if kind in by_kind},
        dict(sorted(_counted(infos, lambda info: info.dtype).items())),
        {kind: kinds[kind] for kind in "SCH"}, config.num_hash_layers, draft, complete,
    )  # fmt: skip


def _draft(checkpoint: Checkpoint) -> tuple[str, bool]:
    mtp, dspark = inventory.draft_of(checkpoint)
    if dspark is None and mtp == 0:
        return "none", True
    wanted = inventory.draft_tensors(checkpoint.config, mtp=mtp, dspark=dspark)
    found = {n: (i.shape, i.dtype) for n, i in checkpoint.tensors.items() if n.startswith(inventory.EXTRA_PREFIX)}
    blocks = "MTP block" if mtp == 1 else "MTP blocks"
    return f"DSpark, {dspark.stages} stages" if dspark else f"{mtp} {blocks}", wanted == found


def _counted(infos: list[TensorInfo], key: Any) -> dict[str, tuple[int, int]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for info in infos:
        counts[key(info)] += 1
        sizes[key(info)] += info.size_bytes
    return {name: (counts[name], sizes[name]) for name in counts}
