"""A GGUF file of an official V4-Flash checkpoint, for the side-by-side with llama.cpp (benchmarks/llamacpp.py).

    python benchmarks/llamacpp_gguf.py CHECKPOINT OUT.gguf

Every weight is written as float32 with the checkpoint's exact value, so that both programs compute with the same
numbers; no vocabulary is written, token ids go in and logits come out. Names and keys are those that llama.cpp's
architecture "deepseek4" reads. The container is GGUF version 3: header, keys, tensor table, tensors at multiples of
32 bytes. MTP blocks are left out. Good for sample models; the real one would be 1.1 TB this way.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from appliance.model import ModelConfig  # noqa: E402
from exporter.checkpoint import Checkpoint  # noqa: E402

ALIGNMENT = 32
_U32, _F32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9  # types of a key's value
_TENSOR_F32, _TENSOR_I32 = 0, 26
_SQRTSOFTPLUS = 4

# Tensors of the model: name in the checkpoint → name in the file.
_MODEL = {
    "embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight",
    "hc_head_fn": "output_hc_fn.weight", "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}  # fmt: skip
# Tensors of a layer, after "layers.N." and "blk.N."; those a layer does not have are passed over.
_LAYER = {
    "attn_norm.weight": "attn_norm.weight", "ffn_norm.weight": "ffn_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight", "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight", "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight", "attn.wo_b.weight": "attn_output_b.weight",
    "hc_attn_fn": "hc_attn_fn.weight", "hc_attn_base": "hc_attn_base.weight", "hc_attn_scale": "hc_attn_scale.weight",
    "hc_ffn_fn": "hc_ffn_fn.weight", "hc_ffn_base": "hc_ffn_base.weight", "hc_ffn_scale": "hc_ffn_scale.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight", "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight", "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight", "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight", "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
}  # fmt: skip
_EXPERTS = {"w1": "ffn_gate_exps.weight", "w2": "ffn_down_exps.weight", "w3": "ffn_up_exps.weight"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to be written; ``shape`` is row-major (the file stores it reversed), ``read`` gives its values."""

    name: str
    shape: tuple[int, ...]
    type: int
    read: Callable[[], NDArray[np.generic]]

    @property
    def size_bytes(self) -> int:
        return 4 * int(np.prod(self.shape))


def write_gguf(checkpoint: Checkpoint, out: Path) -> int:
    """Write ``checkpoint`` to ``out``; the file's bytes."""
    tensors = list(_tensors(checkpoint))
    keys = _keys(checkpoint.config)
    with out.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)))
        file.write(b"".join(_string(name) + value for name, value in keys.items()))
        offset = 0
        for tensor in tensors:
            dims = tensor.shape[::-1]
            file.write(_string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset))
            offset += -(-tensor.size_bytes // ALIGNMENT) * ALIGNMENT
        for tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            file.write(tensor.read().tobytes())
        file.write(bytes(-file.tell() % ALIGNMENT))
        return file.tell()


def _tensors(checkpoint: Checkpoint) -> Iterator[Tensor]:
    for source, name in _MODEL.items():
        yield _tensor(checkpoint, source, name)
    for layer in range(checkpoint.config.num_hidden_layers):
        for source, name in _LAYER.items():
            if checkpoint.has(f"layers.{layer}.{source}"):
                yield _tensor(checkpoint, f"layers.{layer}.{source}", f"blk.{layer}.{name}")
        for part, name in _EXPERTS.items():
            yield _experts(checkpoint, f"layers.{layer}.ffn.experts", part, f"blk.{layer}.{name}")


def _tensor(checkpoint: Checkpoint, source: str, name: str) -> Tensor:
    info = checkpoint.info(source)
    if info.dtype == "I64":
        return Tensor(name, info.shape, _TENSOR_I32, lambda: checkpoint.read(source).astype("<i4"))
    return Tensor(name, info.shape, _TENSOR_F32, lambda: checkpoint.float32(source).astype("<f4"))


def _experts(checkpoint: Checkpoint, source: str, part: str, name: str) -> Tensor:
    """All experts' matrices as one tensor [experts, rows, columns]; the checkpoint packs two codes a byte."""
    count = checkpoint.config.n_routed_experts
    rows, packed = checkpoint.info(f"{source}.0.{part}.weight").shape

    def read() -> NDArray[np.generic]:
        return np.stack([checkpoint.float32(f"{source}.{e}.{part}.weight") for e in range(count)]).astype("<f4")

    return Tensor(name, (count, rows, 2 * packed), _TENSOR_F32, read)


def _keys(config: ModelConfig) -> dict[str, bytes]:
    c, scaling = config, config.rope_scaling
    u32 = {
        "vocab_size": c.vocab_size, "context_length": c.max_position_embeddings, "block_count": c.num_hidden_layers,
        "embedding_length": c.hidden_size, "embedding_length_out": c.hidden_size * c.hc_mult,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
        "attention.q_lora_rank": c.q_lora_rank, "attention.sliding_window": c.sliding_window,
        "attention.output_group_count": c.o_groups, "attention.output_lora_rank": c.o_lora_rank,
        "attention.indexer.head_count": c.index_n_heads, "attention.indexer.key_length": c.index_head_dim,
        "attention.indexer.top_k": c.index_topk,
        "expert_count": c.n_routed_experts, "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts, "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_gating_func": _SQRTSOFTPLUS, "hash_layer_count": c.num_hash_layers,
        "hyper_connection.count": c.hc_mult, "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters,
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
    }  # fmt: skip
    f32 = {
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "hyper_connection.epsilon": c.hc_eps,
        "expert_weights_scale": c.routed_scaling_factor, "rope.freq_base": c.rope_theta,
        "attention.compress_rope_freq_base": c.compress_rope_theta, "rope.scaling.factor": scaling.factor,
        "rope.scaling.yarn_beta_fast": scaling.beta_fast, "rope.scaling.yarn_beta_slow": scaling.beta_slow,
    }  # fmt: skip
    values = {name: struct.pack("<II", _U32, value) for name, value in u32.items()}
    values |= {name: struct.pack("<If", _F32, value) for name, value in f32.items()}
    values["expert_weights_norm"] = struct.pack("<I?", _BOOL, True)
    values["rope.scaling.type"] = struct.pack("<I", _STRING) + _string("yarn")
    values["attention.compress_ratios"] = _array(_U32, "I", c.compress_ratios)
    clamps = (c.swiglu_limit,) * c.num_hidden_layers
    values |= {f"swiglu_clamp_{name}": _array(_F32, "f", clamps) for name in ("exp", "shexp")}
    named = {f"deepseek4.{name}": value for name, value in values.items()}
    texts = {"general.architecture": "deepseek4", "tokenizer.ggml.model": "no_vocab"}
    return {name: struct.pack("<I", _STRING) + _string(text) for name, text in texts.items()} | named


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _array(kind: int, code: str, values: tuple[float, ...]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}{code}", _ARRAY, kind, len(values), *values)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python benchmarks/llamacpp_gguf.py CHECKPOINT OUT.gguf")
    print(f"wrote {sys.argv[2]}: {write_gguf(Checkpoint.open(Path(sys.argv[1])), Path(sys.argv[2])):,} bytes")
