"""A profile's weights as its bundle holds them, under official names: the reference runs on what the engine maps.

Everything comes from the profile's graph and the objects it refers to: which linears are FP4 and rotated (their nodes),
how many experts a layer has (its initializer), which official experts they are (``layers.L.ffn.official``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from appliance.errors import BundleError
from appliance.model import ModelConfig
from exporter import codec
from exporter.ops.moe import record_parts
from exporter.reference_weights import Arrangement

Array = npt.NDArray[Any]
_NUMPY: dict[int, np.dtype[Any]] = {
    onnx.TensorProto.FLOAT: np.dtype("<f4"), onnx.TensorProto.BFLOAT16: np.dtype("<u2"),
    onnx.TensorProto.UINT8: np.dtype("u1"), onnx.TensorProto.INT64: np.dtype("<i8"),
}  # fmt: skip


class BundleWeights(Mapping[str, Array]):
    """name → f32 (dequantized) or i64 (tid2eid), read when asked for. Names as in the official checkpoint."""

    def __init__(self, graph_path: Path, config: ModelConfig) -> None:
        self._root, self._config = graph_path.parent, config
        graph = onnx.load(str(graph_path), load_external_data=False).graph
        self._stored = {t.name: t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        self._names = [name for name in self._stored if not name.endswith((".scale", ".ffn.experts"))]
        for name, tensor in self._stored.items():
            if name.endswith(".ffn.experts"):
                for expert in range(tensor.dims[0]):
                    self._names += [f"{name}.{expert}.{part}.weight" for part in ("w1", "w2", "w3")]
        self._rotations = _fp4_rotations(graph)
        self._official = _official(graph)

    @property
    def arrangement(self) -> Arrangement:
        """Official ids of ranked experts, and rotated inputs, as the graph has them."""
        return Arrangement(self._official, {name: block for name, block in self._rotations.items() if block})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Array:
        if ".ffn.experts." in name:
            return self._expert(name)
        raw = self._raw(name)
        if raw.dtype == np.dtype("<u2"):
            return codec.bf16_decode(raw)
        if raw.dtype == np.dtype("u1"):
            linear = name.removesuffix(".weight")
            scale = self._raw(f"{linear}.scale")
            fp4 = linear in self._rotations
            return codec.fp4_dequantize(raw, scale) if fp4 else codec.fp8_block_dequantize(raw, scale)
        return raw

    def _raw(self, name: str) -> Array:
        if name not in self._stored:
            raise KeyError(name)
        tensor = self._stored[name]
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype, count = _NUMPY[tensor.data_type], math.prod(tensor.dims)
        path = self._root / place["location"]
        array: Array = np.fromfile(path, dtype, count, offset=int(place["offset"]))
        if array.size != count:
            raise BundleError(f"{place['location']} is too short for {name}; copy the bundle again")
        return array.reshape(tuple(tensor.dims))

    def _expert(self, name: str) -> Array:
        layer, _, tail = name.partition(".ffn.experts.")
        expert, part, _ = tail.split(".")
        record = self._raw(f"{layer}.ffn.experts")[int(expert)]
        pieces, at = {}, 0
        for piece, (rows, width) in record_parts(self._config.hidden_size, self._config.moe_intermediate_size):
            pieces[piece] = record[at : at + rows * width].reshape(rows, width)
            at += rows * width
        return codec.fp4_dequantize(pieces[f"{part}.weight"], pieces[f"{part}.scale"])


def _fp4_rotations(graph: onnx.GraphProto) -> dict[str, int]:
    """Every FP4 linear (without ".weight") and the Hadamard block of its input, 0 for none."""
    found = {}
    for node in graph.node:
        if node.op_type in ("Fp4MatMul", "Fp4GroupedMatMul"):
            (rotate,) = (attribute.i for attribute in node.attribute if attribute.name == "rotate")
            found[node.input[1].removesuffix(".weight")] = int(rotate)
    return found


def _official(graph: onnx.GraphProto) -> dict[int, tuple[int, ...]]:
    """Layer → the official id of each record, for layers that are not in official order."""
    tensors = [tensor for tensor in graph.initializer if tensor.name.endswith(".ffn.official")]
    return {int(t.name.split(".")[1]): tuple(onnx.numpy_helper.to_array(t).tolist()) for t in tensors}
