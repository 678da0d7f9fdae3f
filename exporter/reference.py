"""DeepSeek-V4-Flash in fp32 torch: what every graph and kernel is measured against. Slow and plain on purpose.

Prefill and decode are one function: :meth:`Reference.forward` appends any number of tokens to a state. Two switches
add the trained roundings: ``kv_sim`` stores cache rows and index queries in V4's formats (the product's ``kv-v4``),
``act_sim`` rounds activations to BF16 where the official code casts, and the inputs of quantised linears to E4M3 per
128 (needs such inputs to be multiples of 128 wide).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from numpy.typing import NDArray

from appliance.errors import EngineError
from appliance.model import ModelConfig
from exporter import reference_math as ops
from exporter import rope as rope_tables
from exporter import torch_codec
from exporter.checkpoint import Checkpoint
from exporter.reference_state import LayerState, Partials, Rows, State, Trace, new_layer
from exporter.reference_weights import Arrangement, CheckpointWeights
from exporter.view import View

__all__ = ["Arrangement", "CheckpointWeights", "Reference", "State", "Trace"]

Weights = Mapping[str, NDArray[Any] | Callable[[], NDArray[Any]]]
Table = tuple[torch.Tensor, torch.Tensor]


class Reference:
    """The model. ``weights``: official names to f32 arrays (or callables giving them); kept as tensors once used.

    Experts are named by rank; ``arrangement`` tells their official ids, whose order all sums and ties follow, and which
    linears see rotated inputs. Layers may hold fewer experts than the config says: the router's rows count.
    """

    def __init__(
        self, weights: Weights, config: ModelConfig, *, act_sim: bool = False, kv_sim: bool = False,
        arrangement: Arrangement | None = None,
    ) -> None:  # fmt: skip
        self.config, self.act_sim, self.kv_sim = config, act_sim, kv_sim
        self.arrangement = arrangement or Arrangement()
        self._weights, self._tensors = weights, dict[str, torch.Tensor]()
        self._frequencies = dict[bool, torch.Tensor]()
        self._eps = config.rms_norm_eps

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, *, act_sim: bool = False, kv_sim: bool = False) -> Self:
        """The reference of an official checkpoint; CheckpointError names a missing or malformed tensor."""
        return cls(CheckpointWeights(checkpoint), checkpoint.config, act_sim=act_sim, kv_sim=kv_sim)

    @classmethod
    def from_view(cls, view: View, *, act_sim: bool = False, kv_sim: bool = False) -> Self:
        """The reference of a view: its experts, its overlays; CheckpointError as :meth:`from_checkpoint`."""
        weights = CheckpointWeights(view)
        return cls(weights, view.config, act_sim=act_sim, kv_sim=kv_sim, arrangement=Arrangement.of(view))

    def new_state(self, *, keep_all: bool = False) -> State:
        """An empty sequence; ``keep_all`` keeps every window row for :meth:`State.rows`."""
        layers = [new_layer(self.config, ratio) for ratio in self.config.compress_ratios]
        return State(layers, new_layer(self.config, 0), keep_all=keep_all)

    def forward(self, ids: list[int], state: State, *, trace: Trace | None = None) -> torch.Tensor:
        """Append ``ids`` (n ≥ 1) to ``state``; logits f32 [n, vocab] of every one of them."""
        token_ids = self._checked_ids(ids)
        streams = self.embed(token_ids)
        for layer, layer_state in enumerate(state.layers):
            streams = self.block(layer, streams, token_ids, layer_state, state, trace=trace)
        state.tokens += len(ids)
        if trace is not None:
            trace.streams.append(streams)
        return self.head(streams, trace=trace)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [n] to S equal streams [n, S, D]."""
        return self._w("embed.weight")[ids][:, None].repeat(1, self.config.hc_mult, 1)

    def block(
        self, layer: int, streams: torch.Tensor, ids: torch.Tensor, layer_state: LayerState, state: State, *,
        trace: Trace | None = None,
    ) -> torch.Tensor:
        """One layer on streams [n, S, D] at positions ``state.tokens`` …; the layer tests call it directly."""
        if trace is not None:
            trace.block_inputs.setdefault(layer, []).append(streams)
        out = self._block(f"layers.{layer}", layer, streams, ids, layer_state, state.tokens, state.keep_all, trace)
        if trace is not None:
            trace.block_outputs.setdefault(layer, []).append(out)
        return out

    def head(self, streams: torch.Tensor, prefix: str = "", *, trace: Trace | None = None) -> torch.Tensor:
        """Streams [n, S, D] to logits f32 [n, vocab]."""
        mixes = ops.hc_mixes(streams, self._w(f"{prefix}hc_head_fn"), self._eps)
        pre = ops.hc_head(
            mixes, self._w(f"{prefix}hc_head_scale"), self._w(f"{prefix}hc_head_base"), self.config.hc_eps
        )
        x = self._norm(self._cast(ops.hc_collect(streams, pre)), f"{prefix}norm")
        if trace is not None:
            trace.final_norm.append(x)
        return x @ self._w("head.weight").T

    def mtp_logits(self, streams: torch.Tensor, next_ids: list[int], state: State) -> torch.Tensor:
        """MTP block mtp.0: streams before the head [n, S, D] at t and the token at t+1 to logits of t+2 [n, vocab]."""
        name, ids = "mtp.0", self._checked_ids(next_ids)
        token = self._linear(f"{name}.e_proj", self._norm(self._w("embed.weight")[ids], f"{name}.enorm"))
        mixed = token[:, None] + self._linear(f"{name}.h_proj", self._norm(streams, f"{name}.hnorm"))
        out = self._block(name, self.config.num_hidden_layers, self._cast(mixed), ids, state.mtp, state.mtp_tokens,
                          state.keep_all, None)
        state.mtp_tokens += len(next_ids)
        return self.head(out, f"{name}.")

    def _w(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            value = self._weights[name]
            self._tensors[name] = torch.from_numpy(value() if callable(value) else value)
        return self._tensors[name]

    def _checked_ids(self, ids: list[int]) -> torch.Tensor:
        if not ids or min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise EngineError(f"reference: token ids must be 0 to {self.config.vocab_size - 1}, at least one")
        return torch.tensor(ids, dtype=torch.int64)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A linear whose weight is FP8 or FP4: its input is what act_sim rounds to E4M3."""
        x = self._rotated(name, x)
        return self._cast((torch_codec.act_round_trip(x) if self.act_sim else x) @ self._w(f"{name}.weight").T)

    def _rotated(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] times the block Hadamard matrix that ``name``'s weight is stored with, if any."""
        block = self.arrangement.rotations.get(name, 0)
        return torch_codec.hadamard(x.unflatten(-1, (-1, block))).flatten(-2) if block else x

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        """What the official code casts to BF16."""
        return x.to(torch.bfloat16).to(torch.float32) if self.act_sim else x

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMSNorm with the weight ``name``."""
        return self._cast(ops.rms_norm(x, self._w(f"{name}.weight"), self._eps))

    def _rope(self, x: torch.Tensor, table: Table) -> torch.Tensor:
        return self._cast(ops.rope(x, table))

    def _block(
        self, name: str, layer: int, streams: torch.Tensor, ids: torch.Tensor, state: LayerState, start: int,
        keep_all: bool, trace: Trace | None,
    ) -> torch.Tensor:
        streams = self._attention_half(name, layer, streams, state, start, keep_all, trace)
        x, post, comb = self._hc_pre(f"{name}.hc_ffn", streams)
        y = self._moe(f"{name}.ffn", layer, self._norm(x, f"{name}.ffn_norm"), ids, trace)
        return self._cast(ops.hc_post(y, streams, post, comb))

    def _attention_half(
        self, name: str, layer: int, streams: torch.Tensor, state: LayerState, start: int, keep_all: bool,
        trace: Trace | None,
    ) -> torch.Tensor:
        """Streams [n, S, D] after the attention; the experts' half of a block needs no state."""
        x, post, comb = self._hc_pre(f"{name}.hc_attn", streams)
        y = self._attention(name, layer, self._norm(x, f"{name}.attn_norm"), state, start, keep_all, trace)
        return self._cast(ops.hc_post(y, streams, post, comb))

    def _hc_pre(self, name: str, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        c = self.config
        mixes = ops.hc_mixes(streams, self._w(f"{name}_fn"), self._eps)
        pre, post, comb = ops.hc_split(
            mixes, self._w(f"{name}_scale"), self._w(f"{name}_base"), c.hc_mult, c.hc_sinkhorn_iters, c.hc_eps
        )
        return self._cast(ops.hc_collect(streams, pre)), post, comb

    def _ratio(self, layer: int) -> int:
        """Compress ratio; the MTP block follows the last layer and has none."""
        return self.config.compress_ratios[layer] if layer < self.config.num_hidden_layers else 0

    def _frequency(self, compressed: bool) -> torch.Tensor:
        if compressed not in self._frequencies:
            table = rope_tables.frequencies(self.config, compressed=compressed)
            self._frequencies[compressed] = torch.from_numpy(table)
        return self._frequencies[compressed]

    def _attention(
        self, block: str, layer: int, x: torch.Tensor, state: LayerState, start: int, keep_all: bool,
        trace: Trace | None,
    ) -> torch.Tensor:
        c, name, ratio, n = self.config, f"{block}.attn", self._ratio(layer), len(x)
        positions = torch.arange(start, start + n)
        frequency = self._frequency(ratio > 0)
        table = ops.rope_tables(frequency, positions)
        latent = self._norm(self._linear(f"{name}.wq_a", x), f"{name}.q_norm")
        query = self._linear(f"{name}.wq_b", latent).unflatten(-1, (c.num_attention_heads, c.head_dim))
        query = self._rope(ops.head_norm(query, self._eps, self._cast), table)
        kv = self._norm(self._linear(f"{name}.wkv", x), f"{name}.kv_norm")
        state.window.append(*self._stored_row(self._rope(kv, table)))
        age = positions[:, None] - (state.window.first + torch.arange(len(state.window.values)))
        keys, allowed = state.window.values, (age >= 0) & (age < c.sliding_window)
        if state.compressor is not None:
            entries, chosen = self._compressed(name, layer, x, latent, table, state, positions, frequency, trace)
            keys, allowed = torch.cat((keys, entries)), torch.cat((allowed, chosen), dim=1)
        out = self._cast(ops.attend(query, keys, allowed, self._w(f"{name}.attn_sink"), self._cast))
        if not keep_all:
            state.window.keep_last(c.sliding_window)
        groups = self._cast(ops.unrope(out, table)).reshape(n, c.o_groups, -1)
        return self._linear(f"{name}.wo_b", self._grouped_linear(f"{name}.wo_a", groups).flatten(1))

    def _grouped_linear(self, name: str, groups: torch.Tensor) -> torch.Tensor:
        """groups [n, G, I] to [n, G, R]: group g meets rows g·R … of the weight [G·R, I]; act_sim leaves its input."""
        weight = self._w(f"{name}.weight").unflatten(0, (groups.shape[1], -1))
        return self._cast(torch.einsum("ngi,goi->ngo", self._rotated(name, groups), weight))

    def _stored_row(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A window or entry row as later queries read it, and its stored bytes."""
        if not self.kv_sim:
            return row, None
        packed = torch_codec.attention_row_pack(row, self.config.qk_rope_head_dim)
        return torch_codec.attention_row_unpack(packed, self.config.head_dim, self.config.qk_rope_head_dim), packed

    def _stored_index(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """An index key or query as it is scored, and its stored bytes."""
        if not self.kv_sim:
            return row, None
        packed = torch_codec.index_row_pack(row)
        return torch_codec.index_row_unpack(packed), packed

    def _compressed(
        self, name: str, layer: int, x: torch.Tensor, latent: torch.Tensor, table: Table, state: LayerState,
        positions: torch.Tensor, frequency: torch.Tensor, trace: Trace | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All entries [E, d] and which of them each query may read, bool [n, E]."""
        ratio = self._ratio(layer)
        if state.compressor is None:
            raise EngineError(f"reference: layer {layer} has no compressor state")
        entries = self._compress(f"{name}.compressor", x, positions, state.compressor, frequency, self._stored_row)
        visible = torch.arange(len(entries.values)) < ((positions + 1) // ratio)[:, None]
        if state.indexer is None:
            return entries.values, visible
        index = f"{name}.indexer"
        keys = self._compress(f"{index}.compressor", x, positions, state.indexer, frequency, self._stored_index)
        scores = self._index_scores(index, x, latent, table, keys).masked_fill(~visible, float("-inf"))
        return entries.values, self._select(layer, scores, trace)

    def _index_scores(
        self, name: str, x: torch.Tensor, latent: torch.Tensor, table: Table, keys: Rows
    ) -> torch.Tensor:
        heads, dims = self.config.index_n_heads, self.config.index_head_dim
        query = self._rope(self._linear(f"{name}.wq_b", latent).unflatten(-1, (heads, dims)), table)
        weights = self._cast(x @ self._w(f"{name}.weights_proj.weight").T) * (dims**-0.5 * heads**-0.5)
        return ops.index_scores(self._stored_index(query)[0], keys.values, weights)

    def _select(self, layer: int, scores: torch.Tensor, trace: Trace | None) -> torch.Tensor:
        """The top-k of the visible entries (others −inf), as bool [n, E]."""
        values, ids = ops.top_k(scores, self.config.index_topk + 1)
        chosen = ids[:, : self.config.index_topk]
        real = values[:, : self.config.index_topk] > float("-inf")
        if trace is not None:
            trace.selected.setdefault(layer, []).append(torch.where(real, chosen, -1))
            trace.topk_margins.setdefault(layer, []).append(_margins(values, self.config.index_topk))
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, real)

    def _compress(
        self, name: str, x: torch.Tensor, positions: torch.Tensor, state: Partials, frequency: torch.Tensor,
        stored: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]],
    ) -> Rows:
        """Add x [n, D] to a compressor and append the entries that close (RoPE at their first token)."""
        ape, width = self._w(f"{name}.ape"), state.entries.values.shape[1]
        ratio = len(ape)
        state.kv = torch.cat((state.kv, x @ self._w(f"{name}.wkv.weight").T))
        gate = x @ self._w(f"{name}.wgate.weight").T + ape[positions % ratio]
        state.gate = torch.cat((state.gate, gate))
        blocks = len(state.kv) // ratio
        if blocks == 0:
            return state.entries
        kv, gates = (t[: blocks * ratio].unflatten(0, (blocks, ratio)) for t in (state.kv, state.gate))
        state.kv, state.gate = state.kv[blocks * ratio :], state.gate[blocks * ratio :]
        if len(state.carry_kv):
            kv, state.carry_kv = _overlapped(kv, state.carry_kv, width)
            gates, state.carry_gate = _overlapped(gates, state.carry_gate, width)
        rows = self._norm(self._cast(ops.pool(kv, gates)), f"{name}.norm")
        first = len(state.entries.values)
        table = ops.rope_tables(frequency, torch.arange(first, first + blocks) * ratio)
        state.entries.append(*stored(self._rope(rows, table)))
        return state.entries

    def _moe(self, name: str, layer: int, x: torch.Tensor, ids: torch.Tensor, trace: Trace | None) -> torch.Tensor:
        """Routed and shared experts of x [n, D]. Columns are experts by official id, whatever their ranks."""
        order = self._order(layer)
        gate = self._w(f"{name}.gate.weight")
        scores = ops.route_scores(x, gate if order is None else gate[order])
        columns = self._routed(name, layer, scores, ids, order, trace)
        chosen = scores.gather(1, columns)
        weights = chosen / chosen.sum(-1, keepdim=True) * self.config.routed_scaling_factor
        if trace is not None:
            trace.routed.setdefault(layer, []).append(columns if order is None else order[columns])
        out = torch.zeros_like(x)
        for column in columns.unique().tolist():
            token, slot = torch.nonzero(columns == column, as_tuple=True)
            rank = column if order is None else int(order[column])
            y = self._expert(f"{name}.experts.{rank}", x[token], weights[token, slot], ops.swiglu)
            out.index_add_(0, token, y)  # a rewritten token table may name one expert twice
        shared = self._expert(f"{name}.shared_experts", x, torch.ones(len(x)), ops.shared_swiglu)
        return self._cast(out + shared)

    def _order(self, layer: int) -> torch.Tensor | None:
        """Ranks by official id, i64 [K]; None where they are in that order."""
        order, name = self.arrangement.order(layer), f"layers.{layer}.ffn.order"
        if order is not None and name not in self._tensors:
            self._tensors[name] = torch.tensor(order.tolist(), dtype=torch.int64)
        return None if order is None else self._tensors[name]

    def _routed(
        self, name: str, layer: int, scores: torch.Tensor, ids: torch.Tensor, order: torch.Tensor | None,
        trace: Trace | None,
    ) -> torch.Tensor:
        """Scores [n, K] in official order to the chosen columns i64 [n, k], ascending."""
        k = self.config.num_experts_per_tok
        if layer < self.config.num_hash_layers:
            ranks = self._w(f"{name}.gate.tid2eid")[ids]
            columns = ranks if order is None else torch.argsort(order)[ranks]
        else:
            bias = self._w(f"{name}.gate.bias")
            values, ranked = ops.top_k(scores + (bias if order is None else bias[order]), k + 1)
            columns = ranked[:, :k]
            if trace is not None:
                trace.router_margins.setdefault(layer, []).append(_margins(values, k))
        return torch.sort(columns, dim=-1).values

    def _expert(
        self, name: str, x: torch.Tensor, weight: torch.Tensor,
        activation: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
    ) -> torch.Tensor:
        """w2(weight · swiglu(w1 x, w3 x)): the routing weight goes in before w2 (and before its rounding)."""
        inner = activation(self._linear(f"{name}.w1", x), self._linear(f"{name}.w3", x), self.config.swiglu_limit)
        return self._linear(f"{name}.w2", self._cast(weight[:, None] * inner))


def _overlapped(blocks: torch.Tensor, carry: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, r, 2d] to [B, 2r, d]: the "a" half of the block before (``carry`` first), the own "b" half; new carry."""
    own, ahead = blocks[..., width:], blocks[..., :width]
    before = torch.cat((carry[None], ahead[:-1]))
    return torch.cat((before, own), dim=1), ahead[-1]


def _margins(values: torch.Tensor, count: int) -> torch.Tensor:
    """Distance of the last chosen from the first left-out score, [rows that left a real one out]."""
    if values.shape[1] <= count:
        return torch.zeros(0)
    distance = values[:, count - 1] - values[:, count]
    return distance[torch.isfinite(values[:, count])]
