"""Trains the sample model on one CPU core: `python train.py --docs DIR --books DIR --work DIR --minutes 65`.

May be stopped and started again at any time: the state in the work folder is saved every few minutes, and --minutes is
the whole budget. Muon for matrices, AdamW for the rest; the learned routers are balanced by their bias (no auxiliary
loss). In the second part weights are rounded to FP4, FP8 and BF16 and cache rows to kv-v4 in every forward pass, with
the gradient passed straight through, so that what is written to the checkpoint is what was trained.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import data
import model
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

CONFIG: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 128,
    "qk_rope_head_dim": 64, "q_lora_rank": 128, "o_lora_rank": 128, "o_groups": 2, "sliding_window": 128,
    "index_n_heads": 8, "index_head_dim": 128, "index_topk": 32, "moe_intermediate_size": 64, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "num_hash_layers": 1, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000, "compress_rope_theta": 160000,
    "compress_ratios": [0, 4, 16, 4], "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1,
    },
}
ROWS, LENGTH = 8, 256
MUON_LR, ADAM_LR, WARMUP_STEPS = 6e-3, 3e-3, 40
FLAT_UNTIL, LAST_LR = 0.5, 0.03  # of the budget; of the full rate
ROUNDING_FROM = 0.4
BIAS_STEP = 1e-3
TEACH_INDEX_EVERY = 3  # steps
SAVE_EVERY_S = 150
STACKED = ("w1", "w2", "w3")
PLAIN = ("embed.", "head.", "hc_", "gate.weight", "ape", "norm", "attn_sink")  # AdamW


def matrix(name: str, p: Tensor) -> bool:
    return p.dim() >= 2 and not any(part in name for part in PLAIN)


def stored_as(name: str) -> str:
    """Number format of a parameter in the official layout: fp4, fp8, bf16 or f32."""
    if ".ffn.w" in name:
        return "fp4"
    fp8 = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "indexer.wq_b", "shared_experts")
    if any(part in name for part in fp8):
        return "fp8"
    return "f32" if "hc_" in name or name.endswith(("ape", "attn_sink")) else "bf16"


@torch.no_grad()
def rounded(name: str, p: Tensor) -> Tensor:
    """The value that the official file will hold."""
    kind = stored_as(name)
    if kind == "fp4":
        return model.round_fp4_groups(p)
    if kind == "fp8":
        return model.round_fp8_blocks(p)
    return p.bfloat16().float() if kind == "bf16" else p.clone()


class Muon:
    """Momentum, then the nearest orthogonal matrix by Newton-Schulz; stacked experts are one batch."""

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self.momentum = {name: torch.zeros(shape) for name, shape in shapes.items()}

    @torch.no_grad()
    def step(self, name: str, p: Tensor, grad: Tensor, lr: float) -> None:
        m = self.momentum[name].lerp_(grad, 0.05)
        x = grad.lerp(m, 0.95)
        flip = x.shape[-2] > x.shape[-1]
        x = x.mT if flip else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        update = x.mT if flip else x
        p.mul_(1 - lr * 0.02).sub_(update, alpha=lr * 0.2 * math.sqrt(max(update.shape[-2:])))


def fill_hash_routers(net: model.SampleModel, counts: np.ndarray, seed: int) -> None:
    """tid2eid: frequent tokens first, each to the experts that carry least so far; the order is by chance."""
    draw = np.random.default_rng(seed)
    for block in net.layers:
        if not block.ffn.hashed:
            continue
        load = np.zeros(net.cfg.n_routed_experts)
        for token in np.argsort(-counts, kind="stable"):
            noisy = load + draw.random(len(load)) * (counts[token] + 1) * 2
            chosen = np.argsort(noisy)[: net.cfg.num_experts_per_tok]
            load[chosen] += counts[token] + 0.01
            block.ffn.gate.tid2eid[token] = torch.from_numpy(chosen)


class TokenLosses(torch.autograd.Function):
    """Cross entropy per row of logits [N, V], which it overwrites: the table is the largest tensor of a step."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        rows = torch.arange(len(target))
        wanted = logits[rows, target]
        top = logits.amax(-1, keepdim=True)
        p = logits.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        ctx.save_for_backward(p.div_(total), target)
        return (total.log_() + top).squeeze(1) - wanted

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        p, target = ctx.saved_tensors
        p.mul_(grad.unsqueeze(1))
        p[torch.arange(len(target)), target] -= grad
        return p, None


