"""The committed trained checkpoint: official format, small, complete, with V4's control tokens and all layer kinds."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from exporter import inventory, sample_tokenizer
from exporter.checkpoint import Checkpoint

FOLDER = Path(__file__).resolve().parents[2] / "packaging" / "sample-model"
CHECKPOINT = FOLDER / "checkpoint"
MAX_BYTES = 12 << 20


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def test_size_and_files() -> None:
    files = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert sum(files.values()) <= MAX_BYTES
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= files.keys()


def test_holds_exactly_the_official_tensors(checkpoint: Checkpoint) -> None:
    inventory.check(checkpoint)
    expected = inventory.expected_tensors(checkpoint.config)
    assert set(checkpoint.names) == set(expected)
    stored = {checkpoint.info(name).dtype for name in checkpoint.names}
    assert stored == {"BF16", "F32", "F8_E4M3", "F8_E8M0", "I8", "I64"}


def test_every_weight_is_finite(checkpoint: Checkpoint) -> None:
    floats = [n for n in checkpoint.names if checkpoint.info(n).dtype not in ("I64", "F8_E8M0")]
    bad = [name for name in floats if not np.isfinite(checkpoint.float32(name)).all()]
    assert bad == []


def test_shape_of_the_model(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    kinds = {config.layer_kind(layer) for layer in range(config.num_hidden_layers)}
    assert kinds == {"S", "C", "H"}
    assert 1 <= config.num_hash_layers < config.num_hidden_layers
    assert config.n_routed_experts == 16
    assert config.hidden_size % 128 == 0
    assert (config.head_dim - 64) % 64 == 0


def test_parameters_are_three_to_five_million(checkpoint: Checkpoint) -> None:
    packed = {"I8": 2, "F8_E8M0": 0, "I64": 0}
    count = sum(
        int(np.prod(info.shape)) * packed.get(info.dtype, 1)
        for info in map(checkpoint.info, checkpoint.names)
    )
    assert 3_000_000 <= count <= 5_000_000


def test_hash_router_is_filled_and_balanced(checkpoint: Checkpoint) -> None:
    table = checkpoint.read("layers.0.ffn.gate.tid2eid")
    config = checkpoint.config
    assert table.shape == (config.vocab_size, config.num_experts_per_tok)
    assert all(len(set(row)) == config.num_experts_per_tok for row in table.tolist())
    load = np.bincount(table.ravel(), minlength=config.n_routed_experts)
    assert load.min() > 0.5 * load.mean()


def test_learned_routers_have_a_trained_bias(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    learned = range(config.num_hash_layers, config.num_hidden_layers)
    biases = [checkpoint.float32(f"layers.{layer}.ffn.gate.bias") for layer in learned]
    assert all(np.abs(bias).max() > 0 for bias in biases)


def test_control_tokens_are_one_id_each(tokenizer: Tokenizer) -> None:
    literals = [sample_tokenizer.BOS, sample_tokenizer.EOS, *(token for token, _ in sample_tokenizer.CONTROL_TOKENS)]
    ids = [tokenizer.encode(literal, add_special_tokens=False).ids for literal in literals]
    assert all(len(found) == 1 for found in ids)
    assert [found[0] for found in ids[:2]] == [0, 1]


def test_tokenizer_fits_the_model_and_keeps_text(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    text = "Run `solocard install DIR`.\n\n    def f(x):\n\treturn x  # naïve – 12345\n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert max(ids) < checkpoint.config.vocab_size == tokenizer.get_vocab_size()
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_manual_keeps_unseen_wordings_apart() -> None:
    facts = [json.loads(line) for line in (FOLDER / "manual_qa.jsonl").read_text("utf-8").splitlines()]
    seen = {question for fact in facts for question in fact["questions"]}
    unseen = [question for fact in facts for question in fact["unseen"]]
    assert len(facts) >= 100
    assert len(unseen) == len(set(unseen))
    assert not seen & set(unseen)
    assert all(fact["command"] in fact["answer"] for fact in facts)
