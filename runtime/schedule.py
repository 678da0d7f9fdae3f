"""How a prompt is cut into calls: whole 256-token chunks up to c(n), then the tail as one call.

c(n) = 256·⌊(n − 1)/256⌋: at least the last token is always computed, because logits are not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from appliance.model import BLOCK_TOKENS

ANCHOR_TOKENS = 16_384  # a prefill this long leaves a checkpoint on its way, and again after as much


def whole_blocks(n_tokens: int) -> int:
    """256·⌊n/256⌋."""
    return n_tokens // BLOCK_TOKENS * BLOCK_TOKENS


def prompt_boundary(n_tokens: int) -> int:
    """c(n): where the tail of a prompt of n tokens begins; 0 for n ≤ 256."""
    return whole_blocks(max(n_tokens - 1, 0))


def prompt_calls(ids: Sequence[int], start: int = 0) -> Iterator[Sequence[int]]:
    """The calls that prefill ``ids`` from ``start`` on: each 1 … 256 tokens, none across a multiple of 256.

    ``start`` is a multiple of 256 except after an exact tail, which only comes where any cut gives the same bits.
    """
    while start < len(ids):
        stop = (start // BLOCK_TOKENS + 1) * BLOCK_TOKENS
        yield ids[start:stop]
        start = stop


def write_points(
    boundary: int, hit_tokens: int, hit_blocks: int, *, common_tokens: int, anchor_tokens: int, shared_tokens: int
) -> frozenset[int]:
    """Where a prompt with c(n) = ``boundary`` leaves a checkpoint, in tokens: what others may share, and c(n).

    Nothing below what was found: ``hit_tokens`` and, in an exact replay, the stored blocks it runs through.
    """
    candidates = {boundary, common_tokens, anchor_tokens, shared_tokens, *range(ANCHOR_TOKENS, boundary, ANCHOR_TOKENS)}
    return frozenset(at for at in candidates if hit_tokens < at <= boundary and at >= hit_blocks * BLOCK_TOKENS)
