"""How a prompt is cut into calls: whole 256-token chunks up to c(n), then the tail as one call.

c(n) = 256·⌊(n − 1)/256⌋: at least the last token is always computed, because logits are not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from appliance.model import BLOCK_TOKENS


def prompt_boundary(n_tokens: int) -> int:
    """c(n): where the tail of a prompt of n tokens begins; 0 for n ≤ 256."""
    return max(n_tokens - 1, 0) // BLOCK_TOKENS * BLOCK_TOKENS


def prompt_calls(ids: Sequence[int], start: int = 0) -> Iterator[Sequence[int]]:
    """The calls that prefill ``ids`` from ``start`` (a multiple of 256) on: each 1 … 256 tokens."""
    for at in range(start, len(ids), BLOCK_TOKENS):
        yield ids[at : at + BLOCK_TOKENS]
