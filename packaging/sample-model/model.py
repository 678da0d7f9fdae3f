"""DeepSeek-V4-Flash as a trainable torch module: whole sequences, no cache, fp32 parameters.

It computes the same function as `exporter.reference` in `kv-v4` mode: four mHC streams, window attention with a sink
and an inverse rope, overlapping (CSA) and plain (HCA) compressors, the lightning indexer, hash and learned routers.
Rounding of cache rows and of the index path is a switch (`round_rows`), with the gradient passed straight through.
Parameter names are the official checkpoint names, except that the experts of a layer are stacked: `ffn.w1 [E, I, D]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """The numbers of config.json that the maths needs, under their official names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    compress_ratios: tuple[int, ...]
    rope_scaling: dict[str, Any]

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Config:
        """Picks the fields above out of an official config.json; `compress_ratios` is cut to the layers."""
        picked = {name: raw[name] for name in cls.__dataclass_fields__}
        picked["compress_ratios"] = tuple(raw["compress_ratios"][: raw["num_hidden_layers"]])
        return cls(**picked)


# ---------------------------------------------------------------------------------------------------------- rounding
def ceil_power_of_two(x: Tensor) -> Tensor:
    """2^ceil(log2 x) of positive normal fp32, by exponent bits, as the official kernels do."""
    bits = x.float().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return (exponent << 23).view(torch.float32)


