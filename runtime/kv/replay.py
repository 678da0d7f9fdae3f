"""How many tokens must be computed again where the blocks of a prefix are stored, but no checkpoint (exact replay).

The stored entries are kept; windows and rings begin as those of a new sequence. Let P be the end of the stored
blocks and S = P − R the start, both multiples of the chunk. Call a row exact when it has the bits of the
uninterrupted run, and let e(l) be the first position from which on every row that enters layer l is exact. Rows enter
layer 0 by their token id alone: e(0) = S. What layer l makes of token t depends on its row and on

1. the window, rows t − W + 1 … t: exact when t − W + 1 ≥ e(l);
2. entries that closed before this call's chunk: read from the pages, which are stored, so always exact;
3. entries that closed in the chunk [c, c + 256) of t itself: the graph takes those from the call's own candidates,
   computed from the rows [c, t] (ratio r without overlap) or [c − r, t] (with overlap: the first one also needs the
   a-half of the group before): exact when c ≥ e(l), or c − r ≥ e(l). The indexer's choice depends on the same rows.

So a sliding-window layer moves e by W − 1; a layer with entries moves it at least to the first chunk that begins at
or after e(l), or e(l) + r. The state at P has the windows of the last W tokens and, with overlap, r tokens' a-halves:
every layer's rows must be exact from P − max(W, r) on, and e grows with l, so R is e of the last layer plus that,
rounded up to whole chunks. From P on every row, entry and checkpoint is then exact. Nothing is assumed about what the
rows before e hold but that they are finite. V4 spec: n_win · L = 128 · 43 = 5,504 for windows alone; the candidates
make it 5,632.
"""

from __future__ import annotations

from appliance.model import ModelConfig


def replay_tokens(config: ModelConfig, chunk_tokens: int) -> int:
    """R: tokens before the end of the stored blocks where an exact replay begins; a multiple of ``chunk_tokens``."""
    window, overlap = config.sliding_window, config.csa_ratio
    exact = 0  # e(l) − S
    for layer in range(config.num_hidden_layers - 1):
        kind, moved = config.layer_kind(layer), exact + window - 1
        if kind != "S":
            moved = max(moved, _chunks(exact + (overlap if kind == "C" else 0), chunk_tokens))
        exact = moved
    needed = max(window, overlap) if "C" in map(config.layer_kind, range(config.num_hidden_layers)) else window
    return _chunks(exact + needed, chunk_tokens)


def _chunks(tokens: int, chunk_tokens: int) -> int:
    return -(-tokens // chunk_tokens) * chunk_tokens
