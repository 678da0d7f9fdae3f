"""The header of one .safetensors file, read by our own code and not trusted; and a deterministic writer.

A file is: u64 little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data. Accepted only if
the tensors tile the data exactly: no hole, no overlap, nothing after the last one.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError

MAX_HEADER_BYTES = 32 << 20  # the real model's 69,187 tensors in one file would need 9 MB
MAX_DIMS = 8
MAX_NAME_CHARS = 512
NUMPY_DTYPES: dict[str, str] = {  # F8 and BF16 as raw bits
    "F8_E4M3": "u1", "F8_E8M0": "u1", "I8": "u1", "U8": "u1", "BF16": "<u2", "F16": "<f2", "F32": "<f4",
    "I32": "<i4", "I64": "<i8",
}

Piece = bytes | memoryview


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: dtype as in the file ("F8_E4M3", "I8", …), offset and size in bytes in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size_bytes: int


def read_header(path: Path) -> tuple[TensorInfo, ...]:
    """Every tensor of one file, in file order. Raises CheckpointError naming the file (and tensor)."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as handle:
            prefix = handle.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size_bytes - 8):
                raise CheckpointError(
                    f"{path}: header of {header_bytes} bytes in a file of {size_bytes}, expected 2 to "
                    f"{MAX_HEADER_BYTES}; cut short or not a safetensors file, copy it again"
                )
            text = handle.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); copy the checkpoint again") from None
    entries = _parse(text, path)
    data_start = 8 + header_bytes
    tensors = [_tensor(name, entry, path, data_start) for name, entry in entries.items() if name != "__metadata__"]
    tensors.sort(key=lambda t: (t.offset, t.size_bytes))
    _check_tiling(tensors, path, data_start, size_bytes)
    return tuple(tensors)


def write_file(path: Path, tensors: Iterable[tuple[str, str, NDArray[Any]]]) -> None:
    """Write (name, dtype, array) in the given order; equal input gives equal bytes. Arrays hold the raw bits."""
    arrays = {name: (dtype, np.ascontiguousarray(array, NUMPY_DTYPES[dtype])) for name, dtype, array in tensors}
    entries = [(name, dtype, array.shape) for name, (dtype, array) in arrays.items()]
    write_streamed(path, entries, lambda name: [arrays[name][1].tobytes()])


def write_streamed(
    path: Path, entries: Sequence[tuple[str, str, tuple[int, ...]]], pieces: Callable[[str], Iterable[Piece] | None]
) -> int:
    """Write (name, dtype, shape) in the given order, each tensor's bytes as ``pieces(name)`` gives them.

    None makes the tensor all zeros as a hole in the file, which takes no disk. Returns the tensor bytes (holes
    included). CheckpointError if the pieces of a tensor are not as long as its shape says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name, _, _ in entries:
            end = data_start + int(header[name]["data_offsets"][1])
            found = pieces(name)
            for piece in found or ():
                handle.write(piece)
            if found is None:
                handle.seek(end)
            elif handle.tell() != end:
                raise CheckpointError(f"writing {path}: {name} is {handle.tell() - end:+,} bytes off its shape's size")
        handle.truncate(data_start + offset)
    return offset


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not JSON ({str(error)[:80]}); copy it again") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: header is a {type(entries).__name__}, expected an object; copy it again")
    return entries


def _counts(value: Any, most: int) -> list[int] | None:
    """``value`` if it is a list of at most ``most`` counts, else None."""
    if isinstance(value, list) and len(value) <= most and all(type(n) is int and 0 <= n < 1 << 50 for n in value):
        return value
    return None


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    where = f"{path}: {name[:MAX_NAME_CHARS]}"
    if len(name) > MAX_NAME_CHARS or not isinstance(entry, dict):
        raise CheckpointError(f"{where}: not a tensor entry; copy the file again")
    dtype, shape, offsets = entry.get("dtype"), _counts(entry.get("shape"), MAX_DIMS), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise CheckpointError(f"{where}: dtype {str(dtype)[:40]!r}, expected one of {', '.join(NUMPY_DTYPES)}")
    offsets = _counts(offsets, 2)
    if shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{where}: shape or data_offsets are not lists of counts; copy the file again")
    size_bytes = math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != size_bytes:
        raise CheckpointError(f"{where}: {offsets[1] - offsets[0]} bytes for {dtype} {shape}, expected {size_bytes}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], size_bytes)


def _check_tiling(tensors: list[TensorInfo], path: Path, data_start: int, file_bytes: int) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: {tensor.name} at byte {tensor.offset} {kind} (expected {end})")
        end += tensor.size_bytes
    if end != file_bytes:
        raise CheckpointError(f"{path}: {file_bytes} bytes, its header says {end}; cut short or damaged, copy it again")
