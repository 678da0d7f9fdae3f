"""A built bundle's weights under their official names: what the reference is run on, read back from the objects."""

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

Array = npt.NDArray[Any]
_NUMPY: dict[int, np.dtype[Any]] = {
    onnx.TensorProto.FLOAT: np.dtype("<f4"), onnx.TensorProto.BFLOAT16: np.dtype("<u2"),
    onnx.TensorProto.UINT8: np.dtype("u1"), onnx.TensorProto.INT64: np.dtype("<i8"),
}  # fmt: skip


class BundleWeights(Mapping[str, Array]):
    """name → f32 (dequantized) or i64 (tid2eid), read when asked for. Names as in the official checkpoint."""

    def __init__(self, root: Path, config: ModelConfig) -> None:
        self._root, self._config = root, config
        graph = onnx.load(str(root / "model.onnx"), load_external_data=False).graph
        self._stored = {t.name: t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        self._names = [name for name in self._stored if not name.endswith((".scale", ".ffn.experts"))]
        for name in self._stored:
            if name.endswith(".ffn.experts"):
                for expert in range(config.n_routed_experts):
                    self._names += [f"{name}.{expert}.{part}.weight" for part in ("w1", "w2", "w3")]

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
            return codec.fp8_block_dequantize(raw, self._raw(f"{name.removesuffix('.weight')}.scale"))
        return raw

    def _raw(self, name: str) -> Array:
        if name not in self._stored:
            raise KeyError(name)
        tensor = self._stored[name]
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype, count = _NUMPY[tensor.data_type], math.prod(tensor.dims)
        path = self._root / place["location"]
        with path.open("rb") as file:
            file.seek(int(place["offset"]))
            array: Array = np.frombuffer(file.read(count * dtype.itemsize), dtype)
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
