"""transformers' names, configs and logits, for tests only: the product reads official names and nothing else.

torch and transformers are imported inside the functions that need them, so that tests without them can use the
random configs, the official writer and the committed goldens (tests/golden/hf-*.npz).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from appliance.model import ModelConfig, RopeScaling
from exporter import codec
from exporter.checkpoint import Checkpoint
from exporter.inventory import expected_tensors
from exporter.presets import TINY
from exporter.safetensors_file import NUMPY_DTYPES, read_header
from exporter.sample import write_random

GOLDEN = Path(__file__).parent / "golden"
LAST_ROWS = 16  # rows of logits committed in tests/golden/hf-*.npz
MIN_MARGIN = 1e-4

# Official name of a layer's tensor → transformers' module name of it.
_LAYER_NAMES = {
    "hc_attn_fn": "attn_hc.fn", "hc_attn_base": "attn_hc.base", "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn", "hc_ffn_base": "ffn_hc.base", "hc_ffn_scale": "ffn_hc.scale",
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight", "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight", "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight", "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight", "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
_TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight", "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn", "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.(w[123])\.weight")


@dataclasses.dataclass(frozen=True)
class RandomConfig:
    """A config with the prompt that exercises it: n ≥ 4·index_topk + 64 tokens, ≥ 3 HCA entries, ≥ 16 index heads."""

    config: ModelConfig
    seed: int
    tokens: int

    @property
    def ids(self) -> list[int]:
        return np.random.default_rng(self.seed).integers(0, self.config.vocab_size, self.tokens).tolist()


def random_configs() -> dict[str, RandomConfig]:
    """Two configs for transformers parity; seeds chosen so that top-k and router margins exceed 1e-4."""
    short = dataclasses.replace(
        TINY, hidden_size=128, num_hidden_layers=6, vocab_size=512, sliding_window=32, index_topk=16, swiglu_limit=1.0,
        num_hash_layers=2, max_position_embeddings=4096, compress_ratios=(0, 4, 16, 4, 16, 0),
    )
    wide = dataclasses.replace(
        TINY, hidden_size=256, num_hidden_layers=4, vocab_size=640, num_attention_heads=8, head_dim=256,
        q_lora_rank=96, o_lora_rank=32, o_groups=4, sliding_window=128, index_n_heads=24,
        index_head_dim=128, index_topk=64, moe_intermediate_size=96, n_routed_experts=6, num_experts_per_tok=3,
        num_hash_layers=2, routed_scaling_factor=2.0, swiglu_limit=2.5, rope_theta=50000.0,
        rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=128, beta_fast=32.0, beta_slow=1.0),
        max_position_embeddings=1024, compress_ratios=(128, 4, 0, 128),
    )
    return {"short": RandomConfig(short, seed=4, tokens=144), "wide": RandomConfig(wide, seed=1, tokens=400)}


def weights_sha256(checkpoint: Checkpoint) -> str:
    """Digest over every tensor's bytes: a golden is only good for exactly these weights."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.names):
        digest.update(name.encode())
        for chunk in checkpoint.stream(name):
            digest.update(chunk)
    return digest.hexdigest()


def write_goldens(folder: Path) -> None:
    """Recompute tests/golden/hf-*.npz with transformers; ``folder`` takes the checkpoints.

    Run: PYTHONPATH=.:tests python -c "import pathlib, hf_support; hf_support.write_goldens(pathlib.Path('NEW'))"
    """
    from exporter.reference import CheckpointWeights

    for name, case in random_configs().items():
        checkpoint = write_official(folder / name, case.config, case.seed)
        logits = hf_logits(hf_model(CheckpointWeights(checkpoint), case.config), case.ids)
        np.savez_compressed(
            GOLDEN / f"hf-{name}.npz", ids=np.array(case.ids, np.int64), logits=logits[-LAST_ROWS:],
            weights_sha256=np.array(weights_sha256(checkpoint)),
        )


def write_official(path: Path, config: ModelConfig, seed: int) -> Checkpoint:
    """A random checkpoint in the official layout, opened."""
    write_random(path, config, seed)
    return Checkpoint.open(path)


def golden(name: str) -> dict[str, np.ndarray]:
    """tests/golden/hf-NAME.npz: ids [n] i64, transformers' logits f32 [16, vocab] of the last rows, weights_sha256."""
    with np.load(GOLDEN / f"hf-{name}.npz") as stored:
        return {key: stored[key] for key in stored.files}


def load_hf_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A folder with transformers' config and module names → our config and official names with f32 arrays."""
    raw = json.loads((path / "config.json").read_text())
    config = _config_of(raw)
    found: dict[str, np.ndarray] = {}
    for info in read_header(path / "model.safetensors"):
        with info.file.open("rb") as handle:
            handle.seek(info.offset)
            bits = np.frombuffer(handle.read(info.size_bytes), NUMPY_DTYPES[info.dtype]).reshape(info.shape)
        found[info.name] = codec.bf16_decode(bits) if info.dtype == "BF16" else bits.copy()
    return config, official_arrays(found, config)