class Trainer:
    """Master weights, the working (rounded) copy inside the module, optimizers and the clock."""

    def __init__(self, net: model.SampleModel, work: Path, budget_s: float) -> None:
        self.net, self.work, self.budget_s = net, work, budget_s
        self.params = dict(net.named_parameters())
        self.masters = {name: p.detach().clone() for name, p in self.params.items()}
        self.muon = Muon({n: p.shape for n, p in self.params.items() if matrix(n, p)})
        others = [self.masters[n] for n, p in self.params.items() if not matrix(n, p)]
        self.adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.97), weight_decay=0.0, eps=1e-10)
        self.elapsed_s, self.steps, self.tokens = 0.0, 0, 0

    @property
    def progress(self) -> float:
        return min(1.0, self.elapsed_s / self.budget_s)

    @property
    def rounding(self) -> bool:
        return self.progress >= ROUNDING_FROM

    def rate(self) -> float:
        falling = max(0.0, (self.progress - FLAT_UNTIL) / (1 - FLAT_UNTIL))
        return min(1.0, (self.steps + 1) / WARMUP_STEPS) * (1 - (1 - LAST_LR) * falling)

    def load_weights(self, rounding: bool) -> None:
        for name, p in self.params.items():
            p.data.copy_(rounded(name, self.masters[name]) if rounding else self.masters[name])

    def step(self, ids: Tensor, weights: Tensor) -> tuple[float, float]:
        """One update; returns the mean loss, nats per token, of prose and of choices between answers (nan if none)."""
        rounding = self.rounding
        self.load_weights(rounding)
        x, side = self.net(ids[:, :-1], rounding, rounding, self.steps % TEACH_INDEX_EVERY == 0)
        losses = TokenLosses.apply(self.net.head(x), ids[:, 1:].flatten()).view(weights.shape)
        ((losses * weights).sum() / weights.sum() + 0.2 * side).backward()
        self.update()
        self.balance()
        self.steps, self.tokens = self.steps + 1, self.tokens + weights.numel()
        prose, choices = (weights == 1).all(1), weights > 1  # choices: where answers part ways
        return losses[prose].mean().item(), losses[choices].mean().item()

    @torch.no_grad()
    def update(self) -> None:
        rate = self.rate()
        torch.nn.utils.clip_grad_norm_([p for p in self.params.values() if p.grad is not None], 1.0)
        for name, p in self.params.items():
            if p.grad is None:  # the indexer in a step that does not teach it
                self.masters[name].grad = None
            elif name in self.muon.momentum:
                self.muon.step(name, self.masters[name], p.grad, MUON_LR * rate)
            else:
                self.masters[name].grad = p.grad.clone()
            p.grad = None
        for group in self.adam.param_groups:
            group["lr"] = ADAM_LR * rate
        self.adam.step()

    @torch.no_grad()
    def balance(self) -> None:
        for block in self.net.layers:
            if not block.ffn.hashed:
                load = block.ffn.load.float()
                block.ffn.gate.bias += BIAS_STEP * torch.sign(load.mean() - load)

    def save(self) -> None:
        buffers = {n: b for n, b in self.net.named_buffers() if n.endswith(("tid2eid", "gate.bias"))}
        state = {
            "masters": self.masters, "buffers": buffers, "muon": self.muon.momentum, "adam": self.adam.state_dict(),
            "elapsed_s": self.elapsed_s, "steps": self.steps, "tokens": self.tokens,
        }
        torch.save(state, self.work / "state.new")
        (self.work / "state.new").replace(self.work / "state.pt")

    def restore(self) -> None:
        state = torch.load(self.work / "state.pt")
        for name, p in state["masters"].items():
            self.masters[name].copy_(p)
        for name, b in state["buffers"].items():
            self.net.get_buffer(name).copy_(b)
        self.muon.momentum = state["muon"]
        self.adam.load_state_dict(state["adam"])
        self.elapsed_s, self.steps, self.tokens = state["elapsed_s"], state["steps"], state["tokens"]


@torch.no_grad()
def held_out_bits(net: model.SampleModel, ids: np.ndarray, rounding: bool, rows: int = 24) -> float:
    """Bits per token over `rows` windows spread over the held-out tokens: a quick look, not the published number."""
    starts = np.linspace(0, len(ids) - LENGTH - 2, rows).astype(int)
    batch = torch.from_numpy(np.stack([ids[s : s + LENGTH + 1] for s in starts]).astype(np.int64))
    x, _ = net(batch[:, :-1], rounding, rounding)
    return F.cross_entropy(net.head(x), batch[:, 1:].flatten()).item() / math.log(2)


