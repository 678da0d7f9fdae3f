"""An official V4-Flash checkpoint folder: config.json and shards (or one unindexed model.safetensors).

Headers and the small tensors that name the checkpoint are read at :meth:`Checkpoint.open`; other bytes only when asked
for, so that the 160 GB model can be walked tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError
from appliance.model import ModelConfig
from exporter import codec, spec
from exporter.json_file import read_object
from exporter.safetensors_file import NUMPY_DTYPES, TensorInfo, read_header

__all__ = ["Checkpoint", "SourceFile", "TensorInfo"]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 64 << 20
MAX_SHARDS = 4096
SMALL_BYTES = 16 << 10  # tensors up to this size are read for the identity: 13 a layer


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One shard: its path and size."""

    path: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint. Every method that reads raises CheckpointError naming the file and tensor."""

    path: Path
    config: ModelConfig
    raw_config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    sources: tuple[SourceFile, ...]
    source_sha256: str  # names this checkpoint: config, headers, and the values of its small tensors

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Read config.json, the index, all shard headers and the small tensors of the folder ``path``."""
        if not path.is_dir():
            raise CheckpointError(f"{path}: not a folder; give a checkpoint folder with {CONFIG} and *.safetensors")
        raw = spec.read_raw(path / CONFIG)
        config = spec.parse_config(raw, str(path / CONFIG))
        tensors = _indexed(path) if (path / INDEX).exists() else _single(path)
        files = sorted({t.file for t in tensors.values()})
        sources = tuple(SourceFile(file, file.stat().st_size) for file in files)
        return Checkpoint(path, config, raw, tensors, sources, _identity(raw, tensors))

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor name, file by file in file order."""
        return tuple(self.tensors)

    @property
    def listing(self) -> Path:
        """The file that lists the tensors: the index, or the single safetensors file."""
        index = self.path / INDEX
        return index if index.exists() else self.path / SINGLE

    def has(self, name: str) -> bool:
        """True if the checkpoint holds ``name``."""
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """dtype, shape, file, offset and size of ``name``."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.listing}: tensor {name} is missing")
        return self.tensors[name]

    def read(self, name: str) -> NDArray[Any]:
        """Raw bits of ``name``: F8 and I8 as uint8, BF16 as uint16, F32 and I64 as such; shape as in the file."""
        info = self.info(name)
        array = np.empty(info.shape, NUMPY_DTYPES[info.dtype])
        self.read_into(name, array)
        return array

    def read_into(self, name: str, out: NDArray[Any]) -> None:
        """Fill ``out`` (C-contiguous, ``size_bytes`` long) with the bytes of ``name``."""
        info = self.info(name)
        if out.nbytes != info.size_bytes or not out.flags.c_contiguous:
            raise CheckpointError(f"{info.file}: {name} has {info.size_bytes} bytes, the buffer {out.nbytes}")
        view, done = out.reshape(-1).view(np.uint8), 0
        for chunk in self.stream(name):
            view[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)

    def stream(self, name: str, chunk_bytes: int = 4 << 20) -> Iterator[bytes]:
        """The bytes of ``name`` in pieces of at most ``chunk_bytes``."""
        return stream_tensor(self.info(name), chunk_bytes)

    def float32(self, name: str) -> NDArray[np.float32]:
        """``name`` as f32: BF16 and F32 exactly, FP8 and FP4 (I8) times their ``.scale`` sibling, exactly."""
        info = self.info(name)
        scale = f"{name.removesuffix('.weight')}.scale"
        codes = info.dtype in ("F8_E4M3", "I8")
        return dequantize(info, self.read(name), (self.info(scale), self.read(scale)) if codes else None)


