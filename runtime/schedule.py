"""How a prompt is cut into calls: whole 256-token chunks up to c(n), then the tail as one call.

c(n) = 256·⌊(n − 1)/256⌋: at least the last token is always computed, because logits are not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from appliance.model import BLOCK_TOKENS

# A prefill this long leaves a checkpoint on its way, and again after as much. What was cut off before it comes back by
# exact replay, 5,632 tokens for V4-Flash whatever this distance; every 16,384 tokens writes 3 % more and hits no more.
ANCHOR_TOKENS = 65_536
# A checkpoint takes the bytes of 1,037 tokens' blocks, so one this soon after another is not worth them: what it would
# save is less than 1/40 of the prompt, and at most 4,096 tokens. A bound of 1,024 lets agents write 1.144 times their
# distinct bytes instead of 1.128.
NEAR_SHARE, NEAR_TOKENS = 40, 4096


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

    Nothing below what was found: ``hit_tokens`` and, in an exact replay, the stored blocks it runs through. Of points
    that lie near each other the last one is taken, and none near ``hit_tokens``.
    """
    on_the_way = range(hit_tokens + ANCHOR_TOKENS, boundary, ANCHOR_TOKENS)
    candidates = {boundary, common_tokens, anchor_tokens, shared_tokens, *map(whole_blocks, on_the_way)}
    taken: list[int] = []
    for at in sorted(candidates, reverse=True):
        wanted = hit_tokens < at <= boundary and at >= hit_blocks * BLOCK_TOKENS and far_apart(hit_tokens, at)
        if wanted and (not taken or far_apart(at, taken[-1])):
            taken.append(at)
    return frozenset(taken)


def far_apart(earlier_tokens: int, tokens: int) -> bool:
    """Does a checkpoint after ``tokens`` tokens save enough where there is one after ``earlier_tokens``?

    Of a prompt at most 1/40, and at most 4,096 tokens, is so computed again: measured on traces of agents and chats,
    benchmarks/kv_trace.py.
    """
    return (tokens - earlier_tokens) * NEAR_SHARE >= min(tokens, NEAR_TOKENS * NEAR_SHARE)