def official_arrays(found: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Arrays under transformers' module names → official names (fused experts split)."""
    names = [n for n, (_, dtype) in expected_tensors(config).items() if dtype != "F8_E8M0"]
    return {name: _hf_value(found, name, config) for name in names}


def hf_arrays(weights: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Official names → transformers' module names (experts fused: w1 above w3)."""
    found: dict[str, np.ndarray] = {}
    for name, (_, dtype) in expected_tensors(config).items():
        if dtype != "F8_E8M0" and not _EXPERT.search(name):
            found[_hf_name(name)] = weights[name]
    for layer in range(config.num_hidden_layers):
        experts = [f"layers.{layer}.ffn.experts.{e}" for e in range(config.n_routed_experts)]
        both = [np.concatenate([weights[f"{e}.w1.weight"], weights[f"{e}.w3.weight"]]) for e in experts]
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.stack(both)
        down = [weights[f"{e}.w2.weight"] for e in experts]
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = np.stack(down)
    return found


def hf_model(weights: Mapping[str, Any], config: ModelConfig) -> Any:
    """transformers' model in fp32 on CPU with these weights; every module tensor must be filled."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    model = DeepseekV4ForCausalLM(DeepseekV4Config(**hf_config(config))).to(torch.float32).eval()
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in hf_arrays(weights, config).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all("rotary" in name for name in missing), missing
    return model


def hf_logits(model: Any, ids: list[int]) -> np.ndarray:
    """Logits f32 [n, vocab] of one prefill."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=True).logits[0].float().numpy()


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of DeepseekV4Config; explicit about everything that it would guess."""
    ratios = config.compress_ratios
    heavy = [r for r in ratios if r > config.csa_ratio]
    kinds = {"S": "sliding_attention", "C": "compressed_sparse_attention", "H": "heavily_compressed_attention"}
    factor = config.qk_rope_head_dim / config.head_dim
    yarn = {**dataclasses.asdict(config.rope_scaling), "rope_type": "yarn", "attention_factor": 1.0,
            "rope_theta": config.compress_rope_theta, "partial_rotary_factor": factor}
    same = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "head_dim", "q_lora_rank",
            "o_lora_rank", "o_groups", "sliding_window", "index_n_heads", "index_head_dim", "index_topk",
            "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
            "routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps",
            "rope_theta", "compress_rope_theta", "max_position_embeddings")
    return {
        **{key: getattr(config, key) for key in same},
        "layer_types": [kinds[config.layer_kind(i)] for i in range(config.num_hidden_layers)],
        "mlp_layer_types": ["hash_moe" if i < config.num_hash_layers else "moe"
                            for i in range(config.num_hidden_layers)],
        "compress_rates": {kinds["C"]: config.csa_ratio, kinds["H"]: heavy[0] if heavy else 128},
        "partial_rotary_factor": factor, "num_nextn_predict_layers": 0,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": factor},
            "compress": yarn,
        },
    }


def _config_of(raw: Mapping[str, Any]) -> ModelConfig:
    """Our config from transformers' config.json."""
    rates = {**raw["compress_rates"], "sliding_attention": 0}
    yarn = raw["rope_parameters"]["compress"]
    scaling = {f.name: yarn[f.name] for f in dataclasses.fields(RopeScaling)}
    values = {f.name: raw[f.name] for f in dataclasses.fields(ModelConfig) if f.name in raw}
    values |= {
        "num_hash_layers": raw["mlp_layer_types"].count("hash_moe"), "rope_scaling": RopeScaling(**scaling),
        "compress_ratios": tuple(rates[kind] for kind in raw["layer_types"]),
    }
    return ModelConfig(**values)


def _hf_name(official: str) -> str:
    if official in _TOP_NAMES:
        return _TOP_NAMES[official]
    _, layer, rest = official.split(".", 2)
    return f"model.layers.{layer}.{_LAYER_NAMES[rest]}"


def _hf_value(found: Mapping[str, np.ndarray], official: str, config: ModelConfig) -> np.ndarray:
    expert = _EXPERT.search(official)
    if expert is None:
        return found[_hf_name(official)]
    number, part = int(expert[1]), expert[2]
    prefix = f"model.layers.{official.split('.')[1]}.mlp.experts"
    if part == "w2":
        return found[f"{prefix}.down_proj"][number]
    half = config.moe_intermediate_size
    both = found[f"{prefix}.gate_up_proj"][number]
    return np.ascontiguousarray(both[:half] if part == "w1" else both[half:])
