"""config.json of an official DeepSeek-V4-Flash checkpoint: read into a ModelConfig, or written from one.

Only what the maths needs is kept; everything that would change the maths is checked and refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appliance.errors import CheckpointError
from appliance.model import BLOCK_TOKENS, ModelConfig, RopeScaling
from exporter.json_file import read_object

MODEL_TYPE = "deepseek_v4"
ARCHITECTURE = "DeepseekV4ForCausalLM"
MAX_CONFIG_BYTES = 1 << 20
MAX_FIELD = 1 << 31  # no length or count of a real model comes near it
WEIGHT_BLOCK = 128  # rows and columns of one FP8 scale

# Keys with one accepted value: another value is another model. Absent keys mean that value.
_FIXED: dict[str, object] = {
    "hidden_act": "silu", "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "num_key_value_heads": 1, "attention_bias": False, "tie_word_embeddings": False, "n_shared_experts": 1,
}
_FLOATS = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta")
_NOT_PLAIN = (*_FLOATS, "rope_scaling", "compress_ratios")
_MAY_BE_ZERO = ("num_hash_layers", "bos_token_id", "eos_token_id")
_INTS = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name not in _NOT_PLAIN)


def read_config(path: Path) -> ModelConfig:
    """Read and check an official config.json. Raises CheckpointError naming file, field, found and expected."""
    return parse_config(read_raw(path), str(path))


def read_raw(path: Path) -> dict[str, Any]:
    """config.json as a dict, at most 1 MiB. Raises CheckpointError naming the file."""
    return read_object(path, MAX_CONFIG_BYTES, absent="give a checkpoint folder", damaged="copy the checkpoint again")


def parse_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Check the fields of a config.json. ``source`` is named in CheckpointError."""
    if raw.get("model_type") != MODEL_TYPE:
        raise _wrong(source, "model_type", raw.get("model_type"), f"{MODEL_TYPE!r} (V4.1 and others are other models)")
    for field, expected in _FIXED.items():
        if raw.get(field, expected) != expected:
            raise _wrong(source, field, raw[field], repr(expected))
    _check_quantization(raw, source)
    values: dict[str, Any] = {field: _int(raw, field, source) for field in _INTS}
    values |= {field: _float(raw, field, source) for field in _FLOATS}
    values["rope_scaling"] = _rope_scaling(raw, source)
    values["compress_ratios"] = _ratios(raw, values["num_hidden_layers"], source)
    config = ModelConfig(**values)
    _check_shapes(config, source)
    return config


def config_json(config: ModelConfig, *, mtp_layers: int = 1) -> dict[str, Any]:
    """An official config.json for ``config``: read_config gives it back. ``mtp_layers`` MTP blocks follow."""
    values = dataclasses.asdict(config)
    scaling = values.pop("rope_scaling")
    return {
        "architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "attention_dropout": 0.0,
        **_FIXED, **values,
        "rope_scaling": {"type": "yarn", **scaling},
        "compress_ratios": [*config.compress_ratios, *([0] * mtp_layers)],
        "num_nextn_predict_layers": mtp_layers, "initializer_range": 0.02,
        "expert_dtype": "fp4", "torch_dtype": "bfloat16", "use_cache": True,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
            "weight_block_size": [WEIGHT_BLOCK, WEIGHT_BLOCK],
        },
    }


def _wrong(source: str, field: str, found: object, expected: str) -> CheckpointError:
    shown = "nothing" if found is None else repr(found)
    return CheckpointError(f"{source}: {field}: found {shown[:80]}, expected {expected}")


def _int(raw: Mapping[str, Any], field: str, source: str) -> int:
    value, least = raw.get(field), 0 if field in _MAY_BE_ZERO else 1
    if type(value) is not int or not least <= value < MAX_FIELD:
        raise _wrong(source, field, value, f"an integer from {least} to {MAX_FIELD - 1}")
    return value


def _float(raw: Mapping[str, Any], field: str, source: str) -> float:
    value = raw.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < float(value) < 1e12:
        raise _wrong(source, field, value, "a number above 0")
    return float(value)


