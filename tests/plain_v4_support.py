"""One V4-Flash block in plain numpy, straight from the formulas, for tests only: nothing of `exporter`'s maths is used.

`official=True` rounds where the official code does: BF16 after each operation that it runs in BF16 (index scores too),
E4M3 per 128 at the inputs of quantised linears, E4M3 per 64 for cache rows, Hadamard and FP4 per 32 for the index path.
`bf16=False` leaves the BF16 casts out and keeps the rest, `bf16_scores=False` only those of the index scores: the
difference is what those casts alone do to a score.
Prefill only, from position 0. Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.model import ModelConfig

Array = NDArray[np.float64]
E4M3, E2M1 = (3, -6, 448.0), (1, 0, 6.0)  # mantissa bits, least exponent, largest value


def nearest(kind: tuple[int, int, float], x: Array) -> Array:
    """The nearest value of a small float format, ties to the even mantissa, saturating."""
    bits, least, largest = kind
    exponent = np.maximum(np.frexp(x)[1] - 1, least)
    step = np.exp2(exponent - bits)
    return np.clip(np.rint(x / step) * step, -largest, largest)


def grouped(kind: tuple[int, int, float], x: Array, group: int, floor: float) -> Array:
    """``x`` in groups along the last axis, each with the smallest power of two that keeps it in the format's range."""
    parts = x.reshape(*x.shape[:-1], -1, group)
    largest = np.maximum(np.abs(parts).max(-1, keepdims=True), floor) / kind[2]
    scale = 2.0 ** np.ceil(np.log2(largest))
    return (nearest(kind, parts / scale) * scale).reshape(x.shape)


