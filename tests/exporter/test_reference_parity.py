"""P1: the reference in fp32 against transformers and the official code, in any chunking."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_support  # noqa: E402
import parity_support as parity  # noqa: E402

from exporter.reference import CheckpointWeights, Reference, Trace  # noqa: E402

pytestmark = pytest.mark.torch

CHUNKINGS = {"one shot": (1 << 20,), "token by token": (1,), "ragged": parity.RAGGED}


@pytest.fixture(scope="module", params=sorted(hf_support.random_configs()))
def random_case(request, tmp_path_factory):
    return parity.transformers_case(request.param, tmp_path_factory.mktemp("official") / request.param)


@pytest.mark.parametrize("prompt", ["s200", "s37", "s16"])
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_tiny_a(prompt, chunking):
    assert parity.check_p1(parity.tiny_a(prompt), CHUNKINGS[chunking]) > 0  # 0 would mean that nothing was compared


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_tiny_q_on_dequantised_weights(chunking):
    assert parity.check_p1(parity.tiny_q(), CHUNKINGS[chunking]) > 0


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_transformers_on_random_configs(random_case, chunking):
    sizes, n = CHUNKINGS[chunking], len(random_case.ids)
    if chunking == "token by token" and n > 200:  # the last 80 one by one: past top-k, across the third HCA entry
        sizes = (n - 80, *[1] * 80)
    assert parity.check_p1(random_case, sizes) > 0


def test_random_configs_exercise_selection_without_near_ties(random_case):
    config, trace = random_case.config, Trace()
    parity.check_p1(random_case, CHUNKINGS["one shot"], trace)
    heavy = [r for r in config.compress_ratios if r > config.csa_ratio]
    assert len(random_case.ids) >= 4 * config.index_topk + 64
    assert len(random_case.ids) // max(heavy) >= 3
    assert config.index_n_heads >= 16
    assert trace.topk_margins
    assert all(len(call) > 0 for calls in trace.topk_margins.values() for call in calls)
    assert hf_support.MIN_MARGIN < trace.min_topk_margin < float("inf")
    assert hf_support.MIN_MARGIN < trace.min_router_margin < float("inf")


def test_margins_of_tiny_a_are_the_recorded_ones():
    case, trace = parity.tiny_a("s200"), Trace()
    parity.check_p1(case, CHUNKINGS["one shot"], trace)
    with np.load(hf_support.GOLDEN / "tiny-a/golden.npz") as golden:
        assert trace.min_topk_margin == pytest.approx(float(golden["min_margin_topk"]), abs=2e-5)
        assert trace.min_router_margin == pytest.approx(float(golden["min_margin_router"]), abs=2e-6)


def test_streams_of_tiny_a_block_by_block():
    case, trace = parity.tiny_a("s200"), Trace()
    parity.check_p1(case, CHUNKINGS["one shot"], trace)
    with np.load(hf_support.GOLDEN / "tiny-a/golden.npz") as golden:
        streams, final = golden["s200_streams_last8"], golden["s200_final_norm_last8"]
    for layer in range(case.config.num_hidden_layers):
        assert np.abs(trace.block_inputs[layer][0][-8:].numpy() - streams[layer]).max() <= parity.P1_LIMIT, layer
    assert np.abs(trace.final_norm[0][-8:].numpy() - final).max() <= parity.P1_LIMIT


def test_committed_goldens_are_what_transformers_computes(random_case):
    golden = hf_support.golden(random_case.name.removeprefix("transformers "))
    assert golden["ids"].tolist() == random_case.ids
    assert np.abs(golden["logits"] - random_case.logits[-hf_support.LAST_ROWS :]).max() <= 1e-5


def test_transformers_reads_the_official_checkpoint_from_disk(tmp_path):
    """No naming map of ours in between: transformers' own loader on the files our writer made."""
    from transformers import DeepseekV4ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    case = hf_support.random_configs()["wide"]
    checkpoint = hf_support.write_official(tmp_path / "wide", case.config, case.seed)
    model, report = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "wide", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    logits = hf_support.hf_logits(model.float(), case.ids)  # dequantised to bf16, which holds every value exactly
    reference = Reference(CheckpointWeights(checkpoint), case.config)
    assert np.abs(reference.forward(case.ids, reference.new_state()).numpy() - logits).max() <= parity.P1_LIMIT
