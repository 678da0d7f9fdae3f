"""config.json: what is read, what is refused, and that what we write is read back."""

import json
from pathlib import Path

import pytest

from appliance.errors import CheckpointError
from exporter import spec
from exporter.presets import KV_TRUE, PRESETS, TINY, V4_FLASH

TINY_Q = Path(__file__).parents[1] / "golden/tiny-q/config.json"


def changed(**fields):
    raw = spec.config_json(TINY)
    for field, value in fields.items():
        if value is None:
            raw.pop(field)
        else:
            raw[field] = value
    return raw


@pytest.mark.parametrize("config", [V4_FLASH, KV_TRUE, TINY])
def test_written_config_is_read_back(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(spec.config_json(config)))
    assert spec.read_config(tmp_path / "config.json") == config


def test_official_file_with_the_mtp_ratio_cut_off():
    config = spec.read_config(TINY_Q)
    assert config.compress_ratios == (0, 0, 4, 128, 4, 128)
    assert (config.hidden_size, config.index_n_heads, config.swiglu_limit) == (256, 8, 1.0)
    assert [config.layer_kind(layer) for layer in range(6)] == list("SSCHCH")


def test_refresh_lists_more_ratios_and_expert_dtype_may_be_absent():
    raw = changed(compress_ratios=[*TINY.compress_ratios, 0, 0, 0], expert_dtype=None, quantization_config=None)
    assert spec.parse_config(raw, "config.json") == TINY


def test_real_schedule():
    assert len(V4_FLASH.compress_ratios) == 43
    kinds = [V4_FLASH.layer_kind(layer) for layer in range(43)]
    assert (kinds.count("S"), kinds.count("C"), kinds.count("H")) == (2, 21, 20)
    assert KV_TRUE.compress_ratios == V4_FLASH.compress_ratios
    assert set(PRESETS) == {"tiny", "kv-true", "slice"}


REFUSED = [
    ({"model_type": "deepseek_v41"}, "model_type: found 'deepseek_v41', expected 'deepseek_v4'"),
    ({"model_type": "DeepseekV4"}, "model_type: found 'DeepseekV4'"),
    ({"model_type": None}, "model_type: found nothing"),
    ({"compress_ratios": None}, "compress_ratios: found nothing, expected a list of at least num_hidden_layers = 7"),
    ({"compress_ratios": [0, 4]}, "compress_ratios: found '2 entries'"),
    ({"compress_ratios": [0, 0, 4, 24, 4, 16, 0]}, r"compress_ratios\[3\]: found 24"),
    ({"compress_ratios": [0, 0, 2, 16, 4, 16, 0]}, r"compress_ratios\[2\]: found 2"),
    ({"compress_ratios": [0, 0, True, 16, 4, 16, 0]}, r"compress_ratios\[2\]: found True"),
    ({"rope_scaling": None}, "rope_scaling: found nothing"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type: found 'linear'"),
    ({"rope_scaling": {"type": "yarn", "factor": 16}}, "rope_scaling: original_max_position_embeddings: found nothing"),
    ({"sliding_window": 96}, "sliding_window: found 96, expected a divisor of 256"),
    ({"hidden_size": 100}, "hidden_size: found 100, expected a multiple of 32"),
    ({"moe_intermediate_size": 40}, "moe_intermediate_size: found 40"),
    ({"o_groups": 3}, "o_groups: found 3"),
    ({"qk_rope_head_dim": 128}, "qk_rope_head_dim: found 128"),
    ({"index_head_dim": 96}, "index_head_dim: found 96, expected a power of two"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok: found 9, expected at most n_routed_experts = 8"),
    ({"num_hash_layers": 8}, "num_hash_layers: found 8"),
    ({"eos_token_id": 9999}, "eos_token_id: found 9999"),
    ({"vocab_size": "768"}, "vocab_size: found '768', expected an integer"),
    ({"hidden_size": 1 << 40}, "hidden_size: found 1099511627776"),
    ({"head_dim": 0}, "head_dim: found 0"),
    ({"hc_eps": 0}, "hc_eps: found 0, expected a number above 0"),
    ({"rms_norm_eps": True}, "rms_norm_eps: found True"),
    ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
    ({"n_shared_experts": 2}, "n_shared_experts: found 2, expected 1"),
    ({"scoring_func": "sigmoid"}, "scoring_func: found 'sigmoid'"),
    ({"quantization_config": {"weight_block_size": [32, 32]}}, r"quantization_config.weight_block_size: found \[32,"),
    ({"quantization_config": {"fmt": "e5m2"}}, "quantization_config.fmt: found 'e5m2'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused(fields, message):
    with pytest.raises(CheckpointError, match=f"^folder/config.json: {message}") as failure:
        spec.parse_config(changed(**fields), "folder/config.json")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not JSON"), ("[]", "found a list, expected a JSON object"), (" " * (1 << 20) + "{}", "1048578 bytes"),
])
def test_not_a_config_file(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        spec.read_config(path)


def test_no_config_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        spec.read_config(tmp_path / "config.json")
