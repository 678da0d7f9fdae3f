"""P2, the sets: the reference with both switches picks the experts and the entries that the official QAT run picked.

The fixture holds streams, not sets. They are derived by a plain numpy block with the official roundings, fed with the
official streams: its outputs are the official ones to 0.1 %, which no other set would give. A choice is away from
ties when the last score chosen is more than two units above the first left out. The unit is what BF16 rounding does to
a score of that layer, measured on the plain block as an RMS change. Router: when all official BF16 casts before it are
left out. Index: when its scores, which are BF16 in the official code, are kept in float.
"""

import dataclasses
from collections import ChainMap
from types import SimpleNamespace

import numpy as np
import plain_v4_support as plain
import pytest

torch = pytest.importorskip("torch")

import hf_support  # noqa: E402

from exporter import codec  # noqa: E402
from exporter import reference_math as ops  # noqa: E402
from exporter.checkpoint import Checkpoint  # noqa: E402
from exporter.reference import CheckpointWeights, Reference, Trace  # noqa: E402

pytestmark = pytest.mark.torch

SAME_SETS = 0.99  # V4 spec: parity levels
CLEAR_UNITS = 2.0
PLAIN_ERROR = 1e-3  # mean |Δ| / mean |ref| of the plain block against the official streams
ROUTED = (3, 4, 5)  # layers with a learned router
INDEXED = (2, 4)
SMALL_TOPK = 8  # beside the official 32: with 40 entries at most, 32 leaves only the last 29 tokens a choice


@pytest.fixture(scope="module")
def official():
    """The official run: config, weights, streams f64 [7, n, 4, D], ids and logits."""
    checkpoint = Checkpoint.open(hf_support.GOLDEN / "tiny-q")
    with np.load(hf_support.GOLDEN / "tiny-q/golden.npz") as stored:
        bits = stored["official_bf16_qat_streams_u16"].view(np.uint16)
        ids, mtp_logits = stored["ids"], stored["official_bf16_qat_mtp_logits"]
    streams = codec.bf16_decode(bits).astype(np.float64)
    return SimpleNamespace(config=checkpoint.config, weights=CheckpointWeights(checkpoint), streams=streams, ids=ids,
                           next_ids=np.roll(ids, -1), mtp_logits=mtp_logits)


@pytest.fixture(scope="module")
def derived(official):
    """Plain models after all blocks, their scores in `seen`: exact, and with fewer casts; the exact one's outputs."""
    exact, uncast, float_scores = (
        plain.PlainModel(official.weights, official.config, **switches)
        for switches in ({}, {"bf16": False}, {"bf16_scores": False})
    )
    for model in (uncast, float_scores, exact):
        outputs = {f"layers.{i}": model.block(f"layers.{i}", i, official.streams[i], official.ids) for i in range(6)}
        outputs["mtp.0"] = model.mtp_block(official.streams[6], official.next_ids)
    return SimpleNamespace(exact=exact, other={"router": uncast, "index": float_scores}, outputs=outputs)


def relative(found, wanted):
    return float(np.abs(found - wanted).mean() / np.abs(wanted).mean())


def trace_of(official, layer, *, topk=None, weights=None):
    """What the reference chose in one layer, from the official stream."""
    config = dataclasses.replace(official.config, index_topk=topk or official.config.index_topk)
    reference = Reference(official.weights if weights is None else weights, config, act_sim=True, kv_sim=True)
    trace, state = Trace(), reference.new_state()
    streams = torch.from_numpy(official.streams[layer].astype(np.float32))
    reference.block(layer, streams, torch.from_numpy(official.ids), state.layers[layer], state, trace=trace)
    return trace


def sets_of(rows):
    return [{int(i) for i in row if i >= 0} for row in torch.cat(rows).tolist()]


