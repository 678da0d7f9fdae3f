"""How the field names what we store (compressed-tensors' preset schemes and formats), so that others' tools can tell.

Weights only: the engine keeps the inputs of linears in f32, so the schemes end in A16 (16-bit activations or wider).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scheme:
    """One storage form of a linear's weight: dtype in our files, compressed-tensors' names, bits with scales."""

    dtype: str  # of the ".weight" in the checkpoint's terms
    preset: str
    compression: str
    bits_per_weight: float
    scale: str


MXFP4 = Scheme("I8", "MXFP4A16", "mxfp4-pack-quantized", 4.25, "E8M0 per 32 inputs")
FP8_BLOCK = Scheme("F8_E4M3", "FP8_BLOCK", "float-quantized", 8 + 8 / 128**2, "E8M0 per 128×128")
BF16 = Scheme("BF16", "UNQUANTIZED", "dense", 16.0, "none")

BY_DTYPE = {scheme.dtype: scheme for scheme in (MXFP4, FP8_BLOCK, BF16)}
DENSE = {"d4": MXFP4, "d8": FP8_BLOCK}
HEAD = {"fp8": FP8_BLOCK, "bf16": BF16}
