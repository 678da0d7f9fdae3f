"""Models and states for the KV tests: the real V4-Flash shapes, and a tiny model of the same three layer kinds."""

from __future__ import annotations

import dataclasses

import numpy as np

from appliance.model import ModelConfig, ModelSpec, RopeScaling, state_tensors

REAL = ModelConfig(
    hidden_size=4096, num_hidden_layers=43, vocab_size=129280, num_attention_heads=64, head_dim=512,
    qk_rope_head_dim=64, q_lora_rank=1024, o_lora_rank=1024, o_groups=8, sliding_window=128, index_n_heads=64,
    index_head_dim=128, index_topk=512, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
    num_experts_per_tok=6, num_hash_layers=3, routed_scaling_factor=1.5, swiglu_limit=10.0, hc_mult=4,
    hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6, rope_theta=10000.0, compress_rope_theta=160000.0,
    rope_scaling=RopeScaling(16.0, 65536, 32.0, 1.0), max_position_embeddings=1048576, bos_token_id=0, eos_token_id=1,
    compress_ratios=tuple(0 if i < 2 else 4 if i % 2 == 0 else 128 for i in range(43)),
)  # fmt: skip

TINY = dataclasses.replace(
    REAL, num_hidden_layers=5, head_dim=128, qk_rope_head_dim=64, sliding_window=16, index_head_dim=32,
    compress_ratios=(0, 4, 128, 4, 32),
)  # fmt: skip


def make_spec(config: ModelConfig, numerics: str = "kv-v4") -> ModelSpec:
    return ModelSpec(
        name="kv-test", config=config, states=state_tensors(config, numerics), encoding="dsv4-0731",
        numerics=numerics, profiles=(), goldens=(),
    )  # fmt: skip


def make_pools(spec: ModelSpec, count: int = 4, seed: int | None = None) -> dict[str, np.ndarray]:
    """Pools of ``count`` blocks and slots: zeros, or random bytes and floats where a seed is given."""
    rng = None if seed is None else np.random.default_rng(seed)
    pools: dict[str, np.ndarray] = {}
    for state in spec.states:
        shape = (count, state.rows, state.width)
        if rng is None:
            pools[state.name] = np.zeros(shape, np.uint8 if state.dtype == "u8" else np.float32)
        elif state.dtype == "u8":
            pools[state.name] = rng.integers(0, 256, shape, np.uint8)
        else:
            pools[state.name] = rng.standard_normal(shape).astype(np.float32)
    return pools
