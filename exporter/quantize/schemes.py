"""How the field names what we store (compressed-tensors' preset schemes and formats), so that others' tools can tell.

Weights only: the engine keeps the inputs of linears in f32, so the schemes end in A16 (16-bit activations or wider).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scheme:
    """One storage form of a linear's weight: dtype in our files, compressed-tensors' name."""

    dtype: str  # of the ".weight" in the checkpoint's terms
    preset: str


MXFP4 = Scheme("I8", "MXFP4A16")  # 4.25 bits: E8M0 per 32 inputs
FP8_BLOCK = Scheme("F8_E4M3", "FP8_BLOCK")  # E8M0 per 128×128