def _identity(raw_config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """SHA-256 of config.json, of every tensor's name, dtype, shape and place, and of the bytes of all small tensors.

    Norms, biases, sinks and mHC scales of another training differ, so a sibling of equal shapes has another identity,
    and the 160 GB need not be read.
    """
    places = sorted([t.name, t.dtype, list(t.shape), t.file.name, t.offset] for t in tensors.values())
    hashed = hashlib.sha256(json.dumps([dict(raw_config), places], sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        info = tensors[name]
        if info.dtype in ("F32", "BF16") and info.size_bytes <= SMALL_BYTES:
            for piece in stream_tensor(info):
                hashed.update(piece)
    return hashed.hexdigest()


def stream_tensor(info: TensorInfo, chunk_bytes: int = 4 << 20) -> Iterator[bytes]:
    """The bytes of one tensor in pieces of at most ``chunk_bytes``; CheckpointError names file and tensor."""
    left = info.size_bytes
    try:
        with info.file.open("rb") as handle:
            handle.seek(info.offset)
            while left:
                chunk = handle.read(min(chunk_bytes, left))
                if not chunk:
                    raise CheckpointError(f"{info.file}: {info.name} ends {left} bytes early; copy the file again")
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{info.file}: {info.name} cannot be read ({error.strerror})") from None


def dequantize(info: TensorInfo, raw: NDArray[Any], scale: tuple[TensorInfo, codec.U8] | None) -> NDArray[np.float32]:
    """Raw bits of one tensor as f32, exactly; ``scale`` is the E8M0 sibling of FP8 and FP4 (I8) codes."""
    if info.dtype == "F32":
        return raw
    if info.dtype == "BF16":
        return codec.bf16_decode(raw)
    if scale is None:
        raise CheckpointError(f"{info.file}: {info.name} is {info.dtype}, expected F32, BF16, F8_E4M3 or I8")
    _check_scale(info, scale[0])
    fp4 = info.dtype == "I8"
    return codec.fp4_dequantize(raw, scale[1]) if fp4 else codec.fp8_block_dequantize(raw, scale[1])


def _check_scale(info: TensorInfo, scale: TensorInfo) -> None:
    """The sibling's dtype and shape follow from the weight's."""
    rows, columns = info.shape if len(info.shape) == 2 else (0, 0)
    block = codec.WEIGHT_BLOCK
    expected = (rows, columns // 16) if info.dtype == "I8" else (-(-rows // block), -(-columns // block))
    if scale.dtype != "F8_E8M0" or scale.shape != expected:
        raise CheckpointError(
            f"{scale.file}: {scale.name}: found {scale.dtype} {list(scale.shape)}, expected F8_E8M0 {list(expected)}"
        )


def _single(path: Path) -> dict[str, TensorInfo]:
    if not (path / SINGLE).is_file():
        raise CheckpointError(f"{path}: neither {INDEX} nor {SINGLE} is there; copy the checkpoint again")
    return {t.name: t for t in read_header(path / SINGLE)}


def _indexed(path: Path) -> dict[str, TensorInfo]:
    """All shards' headers; the index and the shards must name the same tensors."""
    index = path / INDEX
    weight_map = _weight_map(index)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            name = next(n for n, s in weight_map.items() if s == shard)
            raise CheckpointError(f"{path / shard}: the shard is missing ({index.name} lists {name} in it); copy it")
        for tensor in read_header(path / shard):
            if weight_map.get(tensor.name) != shard:
                listed = weight_map.get(tensor.name, "nowhere")
                raise CheckpointError(f"{path / shard}: holds {tensor.name}, {index.name} lists it {listed}")
            tensors[tensor.name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{path / shard}: tensor {name} is missing ({index.name} lists it there)")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    remedy = "copy the checkpoint again"
    weight_map = read_object(index, MAX_INDEX_BYTES, absent=remedy, damaged=remedy).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty; copy the checkpoint again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name}: file {shard!r} is not a plain *.safetensors name")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise CheckpointError(f"{index}: more than {MAX_SHARDS} shards; not an index of V4-Flash")
    return weight_map
