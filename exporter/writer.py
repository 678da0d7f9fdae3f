"""Checkpoint tensors into the bundle's objects, one at a time: bytes as they are, experts as one record tensor a layer.

Nothing is held longer than one expert; FP4 and FP8 codes and scales are copied bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from appliance.bundle_writer import BundleWriter
from exporter.checkpoint import Checkpoint
from exporter.graph import StoredTensor, graph_tensors
from exporter.ops.moe import record_bytes, record_parts

Report = Callable[[str, int], None]  # (what was written, its bytes)


def stored_bytes(ckpt: Checkpoint) -> int:
    """Bytes the objects will take together."""
    config = ckpt.config
    experts = record_bytes(config.hidden_size, config.moe_intermediate_size) * config.n_routed_experts
    plain = sum(ckpt.info(name).size_bytes for name in graph_tensors(config))
    return plain + experts * config.num_hidden_layers


def write_weights(ckpt: Checkpoint, bundle: BundleWriter, report: Report) -> dict[str, StoredTensor]:
    """Store every tensor the graph reads; answers where each lies, by name."""
    tensors: dict[str, StoredTensor] = {}
    for name in graph_tensors(ckpt.config):
        info = ckpt.info(name)
        entry = bundle.add_object(ckpt.stream(name))
        tensors[name] = StoredTensor(name, info.dtype, info.shape, entry.path, 0, info.size_bytes)
        report(name, info.size_bytes)
    config = ckpt.config
    size_bytes = record_bytes(config.hidden_size, config.moe_intermediate_size)
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}.ffn.experts"
        entry = bundle.add_object(_records(ckpt, layer, size_bytes), size_bytes)
        shape = (config.n_routed_experts, size_bytes)
        tensors[name] = StoredTensor(name, "U8", shape, entry.path, 0, entry.size_bytes)
        report(name, entry.size_bytes)
    return tensors


def _records(ckpt: Checkpoint, layer: int, size_bytes: int) -> Iterator[bytes]:
    """The experts' records of one layer in order, each padded to ``size_bytes``."""
    config = ckpt.config
    parts = [part for part, _ in record_parts(config.hidden_size, config.moe_intermediate_size)]
    for expert in range(config.n_routed_experts):
        used = 0
        for part in parts:
            for piece in ckpt.stream(f"layers.{layer}.ffn.experts.{expert}.{part}"):
                used += len(piece)
                yield piece
        if used < size_bytes:
            yield bytes(size_bytes - used)
