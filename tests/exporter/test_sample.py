"""Sample checkpoints: official layout, equal bytes for equal seeds, a tokenizer that the library loads."""

import argparse
import dataclasses
import json
import tracemalloc

import hf_support
import numpy as np
import pytest

from appliance.errors import UsageError
from appliance.model import state_tensors
from exporter import codec, inventory, sample, sample_tokenizer
from exporter.checkpoint import Checkpoint
from exporter.presets import KV_TRUE, SLICE, TINY, V4_FLASH


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "tiny"
    sample.write_sample(folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny):
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_layout(tiny):
    checkpoint = Checkpoint.open(tiny)
    inventory.check(checkpoint)
    assert set(checkpoint.names) == set(inventory.expected_tensors(TINY, mtp=1))
    names = {path.name for path in tiny.iterdir() if path.suffix == ".json"}
    assert names == {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
                     "tokenizer_config.json"}
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(checkpoint.info(n).size_bytes for n in checkpoint.names)
    assert checkpoint.config == TINY
    assert checkpoint.raw_config["num_nextn_predict_layers"] == 1
    assert json.loads((tiny / "generation_config.json").read_text())["do_sample"] is True


def test_tiny_has_every_kind_and_both_routers():
    kinds = {TINY.layer_kind(layer) for layer in range(TINY.num_hidden_layers)}
    assert kinds == {"S", "C", "H"}
    assert 0 < TINY.num_hash_layers < TINY.num_hidden_layers
    assert TINY.index_topk <= 16 <= TINY.index_n_heads
    assert (TINY.head_dim - TINY.qk_rope_head_dim) % 64 == 0


def test_equal_seeds_give_equal_bytes(tiny, tmp_path):
    sample.write_sample(tmp_path / "again", "tiny", seed=0)
    sample.write_sample(tmp_path / "other", "tiny", seed=1)
    first, other = files(tiny), files(tmp_path / "other")
    assert files(tmp_path / "again") == first
    assert set(other) == set(first)
    assert all(other[name] != first[name] for name in first if name.endswith(".safetensors"))


def test_folder_must_be_empty(tiny, tmp_path):
    with pytest.raises(UsageError, match="tiny is not empty; name a new folder"):
        sample.write_sample(tiny, "tiny")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file is not empty"):
        sample.write_sample(tmp_path / "file", "tiny")
    with pytest.raises(UsageError, match="preset 'huge' is unknown; choose tiny, kv-true, slice"):
        sample.write_sample(tmp_path / "new", "huge")
    assert not (tmp_path / "new").exists()


def test_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    sample.add_command(parser.add_subparsers())
    args = parser.parse_args(["sample", str(tmp_path / "out"), "--preset", "tiny", "--seed", "3"])
    assert args.func(args) == 0
    assert "preset tiny, 7 layers, 4136586 tensor bytes" in capsys.readouterr().out
    assert Checkpoint.open(tmp_path / "out").config == TINY


def test_kv_true_has_the_real_cache_bytes():
    """Design: 899,648 bytes per 256-token block of the real model."""
    states = state_tensors(KV_TRUE, "kv-v4")
    assert sum(s.rows * s.row_bytes for s in states if s.paged) == 899_648
    assert {s.row_bytes for s in states if s.kind in ("win", "ent")} == {584}


def test_slice_has_the_real_widths_and_one_layer_of_each_kind():
    assert [SLICE.layer_kind(layer) for layer in range(3)] == ["S", "C", "H"]
    found, real = inventory.expected_tensors(SLICE), inventory.expected_tensors(V4_FLASH)
    for layer, twin in ((0, 0), (1, 4), (2, 3)):
        part = {n.removeprefix(f"layers.{layer}."): e for n, e in found.items() if n.startswith(f"layers.{layer}.")}
        for name, entry in part.items():
            if not name.startswith("ffn.gate."):  # its rows are the experts or the vocabulary
                assert real[f"layers.{twin}.{name}"] == entry
    assert inventory.size_bytes(found) == 3_080_504_604


def test_experts_of_a_preset_can_be_replaced(tmp_path, capsys):
    sample.write_sample(tmp_path / "three", "tiny", experts=3)
    config = Checkpoint.open(tmp_path / "three").config
    assert config == dataclasses.replace(TINY, n_routed_experts=3)
    with pytest.raises(UsageError, match=r"--experts 1: expected 2 \(experts per token\) to 256"):
        sample.write_sample(tmp_path / "one", "tiny", experts=1)
    with pytest.raises(UsageError, match="--experts 257"):
        sample.write_sample(tmp_path / "many", "tiny", experts=257)


def test_one_tensor_in_memory_at_a_time(tmp_path):
    config = dataclasses.replace(TINY, n_routed_experts=16, hidden_size=256, moe_intermediate_size=256)
    largest = max(inventory.size_bytes({n: e}) for n, e in inventory.expected_tensors(config).items())
    sample_tokenizer.build(config.vocab_size)
    tracemalloc.start()
    try:
        total = sample.write_random(tmp_path / "out", config)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 40 * largest
    assert peak < 20 * largest + (4 << 20)  # f32 copies of one tensor while it is drawn; names and header


