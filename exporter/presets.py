"""Named model configs: the real V4-Flash, and the sizes the sample writer makes."""

from __future__ import annotations

import dataclasses

from appliance.errors import UsageError
from appliance.model import ModelConfig, RopeScaling

V4_FLASH = ModelConfig(
    hidden_size=4096, num_hidden_layers=43, vocab_size=129280, num_attention_heads=64, head_dim=512,
    qk_rope_head_dim=64, q_lora_rank=1024, o_lora_rank=1024, o_groups=8, sliding_window=128,
    index_n_heads=64, index_head_dim=128, index_topk=512,
    moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=6, num_hash_layers=3,
    routed_scaling_factor=1.5, swiglu_limit=10.0,
    hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6,
    rope_theta=10000.0, compress_rope_theta=160000.0,
    rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=65536, beta_fast=32.0, beta_slow=1.0),
    max_position_embeddings=1048576, bos_token_id=0, eos_token_id=1,
    compress_ratios=(0, 0, *(4, 128) * 20, 4),
)

# The real cache geometry (584-byte rows, 43 layers, 256-token blocks of 899,648 bytes) at a size two cores can run.
KV_TRUE = dataclasses.replace(
    V4_FLASH, hidden_size=256, vocab_size=4096, num_attention_heads=4, q_lora_rank=128, o_lora_rank=128, o_groups=2,
    index_n_heads=16, moe_intermediate_size=256, n_routed_experts=8, num_experts_per_tok=2,
)

# All three attention kinds and both routers in 7 layers; windows so small that every path runs within 100 tokens.
TINY = dataclasses.replace(
    V4_FLASH, hidden_size=128, num_hidden_layers=7, vocab_size=768, num_attention_heads=4, head_dim=128,
    q_lora_rank=64, o_lora_rank=64, o_groups=2, sliding_window=32, index_n_heads=16, index_topk=16,
    moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2,
    rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=256, beta_fast=32.0, beta_slow=1.0),
    max_position_embeddings=4096, compress_ratios=(0, 0, 4, 16, 4, 16, 0),
)

# Real widths, all of attention at real shapes, one layer of each kind (S routed by token id, then C, H): 3 GB with
# 64 experts, 11 GB with all 256. For what depends on shapes and bytes: speed, memory, disk.
SLICE = dataclasses.replace(
    V4_FLASH, num_hidden_layers=3, vocab_size=4096, n_routed_experts=64, num_hash_layers=1, compress_ratios=(0, 4, 128)
)

PRESETS = {"tiny": TINY, "kv-true": KV_TRUE, "slice": SLICE}
MTP_BLOCKS = {"tiny": 1, "kv-true": 1, "slice": 0}


def preset(name: str) -> ModelConfig:
    """The config of a sample preset. Raises UsageError naming the choices."""
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} is unknown; choose {', '.join(PRESETS)}")
    return PRESETS[name]
