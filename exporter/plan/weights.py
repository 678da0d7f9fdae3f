"""Bytes of a model in the formats asked for, from its headers: on the device, on the host, in the bundle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from appliance.errors import CheckpointError
from appliance.model import ModelConfig
from exporter.checkpoint import Checkpoint
from exporter.ops.moe import record_bytes
from exporter.plan.kinds import kind_of
from exporter.safetensors_file import TensorInfo

HEAD_FORMATS = ("fp8", "bf16")
_LINEARS = ("attention", "shared", "indexers")  # kinds whose FP8 linears become MXFP4 in D4
_BLOCK, _GROUP = 128, 32  # rows and columns of an FP8 scale, columns of an FP4 scale


@dataclass(frozen=True, slots=True)
class Weights:
    """Sizes of one model in one dense format. All in bytes."""

    config: ModelConfig
    dense_format: str  # "D4" or "D8"
    head_format: str  # "fp8" or "bf16"
    dense: Mapping[str, int]  # kind → on the device; no experts, no embedding, no router rows
    embed: int  # stays on the host: one row is read a token
    tables: int  # expert ids by token id, in dense["gates"]: one row is read a token
    record: int  # one expert of one layer, padded
    base_objects: int  # the bundle's objects with every expert in the checkpoint's formats
    added_objects: int  # and what D4 and an FP8 head add to them

    def gate_row(self, layer: int) -> int:
        """One expert's router row, and its bias where the router is learned."""
        return 2 * self.config.hidden_size + (4 if layer >= self.config.num_hash_layers else 0)

    def slot(self, layer: int) -> int:
        """What keeping one more expert of ``layer`` costs on the device."""
        return self.record + self.gate_row(layer)

    def gate_rows(self, kept: Sequence[int]) -> int:
        """Router rows of the experts kept, layer by layer."""
        return sum(self.gate_row(layer) * count for layer, count in enumerate(kept))


def weights_of(checkpoint: Checkpoint, dense_format: str, head_format: str) -> Weights:
    """CheckpointError naming the tensor that cannot have the format."""
    config = checkpoint.config
    record = record_bytes(config.hidden_size, config.moe_intermediate_size)
    dense: Counter[str] = Counter()
    tables, added = 0, 0
    base = record * config.n_routed_experts * config.num_hidden_layers
    for info in checkpoint.tensors.values():
        kind = kind_of(info.name)
        if kind in ("routed", "draft"):
            continue
        planned = _planned_bytes(info, kind, dense_format, head_format)
        base += info.size_bytes
        added += planned if planned != info.size_bytes else 0
        dense[kind] += planned
        if info.name.endswith(".tid2eid"):
            tables += info.size_bytes
    embed = dense.pop("embed")
    dense["gates"] = tables  # the rest is a row an expert
    return Weights(config, dense_format, head_format, dict(dense), embed, tables, record, base, added)


def _is_recoded(info: TensorInfo, kind: str, dense_format: str) -> bool:
    coded = info.dtype == "F8_E4M3" or info.name.endswith(".scale")
    return dense_format == "D4" and kind in _LINEARS and coded


def _planned_bytes(info: TensorInfo, kind: str, dense_format: str, head_format: str) -> int:
    """Bytes of one tensor as the plan stores it; a scale counts with its weight."""
    if kind == "head" and head_format == "fp8":
        rows, columns = info.shape
        return rows * columns + -(-rows // _BLOCK) * -(-columns // _BLOCK)
    if not _is_recoded(info, kind, dense_format):
        return info.size_bytes
    if info.name.endswith(".scale"):
        return 0
    if info.shape[-1] % _GROUP:
        raise CheckpointError(f"{info.file}: {info.name}: {info.shape[-1]} inputs are no multiple of {_GROUP} (MXFP4)")
    weights = math.prod(info.shape)
    return weights // 2 + weights // _GROUP
