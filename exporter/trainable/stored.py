"""Number formats of trained tensors: the value that a file will hold, and its raw bits.

Scales are those of the codecs: the power of two that holds the group's (or block's) largest value without clipping.
A value that came from a file is on its grid and stays as it is, so training starts from what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from appliance.errors import CheckpointError
from exporter import codec
from exporter.trainable.loading import official_names
from exporter.trainable.rounding import round_bf16, round_fp4_groups, round_fp8_blocks
from exporter.view import View

Stored = tuple[str, str, NDArray[Any]]  # name, dtype, raw bits

_LINEARS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")
FORMATS = {"d4": "I8", "d8": "F8_E4M3"}


def is_dense(name: str) -> bool:
    """True for the ".weight" of an attention or shared-expert linear, which D4 and D8 differ in."""
    parts = name.split(".")
    if ".compressor." in name or parts[-1] != "weight":
        return False
    return "shared_experts" in parts or (len(parts) > 2 and "attn" in parts and parts[-2] in _LINEARS)


def stored_dtype(view: View, name: str, parameter: Tensor, dense: str | None) -> str:
    """dtype in which parameter ``name`` is written: the view's, or for linears that of ``dense`` ("d4", "d8")."""
    _, official = next(official_names(name, parameter))
    return FORMATS[dense] if dense is not None and is_dense(name) else view.info(official).dtype


def rounded(value: Tensor, dtype: str) -> Tensor:
    """The f32 value that a tensor of ``dtype`` holds for ``value`` [..., K]; a new tensor, no gradient."""
    value = value.detach()
    if dtype == "I8":
        return round_fp4_groups(value)
    if dtype == "F8_E4M3":
        return round_fp8_blocks(value)
    return round_bf16(value) if dtype == "BF16" else value.clone()


def encoded(name: str, value: NDArray[np.float32], dtype: str) -> Iterator[Stored]:
    """The tensors (weight, and scale where codes need one) of a rounded ``value``; CheckpointError unless bit-equal."""
    if dtype == "F32":
        yield name, dtype, value
        return
    if dtype == "BF16":
        bits = codec.bf16_encode(value)
        yield _same(name, value, codec.bf16_decode(bits)), dtype, bits
        return
    fp4 = dtype == "I8"
    codes, scale = codec.fp4_quantize(value) if fp4 else codec.fp8_block_quantize(value)
    back = codec.fp4_dequantize(codes, scale) if fp4 else codec.fp8_block_dequantize(codes, scale)
    yield _same(name, value, back), dtype, codes
    yield f"{name.removesuffix('.weight')}.scale", "F8_E8M0", scale


def _same(name: str, value: NDArray[np.float32], back: NDArray[np.float32]) -> str:
    if not np.array_equal(value, back):
        raise CheckpointError(f"{name}: the stored format does not hold the trained value; report this, it is a defect")
    return name