def bf16(x: Array) -> Array:
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def top_sets(scores: Array, count: int) -> tuple[list[set[int]], Array]:
    """The best ``count`` of each row (−inf is never one), and how far the last of them is above the first left out.

    The distance is inf where nothing was left out; rows must be longer than ``count``.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, 1)
    sets = [{int(i) for i in row[:count] if line[i] > -np.inf} for row, line in zip(order, scores, strict=True)]
    left_out = np.isfinite(ranked[:, count])
    return sets, np.where(left_out, ranked[:, count - 1], np.inf) - np.where(left_out, ranked[:, count], 0)


@dataclass
class Seen:
    """Scores a block chose by: the router's [n, experts] with bias, the index's [n, entries] (−inf = not visible)."""

    router: dict[str, Array] = field(default_factory=dict)
    index: dict[str, Array] = field(default_factory=dict)


class PlainModel:
    """Blocks over official names; ``weights[name]`` is the dequantised array."""

    def __init__(
        self, weights: Mapping[str, Any], config: ModelConfig, *, official: bool = True, bf16: bool = True,
        bf16_scores: bool = True,
    ) -> None:
        self.weights, self.config, self.official, self.half = weights, config, official, official and bf16
        self.half_scores = self.half and bf16_scores
        self.seen = Seen()
        self.arrays: dict[str, Array] = {}

    def w(self, name: str) -> Array:
        if name not in self.arrays:
            value = self.weights[name]
            self.arrays[name] = np.asarray(value() if callable(value) else value, np.float64)
        return self.arrays[name]

    def cast(self, x: Array) -> Array:
        return bf16(x) if self.half else x

    def linear(self, name: str, x: Array) -> Array:
        """A quantised linear."""
        x = grouped(E4M3, x, 128, 1e-4) if self.official else x
        return self.cast(x @ self.w(f"{name}.weight").T)

    def norm(self, x: Array, name: str) -> Array:
        return self.cast(x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps) * self.w(name))

    def turned(self, x: Array, positions: NDArray[np.int64], compressed: bool, sign: int = 1) -> Array:
        """RoPE in interleaved pairs on the last dims; angles are float32 products, as trained."""
        c, dims = self.config, self.config.qk_rope_head_dim
        steps = self.yarn_steps() if compressed else c.rope_theta ** (-np.arange(0, dims, 2) / dims)
        angle = (positions[:, None].astype(np.float32) * steps.astype(np.float32)).astype(np.float64)
        turn = np.exp(sign * 1j * angle).reshape(len(positions), *[1] * (x.ndim - 2), -1)
        pairs = (x[..., -dims::2] + 1j * x[..., 1 - dims :: 2]) * turn
        out = x.copy()
        out[..., -dims::2], out[..., 1 - dims :: 2] = pairs.real, pairs.imag
        return self.cast(out)

    def yarn_steps(self) -> Array:
        c, y, dims = self.config, self.config.rope_scaling, self.config.qk_rope_head_dim
        theta, half = c.compress_rope_theta, dims // 2

        def corner(turns: float) -> float:
            return dims * np.log(y.original_max_position_embeddings / (2 * np.pi * turns)) / (2 * np.log(theta))

        low, high = max(np.floor(corner(y.beta_fast)), 0), min(np.ceil(corner(y.beta_slow)), dims - 1)
        smooth = 1 - np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
        steps = theta ** (-np.arange(0, dims, 2) / dims)
        return steps / y.factor * (1 - smooth) + steps * smooth

    def stored_row(self, x: Array) -> Array:
        if not self.official:
            return x
        nope = x.shape[-1] - self.config.qk_rope_head_dim
        return np.concatenate([grouped(E4M3, x[..., :nope], 64, 1e-4), x[..., nope:]], -1)

    def index_row(self, x: Array) -> Array:
        h = np.ones((1, 1))
        while len(h) < x.shape[-1]:
            h = np.block([[h, h], [h, -h]])
        x = self.cast(x @ h * len(h) ** -0.5)
        return grouped(E2M1, x, 32, 6 * 2.0**-126) if self.official else x

    # ------------------------------------------------------------------------------------------------ attention
    def compress(self, name: str, x: Array, ratio: int, width: int) -> Array:
        """Entries [n // ratio, width] after their norm and RoPE, before they are stored."""
        blocks = len(x) // ratio
        x = x[: blocks * ratio]
        kv = (x @ self.w(f"{name}.wkv.weight").T).reshape(blocks, ratio, -1)
        gate = (x @ self.w(f"{name}.wgate.weight").T).reshape(blocks, ratio, -1) + self.w(f"{name}.ape")
        if ratio == self.config.csa_ratio:
            zeros, never = np.zeros((1, ratio, width)), np.full((1, ratio, width), -np.inf)
            kv = np.concatenate([np.concatenate([zeros, kv[:-1, :, :width]]), kv[..., width:]], 1)
            gate = np.concatenate([np.concatenate([never, gate[:-1, :, :width]]), gate[..., width:]], 1)
        share = np.exp(gate - gate.max(1, keepdims=True))
        pooled = self.cast((share / share.sum(1, keepdims=True) * kv).sum(1))
        return self.turned(self.norm(pooled, f"{name}.norm.weight"), np.arange(blocks) * ratio, True)

    def index_scores(self, name: str, x: Array, latent: Array, positions: NDArray[np.int64], ratio: int) -> Array:
        c = self.config
        query = self.linear(f"{name}.wq_b", latent).reshape(len(x), c.index_n_heads, c.index_head_dim)
        query = self.index_row(self.turned(query, positions, True))
        keys = self.index_row(self.compress(f"{name}.compressor", x, ratio, c.index_head_dim))
        weights = self.cast(x @ self.w(f"{name}.weights_proj.weight").T) * (c.index_head_dim * c.index_n_heads) ** -0.5
        short = bf16 if self.half_scores else np.asarray
        per_head = np.maximum(short(np.einsum("nhd,ed->nhe", query, keys)), 0)
        return short(short(per_head * weights[..., None]).sum(1))

    def attention(self, block: str, x: Array, ratio: int) -> Array:
        c, name, n = self.config, f"{block}.attn", len(x)
        at, heads = np.arange(n), c.num_attention_heads
        latent = self.norm(self.linear(f"{name}.wq_a", x), f"{name}.q_norm.weight")
        q = self.linear(f"{name}.wq_b", latent).reshape(n, heads, c.head_dim)
        size = self.cast(self.cast(self.cast(q * q).mean(-1, keepdims=True)) + c.rms_norm_eps)
        q = self.turned(self.cast(q * self.cast(size**-0.5)), at, ratio > 0)
        kv = self.norm(self.linear(f"{name}.wkv", x), f"{name}.kv_norm.weight")
        keys = self.stored_row(self.turned(kv, at, ratio > 0))
        ages = at[:, None] - at
        allowed = (ages >= 0) & (ages < c.sliding_window)
        if ratio:
            entries = self.stored_row(self.compress(f"{name}.compressor", x, ratio, c.head_dim))
            visible = np.arange(len(entries)) < ((at + 1) // ratio)[:, None]
            if ratio == c.csa_ratio:
                scores = np.where(visible, self.index_scores(f"{name}.indexer", x, latent, at, ratio), -np.inf)
                self.seen.index[block] = scores
                chosen, _ = top_sets(scores, c.index_topk)
                visible = np.array([[e in row for e in range(len(entries))] for row in chosen])
            keys, allowed = np.concatenate([keys, entries]), np.concatenate([allowed, visible], 1)
        scores = np.einsum("nhd,kd->nhk", q, keys) * c.head_dim**-0.5
        scores = np.where(allowed[:, None], scores, -np.inf)
        top = scores.max(-1, keepdims=True)
        p = np.exp(scores - top)
        total = p.sum(-1, keepdims=True) + np.exp(self.w(f"{name}.attn_sink")[:, None] - top)
        out = self.cast(self.cast(p) @ keys / total)
        out = self.turned(out, at, ratio > 0, sign=-1).reshape(n, c.o_groups, -1)
        down = self.w(f"{name}.wo_a.weight").reshape(c.o_groups, c.o_lora_rank, -1)
        return self.linear(f"{name}.wo_b", self.cast(np.einsum("ngi,goi->ngo", out, down)).reshape(n, -1))

    # ------------------------------------------------------------------------------------------------ experts
    def expert(self, name: str, x: Array, weight: Array) -> Array:
        limit = self.config.swiglu_limit
        gate = np.minimum(self.linear(f"{name}.w1", x), limit)
        up = self.linear(f"{name}.w3", x).clip(-limit, limit)
        return self.linear(f"{name}.w2", self.cast(weight[:, None] * gate * sigmoid(gate) * up))

    def experts(self, block: str, layer: int, x: Array, ids: NDArray[np.int64]) -> Array:
        c, name = self.config, f"{block}.ffn"
        scores = np.sqrt(np.logaddexp(0, x @ self.w(f"{name}.gate.weight").T))
        if layer < c.num_hash_layers:
            chosen = np.asarray(self.w(f"{name}.gate.tid2eid")[ids], np.int64)
        else:
            biased = scores + self.w(f"{name}.gate.bias")
            self.seen.router[block] = biased
            chosen = np.argsort(-biased, axis=1, kind="stable")[:, : c.num_experts_per_tok]
        picked = np.take_along_axis(scores, chosen, 1)
        shares = picked / picked.sum(1, keepdims=True) * c.routed_scaling_factor
        y = self.expert(f"{name}.shared_experts", x, np.ones(len(x)))
        for expert in range(scores.shape[1]):
            rows, slots = np.nonzero(chosen == expert)
            if len(rows):
                y[rows] += self.expert(f"{name}.experts.{expert}", x[rows], shares[rows, slots])
        return self.cast(y)

    # ------------------------------------------------------------------------------------------------ block
    def mixers(self, name: str, h: Array) -> tuple[Array, Array, Array]:
        """streams [n, S, D] to x [n, D], post [n, S], comb [n, S (j), S (k)]."""
        s, eps, flat = self.config.hc_mult, self.config.hc_eps, h.reshape(len(h), -1)
        m = flat @ self.w(f"{name}_fn").T / np.sqrt((flat * flat).mean(1, keepdims=True) + self.config.rms_norm_eps)
        scale, base = self.w(f"{name}_scale"), self.w(f"{name}_base")
        pre = sigmoid(m[:, :s] * scale[0] + base[:s]) + eps
        post = 2 * sigmoid(m[:, s : 2 * s] * scale[1] + base[s : 2 * s])
        comb = np.exp((m[:, 2 * s :] * scale[2] + base[2 * s :]).reshape(-1, s, s))
        comb = comb / comb.sum(2, keepdims=True) + eps
        comb = comb / (comb.sum(1, keepdims=True) + eps)
        for _ in range(self.config.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(2, keepdims=True) + eps)
            comb = comb / (comb.sum(1, keepdims=True) + eps)
        return self.cast(np.einsum("ns,nsd->nd", pre, h)), post, comb

    def block(self, block: str, layer: int, h: Array, ids: NDArray[np.int64]) -> Array:
        ratio = self.config.compress_ratios[layer] if layer < self.config.num_hidden_layers else 0
        x, post, comb = self.mixers(f"{block}.hc_attn", h)
        y = self.attention(block, self.norm(x, f"{block}.attn_norm.weight"), ratio)
        h = self.cast(post[..., None] * y[:, None] + np.einsum("njk,njd->nkd", comb, h))
        x, post, comb = self.mixers(f"{block}.hc_ffn", h)
        y = self.experts(block, layer, self.norm(x, f"{block}.ffn_norm.weight"), ids)
        return self.cast(post[..., None] * y[:, None] + np.einsum("njk,njd->nkd", comb, h))

    def mtp_block(self, h: Array, next_ids: NDArray[np.int64]) -> Array:
        """The MTP block's streams out, from the streams before the head and the token that follows each."""
        token = self.linear("mtp.0.e_proj", self.norm(self.w("embed.weight")[next_ids], "mtp.0.enorm.weight"))
        mixed = token[:, None] + self.linear("mtp.0.h_proj", self.norm(h, "mtp.0.hnorm.weight"))
        return self.block("mtp.0", self.config.num_hidden_layers, self.cast(mixed), next_ids)

    def head(self, h: Array, prefix: str = "") -> Array:
        flat = h.reshape(len(h), -1)
        m = flat @ self.w(f"{prefix}hc_head_fn").T
        m = m / np.sqrt((flat * flat).mean(1, keepdims=True) + self.config.rms_norm_eps)
        pre = sigmoid(m * self.w(f"{prefix}hc_head_scale") + self.w(f"{prefix}hc_head_base")) + self.config.hc_eps
        x = self.cast(np.einsum("ns,nsd->nd", pre, h))
        return self.norm(x, f"{prefix}norm.weight") @ self.w("head.weight").T