def test_large_tensors_are_drawn_from_the_same_distribution():
    weights = sample.RandomWeights(SLICE, 0)
    small, large = (weights.tensor("layers.1.attn.wq_a.weight", s, "F8_E4M3") for s in ((512, 512), (1100, 1024)))
    spread = [codec.e4m3_decode(codes).std() for codes in (small, large)]
    assert abs(spread[0] / spread[1] - 1) < 0.02
    small, large = (weights.tensor("layers.1.ffn.experts.0.w1.weight", s, "I8") for s in ((512, 512), (2048, 1024)))
    values = [codec.e2m1_decode(codec.fp4_unpack(packed)) for packed in (small, large)]
    assert abs(values[0].std() / values[1].std() - 1) < 0.06  # 16 quantiles have shorter tails
    assert abs(values[1].mean()) < 0.01
    assert abs(np.corrcoef(values[1][:, 0::2].ravel(), values[1][:, 1::2].ravel())[0, 1]) < 0.01


@pytest.mark.slow
def test_slice_is_complete(tmp_path):
    assert sample.write_sample(tmp_path / "slice", "slice") == 3_080_504_604
    inventory.check(Checkpoint.open(tmp_path / "slice"))


@pytest.mark.slow
def test_kv_true_is_complete(tmp_path):
    assert sample.write_sample(tmp_path / "kv-true", "kv-true") == 141_489_528
    inventory.check(Checkpoint.open(tmp_path / "kv-true"))


def test_scales_and_codes_use_their_range(tiny):
    checkpoint = Checkpoint.open(tiny)
    scale = checkpoint.read("layers.3.ffn.experts.0.w1.scale")
    assert len(np.unique(scale)) == 2
    assert len(np.unique(checkpoint.read("layers.3.ffn.experts.0.w1.weight") & 15)) >= 14
    weight = checkpoint.float32("layers.3.attn.wo_b.weight")
    assert 0.5 <= weight.std() * weight.shape[1] ** 0.5 <= 2


def test_hash_experts_are_distinct(tiny):
    table = Checkpoint.open(tiny).read("layers.0.ffn.gate.tid2eid")
    assert table.shape == (768, 2)
    assert (table[:, 0] != table[:, 1]).all()
    assert set(np.unique(table)) == set(range(8))


@pytest.mark.parametrize("text", ["Hello, world 2026!", "日本語 text", "tabs\tand\nlines", "\x00\x7f é", ""])
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(2 <= token < 768 - len(sample_tokenizer.CONTROL_TOKENS) for token in ids)


def test_control_tokens(tokenizer, tiny):
    assert tokenizer.get_vocab_size() == 768
    assert tokenizer.token_to_id(sample_tokenizer.BOS) == 0
    assert tokenizer.token_to_id(sample_tokenizer.EOS) == 1
    first = 768 - len(sample_tokenizer.CONTROL_TOKENS)
    for number, (literal, special) in enumerate(sample_tokenizer.CONTROL_TOKENS):
        assert tokenizer.encode(literal).ids == [first + number], literal
        assert (tokenizer.decode([first + number]) == "") == special
    raw = json.loads((tiny / "tokenizer.json").read_text())
    assert {t["content"]: t["special"] for t in raw["added_tokens"]}["｜DSML｜"] is False
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == (sample_tokenizer.BOS, sample_tokenizer.EOS)
    assert config["add_bos_token"] is False


def test_wrap_of_a_trained_bpe():
    tokens = [*sample_tokenizer.byte_alphabet(), "th", "the"]
    raw = sample_tokenizer.wrap({t: 10 * i for i, t in enumerate(tokens)}, [("t", "h"), ("th", "e")], 300)
    vocab = raw["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(300))
    assert vocab["the"] == 2 + 257
    assert vocab["<｜place▁holder▁no▁0｜>"] == 2 + 258
    with pytest.raises(UsageError, match="vocab_size 270: room for 251 text tokens, not 258"):
        sample_tokenizer.wrap({t: i for i, t in enumerate(tokens)}, [], 270)


def test_byte_alphabet():
    letters = sample_tokenizer.byte_alphabet()
    assert len(set(letters)) == 256
    assert (letters[0x41], letters[0x20], letters[0x0A], letters[0xAD]) == ("A", "Ġ", "Ċ", "Ń")


@pytest.mark.parametrize("name", sorted(hf_support.random_configs()))
def test_weights_of_the_committed_goldens(name, tmp_path):
    """The goldens hold for exactly these bytes; if a numpy release draws others, they must be made anew."""
    case = hf_support.random_configs()[name]
    checkpoint = hf_support.write_official(tmp_path / name, case.config, case.seed)
    golden = hf_support.golden(name)
    assert hf_support.weights_sha256(checkpoint) == str(golden["weights_sha256"])
    assert golden["ids"].tolist() == case.ids
    assert golden["logits"].shape == (hf_support.LAST_ROWS, case.config.vocab_size)