def prepare(args: argparse.Namespace) -> tuple[Tokenizer, dict[str, np.ndarray], float]:
    """Tokenizer and token arrays (kept in the work folder), and bytes per token of the held-out docs."""
    texts = data.collect(args.docs, args.books)
    path = args.work / "tokenizer.json"
    if not path.exists():
        seen = [t.text for t in texts if not t.held_out and (t.name.startswith("docs") or len(t.text) < 60_000)]
        raw = data.train_tokenizer([*seen, *(data.COMMANDS * 40)], CONFIG["vocab_size"])
        path.write_text(json.dumps(raw, ensure_ascii=False, indent=2) + "\n", "utf-8")
    tokenizer = Tokenizer.from_file(str(path))
    parts = {
        part: [t for t in texts if t.name.startswith(part.split("-")[0]) and t.held_out == part.endswith("held")]
        for part in ("docs", "books", "docs-held", "books-held")
    }
    ids = {part: data.encode_all(group, tokenizer) for part, group in parts.items()}
    held_bytes = sum(len(t.text.encode()) for t in parts["docs-held"])
    return tokenizer, ids, held_bytes / len(ids["docs-held"])


def fast_rounding() -> None:
    model.round_fp4_groups = torch.compile(model.round_fp4_groups, dynamic=False)  # 15 times as fast, same values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("docs", "books", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--manual", type=Path, default=Path(__file__).parent / "manual_qa.jsonl")
    parser.add_argument("--manual-share", type=float, default=0.4, help="share of the rows, once the file is there")
    parser.add_argument("--minutes", type=float, default=65.0, help="whole budget, earlier runs included")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")  # BF16 inside matrix products where the CPU has it
    torch.manual_seed(args.seed)
    fast_rounding()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer, ids, bytes_per_token = prepare(args)
    net = model.SampleModel(model.Config.from_json(CONFIG))
    counts = np.bincount(np.concatenate([ids["docs"], ids["books"]]), minlength=CONFIG["vocab_size"])
    fill_hash_routers(net, counts, args.seed)
    trainer = Trainer(net, args.work, args.minutes * 60)
    if (args.work / "state.pt").exists():
        trainer.restore()
    manual = data.load_manual(args.manual) if args.manual.exists() else []
    batches = data.Batches(ids["docs"], ids["books"], manual, tokenizer, LENGTH, args.seed + trainer.steps)
    total = sum(p.numel() for p in net.parameters())
    say(args.work, f"start: {total} parameters, {len(ids['docs'])} docs tokens, {len(ids['books'])} book tokens, "
        f"{len(manual)} facts of the manual, {bytes_per_token:.3f} held-out bytes per token, step {trainer.steps}")
    run(trainer, batches, ids["docs-held"], bytes_per_token, args)


def run(trainer: Trainer, batches: data.Batches, held: np.ndarray, bytes_per_token: float,
        args: argparse.Namespace) -> None:
    last, saved, losses = time.monotonic(), time.monotonic(), []
    while trainer.progress < 1.0:
        ids, weights = batches.next(ROWS, args.manual_share)
        losses.append(trainer.step(torch.from_numpy(ids), torch.from_numpy(weights)))
        now = time.monotonic()
        trainer.elapsed_s, last = trainer.elapsed_s + now - last, now
        if trainer.steps % 25 == 0:
            prose, manual = (np.nanmean([x[i] for x in losses] or [math.nan]) if not all(
                math.isnan(x[i]) for x in losses) else math.nan for i in (0, 1))
            losses.clear()
            say(args.work, f"step {trainer.steps} tokens {trainer.tokens} minutes {trainer.elapsed_s / 60:.1f} "
                f"cpu_s {time.process_time():.0f} rate {trainer.rate():.3f} prose {prose:.3f} manual {manual:.3f}")
        if now - saved > SAVE_EVERY_S or trainer.progress >= 1.0:
            saved = now
            trainer.save()
            rounding = trainer.rounding
            bits = held_out_bits(trainer.net, held, rounding)
            say(args.work, f"saved at step {trainer.steps}: held-out docs {bits / bytes_per_token:.3f} bits per byte "
                f"(sample), rounding {'on' if rounding else 'off'}")


def say(work: Path, line: str) -> None:
    print(line, flush=True)
    with (work / "log.txt").open("a", encoding="utf-8") as log:
        log.write(line + "\n")


if __name__ == "__main__":
    random.seed(0)
    main()