def round_e4m3_groups(x: Tensor, group: int = 64) -> Tensor:
    """E4M3 with one power-of-two scale per `group` along the last axis; values, not codes."""
    g = x.unflatten(-1, (-1, group))
    scale = ceil_power_of_two(g.abs().amax(-1, keepdim=True).clamp_min(1e-4) * (1 / 448))
    return ((g / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def round_e2m1(a: Tensor) -> Tensor:
    """Nearest of 0 .5 1 1.5 2 3 4 6 with sign; ties go to the even code."""
    m = a.abs()
    coarse = torch.where(m < 4, m.round(), (m / 2).round() * 2)
    return torch.where(m < 2, (m * 2).round() / 2, coarse).clamp_max(6).copysign(a)


def round_fp4_groups(x: Tensor, group: int = 32) -> Tensor:
    """E2M1 with one power-of-two scale per `group` along the last axis; values, not codes."""
    g = x.unflatten(-1, (-1, group))
    scale = ceil_power_of_two(g.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0**-126) * (1 / 6))
    return (round_e2m1(g / scale) * scale).flatten(-2)


def round_fp8_blocks(w: Tensor, block: int = 128) -> Tensor:
    """A matrix [n, k] in E4M3 with one power-of-two scale per 128 x 128 block (ceil blocks at the edges)."""
    n, k = w.shape
    p = F.pad(w, (0, -k % block, 0, -n % block)).unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scale = ceil_power_of_two(p.abs().amax((1, 3), keepdim=True).clamp_min(1e-4) * (1 / 448))
    q = (p / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return q.flatten(2, 3).flatten(0, 1)[:n, :k].contiguous()


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded`, the gradient of `x`."""
    return x + (rounded - x).detach()


def round_row(x: Tensor, rope: int) -> Tensor:
    """A cache row [.., d]: E4M3 in groups of 64 before the rope part, BF16 in the rope part."""
    with torch.no_grad():
        nope = round_e4m3_groups(x[..., :-rope])
        rounded = torch.cat([nope, x[..., -rope:].bfloat16().float()], -1)
    return straight_through(x, rounded)


# ---------------------------------------------------------------------------------------------------------- pieces
class Rms(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) over the last axis, with few passes over memory on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        y, inverse = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(inverse), None


class MeanSquare(torch.autograd.Function):
    """mean(x²) over the last axis, kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return x * (grad * (2 / x.shape[-1]))


def rms(x: Tensor, eps: float) -> Tensor:
    return Rms.apply(x, eps)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix times size^-0.5."""
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h * size**-0.5


def rope_frequencies(cfg: Config, compressed: bool) -> Tensor:
    """[rope/2] angular steps: theta 10000 plain on S layers, 160000 with YaRN on compressed layers."""
    dim = cfg.qk_rope_head_dim
    theta = cfg.compress_rope_theta if compressed else cfg.rope_theta
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if not compressed:
        return freqs
    y = cfg.rope_scaling

    def corner(turns: float) -> float:
        return dim * math.log(y["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(corner(y["beta_fast"])), 0), min(math.ceil(corner(y["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    smooth = 1 - ramp
    return freqs / y["factor"] * (1 - smooth) + freqs * smooth


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Interleaved rope of the last dims of x [B, T, .., d] by turn complex [T, rope/2]."""
    rope = turn.shape[-1] * 2
    pairs = torch.view_as_complex(x[..., -rope:].unflatten(-1, (-1, 2)).contiguous())
    turn = turn.view(turn.shape[0], *([1] * (x.dim() - 3)), -1)
    return torch.cat([x[..., :-rope], torch.view_as_real(pairs * turn).flatten(-2)], -1)


class Weight(nn.Module):
    """One parameter under the official name `X.weight`."""

    def __init__(self, *shape: int, std: float = 0.0, ones: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape) if ones else torch.randn(*shape) * std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def dense(n: int, k: int, gain: float = 1.0) -> Weight:
    return Weight(n, k, std=gain * k**-0.5)


class SinkSoftmax(torch.autograd.Function):
    """softmax over keys of scores [B, T, H, K] with one more term exp(sink [H]) in the denominator."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, sink: Tensor) -> Tensor:
        top = scores.amax(-1, keepdim=True)
        p = (scores - top).exp_()
        rest = (sink.view(-1, 1) - top).exp_()
        total = p.sum(-1, keepdim=True).add_(rest)
        p.div_(total)
        ctx.save_for_backward(p, rest.div_(total))
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        p, sink_share = ctx.saved_tensors
        carried = torch.linalg.vecdot(p, grad).unsqueeze(-1)
        return (grad - carried).mul_(p), -(sink_share * carried).sum((0, 1, 3))


class Compressor(nn.Module):
    """Pools `ratio` tokens into one entry; with overlap (ratio 4) each entry also sees the block before it."""

    def __init__(self, cfg: Config, ratio: int, dim: int) -> None:
        super().__init__()
        self.ratio, self.dim, self.overlap = ratio, dim, ratio == 4
        width = dim * (2 if self.overlap else 1)
        self.ape = nn.Parameter(torch.zeros(ratio, width))
        self.wkv, self.wgate = dense(width, cfg.hidden_size), dense(width, cfg.hidden_size, 0.5)
        self.norm = Weight(dim, ones=True)
        self.eps = cfg.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] → entries [B, T // ratio, dim] after the norm, before the rope."""
        b, n = x.shape[0], x.shape[1] // self.ratio
        x = x[:, : n * self.ratio]
        kv = self.wkv(x).view(b, n, self.ratio, -1)
        gate = self.wgate(x).view(b, n, self.ratio, -1) + self.ape
        if self.overlap:
            d = self.dim
            kv = torch.cat([F.pad(kv[:, :-1, :, :d], (0, 0, 0, 0, 1, 0)), kv[..., d:]], 2)
            before = F.pad(gate[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=float("-inf"))
            gate = torch.cat([before, gate[..., d:]], 2)
        return rms((kv * gate.softmax(2)).sum(2), self.eps) * self.norm.weight


class Indexer(nn.Module):
    """Scores compressed entries per query. It learns from a side loss only, as nothing flows back through top-k."""

    def __init__(self, cfg: Config, ratio: int) -> None:
        super().__init__()
        self.heads, self.dim, self.rope = cfg.index_n_heads, cfg.index_head_dim, cfg.qk_rope_head_dim
        self.wq_b = dense(self.heads * self.dim, cfg.q_lora_rank)
        self.weights_proj = dense(self.heads, cfg.hidden_size)
        self.compressor = Compressor(cfg, ratio, self.dim)
        self.register_buffer("mix", hadamard(self.dim), persistent=False)

    def forward(self, x: Tensor, qr: Tensor, turn: Tensor, turn_entries: Tensor, round_rows: bool) -> Tensor:
        """x [B, T, D], qr [B, T, q_lora] (both detached) → scores [B, T, entries]."""
        q = rotate(self.wq_b(qr).unflatten(-1, (self.heads, self.dim)), turn) @ self.mix
        k = rotate(self.compressor(x), turn_entries) @ self.mix
        if round_rows:
            q, k = straight_through(q, round_fp4_groups(q.detach())), straight_through(k, round_fp4_groups(k.detach()))
        w = self.weights_proj(x) * (self.dim**-0.5 * self.heads**-0.5)
        per_head = (q.flatten(1, 2) @ k.transpose(1, 2)).relu().unflatten(1, (x.shape[1], self.heads))
        return (per_head * w.unsqueeze(-1)).sum(2)


class Attention(nn.Module):
    """Shared-KV attention over the window, plus compressed entries on C and H layers."""

    def __init__(self, cfg: Config, ratio: int) -> None:
        super().__init__()
        self.cfg, self.ratio = cfg, ratio
        d, heads, hd = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        self.wq_a, self.wq_b = dense(cfg.q_lora_rank, d), dense(heads * hd, cfg.q_lora_rank)
        self.q_norm, self.kv_norm = Weight(cfg.q_lora_rank, ones=True), Weight(hd, ones=True)
        self.wkv = dense(hd, d)
        self.wo_a = dense(cfg.o_groups * cfg.o_lora_rank, heads * hd // cfg.o_groups)
        self.wo_b = dense(d, cfg.o_groups * cfg.o_lora_rank, 0.3)
        if ratio:
            self.compressor = Compressor(cfg, ratio, hd)
        if ratio == 4:
            self.indexer = Indexer(cfg, ratio)
        self.register_buffer("freqs", rope_frequencies(cfg, ratio > 0), persistent=False)

    def forward(self, x: Tensor, round_rows: bool, select: bool, teach: bool) -> tuple[Tensor, Tensor]:
        """x [B, T, D] → (output [B, T, D], the indexer's side loss, a scalar)."""
        cfg, (b, t, _) = self.cfg, x.shape
        heads, hd, rope = cfg.num_attention_heads, cfg.head_dim, cfg.qk_rope_head_dim
        angle = torch.arange(t, dtype=torch.float32)[:, None] * self.freqs
        turn = torch.polar(torch.ones_like(angle), angle)
        qr = rms(self.wq_a(x), cfg.rms_norm_eps) * self.q_norm.weight
        q = rotate(rms(self.wq_b(qr).unflatten(-1, (heads, hd)), cfg.rms_norm_eps), turn)
        kv = rotate(rms(self.wkv(x), cfg.rms_norm_eps) * self.kv_norm.weight, turn)
        kv = round_row(kv, rope) if round_rows else kv
        at = torch.arange(t)
        mask = (at[None] <= at[:, None]) & (at[None] > at[:, None] - cfg.sliding_window)
        bias = torch.zeros(t, t).masked_fill_(~mask, float("-inf")).expand(1, t, t)
        index_scores = None
        if self.ratio and t >= self.ratio:
            turn_e = turn[:: self.ratio][: t // self.ratio]
            entries = rotate(self.compressor(x), turn_e)
            kv = torch.cat([kv, round_row(entries, rope) if round_rows else entries], 1)
            seen = torch.arange(t // self.ratio)[None] < (at[:, None] + 1) // self.ratio
            extra = torch.zeros(t, t // self.ratio).masked_fill_(~seen, float("-inf")).expand(1, t, -1)
            selecting = select and t // self.ratio > cfg.index_topk
            if self.ratio == 4 and (selecting or teach):
                with torch.set_grad_enabled(teach and torch.is_grad_enabled()):
                    index_scores = self.indexer(x.detach(), qr.detach(), turn, turn_e, round_rows) + extra
                if selecting:
                    extra = self.keep_best(index_scores.detach(), cfg.index_topk)
            bias = torch.cat([bias.expand(extra.shape[0], t, t), extra], 2)
        p = self.probabilities(q, kv, bias)
        o = (p.flatten(1, 2) @ kv).unflatten(1, (t, heads))
        o = rotate(o, turn.conj()).reshape(b, t, cfg.o_groups, -1)
        o = torch.einsum("btgi,goi->btgo", o, self.wo_a.weight.view(cfg.o_groups, cfg.o_lora_rank, -1))
        taught = teach and index_scores is not None
        side = self.side_loss(index_scores, p.detach()[..., t:]) if taught else x.new_zeros(())
        return self.wo_b(o.flatten(2)), side

    def probabilities(self, q: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
        """q [B, T, H, d], kv [B, K, d], bias [1 or B, T, K] → [B, T, H, K] of a softmax that also holds the sink."""
        b, t, heads, hd = q.shape
        scores = ((q * hd**-0.5).flatten(1, 2) @ kv.transpose(1, 2)).view(b, t, heads, -1)
        return SinkSoftmax.apply(scores.add_(bias.unsqueeze(2)), self.attn_sink)

    @staticmethod
    def keep_best(scores: Tensor, topk: int) -> Tensor:
        """scores [B, T, n], −inf where invisible → 0 for the best `topk` of each row (lower index wins), else −inf."""
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
        bias = torch.full_like(scores, float("-inf")).scatter(-1, best, 0.0)
        return torch.where(scores.isinf(), float("-inf"), bias)

    @staticmethod
    def side_loss(scores: Tensor, p: Tensor) -> Tensor:
        """Cross entropy of the index scores [B, T, n] against attention mass p [B, T, H, n], where there is any."""
        target = p.sum(2)
        mass = target.sum(-1, keepdim=True)
        target = target / mass.clamp_min(1e-6)
        logp = scores.clamp_min(-1e4).log_softmax(-1)
        return -(target * logp).sum(-1).mean()


class Experts(nn.Module):
    """Routed experts (stacked), the shared expert and the router, hash or learned."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.cfg, e, i, d = cfg, cfg.n_routed_experts, cfg.moe_intermediate_size, cfg.hidden_size
        self.gate = Weight(e, d, std=d**-0.5)
        self.hashed = layer < cfg.num_hash_layers
        if self.hashed:
            table = torch.zeros(cfg.vocab_size, cfg.num_experts_per_tok, dtype=torch.int64)
            self.gate.register_buffer("tid2eid", table)
        else:
            self.gate.register_buffer("bias", torch.zeros(e))
        self.w1, self.w3 = (nn.Parameter(torch.randn(e, i, d) * d**-0.5) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(e, d, i) * 0.3 * i**-0.5)
        self.shared_experts = nn.ModuleDict({"w1": dense(i, d), "w3": dense(i, d), "w2": dense(d, i, 0.3)})
        self.load = torch.zeros(e)

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        limit = self.cfg.swiglu_limit
        return F.silu(gate.clamp_max(limit)) * up.clamp(-limit, limit)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [N, D], ids [N] → [N, D]."""
        cfg, k = self.cfg, self.cfg.num_experts_per_tok
        scores = F.softplus(self.gate(x)).sqrt()
        chosen = self.gate.tid2eid[ids] if self.hashed else (scores + self.gate.bias).topk(k, -1).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * cfg.routed_scaling_factor
        order = chosen.flatten().argsort(stable=True)
        self.load = chosen.flatten().bincount(minlength=cfg.n_routed_experts)
        counts = self.load.tolist()
        token = order // k
        parts = x.index_select(0, token).split(counts)
        gate = torch.cat([F.linear(p, w) for p, w in zip(parts, self.w1, strict=True)])
        up = torch.cat([F.linear(p, w) for p, w in zip(parts, self.w3, strict=True)])
        mid = self.act(gate, up) * weights.flatten().index_select(0, order).unsqueeze(1)
        y = torch.cat([F.linear(p, w) for p, w in zip(mid.split(counts), self.w2, strict=True)])
        s = self.shared_experts
        return s["w2"](self.act(s["w1"](x), s["w3"](x))).index_add(0, token, y)


def hc_matrices(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, 4·D] → pre [4, N], post [4, N], comb [4 (j), 4 (k), N] after 20 Sinkhorn rounds, columns last."""
    s, eps = cfg.hc_mult, cfg.hc_eps
    m = (F.linear(x, fn) * torch.rsqrt(MeanSquare.apply(x) + cfg.rms_norm_eps)).t().contiguous()
    pre = torch.sigmoid(m[:s] * scale[0] + base[:s, None]) + eps
    post = 2 * torch.sigmoid(m[s : 2 * s] * scale[1] + base[s : 2 * s, None])
    comb = (m[2 * s :] * scale[2] + base[2 * s :, None]).view(s, s, -1).softmax(1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(cfg.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return pre, post, comb


class Block(nn.Module):
    """pre → norm → attention → post, then the same around the experts, on four streams."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.cfg, s, d = cfg, cfg.hc_mult, cfg.hidden_size
        width = s * (2 + s)
        for name in ("attn", "ffn"):
            setattr(self, f"hc_{name}_fn", nn.Parameter(torch.randn(width, s * d) * 0.01))
            base = torch.cat([torch.randn(2 * s) * 0.5 - 0.5, torch.eye(s).flatten() * 4])
            setattr(self, f"hc_{name}_base", nn.Parameter(base))
            setattr(self, f"hc_{name}_scale", nn.Parameter(torch.ones(3)))
        self.attn_norm, self.ffn_norm = Weight(d, ones=True), Weight(d, ones=True)
        self.attn, self.ffn = Attention(cfg, cfg.compress_ratios[layer]), Experts(cfg, layer)

    def forward(
        self, h: Tensor, ids: Tensor, round_rows: bool, select: bool, teach: bool
    ) -> tuple[Tensor, Tensor]:
        """h [N, 4, D], ids [B, T] → (h', side loss)."""
        eps = self.cfg.rms_norm_eps
        pre, post, comb = hc_matrices(h.flatten(1), self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale, self.cfg)
        x = rms(self.mixed(pre, h), eps) * self.attn_norm.weight
        y, side = self.attn(x.view(*ids.shape, -1), round_rows, select, teach)
        h = self.returned(h, y.flatten(0, 1), post, comb)
        pre, post, comb = hc_matrices(h.flatten(1), self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale, self.cfg)
        x = rms(self.mixed(pre, h), eps) * self.ffn_norm.weight
        return self.returned(h, self.ffn(x, ids.flatten()), post, comb), side

    @staticmethod
    def mixed(pre: Tensor, h: Tensor) -> Tensor:
        return torch.bmm(pre.t().unsqueeze(1), h).squeeze(1)

    @staticmethod
    def returned(h: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """h'_k = post_k·y + Σ_j comb[j, k]·h_j."""
        return torch.baddbmm(post.t().unsqueeze(2) * y.unsqueeze(1), comb.permute(2, 1, 0), h)


class SampleModel(nn.Module):
    """Token ids [B, T] → hidden [N, D] before the head; `logits` and `loss` finish the job."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg, s, d = cfg, cfg.hc_mult, cfg.hidden_size
        self.embed = Weight(cfg.vocab_size, d, std=0.2)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_hidden_layers))
        self.hc_head_fn = nn.Parameter(torch.randn(s, s * d) * 0.01)
        self.hc_head_base, self.hc_head_scale = nn.Parameter(torch.randn(s) * 0.3), nn.Parameter(torch.ones(1))
        self.norm, self.head = Weight(d, ones=True), Weight(cfg.vocab_size, d, std=0.3 * d**-0.5)

    def forward(
        self, ids: Tensor, round_rows: bool = True, select: bool = True, teach: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`round_rows`: cache rows and index path in kv-v4; `select`: top-k on; `teach`: the indexer's side loss."""
        cfg = self.cfg
        h = F.embedding(ids.flatten(), self.embed.weight).unsqueeze(1).expand(-1, cfg.hc_mult, -1)
        side = h.new_zeros(())
        for block in self.layers:
            h, extra = block(h, ids, round_rows, select, teach)
            side = side + extra
        x = h.flatten(1)
        m = F.linear(x, self.hc_head_fn) * torch.rsqrt(x.square().mean(-1, keepdim=True) + cfg.rms_norm_eps)
        pre = torch.sigmoid(m * self.hc_head_scale + self.hc_head_base) + cfg.hc_eps
        return rms(Block.mixed(pre.t(), h), cfg.rms_norm_eps) * self.norm.weight, side

    def logits(self, ids: Tensor, round_rows: bool = True, select: bool = True) -> Tensor:
        """[B, T] → fp32 [B, T, V]."""
        x, _ = self(ids, round_rows, select)
        return self.head(x).view(*ids.shape, -1)
