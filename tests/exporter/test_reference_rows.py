"""What the reference commits: row bytes, the same in any chunking, and errors for ids it cannot embed."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import parity_support as parity  # noqa: E402

from appliance.errors import EngineError  # noqa: E402
from appliance.model import attention_row_width, index_row_width  # noqa: E402
from exporter import codec  # noqa: E402
from exporter.checkpoint import Checkpoint  # noqa: E402
from exporter.presets import TINY  # noqa: E402
from exporter.reference import Reference, Trace  # noqa: E402
from exporter.sample import write_random, write_sample  # noqa: E402

pytestmark = pytest.mark.torch

IDS = np.random.default_rng(0).integers(0, TINY.vocab_size, 100).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "tiny"
    write_sample(folder, "tiny")
    return Checkpoint.open(folder)


def run(reference, sizes, trace=None, **state_options):
    state = reference.new_state(**state_options)
    rows = [reference.forward(piece, state, trace=trace) for piece in parity.chunks(IDS, sizes)]
    return torch.cat(rows), state


def test_row_shapes_and_window(checkpoint):
    reference = Reference.from_checkpoint(checkpoint, kv_sim=True)
    _, state = run(reference, (64,))
    row, irow = attention_row_width(TINY, "kv-v4"), index_row_width(TINY, "kv-v4")
    assert state.tokens == 100
    assert state.rows(0, "win").shape == (TINY.sliding_window, row)
    assert state.rows(2, "ent").shape == (25, row)
    assert state.rows(2, "ient").shape == (25, irow)
    assert state.rows(3, "ent").shape == (6, row)
    assert state.rows(0, "win").dtype == np.uint8
    _, everything = run(reference, (64,), keep_all=True)
    assert everything.rows(0, "win").shape == (100, row)
    assert np.array_equal(everything.rows(0, "win")[-TINY.sliding_window :], state.rows(0, "win"))
    with pytest.raises(EngineError, match="layer 0 has no ent rows"):
        state.rows(0, "ent")


def test_rows_are_the_numpy_codecs_bytes(checkpoint):
    """kv_sim reads what it stored: values are the unpacked bytes, and packing f32 rows gives the same bytes."""
    _, state = run(Reference.from_checkpoint(checkpoint, kv_sim=True), (100,), keep_all=True)
    window = state.layers[1].window
    unpacked = codec.attention_row_unpack(state.rows(1, "win"), TINY.head_dim, TINY.qk_rope_head_dim)
    assert np.array_equal(window.values.numpy(), unpacked)
    _, plain = run(Reference.from_checkpoint(checkpoint), (100,), keep_all=True)
    assert np.array_equal(codec.attention_row_pack(plain.rows(0, "win"), TINY.qk_rope_head_dim), state.rows(0, "win"))


@pytest.mark.parametrize(("ratio", "kinds"), [(0, ["win"]), (4, ["win", "ent", "ient"]), (16, ["win", "ent"])])
def test_chunking_does_not_change_rows(tmp_path, ratio, kinds):
    """One layer of each kind: deeper, one code that rounds the other way moves everything after it."""
    config = dataclasses.replace(TINY, num_hidden_layers=1, num_hash_layers=0, compress_ratios=(ratio,))
    write_random(tmp_path / "one", config, mtp=0)
    reference = Reference.from_checkpoint(Checkpoint.open(tmp_path / "one"), kv_sim=True)
    logits, state = run(reference, (100,), keep_all=True)
    for sizes in ((1,), parity.RAGGED, (16,)):
        other_logits, other = run(reference, sizes, keep_all=True)
        for kind in kinds:
            assert (state.rows(0, kind) == other.rows(0, kind)).mean() >= 0.999, (sizes, kind)
        assert (logits - other_logits).abs().mean() < 1e-3


def test_selection_and_window_are_real(checkpoint):
    """Top-k leaves entries out, and what a query may not see does not change its logits."""
    reference, trace = Reference.from_checkpoint(checkpoint), Trace()
    logits, _ = run(reference, (100,), trace)
    last = trace.selected[2][0][-1]
    assert (last >= 0).sum() == TINY.index_topk < 25
    assert trace.selected[2][0][6].tolist()[:2] == [0, -1]  # token 6 sees the entry of tokens 0–3 only
    changed = [*IDS[:80], 5, *IDS[81:]]
    other = reference.forward(changed, reference.new_state())
    assert (other[:80] - logits[:80]).abs().max() < 1e-4
    assert (other[80] - logits[80]).abs().max() > 0.1


@pytest.mark.parametrize("ids", [[], [-1], [TINY.vocab_size]])
def test_ids_outside_the_vocabulary(checkpoint, ids):
    reference = Reference.from_checkpoint(checkpoint)
    with pytest.raises(EngineError, match="token ids must be 0 to 767"):
        reference.forward(ids, reference.new_state())