def _rope_scaling(raw: Mapping[str, Any], source: str) -> RopeScaling:
    scaling = raw.get("rope_scaling")
    if not isinstance(scaling, dict):
        raise _wrong(source, "rope_scaling", scaling, "an object {type: yarn, factor, …}")
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise _wrong(source, "rope_scaling.type", kind, "'yarn'")
    original = "original_max_position_embeddings"
    return RopeScaling(
        factor=_float(scaling, "factor", f"{source}: rope_scaling"),
        original_max_position_embeddings=_int(scaling, original, f"{source}: rope_scaling"),
        beta_fast=_float(scaling, "beta_fast", f"{source}: rope_scaling"),
        beta_slow=_float(scaling, "beta_slow", f"{source}: rope_scaling"),
    )


def _ratios(raw: Mapping[str, Any], layers: int, source: str) -> tuple[int, ...]:
    """One ratio per layer; the file lists the MTP block's (or DSpark's) after them, which is cut off."""
    ratios = raw.get("compress_ratios")
    if not isinstance(ratios, list) or len(ratios) < layers:
        found = f"{len(ratios)} entries" if isinstance(ratios, list) else ratios
        raise _wrong(source, "compress_ratios", found, f"a list of at least num_hidden_layers = {layers} ratios")
    for layer, ratio in enumerate(ratios[:layers]):
        if type(ratio) is not int or not (ratio == 0 or 4 <= ratio <= BLOCK_TOKENS) or (ratio and BLOCK_TOKENS % ratio):
            raise _wrong(source, f"compress_ratios[{layer}]", ratio, f"0, 4, or a divisor of {BLOCK_TOKENS} above 4")
    return tuple(ratios[:layers])


def _check_quantization(raw: Mapping[str, Any], source: str) -> None:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise _wrong(source, "quantization_config", quantization, "an object")
    block = [WEIGHT_BLOCK, WEIGHT_BLOCK]
    for field, expected in (("quant_method", "fp8"), ("fmt", "e4m3"), ("scale_fmt", "ue8m0"),
                            ("weight_block_size", block)):
        if quantization.get(field, expected) != expected:
            raise _wrong(source, f"quantization_config.{field}", quantization[field], repr(expected))


def _check_shapes(config: ModelConfig, source: str) -> None:
    """Divisibilities that the maths, the packed formats and the 256-token blocks need."""
    c = config
    rules: tuple[tuple[str, int, bool, str], ...] = (
        ("sliding_window", c.sliding_window, BLOCK_TOKENS % c.sliding_window == 0, f"a divisor of {BLOCK_TOKENS}"),
        ("hidden_size", c.hidden_size, c.hidden_size % 32 == 0, "a multiple of 32 (FP4 scale group)"),
        ("moe_intermediate_size", c.moe_intermediate_size, c.moe_intermediate_size % 32 == 0,
         "a multiple of 32 (FP4 scale group)"),
        ("o_groups", c.o_groups, c.num_attention_heads % c.o_groups == 0,
         f"a divisor of num_attention_heads = {c.num_attention_heads}"),
        ("qk_rope_head_dim", c.qk_rope_head_dim, c.qk_rope_head_dim % 2 == 0
         and c.qk_rope_head_dim < c.head_dim and c.qk_rope_head_dim <= c.index_head_dim,
         f"even, below head_dim = {c.head_dim}, at most index_head_dim = {c.index_head_dim}"),
        ("index_head_dim", c.index_head_dim, c.index_head_dim >= 32 and c.index_head_dim.bit_count() == 1,
         "a power of two from 32 (Hadamard)"),
        ("num_experts_per_tok", c.num_experts_per_tok, c.num_experts_per_tok <= c.n_routed_experts,
         f"at most n_routed_experts = {c.n_routed_experts}"),
        ("num_hash_layers", c.num_hash_layers, c.num_hash_layers <= c.num_hidden_layers,
         f"at most num_hidden_layers = {c.num_hidden_layers}"),
        ("num_hidden_layers", c.num_hidden_layers, c.num_hidden_layers <= 1024, "at most 1024"),
        ("n_routed_experts", c.n_routed_experts, c.n_routed_experts <= 4096, "at most 4096"),
        ("bos_token_id", c.bos_token_id, c.bos_token_id < c.vocab_size, f"below vocab_size = {c.vocab_size}"),
        ("eos_token_id", c.eos_token_id, c.eos_token_id < c.vocab_size, f"below vocab_size = {c.vocab_size}"),
    )
    for field, found, good, expected in rules:
        if not good:
            raise _wrong(source, field, found, expected)