def compared(derived, kind, block, count, found):
    """(share of equal sets away from ties, how many such choices there are, their share of all real choices)."""
    scores, other = (getattr(model.seen, kind)[block] for model in (derived.exact, derived.other[kind]))
    visible = np.isfinite(scores)
    unit = np.sqrt(np.square(scores[visible] - other[visible]).mean())
    wanted, distance = plain.top_sets(scores, count)
    real = np.isfinite(distance)
    clear = real & (distance > CLEAR_UNITS * unit)
    same = np.array([a == b for a, b in zip(wanted, found, strict=True)])
    print(f"{kind} of {block}, top {count}: unit {unit:.4f} (scores spread {scores[visible].std():.4f}), "
          f"{clear.sum()} of {real.sum()} choices are clear, {100 * same[clear].mean():.2f} % of them the same, "
          f"{100 * same[real].mean():.2f} % of all")
    return float(same[clear].mean()), int(clear.sum()), float(clear.sum() / real.sum())


@pytest.mark.parametrize("layer", range(6))
def test_plain_block_is_the_official_one(layer, official, derived):
    assert relative(derived.outputs[f"layers.{layer}"], official.streams[layer + 1]) <= PLAIN_ERROR


def test_plain_mtp_logits_are_the_official_ones(official, derived):
    logits = derived.exact.head(derived.outputs["mtp.0"], "mtp.0.")
    assert relative(logits, official.mtp_logits) <= PLAIN_ERROR


@pytest.mark.parametrize("layer", ROUTED)
def test_router_sets(layer, official, derived):
    k = official.config.num_experts_per_tok
    found = sets_of(trace_of(official, layer).routed[layer])
    same, count, share = compared(derived, "router", f"layers.{layer}", k, found)
    assert same >= SAME_SETS
    assert count >= 140
    assert share >= 0.9


def test_router_sets_and_logits_of_the_mtp_block(official, derived, monkeypatch):
    k, chosen, true_top_k = official.config.num_experts_per_tok, [], ops.top_k

    def seen(scores, count):
        values, ids = true_top_k(scores, count)
        chosen.append(ids[:, :k])
        return values, ids

    monkeypatch.setattr(ops, "top_k", seen)
    reference = Reference(official.weights, official.config, act_sim=True, kv_sim=True)
    streams = torch.from_numpy(official.streams[6].astype(np.float32))
    logits = reference.mtp_logits(streams, official.next_ids.tolist(), reference.new_state()).numpy()
    assert len(chosen) == 1  # no index in this block
    same, count, share = compared(derived, "router", "mtp.0", k, sets_of(chosen))
    assert same >= SAME_SETS
    assert count >= 140
    assert share >= 0.9
    assert relative(logits, official.mtp_logits) <= 0.03


@pytest.mark.parametrize("layer", INDEXED)
@pytest.mark.parametrize("topk", [32, 16, SMALL_TOPK])
def test_index_sets(layer, topk, official, derived):
    found = sets_of(trace_of(official, layer, topk=topk).selected[layer])
    same, count, share = compared(derived, "index", f"layers.{layer}", topk, found)
    assert same >= SAME_SETS
    assert count / share == pytest.approx(len(official.ids) - 4 * topk - 3)  # tokens that see more than `topk` entries
    assert share >= 0.9


def test_a_router_without_its_bias_would_show(official, derived):
    name = "layers.3.ffn.gate.bias"
    no_bias = {name: np.zeros(official.config.n_routed_experts, np.float32)}
    weights = ChainMap(no_bias, official.weights)
    found = sets_of(trace_of(official, 3, weights=weights).routed[3])
    same, *_ = compared(derived, "router", "layers.3", official.config.num_experts_per_tok, found)
    assert same < SAME_SETS


def test_an_index_without_relu_would_show(official, derived, monkeypatch):
    def linear_scores(query, keys, weights):
        return (torch.einsum("nhd,ed->nhe", query, keys) * weights[..., None]).sum(1)

    monkeypatch.setattr(ops, "index_scores", linear_scores)
    for topk in (official.config.index_topk, SMALL_TOPK):
        found = sets_of(trace_of(official, 2, topk=topk).selected[2])
        same, *_ = compared(derived, "index", "layers.2", topk, found)
        assert same < SAME_SETS
